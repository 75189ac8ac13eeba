"""Gradient pursuit against the formulas of arXiv 2410.14670's code, token by token."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import Transcoder, TranscoderConfig

from eval_helpers import D_MODEL, HOOK
from helpers import D_IN, D_SAE, RANK, K, activations, scaffold_sae, train, trainer_for
from saelens_scaffold import pursuit
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.models import load_embedded_model, load_stdlib_text


def reference(x: torch.Tensor, decoder: torch.Tensor, budget: int) -> torch.Tensor:
    """The weights of one token, by the formulas as they stand."""
    w = torch.zeros(len(decoder), dtype=x.dtype)
    for _ in range(budget):
        residual = x - w @ decoder
        products = decoder @ residual
        selected = w != 0
        selected[products.argmax()] = True
        gradient = torch.where(selected, products, 0)
        direction = gradient @ decoder
        step = (direction @ residual) / (direction @ direction)
        w = (w + step * gradient).clamp(min=0)
    return w


def references(
    x: torch.Tensor, decoder: torch.Tensor, budgets: torch.Tensor
) -> torch.Tensor:
    tokens = zip(x, budgets.tolist(), strict=True)
    return torch.stack([reference(token, decoder, n) for token, n in tokens])


def random_sae(architecture: str = "standard", seed: int = 0, **fields: Any) -> Any:
    """An inference SAE with random weights, whose decoder rows are not of unit norm."""
    torch.manual_seed(seed)
    sae_class, cfg_class = get_sae_class(architecture)
    sae: SAE[Any] = sae_class(cfg_class(**{"d_in": D_IN, "d_sae": D_SAE, **fields}))
    sae.W_dec.data = torch.randn_like(sae.W_dec) * (0.2 + torch.rand(len(sae.W_dec), 1))
    sae.W_dec.data[::5] = sae.W_dec[1::5][: len(sae.W_dec[::5])] + 0.3 * sae.W_dec[::5]
    sae.b_dec.data = torch.randn_like(sae.b_dec)
    return sae.to(dtype=sae.dtype).requires_grad_(False)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize(
    ("d_sae", "d_in", "dtype"),
    [(40, 16, "float64"), (40, 16, "float32"), (300, 16, "float64")]
    + [(700, 640, "float32"), (1000, 64, "float32")],
)
def test_reconstructions_and_supports_are_the_papers(
    integers: bool, d_sae: int, d_in: int, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pursuit, "_MIN_LATENTS", 0 if integers else 2**31)
    sae = random_sae(d_sae=d_sae, d_in=d_in, dtype=dtype)
    x = torch.randn(60, d_in, dtype=sae.dtype)
    x[:, 3] *= 30  # as a few coordinates of a residual stream are
    budgets = torch.randint(0, 25, (60,))
    expected = references(x - sae.b_dec, sae.W_dec, budgets)

    acts = pursuit.encode(sae, x, budgets, batch_tokens=7)
    assert torch.equal(acts > 0, expected > 0)
    assert error(sae.decode(acts), sae.decode(expected)) < 1e-5


def test_clamped_latents_and_latents_chosen_twice_are_met():
    sae = random_sae(d_sae=40, dtype="float64")
    x = torch.randn(60, D_IN, dtype=sae.dtype)
    acts = pursuit.encode(sae, x, 8)
    n_active = (acts > 0).sum(dim=1)
    assert (n_active < 8).any() and (n_active == 8).any()
    expected = references(x - sae.b_dec, sae.W_dec, torch.full((60,), 8))
    assert error(acts, expected) < 1e-9


@pytest.mark.parametrize(
    "fields",
    [
        {"architecture": "topk", "k": 5},
        {"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": True},
        {"architecture": "jumprelu", "apply_b_dec_to_input": False},
        {"architecture": "gated", "normalize_activations": "layer_norm"},
        {"normalize_activations": "constant_norm_rescale"},
        {"architecture": "matching_pursuit", "max_iterations": 5},
        {"architecture": "scaffold_jumprelu", "scaffold_rank": 0},
        {"dtype": "float64"},
    ],
    ids=str,
)
def test_own_l0_in_the_space_where_the_decoder_is_linear(fields: dict[str, Any]):
    sae = random_sae(**fields)
    x = activations(40).to(sae.dtype)
    budgets = sae.encode(x).to_dense().count_nonzero(dim=1)
    acts = pursuit.encode(sae, x)
    reconstruction = sae.decode(acts)

    decoder = sae.W_dec.detach()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        decoder = decoder / decoder.norm(dim=1, keepdim=True)
    sae_in = sae.process_sae_in(x)
    target = sae_in if sae.cfg.apply_b_dec_to_input else sae_in - sae.b_dec
    expected = references(target, decoder, budgets)
    assert budgets.max() > budgets.min() or "k" in fields
    assert error(reconstruction, sae.decode(expected)) < 1e-4
    assert (acts.count_nonzero(dim=1) <= budgets).all()
    assert acts.dtype == sae.dtype


@pytest.mark.parametrize("architecture", ["scaffold_batchtopk", "scaffold_matryoshka"])
@pytest.mark.parametrize("inference", [False, True])
def test_scaffold_keeps_its_coordinates(architecture: str, inference: bool):
    sae: Any = train(scaffold_sae(architecture), steps=20)
    sae = sae.to_inference() if inference else sae
    x = activations(128)
    with torch.no_grad():
        encoded = sae.encode(x)
        norms = sae.W_dec.norm(dim=1, keepdim=True)
        decoder = sae.W_dec / (1 if inference else norms)
        left = x - sae.b_dec - encoded[:, :RANK] @ decoder[:RANK]
        before = (x - sae.decode(encoded)).norm()
    budgets = (encoded[:, RANK:] != 0).sum(dim=1)
    assert 0 < budgets.float().mean() < 3 * K

    acts = pursuit.encode(sae, x)
    assert torch.equal(acts[:, :RANK], encoded[:, :RANK])
    expected = references(left, decoder[RANK:], budgets)
    assert error(acts[:, RANK:], expected) < 1e-4
    assert (x - sae.decode(acts)).norm() < before


def test_shapes_of_attention_heads():
    sae = random_sae(
        reshape_activations="hook_z",
        metadata=SAEMetadata(hook_name="blocks.0.attn.hook_z"),
    )
    z = torch.randn(3, 5, 4, D_IN // 4)
    acts = pursuit.encode(sae, z, 4)
    assert acts.shape == (3, 5, D_SAE)
    assert sae.decode(acts).shape == z.shape
    budgets = torch.full((15,), 4)
    expected = references(z.flatten(2).flatten(0, 1) - sae.b_dec, sae.W_dec, budgets)
    assert error(acts.flatten(0, 1), expected) < 1e-4


def test_tokens_without_anything_to_pursue():
    sae = random_sae()
    x = torch.stack([sae.b_dec, sae.b_dec + 2 * sae.W_dec[3], torch.randn(D_IN)])
    x = x.detach()
    # the reference divides zero by zero where the residual is zero
    acts = pursuit.encode(sae, x, torch.tensor([3, 3, 0]))
    assert torch.equal(acts[0], torch.zeros(D_SAE))
    assert torch.equal(acts[2], torch.zeros(D_SAE))
    assert error(sae.decode(acts)[1], x[1]) < 1e-5
    assert pursuit.encode(sae, x[:0]).shape == (0, D_SAE)


def test_what_is_not_a_number_harms_no_other_token():
    sae = random_sae(d_sae=1000)
    x = torch.randn(30, D_IN)
    expected = pursuit.encode(sae, x, 5)
    x[3], x[4], x[5] = torch.nan, torch.inf, sae.b_dec
    acts = pursuit.encode(sae, x, 5)
    others = [i for i in range(30) if i not in (3, 4, 5)]
    assert torch.allclose(acts[others], expected[others], rtol=1e-5)
    assert not acts[5].any()


def test_one_latent_is_the_best_multiple_of_the_largest_product():
    sae = random_sae()
    x = activations(50)
    products = (x - sae.b_dec) @ sae.W_dec.T
    largest, latent = products.max(dim=1)
    expected = largest / sae.W_dec[latent].square().sum(dim=1)
    acts = pursuit.encode(sae, x, 1)
    assert torch.allclose(acts[range(50), latent], expected, rtol=1e-5)
    assert (acts > 0).sum() == 50


def test_autocast_changes_nothing():
    sae, x = random_sae(), activations(60)
    expected = pursuit.encode(sae, x, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pursuit.encode(sae, x, 8), expected)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99),
    n=st.integers(1, 40),
    batch_tokens=st.integers(1, 50),
    scale=st.floats(0.01, 100),
)
def test_a_token_is_pursued_as_if_it_were_alone(
    seed: int, n: int, batch_tokens: int, scale: float
):
    sae = random_sae(seed=seed).to(torch.float64)
    x = torch.randn(n, D_IN, dtype=torch.float64)
    budgets = torch.randint(0, 12, (n,))
    acts = pursuit.encode(sae, x, budgets, batch_tokens)
    assert (acts >= 0).all()
    assert (acts.count_nonzero(dim=1) <= budgets).all()

    order = torch.randperm(n)
    permuted = pursuit.encode(sae, x[order], budgets[order])
    assert torch.allclose(permuted, acts[order], atol=1e-9)
    scaled = pursuit.encode(sae, sae.b_dec + scale * (x - sae.b_dec), budgets)
    assert torch.allclose(scaled, scale * acts, atol=1e-9 * scale)


@pytest.fixture(scope="module")
def residuals() -> torch.Tensor:
    """Residual streams of py-neox on its held-out text, of unit mean square."""
    model: Any = load_embedded_model()
    texts = load_stdlib_text("test").select(range(8))["text"]  # type: ignore[union-attr]
    tokens = torch.stack([model.to_tokens(text)[0, :256] for text in texts])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=HOOK, stop_at_layer=1)
    x = cache[HOOK][:, 1:].flatten(0, 1)
    return x / x.square().mean().sqrt()


def test_less_error_of_a_trained_sae(residuals: torch.Tensor):
    def data() -> Any:
        while True:
            yield residuals[torch.randint(len(residuals), (256,))]

    torch.manual_seed(0)
    sae_class, cfg_class = get_sae_training_class("batchtopk")
    cfg: Any = cfg_class(d_in=D_MODEL, d_sae=512, k=8)  # type: ignore[call-arg]
    sae = sae_class(cfg)
    sae.b_dec.data = residuals.mean(dim=0)
    trainer_for(sae, 60, data(), batch_size=256).fit()
    sae.requires_grad_(False)
    encoded = sae.encode(residuals)
    acts = pursuit.encode(sae, residuals)
    centred = residuals - residuals.mean(dim=0)
    before, after = (
        float((residuals - sae.decode(a)).square().sum() / centred.square().sum())
        for a in (encoded, acts)
    )
    assert after < 0.95 * before
    assert acts.count_nonzero() <= encoded.count_nonzero()

    few = torch.arange(0, len(residuals), 50)
    budgets = encoded[few].count_nonzero(dim=1)
    decoder = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    expected = references(residuals[few] - sae.b_dec, decoder, budgets)
    assert error(acts[few], expected) < 1e-4


class _Quadratic(StandardSAE):
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        return super().decode(feature_acts.square())


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        (
            Transcoder(
                TranscoderConfig(d_in=8, d_sae=16, d_out=8, apply_b_dec_to_input=False)
            ),
            "it is a transcoder",
        ),
        (
            _Quadratic(StandardSAEConfig(d_in=8, d_sae=16)),
            "architecture 'standard': gradient pursuit needs a linear decoder",
        ),
    ],
    ids=["transcoder", "not linear"],
)
def test_other_decoders_are_refused(sae: Any, message: str):
    with pytest.raises(UserError, match=message):
        pursuit.encode(sae, torch.randn(4, 8))


@pytest.mark.parametrize("l0", [-1, 2.5, True, torch.ones(3, dtype=torch.long)])
def test_budgets_are_counts(l0: Any):
    with pytest.raises(UserError, match="l0 must be a count"):
        pursuit.encode(random_sae(), torch.randn(4, D_IN), l0)
