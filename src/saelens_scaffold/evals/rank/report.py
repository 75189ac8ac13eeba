"""What `saelens-scaffold rank` shows."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import MARKDOWN
from rich.markup import escape
from rich.table import Table

from saelens_scaffold._util.files import new_file
from saelens_scaffold._util.tables import markdown
from saelens_scaffold.evals.rank.analysis import RankAnalysis


def analysis_text(analysis: RankAnalysis) -> str:
    """The candidates as a table, and the one that is suggested."""
    table = Table(box=MARKDOWN)
    table.add_column("by", no_wrap=True)
    table.add_column("rank", justify="right")
    table.add_column("reason", no_wrap=True)
    for candidate in analysis.candidates:
        table.add_row(candidate.name, str(candidate.rank), escape(candidate.reason))
    found = analysis.suggestion
    advice = (
        "Nothing stands out from chance: there is no dense part to give a scaffold."
        if found is None
        else f"Try scaffold_rank={found.rank} (by {found.name}), and half and twice as "
        "much: a rank is chosen by comparing SAEs, not by a spectrum."
    )
    return f"{markdown(table)}\n{advice}"


def write_analysis(analysis: RankAnalysis, folder: Path) -> None:
    """Write rank.json and rank.png into a folder."""
    with new_file(folder / "rank.json") as file:
        file.write_text(json.dumps(asdict(analysis), indent=2), encoding="utf-8")
    with new_file(folder / "rank.png") as file:
        picture(analysis).savefig(file, dpi=150, format="png")


def picture(analysis: RankAnalysis) -> Figure:
    """The spectrum and the candidates, the correlations and their null, the dimensions."""
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(14, 4.5), layout="constrained")
        spectrum, correlations, dimensions = figure.subplots(1, 3)
        _draw_spectrum(spectrum, analysis)
        _draw_correlations(correlations, analysis)
        _draw_dimensions(dimensions, analysis)
    return figure


def _draw_spectrum(axes: Axes, analysis: RankAnalysis) -> None:
    axes.loglog(_numbers(analysis.variance_shares), analysis.variance_shares, ".-")
    for i, candidate in enumerate(analysis.candidates):
        if candidate.rank == 0:  # has no place on a logarithmic axis
            continue
        is_suggested = candidate == analysis.suggestion
        axes.axvline(
            candidate.rank,
            color=f"C{i + 1}",
            linestyle="-" if is_suggested else "--",
            linewidth=2 if is_suggested else 1,
            label=f"{candidate.name}: {candidate.rank}",
        )
    axes.set(
        title="spectrum", xlabel="principal direction", ylabel="share of the variance"
    )
    axes.legend()


def _draw_correlations(axes: Axes, analysis: RankAnalysis) -> None:
    measured, null = analysis.correlation_eigenvalues, analysis.null_eigenvalues
    axes.loglog(_numbers(measured), measured, ".-", label="activations")
    axes.loglog(
        _numbers(null),
        null,
        ":",
        color="grey",
        label=f"chance: {analysis.null_quantile:.0%} quantile, {analysis.null_draws} draws",
    )
    axes.set(
        title="correlations without outlier dimensions",
        xlabel="principal direction",
        ylabel="eigenvalue",
    )
    axes.legend()


def _draw_dimensions(axes: Axes, analysis: RankAnalysis) -> None:
    axes.semilogy(analysis.dimension_variances, ".", color="C0", markersize=3)
    for outlier in analysis.outlier_dimensions:
        variance = analysis.dimension_variances[outlier.dimension]
        axes.semilogy(outlier.dimension, variance, "o", color="C1")
        axes.annotate(
            str(outlier.dimension),
            (outlier.dimension, variance),
            xytext=(4, 2),
            textcoords="offset points",
        )
    axes.set(
        title=f"outlier dimensions: {len(analysis.outlier_dimensions)}",
        xlabel="dimension",
        ylabel="variance",
    )


def _numbers(values: Sequence[float]) -> range:
    return range(1, len(values) + 1)
