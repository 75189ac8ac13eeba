"""Steps of random configurations in sparse kernels, against exact arithmetic.

Dense code is not the measure of itself: in half precision it overflows and rounds as well.
Both are compared with the same step in float64, from the same weights.
"""

import copy
import random
from typing import Any

import pytest
import torch
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput

import saelens_scaffold  # noqa: F401

N_CASES = 25
"""Cases of each seed."""

BOUNDS = {
    torch.float64: 100,
    torch.float32: 100,
    torch.bfloat16: 3,
    torch.float16: 3,
}
"""Roundings of the largest gradient by which sparse kernels may be off, beyond 3 times the
error of dense code."""


def random_case(choose: random.Random) -> tuple[Any, torch.Tensor, Any]:
    """A dense SAE after some steps, a batch, and a mask of dead latents."""
    architecture = choose.choice(["scaffold_batchtopk", "scaffold_matryoshka"])
    d_in, n = choose.choice([4, 8, 16, 33]), choose.choice([8, 24, 64, 130])
    rank = choose.choice([0, 1, 2, 3])
    fields: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": rank + n,
        "k": choose.choice([0.5, 1, 2, 4, 8, n]),
        "scaffold_rank": rank,
        "sparse_encoder_input": choose.choice(["residual", "activation"]),
        "scaffold_init": choose.choice(["pca", "random", "zeros"]),
        "rescale_acts_by_decoder_norm": choose.choice([True, False]),
        "apply_b_dec_to_input": choose.choice([True, False]),
        "aux_loss_coefficient": choose.choice([0.0, 1.0, 1 / 32]),
        "decoder_init_norm": choose.choice([0.1, 1.0, None]),
        "dtype": choose.choice(["float64", "float32", "bfloat16", "float16"]),
        "kernels": "reference",
    }
    if architecture == "scaffold_matryoshka":
        widths = {rank + n // 4, rank + n // 2, rank + n}
        fields["matryoshka_widths"] = sorted(widths)
        fields["use_matryoshka_aux_loss"] = choose.choice([True, False])
    scale, n_tokens = choose.choice([1e-3, 1, 30, 1e3]), choose.choice([1, 7, 64, 200])
    sae_class, config_class = get_sae_training_class(architecture)
    sae: Any = sae_class(config_class(**fields))
    mix = torch.randn(d_in, d_in) * scale
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    share = choose.choice([None, 0.1, 0.6, 1.0])
    dead = None if share is None else torch.rand(rank + n) < share
    n_steps = choose.choice([1, 1, 4, 11])  # the first starts the scaffold
    for _ in range(n_steps):
        x = (torch.randn(n_tokens, d_in) @ mix).to(sae.dtype)
        gradients(sae, x, dead)
        if n_steps > 1:
            optimizer.step()
    return sae, x, dead


def gradients(
    sae: Any, x: torch.Tensor, dead: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Reconstruction and gradients of a step, and which latents are active."""
    sae.zero_grad()
    output = sae.training_forward_pass(TrainStepInput(x, {}, dead, 0, False))
    output.loss.backward()
    found = {name: p.grad.double() for name, p in sae.named_parameters()}
    found["sae_out"] = output.sae_out.detach().double()
    rank = sae.cfg.scaffold_rank
    return found, (output.feature_acts + 0)[:, rank:].detach() != 0


@pytest.mark.parametrize("seed", range(8))
def test_a_step_is_as_exact_as_that_of_dense_code(seed: int) -> None:
    choose = random.Random(seed)
    torch.manual_seed(seed)
    n_compared = 0
    for number in range(N_CASES):
        dense, x, dead = random_case(choose)
        if not all(p.isfinite().all() for p in dense.parameters()):
            continue  # the training itself overflowed
        sparse, exact = copy.deepcopy(dense), copy.deepcopy(dense).double()
        sparse.cfg.kernels = "torch"
        ours, our_active = gradients(sparse, x, dead)
        theirs, active = gradients(dense, x, dead)
        truth, _ = gradients(exact, x.double(), dead)
        where = f"case {number}: {dense.cfg}"
        if not torch.equal(our_active, active):
            assert dense.dtype != torch.float64, where
            continue  # rounding chose others at the cut, or at 0
        if not all(value.isfinite().all() for value in theirs.values()):
            continue  # dense code overflows, as float16 does without a scaled loss
        eps = torch.finfo(dense.dtype).eps
        # where the scaffold starts exact, gradients are the rounding of x̂ - x
        largest = 2 * float(x.double().pow(2).sum()) / len(x)
        for name, _ in dense.named_parameters():
            largest = max(largest, float(truth[name].norm()))
        off = {name: (theirs[name] - value).norm() for name, value in truth.items()}
        # b_dec is a bias of the encoder, whose gradient is that of b_enc times W_enc
        off["b_dec"] = torch.maximum(off["b_dec"], off["b_enc"])
        for name, value in truth.items():
            error = (ours[name] - value).norm()
            size = float(value.norm()) if name == "sae_out" else largest
            allowed = 3 * off[name] + BOUNDS[dense.dtype] * eps * size
            assert error <= allowed, f"{name} {error:.2g} > {allowed:.2g}, {where}"
            n_compared += 1
    assert n_compared > N_CASES
