"""Writing files and directories whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from saelens_scaffold._util.errors import UserError, one_line


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
        A temporary directory beside it, renamed on leaving, removed on an error.

    Raises:
        FileExistsError: There is something at `path` already, and replace is False.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise FileExistsError(
            f"{path} exists already; remove it or choose another path"
        )
    temporary = _beside(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if replace:
            shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write, which appears under its name, or replaces what has it, when whole.

    Args:
        path: Where the file shall be.

    Yields:
        A temporary path beside it, renamed on leaving, removed on an error.
    """
    temporary = _beside(Path(path))
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_writable(directory: Path) -> None:
    """
    Make a directory if there is none, and see that files can be written there.

    Raises:
        UserError: They cannot.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):
            pass
    except OSError as error:
        reason = error.strerror or one_line(error)
        said = f"output_path {directory} cannot be written: {reason}"
        raise UserError(said) from error


def _beside(path: Path) -> Path:
    # Beside its destination, because a rename is atomic only within one file system.
    return path.absolute().with_name(f".{path.absolute().name}.{os.getpid()}.tmp")
