"""Writing files and directories whole or not at all."""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from saelens_scaffold._util.errors import UserError, one_line

if sys.platform != "win32":
    import fcntl


@contextmanager
def new_directory(
    path: str | os.PathLike[str], replace: bool = False
) -> Iterator[Path]:
    """A directory to fill, which appears under its name only once it is complete.

    Args:
        path: Where the directory shall be. Missing parents are made.
        replace: Whether a directory that is there already makes way, once the new one
            is complete.

    Yields:
        A temporary directory, renamed on leaving, removed on an error.

    Raises:
        FileExistsError: There is something at `path` already, and replace is False.
    """
    path = Path(path).absolute()
    if os.path.lexists(path) and not replace:
        raise FileExistsError(
            f"{path} exists already; remove it or choose another path"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with workspace(path) as folder:
        directory = folder / path.name
        directory.mkdir()
        yield directory
        if replace:
            # No call of Python exchanges directories, so for a moment there is none;
            # what is in the way is put back if this ends here.
            with suppress(FileNotFoundError):
                path.rename(folder / _replaced(path))
        directory.rename(path)


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write, which appears under its name, or replaces what has it, when whole.

    Args:
        path: Where the file shall be.

    Yields:
        A temporary path, renamed on leaving, removed on an error.
    """
    path = Path(path).absolute()
    with workspace(path) as folder:
        yield folder / path.name
        (folder / path.name).replace(path)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder as of `tempfile`, but one that a killed process leaves goes with the next."""
    with workspace(Path(tempfile.gettempdir(), "saelens-scaffold")) as folder:
        yield folder


@contextmanager
def workspace(path: Path) -> Iterator[Path]:
    """
    An empty folder beside a path, of this block's own, removed in the end.

    Beside it, because a rename is atomic only within one file system. A killed process
    leaves its folder; the next block for the same path removes it, and puts back what a
    `new_directory` was about to replace. A lock, which ends with its process, tells which
    folders are in use, also by processes in other containers.
    """
    name = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.tmp")  # as mkdtemp's
    for left in filter(lambda each: name.fullmatch(each.name), path.parent.iterdir()):
        with _lock(left, wait=False) as is_free:
            if is_free:
                _remove(left, path)
    while True:
        folder = Path(tempfile.mkdtemp(".tmp", f".{path.name}.", path.parent))
        with _lock(folder, wait=True):
            if not folder.exists():  # another process took it for one that was left
                continue
            try:
                yield folder
            finally:
                _remove(folder, path)
            return


@contextmanager
def _lock(folder: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock of a folder; False if it cannot be had."""
    if sys.platform == "win32":  # where what a killed process leaves stays
        yield False
        return
    with ExitStack() as stack:
        try:
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:  # in use, gone, or on a file system without locks
            yield False
        else:
            yield True


def _remove(folder: Path, path: Path) -> None:
    """Remove the workspace of a path."""
    if not os.path.lexists(path):
        with suppress(OSError):
            (folder / _replaced(path)).rename(path)
    shutil.rmtree(folder, ignore_errors=True)


def _replaced(path: Path) -> str:
    """Name in the workspace of what a new directory takes the place of."""
    return f"{path.name}.replaced"


def is_disk_full(error: BaseException) -> bool:
    """Whether there was no room for a file."""
    # neither safetensors nor PyTorch's writer says so with an OSError, nor the latter why
    signs = "No space left|quota exceeded|inline_container|PytorchStreamWriter|iostream"
    return re.search(signs, str(error)) is not None


def make_writable(directory: Path, field: str = "output_path") -> None:
    """
    Make a directory if there is none, and see that files can be written there.

    Args:
        directory: The directory.
        field: The option that names it.

    Raises:
        UserError: They cannot.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        reason = error.strerror or one_line(error)
        said = f"{field} {directory} cannot be written: {reason}"
        raise UserError(said) from error
