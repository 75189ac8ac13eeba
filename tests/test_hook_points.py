"""Widths at a language model's hook points are those of its activations."""

import pytest
import torch

from helpers import HAS_BRIDGE
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.models import load_embedded_model, register_embedded_model
from saelens_scaffold.models.hook_points import model_config, width_at


def test_widths_are_those_of_the_activations() -> None:
    config = model_config(register_embedded_model())
    tokens = torch.zeros(1, 3, dtype=torch.long)
    _, cache = load_embedded_model().run_with_cache(tokens)
    names = [name for name in cache if name.startswith("blocks.3.")]
    names = [
        name for name in names if cache[name].shape[1] == 3
    ]  # not of pairs of tokens
    assert len(names) > 10
    for name in names:
        assert width_at(config, name) == cache[name][0, 0].numel()
    z = "blocks.3.attn.hook_z"
    assert width_at(config, z, head_index=1) == cache[z][0, 0, 1].numel()
    # the configuration itself is not changed
    assert config.n_layers == 4


def test_models_are_read_as_they_will_be_loaded() -> None:
    name = register_embedded_model()
    if HAS_BRIDGE:
        assert model_config(name, n_ctx=64).n_ctx == 64
    else:
        with pytest.raises(UserError, match="n_ctx .* needs transformer-lens >= 2.17"):
            model_config(name, n_ctx=64)
    with pytest.raises(UserError, match="layers 0 to 1"):
        width_at(model_config(name, first_n_layers=2), "blocks.2.hook_resid_post")
