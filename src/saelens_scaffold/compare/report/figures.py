"""The plots of a comparison's report."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from statistics import fmean
from typing import Any, NamedTuple

from plotly import graph_objects as go

from saelens_scaffold.compare.metrics import metric_name
from saelens_scaffold.compare.report.drawing import (
    Trace,
    error_bars,
    line,
    log_axis,
    named,
    new_figure,
)
from saelens_scaffold.compare.report.series import Style, series_of, styles

Results = Mapping[str, Any]
SAE = Mapping[str, Any]

DENSE_THRESHOLD = 0.1
"""Firing frequency above which a latent is called dense, as in arXiv 2506.15679."""

BAR_WIDTH = 17
"""Of the bars of the ablation plots, in pixels."""


class Plot(NamedTuple):
    """
    A plot of the report.

    Attributes:
        title: What stands above it; empty if its section's heading says it all.
        traces: What it draws: a trace for each series, which is its `legendgroup`.
        figure: plotly's, with the traces.
    """

    title: str
    traces: Sequence[Trace]
    figure: go.Figure


def metric_curves(results: Results) -> list[Plot]:
    """A plot for each metric: mean and interval over seeds against the measured L0."""
    looks = styles(results)
    l0 = [point["l0"] for curve in results["curves"] for point in curve["points"]]
    plots: list[Plot] = []
    for metric in results["metrics"]:
        curves = [
            _curve(curve, looks)
            for curve in results["curves"]
            if curve["metric"] == metric["id"] and curve["points"]
        ]
        if curves:
            figure = new_figure(curves)
            figure.update_xaxes(title_text="l0_total", **log_axis(l0))
            title = metric_name(metric)
            plots.append(Plot(title, curves, figure))
    return plots


def _curve(curve: Mapping[str, Any], looks: Mapping[str, Style]) -> Trace:
    points = sorted(curve["points"], key=lambda point: point["l0"])
    series = series_of(curve["architecture"], points[0]["axes"])
    style = looks[series]
    return line(
        series,
        style,
        [point["l0"] for point in points],
        [point["mean"] for point in points],
        error_y=error_bars(
            [(point["mean"], point["ci_low"], point["ci_high"]) for point in points],
            style,
        ),
        customdata=[point["n_seeds"] for point in points],
        hovertemplate="l0_total %{x:.4g}: %{y:.4g}, %{customdata} seeds",
    )


def firing_frequencies(results: Results) -> list[Plot]:
    """How many sparse latents fire more often than x, mean over seeds; a plot for each k."""

    def curve(series: str, style: Style, seeds: Sequence[SAE]) -> Trace | None:
        found = _mean_histogram(
            [sae["firing_histogram"] for sae in seeds], "log10_edges"
        )
        if found is None:
            return None
        edges, counts = found
        return line(
            series,
            style,
            *_exceedance([10**edge for edge in edges], counts),
            hovertemplate="%{y:.4g} latents above %{x:.3~%}",
        )

    plots = _facets(results, curve)
    frequencies = [x for plot in plots for trace in plot.traces for x in trace["x"]]
    for plot in plots:
        plot.figure.update_xaxes(
            title_text="firing frequency x (share of tokens)",
            **log_axis([*frequencies, 1.0], "%"),
        )
        plot.figure.add_vline(
            DENSE_THRESHOLD, line={"color": "#888", "width": 1, "dash": "dot"}
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
    _share_log_axis(plots, "latents firing more often")
    return plots


def ablation_ratios(results: Results) -> list[Plot]:
    """
    Cross-entropy under each intervention of `scaffold_ablation`, a plot for each k.

    A bar is the mean over seeds; its interval reaches from the lowest to the highest end
    of the seeds' own.
    """

    def bars(series: str, style: Style, seeds: Sequence[SAE]) -> Trace | None:
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
        return dict(
            type="bar",
            orientation="h",
            y=[_intervention(key) for key in estimates],
            # bars start where the intervention changes nothing
            base=[1.0] * len(estimates),
            x=[mean - 1 for mean, _, _ in estimates.values()],
            error_x=error_bars(list(estimates.values()), style),
            customdata=[mean for mean, _, _ in estimates.values()],
            hovertemplate="%{customdata:.4g} × the clean cross-entropy",
            marker={
                "color": "rgba(0, 0, 0, 0)" if style.is_plain else style.colour,
                "line": {"color": style.colour, "width": 1.5},
                "pattern": {
                    "shape": style.bar_pattern,
                    "fillmode": "overlay",
                    "fgcolor": style.colour if style.is_plain else "#fff",
                },
            },
            **named(series),
        )

    plots = _facets(results, bars)
    ends = [
        mean + sign * error
        for plot in plots
        for trace in plot.traces
        for sign, errors in ((1, "array"), (-1, "arrayminus"))
        for mean, error in zip(
            trace["customdata"], trace["error_x"][errors], strict=True
        )
    ]
    for plot in plots:
        n_interventions = len({y for trace in plot.traces for y in trace["y"]})
        plot.figure.update_xaxes(
            title_text="cross-entropy, × the clean one", **log_axis([1.0, *ends])
        )
        plot.figure.update_yaxes(autorange="reversed")
        plot.figure.update_layout(
            height=120 + n_interventions * (len(plot.traces) + 1) * BAR_WIDTH,
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

    def spectrum(series: str, style: Style, seeds: Sequence[SAE]) -> Trace | None:
        known = [s["scaffold"]["singular_values"] for s in seeds if s["scaffold"]]
        if not known:
            return None
        means = [fmean(values) for values in zip(*known, strict=True)]
        return line(
            series,
            style,
            list(range(1, len(means) + 1)),
            means,
            hovertemplate="singular value %{x}: %{y:.4g}",
        )

    plots = _facets(results, spectrum)
    values = [y for plot in plots for trace in plot.traces for y in trace["y"]]
    for plot in plots:
        plot.figure.update_xaxes(title_text="number of the direction", nticks=8)
        plot.figure.update_yaxes(
            title_text="singular value", range=[0, 1.08 * max(values)]
        )
    return plots


def alignments(results: Results) -> list[Plot]:
    """How many sparse latents point into the scaffold's span by more than x."""

    def curve(series: str, style: Style, seeds: Sequence[SAE]) -> Trace | None:
        found = _mean_histogram(
            [s["scaffold"]["alignment_histogram"] for s in seeds if s["scaffold"]],
            "edges",
        )
        if found is None:
            return None
        return line(
            series,
            style,
            *_exceedance(*found),
            hovertemplate="%{y:.4g} latents above %{x:.0%}",
        )

    plots = _facets(results, curve)
    for plot in plots:
        plot.figure.update_xaxes(
            title_text="share x in the scaffold's span", tickformat=".0%", nticks=6
        )
    _share_log_axis(plots, "latents with a larger share")
    return plots


def _facets(
    results: Results,
    trace: Callable[[str, Style, Sequence[SAE]], Trace | None],
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
            title = "" if k is None else f"k = {k}"
            plots.append(Plot(title, traces, new_figure(traces)))
    return plots


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


def _share_log_axis(plots: Sequence[Plot], title: str) -> None:
    """Give the plots the same logarithmic y axis, so that they compare by eye."""
    values = [y for plot in plots for trace in plot.traces for y in trace["y"]]
    for plot in plots:
        plot.figure.update_yaxes(title_text=title, **log_axis(values))
