"""Means over tokens of the last residual stream, from means within the last layer."""

from typing import Any

import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from saelens_scaffold.evals.model import HookedModel
from saelens_scaffold.models.pooling import pooling_hooks

SHAPE = (3, 20)


def random_model(**changes: Any) -> HookedTransformer:
    torch.manual_seed(0)
    values: dict[str, Any] = {"n_layers": 3, "d_model": 16, "n_ctx": 32, "d_head": 4}
    values |= {"d_vocab": 50, "act_fn": "gelu", "device": "cpu", **changes}
    model = HookedTransformer(HookedTransformerConfig(**values))
    for parameter in model.parameters():  # biases are 0 at first
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def weights() -> torch.Tensor:
    """Of a mean, of one token, and of no token."""
    found = torch.zeros(SHAPE)
    found[0, 3:11] = 1 / 8
    found[1, 7] = 1
    return found


@pytest.mark.parametrize(
    ("changes", "n_pooled"),
    [
        ({}, 1),
        ({"gated_mlp": True, "normalization_type": "RMS"}, 1),
        ({"parallel_attn_mlp": True}, 2),
        ({"parallel_attn_mlp": True, "dtype": torch.float64}, 2),
        ({"use_normalization_before_and_after": True, "normalization_type": "RMS"}, 0),
        ({"attn_only": True}, 0),
        ({"dtype": torch.bfloat16}, 0),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_mean_is_that_of_every_token(
    changes: dict[str, Any], n_pooled: int, weights: torch.Tensor
):
    model = random_model(**changes)
    assert len(pooling_hooks(model, weights)) == n_pooled
    tokens = torch.randint(0, 50, SHAPE)
    for name in (
        "blocks.0.hook_resid_post",
        "blocks.1.mlp.hook_post",
        "blocks.1.hook_resid_post",
        "blocks.2.hook_mlp_out",
        "blocks.2.mlp.hook_post",
        "blocks.2.hook_resid_post",
    ):
        if changes.get("attn_only") and "mlp" in name:
            continue
        hooked = HookedModel(model, name)
        x, start = hooked.below(tokens)
        changed = x + torch.randn_like(x)
        hook = (name, lambda _, hook, new=changed: new)  # noqa: ARG005
        last: list[torch.Tensor] = []
        read = ("blocks.2.hook_resid_post", lambda x, hook, to=last: to.append(x))  # noqa: ARG005
        model.run_with_hooks(tokens, fwd_hooks=[hook, read])
        expected = torch.einsum("bs,bsd->bd", weights.double(), last[0].double())
        found = hooked.pooled_above(start, changed, weights)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
        assert (found[2] == 0).all()
        assert (found[:2] != 0).all()
