"""The demo's table and picture."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from saelens_scaffold._util.files import new_file
from saelens_scaffold._util.plots import finish_firing_axes
from saelens_scaffold.demo.architectures import TWINS
from saelens_scaffold.demo.language_model import CENTRED
from saelens_scaffold.demo.measures import DENSE_THRESHOLDS, Measured


class Part(NamedTuple):
    """
    One part of the demo: SAEs measured on the same data.

    Attributes:
        title: What it is, in a line.
        results: Every SAE of every seed.
    """

    title: str
    results: Sequence[Measured]

    def by_sae(self) -> dict[str, list[Measured]]:
        """The seeds' results of each SAE, in the order in which they were measured."""
        grouped: dict[str, list[Measured]] = {}
        for result in self.results:
            grouped.setdefault(result.sae, []).append(result)
        return grouped


COLUMNS = """\
> 10%, > 20%, > 50%: sparse latents that fire on more of the tokens; alive: that fire at
all; l0_sparse, l0_total: latents that fire per token, without and with the scaffold's;
expl. var.: explained variance; CE score: SAELens's ce_loss_score; cosine: mean best
cosine of living latents with the planted features; overlap: of the scaffold with the
planted dense subspace, or with the top-r PCA subspace."""


def print_part(part: Part, console: Console) -> None:
    """Print a part's title and table."""
    console.print(f"\n{part.title}", style="bold")
    console.print(_table(part))


def _table(part: Part) -> Table:
    """One row an SAE: the value of one seed, or mean ± standard deviation of several."""
    grid = Table(box=MARKDOWN)
    grid.add_column("SAE", no_wrap=True)
    columns = [
        *(f"> {threshold:.0%}" for threshold in DENSE_THRESHOLDS),
        "alive",
        "l0_sparse",
        "l0_total",
        "expl. var.",
        "CE score",
        "cosine",
        "overlap",
    ]
    rows = {
        name: [
            *(
                _mean([float(r.dense_latents[i]) for r in runs], 0)
                for i in range(len(DENSE_THRESHOLDS))
            ),
            _mean([float(r.alive_latents) for r in runs], 0),
            _mean([r.l0_sparse for r in runs], 1),
            _mean([r.l0_total for r in runs], 1),
            _mean([r.explained_variance for r in runs], 3),
            _mean([r.ce_loss_score for r in runs], 3),
            _mean([r.feature_cosine for r in runs], 3),
            _mean([r.scaffold_overlap for r in runs], 4),
        ]
        for name, runs in part.by_sae().items()
    }
    # a column that no SAE of this part has a value for is left out
    used = [i for i in range(len(columns)) if any(row[i] for row in rows.values())]
    for i in used:
        grid.add_column(columns[i], justify="right", no_wrap=True)
    for name, row in rows.items():
        grid.add_row(name, *(row[i] or "-" for i in used))
    return grid


def _mean(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    if len(known) == 1:
        return f"{known[0]:.{digits}f}"
    digits = max(digits, 1)
    mean, spread = statistics.mean(known), statistics.stdev(known)
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def dense_latent_summary(part: Part) -> list[str]:
    """A sentence for each scaffold SAE and twin: how many dense latents are left."""
    runs = part.by_sae()
    sentences: list[str] = []
    for scaffold, plain in TWINS.items():
        for twin in (plain, plain + CENTRED):
            if scaffold not in runs or twin not in runs:
                continue
            before = statistics.mean(r.dense_latents[0] for r in runs[twin])
            after = statistics.mean(r.dense_latents[0] for r in runs[scaffold])
            change = f" ({after / before - 1:+.0%})" if before else ""
            sentences.append(
                f"{scaffold} has {after:.1f} latents firing on more than "
                f"{DENSE_THRESHOLDS[0]:.0%} of the tokens, {twin} {before:.1f}{change}."
            )
    return sentences


def write_picture(parts: Sequence[Part], path: Path) -> None:
    """
    Draw each part's firing-frequency distributions, and save them as a PNG.

    A point (x, y) of a curve says: y sparse latents fire on more than x of the tokens.
    Seeds are drawn as separate curves.
    """
    figure = Figure(figsize=(6.4 * len(parts), 4.8), layout="constrained")
    axes = figure.subplots(1, len(parts), squeeze=False)[0]
    for axis, part in zip(axes, parts, strict=True):
        _draw_firing_frequencies(axis, part)
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _draw_firing_frequencies(axis: Axes, part: Part) -> None:
    colours = {"BatchTopK": "tab:blue", "Matryoshka": "tab:orange"}
    for name, runs in part.by_sae().items():
        plain = TWINS.get(name, name.removesuffix(CENTRED))
        style = "-" if name in TWINS else (":" if name.endswith(CENTRED) else "--")
        for i, run in enumerate(runs):
            frequencies = np.sort(np.asarray(run.firing_frequencies))[::-1]
            alive = frequencies[frequencies > 0]
            axis.step(
                alive,
                np.arange(1, len(alive) + 1),
                linestyle=style,
                color=colours.get(plain),
                linewidth=1.6,
                label=name if i == 0 else None,
            )
    axis.set_title(part.title)
    finish_firing_axes(axis, DENSE_THRESHOLDS[0])
