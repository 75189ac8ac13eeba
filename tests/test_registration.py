"""Registration with SAELens; the entry points are tested with the command line."""

import pytest
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

import saelens_scaffold


def test_importing_registers_and_registering_again_does_nothing():
    saelens_scaffold.register_architectures()
    assert {"scaffold_batchtopk", "scaffold_matryoshka"} <= set(
        SAE_TRAINING_CLASS_REGISTRY
    )
    assert "scaffold_jumprelu" in SAE_CLASS_REGISTRY


def test_a_name_taken_by_another_package_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(SAE_CLASS_REGISTRY, "scaffold_jumprelu", (object, object))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scaffold_jumprelu already registered"):
        saelens_scaffold.register_architectures()
