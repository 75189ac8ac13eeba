"""Gradient pursuit against the paper's formulas (arXiv 2410.14670), token by token."""

from typing import Any

import pytest
import torch
from sae_lens import (
    JumpReLUSAE,
    JumpReLUSAEConfig,
)

from saelens_scaffold import pursuit

D_IN, D_SAE = 16, 64


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


def jumprelu(seed: int = 0, **overrides: Any) -> JumpReLUSAE:
    """Random encoder and decoder, whose rows are not of unit norm."""
    torch.manual_seed(seed)
    sae = JumpReLUSAE(JumpReLUSAEConfig(**{"d_in": D_IN, "d_sae": D_SAE, **overrides}))
    sae.W_dec.data = torch.randn_like(sae.W_dec) * torch.rand(sae.cfg.d_sae, 1)
    sae.b_dec.data = torch.randn_like(sae.b_dec)
    sae.threshold.data.fill_(1.5)
    return sae


@pytest.mark.parametrize("d_sae", [40, 300])
@pytest.mark.parametrize("gram", [True, False])
def test_reconstructions_and_supports_are_the_papers(
    d_sae: int, gram: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pursuit, "_MAX_GRAM_BYTES", 2**31 if gram else 0)
    sae = jumprelu(d_sae=d_sae)
    x = torch.randn(60, D_IN)
    budgets = torch.randint(0, 25, (60,))
    expected = references(x - sae.b_dec, sae.W_dec, budgets)

    acts = pursuit.encode(sae, x, budgets, batch_tokens=7)
    assert torch.equal(acts > 0, expected > 0)
    expected_x = sae.decode(expected)
    assert (sae.decode(acts) - expected_x).norm() <= 1e-5 * expected_x.norm()
