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

# Objects of the package's entry points, in the groups `sae_lens.training_saes` and
# `sae_lens.saes`: (SAE class, config class). SAELens reads no entry points yet.
SCAFFOLD_BATCHTOPK = (ScaffoldBatchTopKTrainingSAE, ScaffoldBatchTopKTrainingSAEConfig)
SCAFFOLD_MATRYOSHKA = (
    ScaffoldMatryoshkaTrainingSAE,
    ScaffoldMatryoshkaTrainingSAEConfig,
)
SCAFFOLD_JUMPRELU = (ScaffoldJumpReLUSAE, ScaffoldJumpReLUSAEConfig)


def register_architectures() -> None:
    """
    Register the scaffold architectures with SAELens.

    `import saelens_scaffold` calls this. Further calls do nothing.

    Raises:
        ValueError: Another package has registered one of the names.
    """
    for classes in (SCAFFOLD_BATCHTOPK, SCAFFOLD_MATRYOSHKA):
        _register(SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class, classes)
    _register(SAE_CLASS_REGISTRY, register_sae_class, SCAFFOLD_JUMPRELU)


def _register(registry: dict[str, Any], register: Any, classes: Any) -> None:
    name = classes[1].architecture()
    if registry.get(name) != classes:
        register(name, *classes)  # raises if the name is taken
