"""A scaffold for an SAE that exists, against plain PyTorch on all tokens in memory."""

from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from helpers import D_IN, D_SAE, activations, scaffold_sae, train
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.saes.absorption import (
    absorb_scaffold,
    jumprelu_form,
)

CLASSES: dict[str, tuple[Any, Any]] = {
    "standard": (StandardSAE, StandardSAEConfig),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
    "gated": (GatedSAE, GatedSAEConfig),
    "topk": (TopKSAE, TopKSAEConfig),
}


def plain_sae(architecture: str, seed: int = 0, **fields: Any) -> SAE[Any]:
    """An untrained SAE whose every weight matters."""
    sae_class, cfg_class = CLASSES[architecture]
    metadata = SAEMetadata(model_name="py-neox", hook_name=fields.pop("hook_name", "h"))
    cfg = cfg_class(**{"d_in": D_IN, "d_sae": D_SAE, "metadata": metadata, **fields})
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    sae = sae_class(cfg)
    with torch.no_grad():
        for name, of in sae.named_parameters():
            of.copy_(torch.randn(of.shape, generator=g) * of.std().nan_to_num(0.3))
            if name != "W_enc":
                of.add_(0.2 * torch.randn(of.shape, generator=g))
        if architecture == "jumprelu":
            sae.threshold.abs_()
    return sae


def optimum(x: torch.Tensor, error: torch.Tensor, rank: int) -> torch.Tensor:
    """Predictions of reduced-rank regression with an intercept, by SVD in float64."""
    x, error = x.double(), error.double()
    inputs = torch.cat([x - x.mean(0), torch.ones(len(x), 1)], dim=1)
    fitted = inputs @ torch.linalg.lstsq(inputs, error).solution
    mean = error.mean(0)
    u, s, vh = torch.linalg.svd(fitted - mean, full_matrices=False)
    return mean + u[:, :rank] * s[:rank] @ vh[:rank]


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_it_adds_the_optimum_of_reduced_rank_regression(
    architecture: str, apply_b_dec_to_input: bool
):
    sae = plain_sae(architecture, apply_b_dec_to_input=apply_b_dec_to_input)
    x = activations(1000)
    before = sae(x).detach()
    for rank in 0, 1, 5:
        absorbed = absorb_scaffold(sae, x.split(64), rank)
        assert absorbed.cfg.scaffold_rank == rank
        expected = before + optimum(x, x - before, rank)
        assert torch.allclose(absorbed(x).double(), expected, atol=1e-4)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_the_dictionary_stays_as_it_is(architecture: str, apply_b_dec_to_input: bool):
    sae = plain_sae(architecture, apply_b_dec_to_input=apply_b_dec_to_input)
    x = activations(1000)
    acts = sae.encode(x)
    absorbed = absorb_scaffold(sae, [x], rank=3)
    assert torch.allclose(absorbed.encode(x)[:, 3:], acts, atol=1e-4)
    assert ((absorbed.encode(x)[:, 3:] > 0) == (acts > 0)).float().mean() > 0.9999
    assert torch.equal(absorbed.W_dec[3:], sae.W_dec)
    assert torch.allclose(absorbed.to_jumprelu()(x), absorbed(x), atol=1e-4)
    assert torch.allclose(absorbed.sparse_sae().encode(x), acts, atol=1e-4)
    assert torch.allclose(absorbed.encode(x)[:, :3].mean(0), torch.zeros(3), atol=1e-3)


@pytest.mark.parametrize("rescale", [True, False])
def test_topk_becomes_a_threshold_at_which_k_latents_fire(rescale: bool):
    sae = plain_sae("topk", k=4, rescale_acts_by_decoder_norm=rescale)
    x = activations(2000)
    with pytest.raises(UserError, match="give activations to calibrate"):
        absorb_scaffold(sae, [x], rank=2)
    form = jumprelu_form(sae, x)
    acts, own = form.encode(x), sae.encode(x)
    # the activations of whatever fires in both are those of the SAE
    norms = sae.W_dec.norm(dim=1) if rescale else torch.ones(D_SAE)
    in_both = (acts > 0) & (own > 0)
    assert in_both.sum() > 0.5 * (own > 0).sum()
    assert torch.allclose(acts[in_both], own[in_both], atol=1e-4)
    assert torch.allclose(form.W_dec * norms[:, None], sae.W_dec, atol=1e-5)
    assert (acts > 0).sum() == 4 * len(x)
    metadata: Any = form.cfg.metadata
    assert metadata.k == 4 and metadata.threshold_calibration["n_tokens"] == len(x)

    absorbed = absorb_scaffold(form, [x], rank=2)
    expected = form(x) + optimum(x, x - form(x), 2)
    assert torch.allclose(absorbed(x).double(), expected, atol=1e-4)


@pytest.mark.parametrize("norm", ["constant_norm_rescale", "layer_norm"])
def test_with_run_time_normalisation_the_normalised_errors_count(norm: Any):
    sae = plain_sae("jumprelu", normalize_activations=norm)
    x = activations(1000) * torch.linspace(0.5, 5, 1000)[:, None]
    before = sae(x).detach()
    # normalised activations have sum 0, up to rounding
    exact = x.double()
    mean, size = torch.zeros(1), exact.norm(dim=1, keepdim=True) / D_IN**0.5
    if norm == "layer_norm":
        mean, size = exact.mean(1, keepdim=True), exact.std(1, keepdim=True)
    absorbed = absorb_scaffold(sae, x.split(100), rank=4)
    expected = optimum((exact - mean) / size, (exact - before) / size, 4) * size
    assert torch.allclose(absorbed(x).double(), before + expected, atol=1e-2, rtol=1e-3)
    assert torch.allclose(absorbed.to_jumprelu()(x), absorbed(x), atol=1e-3)


def test_heads_are_read_as_the_sae_reads_them():
    fields: Any = {"hook_name": "blocks.0.attn.hook_z", "reshape_activations": "hook_z"}
    sae, flat = plain_sae("standard", **fields), plain_sae("standard")
    x = activations(500)
    absorbed = absorb_scaffold(sae, [x.view(500, 4, D_IN // 4)], rank=3)
    expected = absorb_scaffold(flat, [x], rank=3)(x)
    heads = absorbed(x.view(500, 4, D_IN // 4))
    assert torch.allclose(heads.flatten(1), expected, atol=1e-4)


def test_a_scaffold_that_is_there_stays_and_grows():
    sae = train(scaffold_sae())
    x, whole = activations(1000), sae.to_inference()
    absorbed = absorb_scaffold(sae, [x], rank=2)
    assert absorbed.cfg.scaffold_rank == 2 + whole.cfg.scaffold_rank
    expected = whole(x) + optimum(x, x - whole(x), 2)
    assert torch.allclose(absorbed(x).double(), expected, atol=1e-3)
    assert torch.allclose(absorbed.encode(x)[:, 2:], whole.encode(x), atol=1e-3)


def test_the_scaffold_takes_the_place_of_latents_that_are_taken_out():
    sae = plain_sae("standard")
    x = activations(1000)
    frequency = (sae.encode(x) > 0).float().mean(0)
    dense = frequency.topk(10).indices
    absorbed = absorb_scaffold(sae, [x], rank=4, drop_latents=dense)
    kept = torch.ones(D_SAE).index_fill(0, dense, 0.0)
    left = sae.decode(sae.encode(x) * kept)
    assert absorbed.cfg.d_sae == D_SAE - 10 + 4
    expected = left + optimum(x, x - left, 4)
    assert torch.allclose(absorbed(x).double(), expected, atol=1e-4)


def test_a_batchtopk_sae_goes_through_in_the_form_in_which_it_is_saved(tmp_path: Any):
    cfg = BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=4)
    sae: Any = train(BatchTopKTrainingSAE(cfg))
    sae.save_inference_model(tmp_path)
    saved = SAE.load_from_disk(tmp_path)
    x = activations(2000)
    absorbed = absorb_scaffold(saved, [x], rank=3)
    assert torch.allclose(absorbed.encode(x)[:, 3:], saved.encode(x), atol=1e-4)

    def error(of: Any) -> torch.Tensor:
        held_out = activations(2000, seed=1)
        return (held_out - of(held_out)).pow(2).sum()

    assert error(absorbed) < error(saved)


def test_half_precision_is_left_for_single():
    sae = plain_sae("standard").to(dtype=torch.bfloat16)
    x = activations(500)
    absorbed = absorb_scaffold(sae, [x], rank=1)
    assert absorbed.cfg.dtype == "float32"
    exact = plain_sae("standard")
    exact.load_state_dict(sae.state_dict())
    assert torch.allclose(absorbed.encode(x)[:, 1:], exact.encode(x), atol=1e-4)


@pytest.mark.parametrize("architecture", ["abstopk", "matching_pursuit"])
def test_architectures_without_a_jumprelu_form_are_refused(architecture: str):
    sae_class, cfg_class = SAE_CLASS_REGISTRY[architecture]
    sae: Any = sae_class(cfg_class(d_in=D_IN, d_sae=D_SAE))
    with pytest.raises(UserError, match=f"'{architecture}' has no JumpReLU form"):
        absorb_scaffold(sae, [activations(100)], rank=1)


def test_there_are_more_tokens_than_dimensions():
    with pytest.raises(UserError, match="more than 16 tokens.* there are 16"):
        absorb_scaffold(plain_sae("standard"), [activations(16)], rank=1)


def test_weights_of_an_unknown_scale_are_refused():
    sae = plain_sae("standard", normalize_activations="expected_average_only_in")
    with pytest.raises(UserError, match="normalize_activations"):
        absorb_scaffold(sae, [activations(100)], rank=1)
