"""Scaffold SAEs as native SAELens architectures."""

from saelens_scaffold.saes.scaffold_batchtopk_sae import (
    ScaffoldBatchTopKTrainingSAE,
    ScaffoldBatchTopKTrainingSAEConfig,
)
from saelens_scaffold.saes.scaffold_jumprelu_sae import (
    ScaffoldJumpReLUSAE,
    ScaffoldJumpReLUSAEConfig,
)
from saelens_scaffold.saes.scaffold_matryoshka_sae import (
    ScaffoldMatryoshkaTrainingSAE,
    ScaffoldMatryoshkaTrainingSAEConfig,
)

__all__ = [
    "ScaffoldBatchTopKTrainingSAE",
    "ScaffoldBatchTopKTrainingSAEConfig",
    "ScaffoldJumpReLUSAE",
    "ScaffoldJumpReLUSAEConfig",
    "ScaffoldMatryoshkaTrainingSAE",
    "ScaffoldMatryoshkaTrainingSAEConfig",
]
