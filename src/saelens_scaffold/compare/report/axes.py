"""Logarithmic axes of the report's plots."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator


def log_axis(values: Sequence[float], tick_format: str = "") -> dict[str, Any]:
    """
    A logarithmic axis with room around the values, and ticks at round numbers.

    Args:
        values: Values to show; only positive ones have a place on the axis.
        tick_format: "%" to write shares as percentages.
    """
    logarithms = [math.log10(value) for value in values if value > 0] or [0.0]
    low, high = min(logarithms), max(logarithms)
    margin = max(0.05 * (high - low), 0.04)
    low, high = low - margin, high + margin
    ticks = _log_ticks(low, high)
    return {
        "type": "log",
        "range": [low, high],
        "tickvals": ticks,
        "ticktext": [
            f"{100 * tick:g} %" if tick_format == "%" else f"{tick:g}" for tick in ticks
        ],
    }


def _log_ticks(low: float, high: float) -> list[float]:
    """
    A few round numbers between 10 ** low and 10 ** high.

    plotly's own choice labels some ticks with their digit only (2 and 5 for 20 and 50),
    in smaller letters.
    """
    powers = range(math.floor(low), math.ceil(high) + 1)
    for steps in ((1,), (1, 2, 5), (1, 2, 3, 4, 6, 8)):
        ticks = [
            float(f"{step}e{power}")
            for power in powers
            for step in steps
            if low <= math.log10(step) + power <= high
        ]
        if len(ticks) >= 3:
            # of many decades, as few as have room for their labels on a phone
            return ticks[:: math.ceil(len(ticks) / 5)] if steps == (1,) else ticks
    # so little of a decade that a linear axis would look the same
    ticks = MaxNLocator(4).tick_values(10**low, 10**high)
    return [float(tick) for tick in ticks if 10**low <= tick <= 10**high]
