"""The SAEs that the demo compares: each plain architecture and its scaffold twin."""

from typing import Any

from sae_lens import (
    BatchTopKTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainingSAEConfig

from saelens_scaffold.saes import (
    ScaffoldBatchTopKTrainingSAEConfig,
    ScaffoldMatryoshkaTrainingSAEConfig,
)

# scaffold SAE -> its plain twin, by their names in the tables
TWINS = {"ScaffoldBatchTopK": "BatchTopK", "ScaffoldMatryoshka": "Matryoshka"}


def twin_configs(
    d_in: int,
    d_sae: int,
    k: float,
    scaffold_rank: int,
    matryoshka_widths: tuple[int, ...],
    **others: Any,
) -> dict[str, TrainingSAEConfig]:
    """
    The four architectures at the same width and the same k, by their names.

    Args:
        d_in: Dimension of the activations.
        d_sae: Number of latents, those of a scaffold included.
        k: Sparse latents active per token.
        scaffold_rank: Rank of the scaffolds.
        matryoshka_widths: Widths of the Matryoshka levels.
        others: Further fields that all SAELens training configurations have.
    """
    plain: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "k": k, **others}
    scaffold: dict[str, Any] = {**plain, "scaffold_rank": scaffold_rank}
    return {
        "BatchTopK": BatchTopKTrainingSAEConfig(**plain),
        "ScaffoldBatchTopK": ScaffoldBatchTopKTrainingSAEConfig(**scaffold),
        "Matryoshka": MatryoshkaBatchTopKTrainingSAEConfig(
            **plain, matryoshka_widths=list(matryoshka_widths)
        ),
        "ScaffoldMatryoshka": ScaffoldMatryoshkaTrainingSAEConfig(
            **scaffold, matryoshka_widths=list(matryoshka_widths)
        ),
    }
