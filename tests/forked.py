"""
Processes that begin with everything imported: forks of one that has imported it once.

A new interpreter takes seconds to import SAELens, TransformerLens and PyTorch. Where a
test is about what a process does, and not about how it is started, it forks one here.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from saelens_scaffold_cli import main

PATIENCE = 600.0
"""Seconds to wait for what comes in a few, on a machine that is busy with something else."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["saelens_scaffold.compare", "saelens_scaffold.training.sharded_runner"]
)


def forking() -> ForkServerContext:
    """Where processes are forked, which has imported the package."""
    # what tqdm reads when it is imported, as `main` sets it where stderr is no terminal
    with patch.dict(os.environ, TQDM_MININTERVAL="60", TQDM_MAXINTERVAL="60"):
        forkserver.ensure_running()
    return _CONTEXT


class Forked:
    """
    A process that calls a function with arguments, and ends with its value as status.

    Signals have Python's own handlers there, also where this process ignores some.

    Args:
        function: A function that can be pickled.
        args: Its arguments.
        cwd: Working directory; by default this process's.
        environment: Of the process, beside this process's.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *args: Any,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        self._folder = tempfile.TemporaryDirectory()
        self._written = [Path(self._folder.name) / name for name in ("out", "err")]
        for file in self._written:
            file.touch()
        setting = (
            self._written,
            cwd or Path.cwd(),
            {**os.environ, **(environment or {})},
        )
        self._process = forking().Process(
            target=_begin, args=(*setting, function, args)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def stdout(self) -> str:
        """What it has written to stdout so far."""
        return self._written[0].read_text()

    @property
    def stderr(self) -> str:
        """What it has written to stderr so far."""
        return self._written[1].read_text()

    def wait(self) -> int:
        """Wait for its end; its exit status, or the negative of the signal that ended it."""
        self._process.join(PATIENCE)
        status = self._process.exitcode
        if status is None:
            self._process.kill()
            pytest.fail(f"not at an end in {PATIENCE} s:\n{self.stderr}")
        return status

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait for something that comes before its end."""
        try:
            wait_until(condition, self._process.is_alive, lambda: self.stderr)
        except BaseException:
            self._process.kill()
            raise

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, number)


def forked_command(*argv: str, **setting: Any) -> Forked:
    """`saelens-scaffold` with arguments, in another process."""
    return Forked(main_of, argv, **setting)


def forked_code(code: str, *argv: str, **setting: Any) -> Forked:
    """`python -c` with arguments, in another process."""
    return Forked(run_code, code, argv, **setting)


def main_of(argv: Sequence[str]) -> int:
    """`saelens-scaffold` as it is started from a shell."""
    sys.argv = ["saelens-scaffold", *argv]
    return main()


def run_code(code: str, argv: Sequence[str]) -> None:
    """Code as `python -c` runs it."""
    sys.argv = ["-c", *argv]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def wait_until(
    condition: Callable[[], object],
    can_come: Callable[[], bool] = lambda: True,
    said: Callable[[], str] = str,
) -> None:
    """Wait for a condition, as long as it can come."""
    end = time.monotonic() + PATIENCE
    while not condition():
        # asked before, or it could have come in between
        can = can_come()
        assert can or condition(), said()
        assert time.monotonic() < end, f"not there in {PATIENCE} s:\n{said()}"
        time.sleep(0.01)


def _begin(
    written: Sequence[Path],
    cwd: Path,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: Sequence[Any],
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, file in enumerate(written, start=1):
        with file.open("a") as opened:
            os.dup2(opened.fileno(), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.exit(function(*args))
