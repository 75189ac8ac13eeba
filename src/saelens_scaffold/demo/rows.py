"""Rows of the demo's tables, the same for both halves."""

from dataclasses import dataclass
from typing import NamedTuple

DENSE = {"dense_10": 0.1, "dense_20": 0.2, "dense_50": 0.5}
"""Column -> firing frequency above which it counts a latent as dense."""


COLUMNS = {
    **{name: (f"> {threshold:.0%}", 0) for name, threshold in DENSE.items()},
    "alive": ("alive", 0),
    "l0_sparse": ("l0_sparse", 1),
    "l0_total": ("l0_total", 1),
    "explained_variance": ("expl. var.", 3),
    "ce_loss_score": ("CE score", 3),
    "feature_cosine": ("cosine", 3),
    "overlap": ("overlap", 4),
}
"""Column -> header, and digits after the point."""

LEGEND = """\
> 10%, > 20%, > 50%: sparse latents that fire on more of the tokens; alive: that fire at
all; l0_sparse, l0_total: latents per token, without and with the scaffold's; CE score: CE
loss score; cosine: mean best cosine of alive latents with the planted features; overlap:
of the scaffold with the planted dense subspace, or with the top-r PCA subspace."""

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
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.sae, []).append(row)
    return grouped
