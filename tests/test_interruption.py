"""Ctrl-C and SIGTERM end a command, whatever a library makes of them."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sae_lens.training._interruption import interrupt_callback

from forked import forked_command
from saelens_scaffold._util.interruption import interruptible, raise_if_interrupted

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def sigint_is_not_ignored() -> Iterator[None]:
    """As it is, and inherited, where a shell runs the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python looks for signals between instructions


@pytest.mark.parametrize("number", SIGNALS)
def test_raised_at_once(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        send(number)
        pytest.fail("not interrupted")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", SIGNALS)
def test_remembered_where_python_drops_it(number: signal.Signals) -> None:
    def unfinished() -> Iterator[int]:
        try:
            yield 1
        finally:
            send(number)

    went_on = False
    with pytest.raises(KeyboardInterrupt), interruptible():
        generator = unfinished()
        next(generator)
        del generator  # the exception does not leave it
        went_on = True
        raise_if_interrupted()
    assert went_on


def test_an_error_that_an_interruption_became_is_one() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        try:
            send(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise ValueError("a library's own") from error
    with pytest.raises(ValueError, match="a user's own"), interruptible():
        raise ValueError("a user's own")


def test_saelens_own_exception_is_an_interruption() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.signal(signal.SIGTERM, interrupt_callback)  # as SAELens's trainer does
        send(signal.SIGTERM)


def test_nothing_is_left_behind() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(KeyboardInterrupt), interruptible():
        send(signal.SIGTERM)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    raise_if_interrupted()
    with interruptible():
        raise_if_interrupted()


@pytest.mark.parametrize("number", SIGNALS)
def test_ignored_signals_are_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with interruptible():
            send(number)
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_demo(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    command = ["demo", "--quick", "--output_path", str(out)]
    process = forked_command(*command)
    process.wait_until(lambda: list(out.glob("*/*")))  # work has begun
    process.send_signal(number)
    assert process.wait() == 130, process.stderr
    written = process.stderr
    assert "repeat the command" in written
    assert "Traceback" not in written
    assert not list(out.rglob("results.json"))


def test_an_interruption_that_python_drops_is_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)

    class Deleted:
        def __init__(self, fails: bool) -> None:
            self.fails = fails

        def __del__(self) -> None:
            if self.fails:
                raise ValueError
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):
                pass

    with pytest.raises(KeyboardInterrupt), interruptible():
        Deleted(fails=True)
        assert len(shown) == 1
        Deleted(fails=False)
        raise_if_interrupted()
    assert len(shown) == 1
    assert sys.unraisablehook == shown.append
