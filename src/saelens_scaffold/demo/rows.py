"""Rows of the demo's tables, the same for both halves."""

from dataclasses import dataclass
from typing import NamedTuple

DENSE = {"dense_10": 0.1, "dense_20": 0.2, "dense_50": 0.5}
"""Column -> firing frequency above which it counts a latent as dense."""


class Column(NamedTuple):
    """
    A column of numbers.

    Attributes:
        title: Column header.
        digits: Digits after the point; 0 for a count.
    """

    title: str
    digits: int


COLUMNS = {
    **{name: Column(f"> {threshold:.0%}", 0) for name, threshold in DENSE.items()},
    "alive": Column("alive", 0),
    "l0_sparse": Column("l0_sparse", 1),
    "l0_total": Column("l0_total", 1),
    "explained_variance": Column("expl. var.", 3),
    "ce_loss_score": Column("CE score", 3),
    "feature_cosine": Column("cosine", 3),
    "overlap": Column("overlap", 4),
}

LEGEND = """\
> 10%, > 20%, > 50%: sparse latents that fire on more of the tokens; alive: that fire at
all; l0_sparse, l0_total: latents that fire per token, without and with the scaffold's;
expl. var.: explained variance; CE score: CE loss score; cosine: mean best cosine of alive
latents with the planted features; overlap: of the scaffold with the planted dense
subspace, or with the top-r PCA subspace."""

TWINS = {
    "scaffold_batchtopk": "batchtopk",
    "scaffold_matryoshka": "matryoshka_batchtopk",
}
"""Scaffold architecture -> its plain twin."""


@dataclass
class Row:
    """
    One trained SAE, measured on held-out activations.

    Attributes:
        sae: Architecture, and what else tells it from other SAEs of its half.
        architecture: Training architecture.
        seed: Training seed.
        numbers: Values of columns, by their names in `COLUMNS`; None where a plain SAE
            has none.
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
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.sae, []).append(row)
    return grouped
