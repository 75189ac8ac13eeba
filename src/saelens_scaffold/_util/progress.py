"""Progress of long work, with the time left at the pace measured so far."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

_SECONDS_BETWEEN_LINES = (30.0, 600.0)
"""Least and most time between two lines of a log."""


class Progress:
    """
    Says how far work of several kinds has got, and how long the rest will take: what is
    left of each kind, at the pace measured of that kind.

    On a terminal a progress bar says so; in a log it is a line now and then.

    Args:
        clock: Seconds, from any start.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._begun = clock()
        self._last_line: float | None = None
        self._done: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}

    def done(self, kind: str, amount: int, seconds: float) -> None:
        """Work that was done, and how long it took."""
        self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds
        self._done[kind] += amount

    def time_left(self, amounts: Mapping[str, int], at_once: int = 1) -> str:
        """
        As in "3 h 12 min", "at least 20 min" if a kind of work has not been measured yet,
        or "" if none has.

        Args:
            amounts: What is left, by kind.
            at_once: Number of those who work at the same time.
        """
        left = {kind: amount for kind, amount in amounts.items() if amount}
        known = {kind: amount for kind, amount in left.items() if self._done[kind]}
        seconds = sum(
            amount * self._seconds[kind] / self._done[kind]
            for kind, amount in known.items()
        )
        if left and not known:
            return ""
        least = "" if len(known) == len(left) else "at least "
        return least + duration(seconds / at_once)

    def show(self, text: str, bar: Any = None) -> None:
        """
        Say how far it has got.

        Args:
            text: One line.
            bar: A tqdm bar, which gets the line on a terminal, and is closed in a log.
                Without one, the line is printed at once.
        """
        if bar is not None and sys.stderr.isatty():
            bar.set_description_str(text, refresh=False)
            return
        if bar is not None:
            now = self._clock()
            least, most = _SECONDS_BETWEEN_LINES
            pause = min(max((now - self._begun) / 20, least), most)
            bar.leave = False
            bar.close()
            if self._last_line is not None and now - self._last_line < pause:
                return
            self._last_line = now
        print(text, file=sys.stderr)


def n_saes(n: int) -> str:
    """A number of SAEs, in words."""
    return f"{n} SAE" if n == 1 else f"{n} SAEs"


def duration(seconds: float) -> str:
    """A time, as in "3 h 12 min" or "40 s"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
