"""Registration of the scaffold architectures with SAELens."""

from typing import Any

from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)

from saelens_scaffold.saes import (
    ScaffoldBatchTopKTrainingSAE,
    ScaffoldBatchTopKTrainingSAEConfig,
    ScaffoldJumpReLUSAE,
    ScaffoldJumpReLUSAEConfig,
    ScaffoldMatryoshkaTrainingSAE,
    ScaffoldMatryoshkaTrainingSAEConfig,
)

# The objects of the package's entry points, (SAE class, config class), in the groups
# `sae_lens.training_saes` and `sae_lens.saes`. SAELens reads no entry points yet.
SCAFFOLD_BATCHTOPK = (ScaffoldBatchTopKTrainingSAE, ScaffoldBatchTopKTrainingSAEConfig)
SCAFFOLD_MATRYOSHKA = (
    ScaffoldMatryoshkaTrainingSAE,
    ScaffoldMatryoshkaTrainingSAEConfig,
)
SCAFFOLD_JUMPRELU = (ScaffoldJumpReLUSAE, ScaffoldJumpReLUSAEConfig)


def register_architectures() -> None:
    """
    Make the scaffold architectures known to SAELens, as its own are.

    Called by `import saelens_scaffold`; calling it again does nothing.

    Raises:
        ValueError: If another package has registered one of the names.
    """
    for registry, register, classes in (
        (SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class, SCAFFOLD_BATCHTOPK),
        (SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class, SCAFFOLD_MATRYOSHKA),
        (SAE_CLASS_REGISTRY, register_sae_class, SCAFFOLD_JUMPRELU),
    ):
        _register_once(registry, register, classes)


def _register_once(registry: dict[str, Any], register: Any, classes: Any) -> None:
    name = classes[1].architecture()
    if registry.get(name) != classes:
        register(name, *classes)  # raises if the name is taken
