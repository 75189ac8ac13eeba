"""The training architectures against the formula of the README and SAELens's parents."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.saes.sae import TrainStepInput

from helpers import (
    D_IN,
    D_SAE,
    RANK,
    K,
    activations,
    batches,
    overlap,
    scaffold_config,
    scaffold_sae,
    train,
    trainer_for,
)
from saelens_scaffold import ScaffoldBatchTopKTrainingSAE

ARCHITECTURES = ["scaffold_batchtopk", "scaffold_matryoshka"]


def step_input(x: torch.Tensor, dead: torch.Tensor | None = None) -> TrainStepInput:
    return TrainStepInput(
        sae_in=x,
        coefficients={},
        dead_neuron_mask=dead,
        n_training_steps=0,
        is_logging_step=False,
    )


def reference_training_forward(
    sae: Any, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z, f and the reconstruction of design formula, in plain torch."""
    r = sae.cfg.scaffold_rank
    rho = 1.0 if sae.cfg.sparse_encoder_input == "residual" else 0.0
    A, B = sae.W_enc[:, :r], sae.W_dec[:r]
    x_bar = x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x
    z = x_bar @ A
    h = (x_bar - rho * z @ B) @ sae.W_enc[:, r:] + sae.b_enc[r:]
    scale = sae.W_dec[r:].norm(dim=1) if sae.cfg.rescale_acts_by_decoder_norm else 1.0
    competing = (h * scale).relu()
    n_kept = int(sae.cfg.k * len(x))
    cut = competing.flatten().sort(descending=True).values[n_kept - 1]
    f = torch.where(competing >= cut, h.relu(), 0.0)
    return z, f, z @ B + f @ sae.W_dec[r:] + sae.b_dec


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("sparse_encoder_input", ["residual", "activation"])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_training_forward_is_the_formula(
    architecture: str,
    sparse_encoder_input: str,
    apply_b_dec_to_input: bool,
    rescale: bool,
):
    sae = scaffold_sae(
        architecture,
        dtype="float64",
        sparse_encoder_input=sparse_encoder_input,
        apply_b_dec_to_input=apply_b_dec_to_input,
        rescale_acts_by_decoder_norm=rescale,
    )
    train(sae, steps=10)
    x = activations(100, seed=77).double()
    output = sae.training_forward_pass(step_input(x))
    z, f, reconstruction = reference_training_forward(sae, x)
    torch.testing.assert_close(output.sae_out, reconstruction)
    scale = sae.W_dec.norm(dim=1) if rescale else torch.ones(D_SAE).double()
    torch.testing.assert_close(output.feature_acts[:, :RANK], z * scale[:RANK])
    torch.testing.assert_close(output.feature_acts[:, RANK:], f * scale[RANK:])
    assert int((f > 0).sum()) == int(K * len(x))
    assert float(output.metrics["l0_sparse"]()) == pytest.approx(K)  # type: ignore[operator]


def test_matryoshka_levels_all_contain_the_scaffold():
    sae = scaffold_sae("scaffold_matryoshka", dtype="float64")
    train(sae, steps=10)
    x = activations(100, seed=77).double()
    output = sae.training_forward_pass(step_input(x))
    z, f, _ = reference_training_forward(sae, x)
    for width in (8, 32):
        level = z @ sae.W_dec[:RANK] + sae.b_dec
        level = level + f[:, : width - RANK] @ sae.W_dec[RANK:width]
        expected = (level - x).pow(2).sum(-1).mean()
        torch.testing.assert_close(output.losses[f"inner_mse_loss_{width}"], expected)


@pytest.mark.parametrize(
    ("architecture", "parent", "parent_config", "extra"),
    [
        (
            "scaffold_batchtopk",
            BatchTopKTrainingSAE,
            BatchTopKTrainingSAEConfig,
            {},
        ),
        (
            "scaffold_matryoshka",
            MatryoshkaBatchTopKTrainingSAE,
            MatryoshkaBatchTopKTrainingSAEConfig,
            {"matryoshka_widths": [8, 32, D_SAE], "use_matryoshka_aux_loss": True},
        ),
    ],
)
def test_rank_zero_is_the_parent_bit_for_bit(
    architecture: str, parent: Any, parent_config: Any, extra: dict[str, Any]
):
    ours = scaffold_sae(architecture, scaffold_rank=0, **copy.deepcopy(extra))
    torch.manual_seed(0)
    theirs = parent(parent_config(d_in=D_IN, d_sae=D_SAE, k=K, **extra))
    for sae in (ours, theirs):
        train(sae, steps=50)
    x = activations(64, seed=99)
    assert torch.equal(ours.topk_threshold, theirs.topk_threshold)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_step_starts_the_scaffold_on_the_principal_subspace(
    architecture: str,
):
    sae = scaffold_sae(architecture)
    x = activations(500)
    sae.training_forward_pass(step_input(x))
    _, _, principal = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    assert overlap(sae.W_dec[:RANK].detach(), principal[:RANK]) > 1 - 1e-6
    torch.testing.assert_close(sae.W_dec[:RANK].T, sae.W_enc[:, :RANK])
    torch.testing.assert_close(sae.b_dec.detach(), x.mean(0))
    # the scaffold is the orthogonal projection of the centred activations
    projection = (x - x.mean(0)) @ principal[:RANK].T @ principal[:RANK]
    torch.testing.assert_close(
        sae.scaffold(x).detach(), projection, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("rows", [1, 2, 500])
def test_without_input_bias_the_scaffold_still_starts_as_a_centred_projection(
    rows: int,
):
    sae = scaffold_sae(apply_b_dec_to_input=False, dtype="float64")
    x = activations(500).double()
    sae.training_forward_pass(step_input(x))
    mean = x.mean(0)
    _, _, principal = torch.linalg.svd(x - mean, full_matrices=False)
    P = principal[:RANK].T @ principal[:RANK]
    torch.testing.assert_close(
        (sae.scaffold(x) + sae.b_dec)[:rows], (mean + (x - mean) @ P)[:rows]
    )


def test_massive_activations_do_not_own_the_scaffold():
    x = activations(1000)
    clean = scaffold_sae()
    clean.training_forward_pass(step_input(x))
    with_sinks = torch.cat([x, 200 * torch.eye(D_IN)[5].repeat(20, 1)])
    sae = scaffold_sae()
    sae.training_forward_pass(step_input(with_sinks))
    assert torch.equal(sae.W_dec[:RANK], clean.W_dec[:RANK])
    assert torch.equal(sae.b_dec, clean.b_dec)


def test_non_finite_tokens_are_left_out_of_the_initialisation():
    x = activations(1000)
    clean = scaffold_sae()
    clean.initialize_scaffold(x)
    broken = torch.cat(
        [x, torch.full((3, D_IN), torch.nan), torch.full((1, D_IN), torch.inf)]
    )
    sae = scaffold_sae()
    sae.initialize_scaffold(broken)
    assert torch.equal(sae.W_dec, clean.W_dec)
    assert torch.equal(sae.b_dec, clean.b_dec)


def test_a_batch_without_a_finite_token_is_an_error():
    with pytest.raises(ValueError, match="none of the 7 tokens"):
        scaffold_sae().initialize_scaffold(torch.full((7, D_IN), torch.nan))


@pytest.mark.parametrize(
    "x",
    [
        activations(2),  # fewer tokens than the rank
        activations(300) @ torch.diag(torch.tensor([1.0, 1.0] + [0.0] * (D_IN - 2))),
        torch.zeros(50, D_IN),
    ],
    ids=["small batch", "rank deficient", "all zero"],
)
def test_an_undetermined_subspace_is_completed_with_a_warning(x: torch.Tensor):
    sae = scaffold_sae()
    with pytest.warns(UserWarning, match="determines only"):
        sae.initialize_scaffold(x)
    B = sae.W_dec[:RANK].detach()
    torch.testing.assert_close(B @ B.T, torch.eye(RANK), atol=1e-5, rtol=0)
    centred = x - x.mean(0)
    torch.testing.assert_close(sae.scaffold(x).detach(), centred, atol=1e-4, rtol=1e-4)


def test_whitened_activations_have_no_principal_directions_and_a_warning_says_so():
    sae = scaffold_sae(normalize_activations="covariance_whitening")
    with pytest.warns(UserWarning, match="covariance_whitening"):
        sae.initialize_scaffold(activations(500))


@pytest.mark.parametrize("scaffold_init", ["random", "zeros"])
def test_other_initialisations(scaffold_init: str):
    sae = scaffold_sae(scaffold_init=scaffold_init)
    before = sae.W_dec.detach().clone()
    x = activations(200)
    sae.training_forward_pass(step_input(x))
    assert torch.equal(sae.W_dec, before)
    assert torch.equal(sae.b_dec, torch.zeros(D_IN))
    s = sae.scaffold(x).detach()
    assert bool((s == 0).all()) == (scaffold_init == "zeros")
    train(sae, steps=20)
    assert sae.scaffold(x).norm() > 0.1
    assert all(p.isfinite().all() for p in sae.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_scaffold_is_never_initialised_twice(architecture: str, tmp_path: Path):
    sae = scaffold_sae(architecture)
    assert not bool(sae.scaffold_is_initialized)
    train(sae, steps=5)
    assert bool(sae.scaffold_is_initialized)
    sae.save_model(tmp_path)

    resumed = scaffold_sae(architecture, seed=1)
    resumed.load_weights_from_checkpoint(tmp_path)
    fine_tuned = TrainingSAE.load_from_disk(tmp_path)
    copied = copy.deepcopy(sae)
    for other in (resumed, fine_tuned, copied):
        B = other.W_dec[:RANK].detach().clone()
        other.training_forward_pass(step_input(activations(100, seed=5) * 7 + 3))
        assert torch.equal(other.W_dec[:RANK], B)
        assert torch.equal(other.W_enc, sae.W_enc)


def test_a_checkpoint_from_before_the_first_step_still_initialises(tmp_path: Path):
    scaffold_sae().save_model(tmp_path)
    sae = TrainingSAE.load_from_disk(tmp_path)
    x = activations(300)
    sae.training_forward_pass(step_input(x))
    torch.testing.assert_close(sae.b_dec.detach(), x.mean(0))


def test_scaffold_latents_are_never_revived_as_dead():
    sae = scaffold_sae()
    x = activations(100)
    sae.training_forward_pass(step_input(x))
    only_scaffold_dead = torch.zeros(D_SAE, dtype=torch.bool)
    only_scaffold_dead[:RANK] = True
    output = sae.training_forward_pass(step_input(x, only_scaffold_dead))
    assert output.losses["auxiliary_reconstruction_loss"] == 0
    assert only_scaffold_dead[:RANK].all(), "the trainer's mask must not be changed"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("use_matryoshka_aux_loss", [False, True])
def test_dead_sparse_latents_are_revived(
    architecture: str, use_matryoshka_aux_loss: bool
):
    if architecture == "scaffold_batchtopk":
        sae = scaffold_sae(architecture)
    else:
        sae = scaffold_sae(
            architecture, use_matryoshka_aux_loss=use_matryoshka_aux_loss
        )
    x = activations(100)
    sae.training_forward_pass(step_input(x))
    dead = torch.ones(D_SAE, dtype=torch.bool)
    output = sae.training_forward_pass(step_input(x, dead))
    loss = output.losses["auxiliary_reconstruction_loss"]
    assert loss > 0
    loss.backward()
    assert sae.W_enc.grad is not None
    assert sae.W_enc.grad[:, RANK:].abs().sum() > 0
    if sae.cfg.sparse_encoder_input == "activation":
        assert sae.W_enc.grad[:, :RANK].abs().sum() == 0


def test_the_threshold_ignores_the_scaffold():
    sae = scaffold_sae(topk_threshold_lr=1.0)
    x = activations(100)
    sae.training_forward_pass(step_input(x))
    acts = sae.encode(x)[:, RANK:].detach()
    assert float(sae.topk_threshold) == pytest.approx(float(acts[acts > 0].min()))


def test_the_scaffold_has_no_trained_encoder_bias():
    sae = scaffold_sae()
    train(sae, steps=20)
    assert torch.equal(sae.b_enc[:RANK], torch.zeros(RANK))
    assert sae.b_enc[RANK:].abs().sum() > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "overrides",
    [
        {"normalize_activations": "expected_average_only_in"},
        {"normalize_activations": "covariance_whitening"},
        {
            "normalize_activations": "covariance_whitening",
            "apply_b_dec_to_input": False,
        },
        {"decoder_init_norm": None},
        {"use_sparse_activations": True},
        {"dtype": "bfloat16"},
        {"dtype": "float64"},
        {"rescale_acts_by_decoder_norm": False},
        {"sparse_encoder_input": "activation"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:scaffold_init='pca' finds no principal")
def test_saelens_features_train_and_save(
    architecture: str, overrides: dict[str, Any], tmp_path: Path
):
    sae = scaffold_sae(architecture, **overrides)
    train(sae, steps=60)
    assert all(p.isfinite().all() for p in sae.parameters())
    x = activations(2000, seed=500).to(sae.dtype)
    sae.save_inference_model(tmp_path)
    inference = sae.to_inference()
    residual = (inference.decode(inference.encode(x)) - x).float()
    explained = 1 - residual.pow(2).sum() / (x - x.mean(0)).float().pow(2).sum()
    assert explained > 0.5


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_run_time_normalisation_trains_without_the_auxiliary_loss(normalize: str):
    sae = scaffold_sae(normalize_activations=normalize, aux_loss_coefficient=0.0)
    train(sae, steps=30, dead_feature_window=1)
    x = activations(300, seed=3)
    inference = sae.to_inference()
    reconstruction = inference(x)
    assert (reconstruction - x).norm() / (x - x.mean(0)).norm() < 0.8
    # s is one summand of the reconstruction, in the units of x
    acts = inference.encode(x)
    without_scaffold = acts.clone()
    without_scaffold[:, :RANK] = 0
    dictionary = inference.decode(without_scaffold)
    inference.encode(x)  # sets the statistics that decode undoes
    torch.testing.assert_close(
        inference.scaffold(x) + dictionary, reconstruction, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_autocast(architecture: str):
    sae = scaffold_sae(architecture)
    train(sae, steps=20, autocast=True)
    assert sae.W_dec.dtype == torch.float32
    # the start itself is not done in bfloat16
    x = activations(500)
    fresh = scaffold_sae(architecture)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fresh.training_forward_pass(step_input(x))
    reference = scaffold_sae(architecture)
    reference.training_forward_pass(step_input(x))
    assert torch.equal(fresh.W_dec[:RANK], reference.W_dec[:RANK])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_compiled_training_equals_eager(architecture: str, kernels: str):
    eager, compiled = (scaffold_sae(architecture, kernels=kernels) for _ in range(2))
    compiled.training_forward_pass = torch.compile(  # type: ignore[method-assign]
        compiled.training_forward_pass, backend="aot_eager"
    )
    for sae in (eager, compiled):
        train(sae, steps=5, dead_feature_window=1000)
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(
            compiled.get_parameter(name), parameter, atol=1e-5, rtol=1e-4
        )


INVALID = [
    ({"scaffold_rank": -1}, "scaffold_rank .* got -1"),
    ({"scaffold_rank": D_IN}, f"scaffold_rank .*d_in={D_IN}.* got {D_IN}"),
    ({"scaffold_rank": 8, "d_sae": 8, "k": 1}, "scaffold_rank .*d_sae=8.* got 8"),
    ({"scaffold_rank": 2.5}, "scaffold_rank must be an int, got 2.5"),
    ({"k": 0}, "k must be above 0 .* got 0"),
    ({"k": -3}, "k must be above 0 .* got -3"),
    ({"k": float("nan")}, "k must be above 0 .* got nan"),
    ({"k": D_SAE - RANK + 1}, f"k must be .* at most .* = {D_SAE - RANK}, got"),
    ({"scaffold_init": "svd"}, "scaffold_init must be one of 'pca', .* got 'svd'"),
    ({"sparse_encoder_input": "x"}, "sparse_encoder_input must be one of .* got 'x'"),
    ({"normalize_activations": "layer_norm"}, "aux_loss_coefficient must be 0"),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("overrides", "message"), INVALID, ids=str)
def test_config_errors(architecture: str, overrides: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        scaffold_config(architecture, **overrides)


def test_matryoshka_config_errors():
    with pytest.raises(ValueError, match="first of matryoshka_widths=.* got 8"):
        scaffold_config("scaffold_matryoshka", scaffold_rank=8)
    with pytest.raises(ValueError, match="normalize_activations must be .* Matryoshka"):
        scaffold_config(
            "scaffold_matryoshka",
            normalize_activations="layer_norm",
            aux_loss_coefficient=0.0,
        )


def test_a_config_changed_by_a_runner_is_checked_again():
    cfg = scaffold_config()
    cfg.d_in = RANK  # as SyntheticSAERunner does
    with pytest.raises(ValueError, match=f"d_in={RANK}"):
        ScaffoldBatchTopKTrainingSAE(cfg)


@settings(max_examples=30, deadline=None)
@given(
    rank=st.integers(0, 6),
    k=st.floats(0.5, 8),
    n=st.integers(2, 40),
    residual=st.booleans(),
    rescale=st.booleans(),
    scale=st.floats(0.01, 100),
)
def test_exactly_k_sparse_latents_fire_and_every_scaffold_latent_does(
    rank: int, k: float, n: int, residual: bool, rescale: bool, scale: float
):
    sae = scaffold_sae(
        scaffold_rank=rank,
        k=k,
        sparse_encoder_input="residual" if residual else "activation",
        rescale_acts_by_decoder_norm=rescale,
        scaffold_init="random",
    )
    x = activations(n) * scale
    acts = sae.encode(x)
    assert (acts[:, :rank] != 0).all()
    assert (acts[:, rank:] >= 0).all()
    assert int((acts[:, rank:] > 0).sum()) == int(k * n)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resuming_continues_as_if_never_interrupted(architecture: str, tmp_path: Path):
    def run(sae: Any, steps: int, data: Any, checkpoint: Path | None = None) -> Any:
        trainer = trainer_for(sae, steps, data)
        if checkpoint is not None:
            trainer.load_trainer_state(checkpoint)
            sae.load_weights_from_checkpoint(checkpoint)
        trainer.fit()
        return trainer

    whole = scaffold_sae(architecture)
    run(whole, 20, batches())

    first = scaffold_sae(architecture)
    data = batches()
    run(first, 10, data).save_checkpoint("half", base_path=tmp_path)
    second = scaffold_sae(architecture, seed=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(second, 20, data, tmp_path / "half")

    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
