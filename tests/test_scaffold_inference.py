"""The saved form and the plain views, against the formula in plain torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, JumpReLUSAE

from helpers import D_IN, D_SAE, RANK, activations, scaffold_sae, train
from saelens_scaffold import ScaffoldJumpReLUSAE, ScaffoldJumpReLUSAEConfig

ARCHITECTURES = ["scaffold_batchtopk", "scaffold_matryoshka"]


def reference_inference(
    sae: Any, x: torch.Tensor, threshold: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """
    z, f, s and the reconstruction of a *training* SAE at inference, in plain torch.

    f is gated by a threshold instead of a batch's k-th largest value.
    """
    r = sae.cfg.scaffold_rank
    rho = 1.0 if sae.cfg.sparse_encoder_input == "residual" else 0.0
    A, B = sae.W_enc[:, :r], sae.W_dec[:r]
    x_bar = x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x
    z = x_bar @ A + sae.b_enc[:r]
    s = z @ B
    h = (x_bar - rho * s) @ sae.W_enc[:, r:] + sae.b_enc[r:]
    norms = sae.W_dec[r:].norm(dim=1) if sae.cfg.rescale_acts_by_decoder_norm else 1.0
    f = torch.where(h * norms > threshold, h.relu(), 0.0)
    return z, f, s, s + f @ sae.W_dec[r:] + sae.b_dec


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm().detach() / expected.norm().detach())


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("sparse_encoder_input", ["residual", "activation"])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"rescale_acts_by_decoder_norm": False},
        {"apply_b_dec_to_input": False},
        {"dtype": "float64"},
        {"scaffold_rank": 0},
        {"normalize_activations": "covariance_whitening"},
        {
            "normalize_activations": "covariance_whitening",
            "apply_b_dec_to_input": False,
        },
        {"normalize_activations": "expected_average_only_in"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:scaffold_init='pca' finds no principal")
def test_saved_sae_is_the_formula(
    architecture: str,
    sparse_encoder_input: str,
    overrides: dict[str, Any],
    tmp_path: Path,
):
    sae = scaffold_sae(
        architecture,
        sparse_encoder_input=sparse_encoder_input,
        topk_threshold_lr=0.3,
        **overrides,
    )
    train(sae, steps=30)
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert isinstance(loaded, ScaffoldJumpReLUSAE)
    x = activations(400, seed=50).to(sae.dtype)
    _, f, s, reconstruction = reference_inference(sae, x, loaded.threshold[-1])
    assert 0 < float((f > 0).float().sum(1).mean()) < D_SAE / 2

    assert relative_error(loaded.decode(loaded.encode(x)), reconstruction) < 1e-5
    assert relative_error(sae.to_inference()(x), reconstruction) < 1e-5
    if sae.cfg.scaffold_rank:
        assert relative_error(loaded.scaffold(x), s) < 1e-5
        assert relative_error(sae.scaffold(x), s) < 1e-5

    whole = loaded.to_jumprelu()
    assert type(whole) is JumpReLUSAE
    assert whole.cfg.d_sae == D_SAE + sae.cfg.scaffold_rank
    assert (whole.encode(x) >= 0).all()
    assert relative_error(whole(x), reconstruction) < 1e-5

    sparse = loaded.sparse_sae()
    assert type(sparse) is JumpReLUSAE
    assert sparse.cfg.d_sae == D_SAE - sae.cfg.scaffold_rank
    torch.testing.assert_close(
        sparse.encode(x), loaded.encode(x)[:, sae.cfg.scaffold_rank :]
    )
    assert relative_error(sparse(x), reconstruction - s) < 1e-5


def test_saved_bfloat16_sae_is_close_to_the_formula(architecture: str):
    sae = scaffold_sae(architecture, dtype="bfloat16")
    train(sae, steps=40)
    x = activations(400, seed=50).bfloat16()
    inference = sae.to_inference()
    _, _, _, reconstruction = reference_inference(sae, x, inference.threshold[-1])
    assert inference.W_enc.dtype == torch.bfloat16
    assert relative_error(inference(x).float(), reconstruction.float()) < 0.05


def test_views_own_their_weights_and_keep_the_metadata(architecture: str):
    sae = scaffold_sae(architecture)
    train(sae, steps=5)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    for view in (sae.to_inference(), sae.sparse_sae(), sae.to_jumprelu()):
        assert view.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
        assert view.cfg.metadata.training_architecture == architecture
        assert view.device == sae.device
        for parameter in view.parameters():
            assert parameter.requires_grad
            parameter.data.zero_()
    for name, value in sae.state_dict().items():
        assert torch.equal(value, before[name])
    assert sae.sparse_sae().cfg.metadata.scaffold_view == "sparse"
    assert sae.to_jumprelu().cfg.metadata.scaffold_view == "whole"


def test_views_of_a_hook_z_sae(architecture: str):
    sae = scaffold_sae(
        architecture, reshape_activations="hook_z", calibrate_threshold=False
    )
    train(sae, steps=20)
    inference = sae.to_inference()
    x = activations(30).reshape(5, 6, 4, D_IN // 4)
    flat = scaffold_sae(architecture)
    flat.load_state_dict(sae.state_dict())
    flat_inference = flat.to_inference()
    expected = flat_inference(x.flatten(-2)).unflatten(-1, (4, D_IN // 4))
    torch.testing.assert_close(inference(x), expected)
    torch.testing.assert_close(inference.to_jumprelu()(x), expected)
    torch.testing.assert_close(
        inference.scaffold(x),
        flat_inference.scaffold(x.flatten(-2)).unflatten(-1, (4, D_IN // 4)),
    )


def test_folding_the_decoder_norms_changes_nothing(architecture: str):
    sae = scaffold_sae(architecture, rescale_acts_by_decoder_norm=False)
    train(sae, steps=20)
    x = activations(100, seed=8)
    inference = sae.to_inference()
    expected = inference(x)
    inference.fold_W_dec_norm()
    torch.testing.assert_close(inference.W_dec.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(inference(x), expected, atol=1e-4, rtol=1e-4)

    rescaled = scaffold_sae(architecture)
    train(rescaled, steps=20)
    expected = rescaled(x)
    rescaled.fold_W_dec_norm()
    torch.testing.assert_close(rescaled(x), expected, atol=1e-4, rtol=1e-4)


def test_a_new_inference_sae_has_linear_latents():
    sae = ScaffoldJumpReLUSAE(ScaffoldJumpReLUSAEConfig(D_IN, D_SAE, scaffold_rank=4))
    acts = sae.encode(activations(100))
    assert (acts[:, :4] < 0).any()
    assert (acts[:, 4:] >= 0).all()


@pytest.mark.parametrize("rank", [-1, D_IN, D_SAE, 2.5, True, "3"])
def test_inference_config_errors(rank: Any):
    with pytest.raises(ValueError, match=f"scaffold_rank must be .* got {rank!r}"):
        ScaffoldJumpReLUSAEConfig(D_IN, D_SAE, scaffold_rank=rank)


def test_the_plain_form_loads_where_this_package_is_never_imported(tmp_path: Path):
    sae = scaffold_sae()
    train(sae, steps=20)
    x = activations(50, seed=9)
    sae.to_jumprelu().save_model(tmp_path / "sae")
    expected = sae.to_inference()(x).tolist()
    (tmp_path / "x.json").write_text(json.dumps(x.tolist()))
    program = """
import json, sys, torch
from sae_lens import SAE
sae = SAE.load_from_disk(sys.argv[1] + "/sae")
x = torch.tensor(json.load(open(sys.argv[1] + "/x.json")))
assert not any(name.startswith("saelens_scaffold") for name in sys.modules)
print(json.dumps([sae.cfg.architecture(), sae(x).tolist()]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    architecture, output = json.loads(result.stdout.splitlines()[-1])
    assert architecture == "jumprelu"
    assert relative_error(torch.tensor(output), torch.tensor(expected)) < 1e-5


def test_encode_and_decode_take_no_tokens_and_sparse_activations():
    sae = scaffold_sae("scaffold_batchtopk").to_inference()
    with torch.no_grad():
        assert sae.encode(torch.empty(0, D_IN)).shape == (0, D_SAE)
        assert sae.encode(torch.empty(2, 0, D_IN)).shape == (2, 0, D_SAE)
        assert sae.decode(torch.empty(0, D_SAE)).shape == (0, D_IN)
        acts = sae.encode(activations(32))
        torch.testing.assert_close(sae.decode(acts.to_sparse()), sae.decode(acts))


def test_a_residual_input_is_folded_more_precisely_than_it_is_kept():
    sae = scaffold_sae(
        "scaffold_batchtopk", dtype="bfloat16", rescale_acts_by_decoder_norm=False
    )
    sae.initialize_scaffold(activations(100))
    # so that what is left of what the sparse encoder reads is a small difference
    weights = torch.randn(RANK, D_SAE - RANK).to(sae.dtype)
    sae.W_enc.data[:, RANK:] += 10 * sae.W_enc[:, :RANK] @ weights
    A, S = sae.W_enc.double().split([RANK, D_SAE - RANK], dim=1)
    folded = (S - A @ (sae.W_dec[:RANK].double() @ S)).to(torch.bfloat16)
    torch.testing.assert_close(
        sae.to_inference().W_enc[:, RANK:], folded, rtol=2**-7, atol=1e-5
    )


def test_an_sae_trained_in_triton_can_be_used_without(tmp_path: Path):
    sae = scaffold_sae("scaffold_batchtopk", kernels="triton").to_inference()
    assert sae.cfg.kernels == "auto"
    sae.cfg.kernels = "triton"
    sae.save_model(tmp_path)
    assert ScaffoldJumpReLUSAE.load_from_disk(tmp_path).cfg.kernels == "auto"


def test_coordinates_are_the_first_latents_and_repr_tells_the_shape(architecture: str):
    sae = scaffold_sae(architecture)
    x = activations(50)
    for each in (sae, sae.to_inference()):
        z = each.scaffold_coordinates(x)
        assert torch.allclose(z @ each.W_dec[:RANK], each.scaffold(x), atol=1e-5)
        assert f"d_in={D_IN}, d_sae={D_SAE}, scaffold_rank={RANK}" in repr(each)
    assert torch.allclose(z, sae.to_inference().encode(x)[:, :RANK], atol=1e-5)
