"""Ctrl-C and SIGTERM, which must not get lost in a library."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_interrupted = False


@contextmanager
def interruptible() -> Iterator[None]:
    """
    Within it Ctrl-C and SIGTERM raise KeyboardInterrupt, and are remembered.

    Python drops an exception that comes while a generator is cleaned up, and libraries
    turn some into errors of their own. So long work calls `raise_if_interrupted` between
    its steps, and an error after an interruption is taken for the interruption. SIGTERM
    is what a cluster sends before it takes the machine away. A signal that was ignored
    still is.

    Raises:
        KeyboardInterrupt: As said; from another thread than the main one, where Python
            has no signals, nothing changes.
    """
    global _interrupted
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _interrupted = False
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as a shell does for what runs in the background
            signal.signal(number, _interrupt)
    try:
        yield
    except Exception:
        raise_if_interrupted()
        raise
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: one that was not set by Python
                signal.signal(number, handler)
        _interrupted = False


def raise_if_interrupted() -> None:
    """
    Raise the interruption that came within `interruptible`, if one did.

    Raises:
        KeyboardInterrupt: There was one.
    """
    if _interrupted:
        raise KeyboardInterrupt


def _interrupt(*_: object) -> None:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt
