"""Training that goes on from a saved SAE."""

from typing import Any

import pytest
import torch

from helpers import RANK, activations, scaffold_sae, train
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.saes.fine_tuning import start_from

ARCHITECTURES = ["scaffold_batchtopk", "scaffold_matryoshka"]
INPUTS = ["residual", "activation"]


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("sparse_encoder_input", INPUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_start_computes_what_the_saved_sae_does(
    architecture: str,
    sparse_encoder_input: str,
    apply_b_dec_to_input: bool,
    rescale: bool,
) -> None:
    options: dict[str, Any] = {
        "sparse_encoder_input": sparse_encoder_input,
        "rescale_acts_by_decoder_norm": rescale,
    }
    saved = train(scaffold_sae(architecture, **options)).to_inference()
    sae = scaffold_sae(
        architecture, seed=1, apply_b_dec_to_input=apply_b_dec_to_input, **options
    )
    start_from(sae, saved)
    x = activations(500)
    torch.testing.assert_close(sae.to_inference()(x), saved(x), atol=1e-4, rtol=1e-4)
    acts = saved.encode(x)
    assert ((sae.to_inference().encode(x) != 0) == (acts != 0)).float().mean() > 0.9999
    # the k that fire in training are those that fire in the inference form, up to the cut
    fired = (acts[:, RANK:] > 0).sum() / len(x)
    assert (sae.encode(x)[:, RANK:] > 0).sum() / len(x) == pytest.approx(4, abs=0.01)
    assert float(fired) == pytest.approx(4, rel=0.1)
    assert torch.nn.functional.mse_loss(sae(x), saved(x)) < 0.1 * saved(x).var()
    # the next step does not start the scaffold anew
    before = sae.W_dec[:RANK].clone()
    train(sae, steps=1, lr=1e-6)
    torch.testing.assert_close(sae.W_dec[:RANK], before, atol=1e-4, rtol=0)


def test_what_the_residual_lacks_is_not_read_from_it() -> None:
    saved = train(scaffold_sae(sparse_encoder_input="activation")).to_inference()
    with pytest.raises(UserError, match="train with 'activation'"):
        start_from(scaffold_sae(), saved)
