"""Ctrl-C and SIGTERM, which must not get lost in a library."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sae_lens.training._interruption import InterruptedException

_interrupted = False


@contextmanager
def interruptible() -> Iterator[None]:
    """
    Raise and remember KeyboardInterrupt on Ctrl-C and SIGTERM.

    Python drops an exception raised while a generator is cleaned up, and libraries turn
    some into errors of their own. So long work calls `raise_if_interrupted` between its
    steps, and an error after an interruption counts as the interruption. Clusters send
    SIGTERM before they take a machine away. Ignored signals stay ignored. Outside the
    main thread, where Python has no signals, this does nothing.

    Raises:
        KeyboardInterrupt: There was an interruption.
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
    except InterruptedException as error:  # from the handlers that SAELens sets
        raise KeyboardInterrupt from error
    except Exception:
        raise_if_interrupted()
        raise
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: not set by Python
                signal.signal(number, handler)
        _interrupted = False


def raise_if_interrupted() -> None:
    """
    Raise the interruption that `interruptible` remembers, if there is one.

    Raises:
        KeyboardInterrupt: There was one.
    """
    if _interrupted:
        raise KeyboardInterrupt


def _interrupt(*_: object) -> None:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt
