"""Writing a directory whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory to fill, which appears under its name only once it is complete.

    Args:
        path: Where the directory shall be. Missing parents are made.

    Yields:
        A temporary directory beside it, renamed on leaving, removed on an error.

    Raises:
        FileExistsError: There is something at `path` already.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(
            f"{path} exists already; remove it or choose another path"
        )
    # Beside its destination, because a rename is atomic only within one file system.
    temporary = path.absolute().with_name(f".{path.absolute().name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
