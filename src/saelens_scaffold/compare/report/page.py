"""
Report of a comparison: one HTML page that needs no network, and the data of its plots.

page.html says what the plots show, page.js how they look.
"""

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from saelens_scaffold._util.files import new_file
from saelens_scaffold.compare import table
from saelens_scaffold.compare.config import yaml_text
from saelens_scaffold.compare.grid import Arm
from saelens_scaffold.compare.metrics import metric_name

Results = Mapping[str, Any]
Seeds = Sequence[Mapping[str, Any]]
"""SAEs that differ in their seeds only, as in results.json."""

Trace = dict[str, Any]
"""plotly's description of a curve or of bars."""

Plot = dict[str, Any]
"""
A plot of the report: its `title` (empty if that of its section suffices), a trace for each
series, whose `legendgroup` is the series, and plotly's `xaxis` and `yaxis` as `axes`.
"""

# Distinct from each other on a white and on a black page.
COLOURS = ("#3b7dd8", "#d9742b", "#2f9e77", "#b65fc4", "#b8931f", "#d1495b", "#7d8794")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "star")
BAR_PATTERNS = ("", "/", "x", "-", "|", ".")


def write_page(results: Results, path: Path) -> None:
    """
    Write the report of a comparison.

    Args:
        results: Contents of the comparison's results.json.
        path: HTML file; an existing one is replaced once the new one is complete.
    """
    with new_file(path) as temporary:
        temporary.write_text(page(results), encoding="utf-8")


def page(results: Results) -> str:
    """
    The report of a comparison as one HTML page, with its plots and plotly.js.

    Args:
        results: Contents of the comparison's results.json. Sections without data are left
            out.
    """
    plots = {
        "curves": metric_curves(results),
        "firing": firing_frequencies(results),
        "ablation": ablation_ratios(results),
        "spectrum": scaffold_spectra(results),
        "alignment": alignments(results),
    }
    series = styles(results)
    drawn = {
        f"{section}-{i}": plot
        for section, of_section in plots.items()
        for i, plot in enumerate(of_section, start=1)
    }
    cells = [cell for sae in results["saes"] for cell in sae["metrics"].items()]
    made = table.environment()
    made.filters |= {"minus": _minus, "breakable": _breakable}
    made.filters["yaml"] = yaml_text
    return made.get_template("page.html").render(
        results=results,
        wording=table,
        comparisons=table.rows_by_pair(results),
        one_sided=table.one_sided(results),
        measured_metrics={name for name, found in cells if found["value"] is not None},
        plots=plots,
        styles=series,
        title=results["title"],
        data={"figures": {"plots": drawn, "styles": series}},
        libraries=[get_plotlyjs()],
    )


def _minus(numbers: str) -> str:
    """Numbers with true minus signs."""
    return re.sub(r"-(?=\d)", "−", numbers)


def _breakable(name: str) -> Markup:
    """An arm's name for narrow columns: `axis=value` stays whole as long as it fits."""
    words = (
        escape(word) if "=" in word else escape(word).replace("_", Markup("_<wbr>"))
        for word in name.split(" ")
    )
    return Markup(" ").join(words)


def series_of(architecture: str, axes: Mapping[str, Any]) -> str:
    """Name of a series: the architecture and all axes but k."""
    return Arm(architecture, axes).without("k").label


def styles(results: Results) -> dict[str, dict[str, Any]]:
    """
    The look of each series, in the order of the SAEs.

    A scaffold SAE shares the colour of its plain baseline, which is dashed and hollow
    (`is_plain`); the marker's symbol and the bars' pattern, by plotly's names, tell series
    of one colour apart.
    """
    twins = _twins(results)
    families: dict[str, int] = {}
    found: dict[str, dict[str, Any]] = {}
    for sae in results["saes"]:
        architecture: str = sae["architecture"]
        series = series_of(architecture, sae["axes"])
        if series in found:
            continue
        family = twins.get(architecture, architecture)
        number = families.setdefault(family, len(families))
        kind = {
            "colour": COLOURS[number % len(COLOURS)],
            "is_plain": sae["scaffold_rank"] == 0,
        }
        alike = sum(kind.items() <= style.items() for style in found.values())
        found[series] = {
            **kind,
            "symbol": SYMBOLS[alike % len(SYMBOLS)],
            "bar_pattern": BAR_PATTERNS[alike % len(BAR_PATTERNS)],
        }
    return found


def _twins(results: Results) -> dict[str, str]:
    """
    The plain architecture whose colour a scaffold architecture shares.

    It is the baseline, unless another architecture has its colour already: solid and
    dashed lines cannot tell three apart.
    """
    has_scaffold = {s["architecture"] for s in results["saes"] if s["scaffold_rank"]}
    twins: dict[str, str] = {}
    for comparison in results["comparisons"]:
        treatment = comparison["treatment"]["architecture"]
        baseline = comparison["baseline"]["architecture"]
        is_taken = baseline in has_scaffold or baseline in twins.values()
        if treatment in has_scaffold and not is_taken:
            twins.setdefault(treatment, baseline)
    return twins


def metric_curves(results: Results) -> list[Plot]:
    """Mean and interval over seeds against the measured L0, a plot for each metric."""
    l0s = [point["l0"] for curve in results["curves"] for point in curve["points"]]
    curves: dict[str, list[Trace]] = {}
    for curve in results["curves"]:
        points = curve["points"]
        if points:
            ends = [(p["mean"], p["ci_low"], p["ci_high"]) for p in points]
            trace = _trace(
                series_of(curve["architecture"], points[0]["axes"]),
                x=[point["l0"] for point in points],
                y=[point["mean"] for point in points],
                error_y=_whiskers(ends),
                customdata=[point["n_seeds"] for point in points],
            )
            curves.setdefault(curve["metric"], []).append(trace)
    plots = [
        {"title": metric_name(metric), "traces": curves.get(metric["id"], [])}
        for metric in results["metrics"]
    ]
    return _with_axes(plots, log_axis(l0s), {})


def firing_frequencies(results: Results) -> list[Plot]:
    """Number of sparse latents that fire more often than x, mean over seeds, for each k."""

    def curve(seeds: Seeds) -> Trace:
        histograms = [sae["firing_histogram"] for sae in seeds]
        trace = _exceedance(histograms, "log10_edges")
        return {**trace, "x": [10**edge for edge in trace["x"]]}

    plots = _facets(results, curve)
    x_axis = log_axis([*_values(plots, "x"), 1.0], ".3~%")
    return _with_axes(plots, x_axis, log_axis(_values(plots, "y")))


def ablation_ratios(results: Results) -> list[Plot]:
    """
    Cross-entropy under each intervention of `scaffold_ablation`, for each k.

    A bar is the mean over seeds; its whiskers reach from the lowest to the highest end of
    the seeds' own intervals.
    """
    plots = _facets(results, _ablation_bars)
    ends = chain.from_iterable(_values(plots, "customdata"))
    return _with_axes(plots, log_axis([1.0, *ends]), {"autorange": "reversed"})


def scaffold_spectra(results: Results) -> list[Plot]:
    """Singular values of the scaffold's map A B, mean over seeds, for each k."""

    def spectrum(seeds: Seeds) -> Trace:
        known = [sae["scaffold"]["singular_values"] for sae in seeds if sae["scaffold"]]
        means = [fmean(values) for values in zip(*known, strict=True)]
        return {"x": list(range(1, len(means) + 1)), "y": means}

    plots = _facets(results, spectrum)
    top = 1.08 * max(_values(plots, "y"), default=0.0)
    return _with_axes(plots, {"nticks": 8}, {"range": [0, top]})


def alignments(results: Results) -> list[Plot]:
    """Number of sparse latents with more than a share x in the scaffold's span."""

    def curve(seeds: Seeds) -> Trace:
        scaffolds = [sae["scaffold"] for sae in seeds if sae["scaffold"]]
        histograms = [scaffold["alignment_histogram"] for scaffold in scaffolds]
        return _exceedance(histograms, "edges")

    plots = _facets(results, curve)
    x_axis = {"tickformat": ".0%", "nticks": 6}
    return _with_axes(plots, x_axis, log_axis(_values(plots, "y")))


def _facets(results: Results, draw: Callable[[Seeds], Trace]) -> list[Plot]:
    """
    A plot for each k, with a trace for each series that has data.

    Args:
        results: The comparison's results.
        draw: Draws the seeds of one series at one k.
    """
    by_k: dict[Any, dict[str, list[Mapping[str, Any]]]] = {}
    for sae in results["saes"]:
        series = series_of(sae["architecture"], sae["axes"])
        by_k.setdefault(sae["axes"].get("k"), {}).setdefault(series, []).append(sae)
    plots: list[Plot] = []
    for k, by_series in by_k.items():
        traces = [_trace(series, **draw(seeds)) for series, seeds in by_series.items()]
        title = "" if k is None else f"k = {k}"
        plots.append({"title": title, "traces": [t for t in traces if t["x"]]})
    return plots


def _with_axes(
    plots: Sequence[Plot], x_axis: dict[str, Any], y_axis: dict[str, Any]
) -> list[Plot]:
    """The plots that have traces, with the same axes, so that they compare by eye."""
    axes = {"xaxis": x_axis, "yaxis": y_axis}
    return [{**plot, "axes": axes} for plot in plots if plot["traces"]]


def _trace(series: str, **more: Any) -> Trace:
    # plotly reads some HTML in names
    name = html.escape(series, quote=False)
    return {"type": "scatter", "name": name, "legendgroup": series, **more}


def _ablation_bars(seeds: Seeds) -> Trace:
    measured = [
        sae["evaluations"]["scaffold_ablation"]["cross_entropy"]
        for sae in seeds
        if sae["evaluations"].get("scaffold_ablation")
    ]

    def known(field: str) -> list[float]:
        return [found[field] for found in measured if found.get(field) is not None]

    estimates: dict[str, tuple[float, float, float]] = {}
    for field in dict.fromkeys(field for found in measured for field in found):
        values = known(field)
        if field.startswith("ce_ratio_") and "_ci_" not in field and values:
            # a word a line
            label = field.removeprefix("ce_ratio_").replace("pca", "PCA")
            label = label.replace("_", "<br>")
            ends = values + known(f"{field}_ci_low") + known(f"{field}_ci_high")
            estimates[label] = (fmean(values), min(ends), max(ends))
    return {
        "type": "bar",
        "orientation": "h",
        "y": list(estimates),
        # bars start where the intervention changes nothing
        "base": [1.0] * len(estimates),
        "x": [mean - 1 for mean, _, _ in estimates.values()],
        "error_x": _whiskers(list(estimates.values())),
        "customdata": list(estimates.values()),
    }


def _exceedance(histograms: Sequence[Mapping[str, Any] | None], edges: str) -> Trace:
    """
    Lower edges of the bins (x) and the mean count above each (y), while there is any.

    They start where the count starts to fall. Both are empty without a histogram.
    """
    known = [histogram for histogram in histograms if histogram is not None]
    if not known:
        return {"x": [], "y": []}
    counts = np.mean([histogram["counts"] for histogram in known], axis=0)
    above = np.cumsum(counts[::-1])[::-1]
    is_shown = (above > 0) & (np.append(above[1:], 0.0) < above[0])
    x = np.array(known[0][edges])[:-1][is_shown]
    return {"x": x.tolist(), "y": above[is_shown].tolist()}


def _whiskers(
    estimates: Sequence[tuple[float, float | None, float | None]],
) -> dict[str, Any]:
    """plotly's error bars of (mean, low, high); of no length where an end is missing."""
    return {
        "array": [0 if high is None else high - mean for mean, _, high in estimates],
        "arrayminus": [0 if low is None else mean - low for mean, low, _ in estimates],
    }


def _values(plots: Sequence[Plot], coordinate: str) -> list[Any]:
    return [value for plot in plots for t in plot["traces"] for value in t[coordinate]]


def log_axis(values: Sequence[float], tick_format: str = "~g") -> dict[str, Any]:
    """
    A logarithmic axis with room around the values.

    Args:
        values: Values to show; only positive ones have a place on the axis.
        tick_format: d3's format of the ticks. Without any, plotly labels some of them with
            their digit only (2 and 5 for 20 and 50), in smaller letters.
    """
    logarithms = [math.log10(value) for value in values if value > 0] or [0.0]
    low, high = min(logarithms), max(logarithms)
    margin = max(0.05 * (high - low), 0.04)
    ends = [low - margin, high + margin]
    return {"type": "log", "range": ends, "tickformat": tick_format, "nticks": 6}
