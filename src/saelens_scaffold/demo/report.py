"""Results of the demo, the same for both halves; their tables and picture."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import yaml
from matplotlib.figure import Figure
from rich.box import MARKDOWN
from rich.table import Table

from saelens_scaffold._util.files import new_file
from saelens_scaffold._util.plots import draw_firing_curve, finish_firing_axes
from saelens_scaffold._util.tables import markdown

DENSE = {"dense_10": 0.1, "dense_20": 0.2, "dense_50": 0.5}
"""Column -> firing frequency above which it counts a latent as dense."""

COLUMNS: Any = yaml.safe_load(Path(__file__).with_name("columns.yaml").read_text())
"""Header, digits and metric of each column."""

TWINS = {
    "scaffold_batchtopk": "batchtopk",
    "scaffold_matryoshka": "matryoshka_batchtopk",
}
"""Scaffold architecture -> its plain twin."""

COLOURS = {"batchtopk": "tab:blue", "matryoshka_batchtopk": "tab:orange"}


@dataclass
class Row:
    """
    One trained SAE, measured on held-out activations.

    Attributes:
        sae: Architecture, and what else tells it from other SAEs of its half.
        architecture: Training architecture.
        seed: Training seed.
        numbers: Values by column, in the order of `COLUMNS`; None where a plain SAE has
            none.
        firing_frequencies: Share of the tokens on which each sparse latent fires; on a
            language model, of alive latents, rounded to the centre of a histogram bin.
        l0_warning: Warning of a planted SAE whose l0_sparse is far from k.
    """

    sae: str
    architecture: str
    seed: int
    numbers: dict[str, float | None]
    firing_frequencies: list[float]
    l0_warning: str | None = None


class Half(NamedTuple):
    """
    One half of the demo.

    Attributes:
        title: Heading of its table.
        saes: Rows of all seeds of each SAE.
        notes: Lines to print below the table.
    """

    title: str
    saes: dict[str, list[Row]]
    notes: list[str]


def by_sae(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows grouped by SAE, in their order."""
    return {row.sae: [r for r in rows if r.sae == row.sae] for row in rows}


def half_text(half: Half) -> str:
    """Title, table, a sentence for each pair of twins, and notes."""
    return "\n".join([f"{half.title}\n", _table(half), *_sentences(half), *half.notes])


def _table(half: Half) -> str:
    """A row for each SAE: values of one seed, or mean ± standard deviation of several."""
    columns = next(iter(half.saes.values()))[0].numbers
    table = Table("SAE", box=MARKDOWN)
    for column in columns:
        table.add_column(COLUMNS[column]["header"], justify="right")
    for sae, rows in half.saes.items():
        table.add_row(sae, *(_cell(column, rows) for column in columns))
    return markdown(table)


def _cell(column: str, rows: Sequence[Row]) -> str:
    known = [n for row in rows if (n := row.numbers[column]) is not None]
    digits = COLUMNS[column]["digits"]
    if len(known) < 2:
        return f"{known[0]:.{digits}f}" if known else "-"
    digits = max(digits, 1)
    return f"{mean(known):.{digits}f} ± {stdev(known):.{digits}f}"


def _sentences(half: Half) -> Iterator[str]:
    """Dense latents of each scaffold SAE beside those of its plain twins."""
    for scaffold, of_scaffold in half.saes.items():
        for plain, of_plain in half.saes.items():
            if TWINS.get(of_scaffold[0].architecture) == of_plain[0].architecture:
                after, before = _dense_latents(of_scaffold), _dense_latents(of_plain)
                change = f" ({after / before - 1:+.0%})" if before else ""
                yield (
                    f"{scaffold} has {after:.1f} latents firing on more than "
                    f"{DENSE['dense_10']:.0%} of the tokens, {plain} {before:.1f}{change}."
                )


def _dense_latents(rows: Sequence[Row]) -> float:
    return mean(row.numbers["dense_10"] or 0 for row in rows)


def write_picture(halves: Sequence[Half], path: Path) -> None:
    """
    Draw the firing-frequency distributions of each half, and save them as a PNG.

    A point (x, y) of a curve: y sparse latents fire on more than x of the tokens. Seeds
    are separate curves.
    """
    figure = Figure(figsize=(6.4 * len(halves), 4.8), layout="constrained")
    axes = figure.subplots(1, len(halves), squeeze=False)[0]
    for axis, half in zip(axes, halves, strict=True):
        drawn: list[str] = []
        for sae, rows in half.saes.items():
            architecture = rows[0].architecture
            twin = TWINS.get(architecture)
            style = "-" if twin else ("--", ":")[drawn.count(architecture)]
            drawn.append(architecture)
            for row in rows:
                look = {"color": COLOURS[twin or architecture]}
                label = sae if row is rows[0] else None
                frequencies = row.firing_frequencies
                draw_firing_curve(axis, frequencies, style, label=label, **look)
        axis.set_title(half.title)
        finish_firing_axes(axis, DENSE["dense_10"])
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
