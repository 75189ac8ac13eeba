"""PyTorch's fused attention and GELU in TransformerLens's models."""

from typing import Any

import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from saelens_scaffold.models import load_embedded_model
from saelens_scaffold.models.fused import fused
from saelens_scaffold.models.language_models import load_language_model

HOOK = "blocks.1.hook_resid_post"


def random_model(**changes: Any) -> HookedTransformer:
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "n_layers": 2,
        "d_model": 32,
        "n_ctx": 48,
        "d_head": 8,
        "n_heads": 4,
        "d_vocab": 50,
        "act_fn": "gelu",
        "seed": 0,
        "init_weights": True,
        **changes,
    }
    model = HookedTransformer(HookedTransformerConfig(**fields))
    model.tokenizer = load_embedded_model().tokenizer
    return model


def activations(model: HookedTransformer, tokens: torch.Tensor) -> torch.Tensor:
    """As SAELens's store reads them."""
    cached = {"names_filter": [HOOK], "stop_at_layer": 2, "prepend_bos": False}
    return model.run_with_cache(tokens, **cached)[1][HOOK]


def n_fused(model: HookedTransformer) -> int:
    return sum("calculate_z_scores" in vars(block.attn) for block in model.blocks)  # type: ignore[arg-type]


@pytest.mark.parametrize("positions", ["standard", "rotary"])
@torch.no_grad()
def test_activations_are_the_same(positions: str):
    rotary = {"positional_embedding_type": positions, "rotary_dim": 8}
    model = random_model(**rotary)
    tokens = torch.randint(0, 50, (3, 48))
    expected = activations(model, tokens)
    with fused(model):
        assert n_fused(model) == 2
        found = activations(model, tokens)
    assert n_fused(model) == 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(activations(model, tokens), expected)


@torch.no_grad()
def test_the_embedded_model_s_activations_are_the_same():
    model = load_embedded_model()
    tokens = torch.randint(0, model.cfg.d_vocab, (2, 256))
    tokens[:, [0, 100]] = model.tokenizer.bos_token_id  # type: ignore[union-attr]
    expected = activations(model, tokens)
    with fused(model):
        assert n_fused(model) == 4
        found = activations(model, tokens)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("point", ["hook_pattern", "hook_attn_scores"])
@torch.no_grad()
def test_hooks_read_real_patterns(point: str):
    model, seen = random_model(), []
    tokens = torch.randint(0, 50, (3, 20))
    name = f"blocks.0.attn.{point}"
    expected = model.run_with_cache(tokens, names_filter=[name])[1][name]
    with fused(model):
        model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: seen.append(x))])  # noqa: ARG005
    assert torch.equal(seen[0], expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_scores_soft_cap": 5.0},
        {"attention_dir": "bidirectional"},
        {"n_key_value_heads": 2},
        {"positional_embedding_type": "alibi"},
        {"use_local_attn": True, "attn_types": ["local", "local"], "window_size": 4},
    ],
    ids=str,
)
@torch.no_grad()
def test_other_attention_is_left_as_it_is(changes: dict[str, Any]):
    model, tokens = random_model(**changes), torch.randint(0, 50, (2, 20))
    expected = activations(model, tokens)
    with fused(model):
        assert n_fused(model) == 0
        assert torch.equal(activations(model, tokens), expected)


@torch.no_grad()
def test_a_mask_of_padding_counts():
    model, tokens = random_model(), torch.randint(0, 50, (2, 20))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    expected = model(tokens, attention_mask=mask)
    with fused(model):
        assert torch.equal(model(tokens, attention_mask=mask), expected)


def test_evaluations_have_it():
    model: Any = load_language_model("py-neox", "cpu")
    assert n_fused(model) == 4
    with fused(model):  # as in a training
        assert n_fused(model) == 4
    assert n_fused(model) == 4


def test_padding_on_the_left_and_other_models_are_left_as_they_are():
    model = random_model()
    model.tokenizer.padding_side = "left"  # type: ignore[union-attr]
    with fused(model), fused(object()):
        assert n_fused(model) == 0


@pytest.mark.parametrize("act_fn", ["gelu_new", "gelu_fast"])
@torch.no_grad()
def test_gelu_of_gpt2_is_the_same(act_fn: str):
    model = random_model(act_fn=act_fn)
    own = [block.mlp.act_fn for block in model.blocks]
    tokens = torch.randint(0, 50, (3, 48))
    expected = activations(model, tokens)
    with fused(model):
        assert not any(block.mlp.act_fn in own for block in model.blocks)
        found = activations(model, tokens)
    assert [block.mlp.act_fn for block in model.blocks] == own
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_model_without_a_tokenizer_is_fused():
    model = random_model()
    model.tokenizer = None
    with fused(model):
        assert n_fused(model) == 2
