"""What `saelens-scaffold rank` shows."""

import json
from dataclasses import asdict
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from rich.box import MARKDOWN
from rich.markup import escape
from rich.table import Table

from saelens_scaffold.evals.table import markdown
from saelens_scaffold.files import new_file
from saelens_scaffold.rank.analysis import RankAnalysis


def analysis_text(analysis: RankAnalysis) -> str:
    """The candidates as a table, and the one that is suggested."""
    table = Table(box=MARKDOWN)
    table.add_column("by", no_wrap=True)
    table.add_column("rank", justify="right")
    table.add_column("reason", no_wrap=True)
    for candidate in analysis.candidates:
        table.add_row(candidate.name, str(candidate.rank), escape(candidate.reason))
    found = analysis.suggestion
    return (
        f"{markdown(table)}\nTry scaffold_rank={found.rank} (by {found.name}), and half and "
        "twice as much: a rank is chosen by comparing SAEs, not by a spectrum."
    )


def write_analysis(analysis: RankAnalysis, folder: Path) -> None:
    """Write rank.json and rank.png into a folder."""
    with new_file(folder / "rank.json") as file:
        file.write_text(json.dumps(asdict(analysis), indent=2), encoding="utf-8")
    with new_file(folder / "rank.png") as file:
        picture(analysis).savefig(file, dpi=150, format="png")


def picture(analysis: RankAnalysis) -> Figure:
    """The spectrum, that of shuffled activations, and the candidates."""
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        numbers = range(1, len(analysis.variance_shares) + 1)
        axes.loglog(numbers, analysis.variance_shares, label="activations")
        axes.loglog(
            numbers,
            analysis.noise_shares,
            ":",
            color="grey",
            label="dimensions shuffled",
        )
        for i, candidate in enumerate(analysis.candidates):
            is_suggested = candidate == analysis.suggestion
            axes.axvline(
                candidate.rank,
                color=f"C{i + 1}",
                linestyle="-" if is_suggested else "--",
                linewidth=2 if is_suggested else 1,
                label=f"{candidate.name}: {candidate.rank}",
            )
        axes.set_xlabel("principal direction")
        axes.set_ylabel("share of the variance")
        axes.legend()
    return figure
