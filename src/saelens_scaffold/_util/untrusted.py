"""Names and files that others made: what may become a file's name, and what is read."""

import json
import re
import stat
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from saelens_scaffold._util.errors import UserError, one_line

MAX_JSON_BYTES = 1 << 26
MAX_JSON_VALUES = 1 << 21
MAX_JSON_DEPTH = 50  # recursive functions of others read on

_MAX_NAME_BYTES = 200  # of the 255 that file systems have, some are for temporary names


def file_name(name: object) -> str:
    """
    A name from a file as the name of a file or folder, which is never a path.

    Args:
        name: The name, with its suffix.

    Raises:
        UserError: It could lead out of its folder, or no disk takes it.
    """
    is_name = (
        isinstance(name, str)
        and name.isprintable()  # no control characters, no halves of surrogate pairs
        and not set(name) & set('/\\:*?"<>|')
        and name.strip(" .") == name.lstrip(" .") != ""
        and not name.startswith((".", " "))
        and len(name.encode()) <= _MAX_NAME_BYTES
    )
    if not is_name:
        raise UserError(
            f"{name!r:.100} cannot name a file: allowed are at most {_MAX_NAME_BYTES} bytes "
            'of visible characters, none of /\\:*?"<>|, and no dot or space at either end'
        )
    return str(name)


def without_token(text: str) -> str:
    """A message without tokens of the Hub, which servers and libraries repeat."""
    if token := get_token():
        text = text.replace(token, "<token>")
    return re.sub("hf_[A-Za-z0-9]{20,}", "<token>", text)


def check_own_path(path: Path, folder: Path) -> Path:
    """
    Check that a path lies in a folder, also if links are followed.

    Raises:
        UserError: It lies elsewhere.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{path} is a link that leads out of {folder}; put what it leads to in its "
            "place, or remove it"
        )
    return path


def check_own_file(file: Path, folder: Path) -> Path:
    """
    Check that a file is a regular one and lies in a folder, also if links are followed.

    Raises:
        UserError: It is something else, or lies elsewhere.
    """
    check_own_path(file, folder)
    if not file.is_file():
        raise UserError(f"{file} is no regular file")
    return file


def read_json(file: Path) -> Any:
    """
    JSON content of a regular file, of at most 64 MiB, two million values and 50 levels.

    Raises:
        FileNotFoundError: There is no such file.
        UserError: It is larger, or something else.
    """
    try:
        # A named pipe is not opened: that would wait for its other end.
        if not stat.S_ISREG(file.stat().st_mode):
            raise UserError(f"{file} is no regular file")
        with file.open("rb") as opened:
            content = opened.read(MAX_JSON_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    if len(content) > MAX_JSON_BYTES:
        raise UserError(f"{file} has more than {MAX_JSON_BYTES:,} bytes")
    if sum(map(content.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise UserError(f"{file} has more than {MAX_JSON_VALUES:,} values")
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({one_line(error):.200})") from error
    level = [found]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            value
            for container in level
            if isinstance(container, (dict, list))
            for value in (
                container.values() if isinstance(container, dict) else container
            )
        ]
    if level:
        raise UserError(f"{file} is nested more than {MAX_JSON_DEPTH} deep")
    return found
