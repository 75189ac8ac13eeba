"""What the plots of a comparison's report have in common."""

import html
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator
from plotly import graph_objects as go

from saelens_scaffold.compare.report.series import Style

# plotly's, as a dictionary
Trace = dict[str, Any]

FONT_SIZE = 14
FONT_FAMILY = "system-ui, sans-serif"


def new_figure(traces: Sequence[Trace]) -> go.Figure:
    """A figure of these traces, as wide as the page has room for."""
    # The page's style sheet colours text, axes and grid, for light and dark pages alike.
    clear = "rgba(0, 0, 0, 0)"
    axis = {
        "automargin": True,
        "showline": True,
        "ticks": "outside",
        "title": {"standoff": 8, "font": {"size": FONT_SIZE}},
        "zeroline": False,
    }
    layout = {
        "template": None,
        "height": 340,
        "margin": {"l": 10, "r": 26, "t": 24, "b": 10},
        "font": {"size": FONT_SIZE, "family": FONT_FAMILY},
        "showlegend": False,
        "paper_bgcolor": clear,
        "plot_bgcolor": clear,
        "modebar": {"bgcolor": clear, "color": "#888"},
        "hoverlabel": {
            "namelength": -1,
            "font": {"size": FONT_SIZE, "color": "#fff"},
            "bgcolor": "#333",
        },
        "xaxis": axis,
        "yaxis": axis,
    }
    return go.Figure(data=list(traces), layout=layout)


def named(series: str) -> dict[str, str]:
    """What tells a trace's series: to readers, and to the page's legend."""
    # plotly reads some HTML in names
    return {"name": html.escape(series, quote=False), "legendgroup": series}


def line(
    series: str, style: Style, x: Sequence[float], y: Sequence[float], **more: Any
) -> Trace:
    """A curve in the style of its series; `more` is plotly's."""
    suffix = "-open" if style.is_plain else ""
    return dict(
        type="scatter",
        x=list(x),
        y=list(y),
        mode="lines+markers",
        line={
            "color": style.colour,
            "width": 2,
            "dash": "dash" if style.is_plain else "solid",
        },
        marker={
            "symbol": style.symbol + suffix,
            "size": 9,
            "color": style.colour,
            "line": {"width": 1.5, "color": style.colour},
            # long lines get a few, only to be told apart
            "maxdisplayed": 8,
        },
        **named(series),
        **more,
    )


def error_bars(
    estimates: Sequence[tuple[float, float | None, float | None]], style: Style
) -> dict[str, Any]:
    """Of (estimate, low, high); of no length where the interval is not known."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [0 if high is None else high - mean for mean, _, high in estimates],
        "arrayminus": [0 if low is None else mean - low for mean, low, _ in estimates],
        "thickness": 1.5,
        "width": 4,
        "color": style.colour,
    }


def log_axis(values: Sequence[float], tick_format: str = "") -> dict[str, Any]:
    """
    A logarithmic axis with room around the values, and ticks at round numbers.

    Args:
        values: What it has to hold; there is no place for any but positive ones.
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

    plotly's own choice names only the digit of some (2 and 5 for 20 and 50), in smaller
    letters.
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
