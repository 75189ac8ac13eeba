"""The plots of a comparison's report."""

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from statistics import fmean
from typing import Any, NamedTuple

from plotly import graph_objects as go

Results = Mapping[str, Any]
SAE = Mapping[str, Any]

# Each can be told from the others, and from both a white and a black page.
COLOURS = ("#3b7dd8", "#d9742b", "#2f9e77", "#b65fc4", "#b8931f", "#d1495b", "#7d8794")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "star")
BAR_PATTERNS = ("", "/", "x", "-", "|", ".")

DENSE_THRESHOLD = 0.1
"""Firing frequency above which a latent is called dense, as in the paper."""

LINE_HEIGHT = 17
FONT_SIZE = 14
FONT_FAMILY = "system-ui, sans-serif"


class Style(NamedTuple):
    """
    How a series looks in every plot.

    Attributes:
        colour: A scaffold SAE's is that of the plain one it is compared with.
        is_plain: Whether it has no scaffold: dashed and hollow.
        variant: Tells series of one architecture apart, by symbol or pattern.
    """

    colour: str
    is_plain: bool
    variant: int

    @property
    def symbol(self) -> str:
        return SYMBOLS[self.variant % len(SYMBOLS)]


class Plot(NamedTuple):
    """A plot, and what stands above it."""

    title: str
    figure: go.Figure


def series_of(architecture: str, axes: Mapping[str, Any]) -> str:
    """The name of what a curve over k is of: the architecture and all axes but k."""
    varied = (f"{name}={value}" for name, value in axes.items() if name != "k")
    return " ".join([architecture, *varied])


def styles(results: Results) -> dict[str, Style]:
    """How each series looks, in the order in which the SAEs are listed."""
    is_plain: dict[str, bool] = {}
    architecture_of: dict[str, str] = {}
    for sae in results["saes"]:
        series = series_of(sae["architecture"], sae["axes"])
        is_plain[series] = sae["scaffold_rank"] == 0
        architecture_of[series] = sae["architecture"]
    twins = _twins(results)
    families = [twins.get(a, a) for a in dict.fromkeys(architecture_of.values())]
    families = list(dict.fromkeys(families))
    found: dict[str, Style] = {}
    for series, architecture in architecture_of.items():
        family = families.index(twins.get(architecture, architecture))
        look = (COLOURS[family % len(COLOURS)], is_plain[series])
        variant = sum(style[:2] == look for style in found.values())
        found[series] = Style(*look, variant)
    return found


def _twins(results: Results) -> dict[str, str]:
    """
    The plain architecture whose colour a scaffold architecture shares.

    It is the one it is compared with, if no other has its colour already: solid and
    dashed lines could not tell three apart.
    """
    has_scaffold = {s["architecture"] for s in results["saes"] if s["scaffold_rank"]}
    twins: dict[str, str] = {}
    for comparison in results["comparisons"]:
        treatment = comparison["treatment"]["architecture"]
        baseline = comparison["baseline"]["architecture"]
        if (
            treatment in has_scaffold
            and baseline not in has_scaffold
            and baseline not in twins.values()
        ):
            twins.setdefault(treatment, baseline)
    return twins


def metric_curves(results: Results) -> list[Plot]:
    """A plot for each metric: mean and interval over seeds against the measured L0."""
    looks = styles(results)
    l0 = [point["l0"] for curve in results["curves"] for point in curve["points"]]
    plots: list[Plot] = []
    for metric in results["metrics"]:
        curves = [c for c in results["curves"] if c["metric"] == metric["id"]]
        if not any(curve["points"] for curve in curves):
            continue
        figure = _figure(
            xaxis={"title": {"text": "l0_total"}, **_log_axis(l0)},
        )
        for curve in curves:
            points = sorted(curve["points"], key=lambda point: point["l0"])
            if points:
                series = series_of(curve["architecture"], points[0]["axes"])
                figure.add_trace(_curve(series, looks[series], points))
        plots.append(Plot(f"{metric['evaluation']}: {metric['title']}", figure))
    return plots


def _curve(series: str, style: Style, points: Sequence[Mapping[str, Any]]) -> go.Scatter:
    return _line(
        series,
        style,
        [point["l0"] for point in points],
        [point["mean"] for point in points],
        error_y=_error_bars(
            [(point["mean"], point["ci_low"], point["ci_high"]) for point in points],
            style,
        ),
        customdata=[point["n_seeds"] for point in points],
        hovertemplate="l0_total %{x:.4g}: %{y:.4g}, %{customdata} seeds",
    )


def firing_frequencies(results: Results) -> list[Plot]:
    """How many sparse latents fire more often than x, mean over seeds; a plot for each k."""

    def curve(series: str, style: Style, seeds: Sequence[SAE]) -> go.Scatter | None:
        found = _mean_histogram([sae["firing_histogram"] for sae in seeds], "log10_edges")
        if found is None:
            return None
        edges, counts = found
        return _line(
            series,
            style,
            *_exceedance([10**edge for edge in edges], counts),
            hovertemplate="%{y:.4g} latents above %{x:.3~%}",
        )

    plots = _facets(results, curve)
    frequencies = [x for plot in plots for line in plot.figure.data for x in line.x]
    for plot in plots:
        plot.figure.update_layout(
            xaxis={
                "title": {"text": "firing frequency x (share of tokens)"},
                **_log_axis([*frequencies, 1.0], "%"),
            },
            yaxis={"title": {"text": "latents firing more often"}, "type": "log"},
        )
        plot.figure.add_vline(
            DENSE_THRESHOLD,
            line={"color": "#888", "width": 1, "dash": "dot"},
        )
        plot.figure.add_annotation(
            text="dense →",
            # annotations of a logarithmic axis stand at the logarithm
            x=math.log10(DENSE_THRESHOLD),
            y=1,
            yref="paper",
            xanchor="left",
            yanchor="bottom",
            showarrow=False,
        )
    _share_log_range(plots)
    return plots


def ablation_ratios(results: Results) -> list[Plot]:
    """
    Cross-entropy under each intervention of `scaffold_ablation`, a plot for each k.

    A bar is the mean over seeds; its interval reaches from the lowest to the highest end
    of the seeds' own.
    """

    def bars(series: str, style: Style, seeds: Sequence[SAE]) -> go.Bar | None:
        measured = [
            sae["evaluations"]["scaffold_ablation"]["cross_entropy"]
            for sae in seeds
            if sae["evaluations"].get("scaffold_ablation")
        ]
        estimates = {
            key: estimate
            for key in dict.fromkeys(key for ratios in measured for key in ratios)
            if key.startswith("ce_ratio_") and not key.endswith(("_ci_low", "_ci_high"))
            if (estimate := _envelope(measured, key)) is not None
        }
        if not estimates:
            return None
        return go.Bar(
            orientation="h",
            y=[_intervention(key) for key in estimates],
            # bars start where the intervention changes nothing
            base=[1.0] * len(estimates),
            x=[mean - 1 for mean, _, _ in estimates.values()],
            error_x=_error_bars(list(estimates.values()), style),
            customdata=[mean for mean, _, _ in estimates.values()],
            hovertemplate="%{customdata:.4g} × the clean cross-entropy",
            marker={
                "color": "rgba(0, 0, 0, 0)" if style.is_plain else style.colour,
                "line": {"color": style.colour, "width": 1.5},
                "pattern": {
                    "shape": BAR_PATTERNS[style.variant % len(BAR_PATTERNS)],
                    "fgcolor": "#888",
                },
            },
            **_named(series),
        )

    plots = _facets(results, bars)
    ends = [
        mean + error
        for plot in plots
        for bar in plot.figure.data
        for mean, error in zip(bar.customdata, bar.error_x.array, strict=True)
    ]
    for plot in plots:
        n_interventions = len({y for bar in plot.figure.data for y in bar.y})
        plot.figure.update_layout(
            height=120 + n_interventions * (len(plot.figure.data) + 1) * LINE_HEIGHT,
            xaxis={
                "title": {"text": "cross-entropy, × the clean one"},
                **_log_axis([1.0, *ends]),
            },
            yaxis={"autorange": "reversed"},
            bargap=0.25,
            hovermode="closest",
        )
    return plots


def _intervention(key: str) -> str:
    """A field of the evaluation's output as a label of a bar: a word a line."""
    name = key.removeprefix("ce_ratio_").replace("pca", "PCA")
    return name.replace("_", "<br>")


def _envelope(
    measured: Sequence[Mapping[str, Any]], key: str
) -> tuple[float, float, float] | None:
    """Mean over seeds, and the ends of all of their intervals."""
    values = [ratios[key] for ratios in measured if ratios.get(key) is not None]
    if not values:
        return None
    ends = [
        ratios[end]
        for ratios in measured
        for end in (f"{key}_ci_low", f"{key}_ci_high")
        if ratios.get(end) is not None
    ]
    return fmean(values), min(values + ends), max(values + ends)


def scaffold_spectra(results: Results) -> list[Plot]:
    """Singular values of the scaffold's map A B, mean over seeds; a plot for each k."""

    def spectrum(series: str, style: Style, seeds: Sequence[SAE]) -> go.Scatter | None:
        known = [s["scaffold"]["singular_values"] for s in seeds if s["scaffold"]]
        if not known:
            return None
        means = [fmean(values) for values in zip(*known, strict=True)]
        return _line(
            series,
            style,
            list(range(1, len(means) + 1)),
            means,
            hovertemplate="singular value %{x}: %{y:.4g}",
        )

    plots = _facets(results, spectrum)
    values = [y for plot in plots for line in plot.figure.data for y in line.y]
    for plot in plots:
        plot.figure.update_layout(
            xaxis={"title": {"text": "number of the direction"}, "nticks": 8},
            yaxis={
                "title": {"text": "singular value"},
                "range": [0, 1.08 * max(values)],
            },
        )
    return plots


def alignments(results: Results) -> list[Plot]:
    """How many sparse latents point into the scaffold's span by more than x."""

    def curve(series: str, style: Style, seeds: Sequence[SAE]) -> go.Scatter | None:
        found = _mean_histogram(
            [s["scaffold"]["alignment_histogram"] for s in seeds if s["scaffold"]],
            "edges",
        )
        if found is None:
            return None
        return _line(
            series,
            style,
            *_exceedance(*found),
            hovertemplate="%{y:.4g} latents above %{x:.0%}",
        )

    plots = _facets(results, curve)
    for plot in plots:
        plot.figure.update_layout(
            xaxis={
                "title": {"text": "share x of the direction in the scaffold's span"},
                "tickformat": ".0%",
                "nticks": 6,
            },
            yaxis={"title": {"text": "latents with a larger share"}, "type": "log"},
        )
    _share_log_range(plots)
    return plots


def _facets(
    results: Results,
    trace: Callable[[str, Style, Sequence[SAE]], go.Scatter | go.Bar | None],
) -> list[Plot]:
    """
    A plot for each k, with a trace for each series.

    Args:
        results: The comparison's results.
        trace: Draws the seeds of one series at one k, or nothing where it has no data.
    """
    looks = styles(results)
    seeds: dict[Any, dict[str, list[SAE]]] = {}
    for sae in results["saes"]:
        series = series_of(sae["architecture"], sae["axes"])
        seeds.setdefault(sae["axes"].get("k"), {}).setdefault(series, []).append(sae)
    plots: list[Plot] = []
    for k, by_series in seeds.items():
        traces = [
            drawn
            for series, saes in by_series.items()
            if (drawn := trace(series, looks[series], saes)) is not None
        ]
        if traces:
            figure = _figure()
            figure.add_traces(traces)
            plots.append(Plot("" if k is None else f"k = {k}", figure))
    return plots


def _figure(**layout: Any) -> go.Figure:
    # The page's style sheet colours text, axes and grid, for light and dark pages alike.
    axis = {"automargin": True, "showline": True, "zeroline": False, "ticks": "outside"}
    figure = go.Figure(
        layout={
            "template": None,
            "height": 340,
            "margin": {"l": 10, "r": 12, "t": 24, "b": 10},
            "font": {"size": FONT_SIZE, "family": FONT_FAMILY},
            "showlegend": False,
            "modebar": {"bgcolor": "rgba(0, 0, 0, 0)", "color": "#888"},
            "paper_bgcolor": "rgba(0, 0, 0, 0)",
            "plot_bgcolor": "rgba(0, 0, 0, 0)",
            "hoverlabel": {
                "namelength": -1,
                "font": {"size": FONT_SIZE, "color": "#fff"},
                "bgcolor": "#333",
            },
            "xaxis": {**axis, "title": {"standoff": 8}},
            "yaxis": {**axis, "title": {"standoff": 8}},
        }
    )
    figure.update_layout(**layout)
    return figure


def _named(series: str) -> dict[str, str]:
    # plotly reads some HTML in names; the group is the page's key, and is not shown
    return {"name": html.escape(series), "legendgroup": series}


def _line(
    series: str, style: Style, x: Sequence[float], y: Sequence[float], **more: Any
) -> go.Scatter:
    suffix = "-open" if style.is_plain else ""
    return go.Scatter(
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
        **_named(series),
        **more,
    )


def _error_bars(
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


def _mean_histogram(
    histograms: Iterable[Mapping[str, Any] | None], edges: str
) -> tuple[list[float], list[float]] | None:
    """Edges of the bins and mean counts, or None where there is no histogram."""
    known = [histogram for histogram in histograms if histogram is not None]
    seeds = zip(*(histogram["counts"] for histogram in known), strict=True)
    counts = [fmean(count) for count in seeds]
    return (known[0][edges], counts) if any(counts) else None


def _exceedance(
    edges: Sequence[float], counts: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Each lower edge of a bin, and the number above it, as long as there are any."""
    above = list(accumulate(reversed(counts)))[::-1]
    points = [(x, y) for x, y in zip(edges, above, strict=False) if y > 0]
    # from where the count starts to fall
    start = max((i for i, (_, y) in enumerate(points) if y == points[0][1]), default=0)
    return [x for x, _ in points[start:]], [y for _, y in points[start:]]


def _log_axis(values: Sequence[float], tick_format: str = "") -> dict[str, Any]:
    """A logarithmic axis with room around the values, and ticks at round numbers."""
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = max(0.05 * (high - low), 0.04)
    low, high = low - margin, high + margin
    decades = high - low
    steps = (1, 2, 3, 4, 6, 8) if decades < 0.9 else (1, 2, 5) if decades < 2 else (1,)
    every = math.ceil(decades / 5)
    ticks = [
        step * 10.0**power
        for power in range(math.floor(low), math.ceil(high) + 1)
        if power % every == 0
        for step in steps
        if low <= math.log10(step) + power <= high
    ]
    return {
        "type": "log",
        "range": [low, high],
        "tickvals": ticks,
        "ticktext": [
            f"{100 * tick:g} %" if tick_format == "%" else f"{tick:g}" for tick in ticks
        ],
    }


def _share_log_range(plots: Sequence[Plot]) -> None:
    """Give the plots the same logarithmic y axis, so that they compare by eye."""
    values = [y for plot in plots for line in plot.figure.data for y in line.y]
    for plot in plots:
        plot.figure.update_yaxes(_log_axis(values))
