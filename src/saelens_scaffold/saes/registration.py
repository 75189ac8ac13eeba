"""Registration of the scaffold architectures with SAELens."""

from typing import Any

from sae_lens import registry

from saelens_scaffold import saes

# Objects of the package's entry points, in the groups `sae_lens.training_saes` and
# `sae_lens.saes`: (SAE class, config class). SAELens reads no entry points yet.
SCAFFOLD_BATCHTOPK = (
    saes.ScaffoldBatchTopKTrainingSAE,
    saes.ScaffoldBatchTopKTrainingSAEConfig,
)
SCAFFOLD_MATRYOSHKA = (
    saes.ScaffoldMatryoshkaTrainingSAE,
    saes.ScaffoldMatryoshkaTrainingSAEConfig,
)
SCAFFOLD_JUMPRELU = (saes.ScaffoldJumpReLUSAE, saes.ScaffoldJumpReLUSAEConfig)


def register_architectures() -> None:
    """
    Register the scaffold architectures with SAELens.

    `import saelens_scaffold` calls this. Further calls do nothing.

    Raises:
        ValueError: Another package has registered one of the names.
    """
    training, inference = (
        registry.SAE_TRAINING_CLASS_REGISTRY,
        registry.SAE_CLASS_REGISTRY,
    )
    entries: list[Any] = [
        (training, registry.register_sae_training_class, SCAFFOLD_BATCHTOPK),
        (training, registry.register_sae_training_class, SCAFFOLD_MATRYOSHKA),
        (inference, registry.register_sae_class, SCAFFOLD_JUMPRELU),
    ]
    for known, register, classes in entries:
        name = classes[1].architecture()
        if known.get(name) != classes:
            register(name, *classes)  # raises if the name is taken
