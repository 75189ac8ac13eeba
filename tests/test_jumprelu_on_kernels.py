"""SAELens's JumpReLU SAEs, run in the sparse kernels."""

import copy
from typing import Any

import pytest
import torch
from sae_lens import JumpReLUSAE
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from eval_helpers import eval_sae
from saelens_scaffold.evals.saes import resolve_saes
from saelens_scaffold.kernels import inference
from saelens_scaffold.saes.jumprelu_on_kernels import (
    JumpReLUOnKernels,
    inference_on_kernels,
)

N_TOKENS, D_IN, D_SAE = 70, 256, 96


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(N_TOKENS, D_IN, generator=torch.Generator().manual_seed(0))


def sae_with(**values: Any) -> JumpReLUSAE:
    sae: JumpReLUSAE = eval_sae(d_sae=D_SAE, **values)
    sae.threshold.data[:10] = torch.linspace(-1, 0, 10)  # relu goes first
    return sae


@pytest.mark.parametrize("shape", [(N_TOKENS,), (7, 10), (0,)], ids=str)
@pytest.mark.parametrize("rare", [True, False])
@torch.no_grad()
def test_the_same_as_saelens_s(x: torch.Tensor, shape: tuple[int, ...], rare: bool):
    sae = sae_with()
    if rare:  # few enough for a sum over active latents
        sae.threshold.data += 2
    x = x[: torch.Size(shape).numel()].view(*shape, D_IN)
    x.view(-1)[5:7] = torch.nan
    acts = sae.encode(x)
    assert shape == (0,) or 0 < (acts != 0).float().mean() < (0.06 if rare else 0.6)
    ours = inference_on_kernels(sae)
    assert type(ours) is JumpReLUOnKernels
    torch.testing.assert_close(ours.encode(x), acts, equal_nan=True)
    torch.testing.assert_close(ours.decode(acts), sae.decode(acts), equal_nan=True)
    torch.testing.assert_close(ours(x), sae(x), equal_nan=True)


@pytest.mark.parametrize("max_elements", [1, 100, 1000, 10**6])
@pytest.mark.parametrize("min_tokens", [1, 9, 1024])
def test_blocks_of_any_size(
    x: torch.Tensor,
    max_elements: int,
    min_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(inference, "_MIN_TOKENS", min_tokens)
    W, b = torch.randn(D_IN, D_SAE), torch.randn(D_SAE)
    cuts = torch.randn(D_SAE)
    h = x @ W + b
    found = inference.jumprelu_encode(x, W, b, cuts, max_elements)
    torch.testing.assert_close(found, h * (h > cuts), rtol=1e-4, atol=1e-4)


def test_gradients_are_saelens_s(x: torch.Tensor):
    sae = sae_with()
    of_each = []
    for each in (sae, inference_on_kernels(copy.deepcopy(sae))):
        each(x).pow(2).sum().backward()
        of_each.append({name: p.grad for name, p in each.named_parameters()})
    torch.testing.assert_close(*of_each)


@torch.no_grad()
def test_weights_and_hooks_are_shared(x: torch.Tensor):
    sae = sae_with()
    ours = inference_on_kernels(sae)
    assert type(sae) is JumpReLUSAE
    sae.fold_W_dec_norm()
    sae.b_dec.data += 1
    torch.testing.assert_close(ours(x), sae(x))
    zero = lambda acts, hook: 0 * acts  # noqa: ARG005, E731
    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", zero)]):
        assert (ours.encode(x) == 0).all()


def test_other_saes_stay_what_they_are():
    class Own(JumpReLUSAE):
        pass

    sae = sae_with()
    for other in (
        Own(sae.cfg),
        eval_sae(rank=4),
        TopKSAE(TopKSAEConfig(d_in=8, d_sae=16, k=2)),
    ):
        assert inference_on_kernels(other) is other
    sae.activation_fn = torch.nn.Identity()
    assert inference_on_kernels(sae) is sae


def test_evaluations_use_it():
    (sae,) = resolve_saes([("sae", sae_with())], "cpu", "float32")
    assert isinstance(sae.sae, JumpReLUOnKernels)
    (sae,) = resolve_saes([("sae", eval_sae(rank=4))], "cpu", "float32", view="sparse")
    assert type(sae.sae) is JumpReLUOnKernels
