"""Ctrl-C and SIGTERM, which must not get lost in a library."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sae_lens.training._interruption import InterruptedException

_SAME_SECONDS = 1.0
"""Time in which signals are one interruption: schedulers repeat them."""

_interrupted_at: float | None = None
_held = False


@contextmanager
def interruptible() -> Iterator[None]:
    """
    Raise and remember KeyboardInterrupt on Ctrl-C and SIGTERM.

    Python drops an exception raised while a generator is cleaned up, and libraries turn
    some into errors of their own. So long work calls `raise_if_interrupted` between its
    steps, and an error after an interruption counts as the interruption. Clusters send
    SIGTERM before they take a machine away. Ignored signals stay ignored. Outside the
    main thread, where Python has no signals, and within another such block, this
    changes no signals.

    Raises:
        KeyboardInterrupt: There was an interruption.
    """
    global _interrupted_at, _held
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or _interrupt in before.values():
        before = {}
    else:
        _interrupted_at, _held = None, False
    shows = sys.unraisablehook
    if before:
        # what Python drops it shows, with a traceback
        sys.unraisablehook = lambda dropped: (
            None if dropped.exc_type is KeyboardInterrupt else shows(dropped)
        )
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as a shell does for what runs in the background
            signal.signal(number, _interrupt)
    try:
        yield
    except InterruptedException as error:  # from the handlers that SAELens sets
        raise KeyboardInterrupt from error
    except Exception:
        raise_if_interrupted()
        raise
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: not set by Python
                signal.signal(number, handler)
        if before:
            _interrupted_at, _held = None, False
            sys.unraisablehook = shows


def raise_if_interrupted() -> None:
    """
    Raise the interruption that `interruptible` remembers, if there is one.

    Raises:
        KeyboardInterrupt: There was one.
    """
    if is_interrupted():
        raise KeyboardInterrupt


def is_interrupted() -> bool:
    """Whether `interruptible` remembers an interruption."""
    return _interrupted_at is not None


def hold_interruptions() -> None:
    """Only remember interruptions from here on, where one more would lose something."""
    global _held
    _held = True


def release_interruptions() -> None:
    """
    Raise interruptions at once again.

    Raises:
        KeyboardInterrupt: There was one meanwhile.
    """
    global _held
    _held = False
    raise_if_interrupted()


def _interrupt(*_: object) -> None:
    global _interrupted_at
    now = time.monotonic()
    is_new = _interrupted_at is None or now - _interrupted_at > _SAME_SECONDS
    if is_new:
        _interrupted_at = now
    if is_new and not _held:
        raise KeyboardInterrupt
