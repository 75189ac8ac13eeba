"""What a call of SAEBench leaves behind: result files, printed lines, logged errors."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def read_result(folder: Path, name: str) -> dict[str, Any] | None:
    """A result file anywhere below a folder; None if it is missing or incomplete."""
    for file in folder.rglob(name):
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError:  # SAEBench was interrupted while it wrote the file
            return None
    return None


@dataclass
class Heard:
    """
    What SAEBench said.

    Attributes:
        errors: Errors that were logged or raised.
        last_line: The last line that was printed.
    """

    errors: list[BaseException] = field(default_factory=list)
    last_line: str = "nothing"


@contextmanager
def listening() -> Iterator[Heard]:
    """Listen to SAEBench; what it prints goes to stderr, since stdout is for the table."""
    heard = Heard()
    handler = _LoggedErrors(heard)
    logger = logging.getLogger("sae_bench")
    logger.addHandler(handler)
    try:
        with redirect_stdout(_PrintedLines(heard)):
            yield heard
    finally:
        logger.removeHandler(handler)


class _LoggedErrors(logging.Handler):
    def __init__(self, heard: Heard):
        super().__init__(logging.ERROR)
        self.heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        # core logs from within its `except`
        error = sys.exc_info()[1] or RuntimeError(record.getMessage())
        self.heard.errors.append(error)


class _PrintedLines(io.TextIOBase):
    def __init__(self, heard: Heard):
        self.heard = heard

    def write(self, text: str) -> int:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if lines:
            self.heard.last_line = lines[-1]
        return sys.stderr.write(text)
