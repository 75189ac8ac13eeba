"""SAELens's plain BatchTopK and Matryoshka SAEs, trained in the sparse kernels."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import JumpReLUSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE
from safetensors.torch import load_file

from helpers import D_IN, D_SAE, K, batches, train, trainer_for
from saelens_scaffold.kernels.lazy import SparseActivations
from saelens_scaffold.saes.plain_on_kernels import on_kernels
from saelens_scaffold.training.runner import initial_sae

PLAIN: list[tuple[str, dict[str, Any]]] = [
    ("batchtopk", {}),
    ("batchtopk", {"rescale_acts_by_decoder_norm": False}),
    ("batchtopk", {"normalize_activations": "expected_average_only_in"}),
    ("batchtopk", {"normalize_activations": "covariance_whitening"}),
    ("batchtopk", {"apply_b_dec_to_input": False, "aux_loss_coefficient": 0.5}),
    ("matryoshka_batchtopk", {}),
    ("matryoshka_batchtopk", {"use_matryoshka_aux_loss": True}),
]


def plain_sae(architecture: str, kernels: Any, **overrides: Any) -> TrainingSAE[Any]:
    values = {"d_in": D_IN, "d_sae": D_SAE, "k": K, **overrides}
    if architecture == "matryoshka_batchtopk":
        values.setdefault("matryoshka_widths", [8, 32, D_SAE])
    cfg = get_sae_training_class(architecture)[1](**values)
    return initial_sae(cfg, 0, kernels)


def is_sparse(sae: TrainingSAE[Any], batch: torch.Tensor) -> bool:
    output = trainer_for(sae, 1, None).step(batch)
    return isinstance(output.feature_acts, SparseActivations)


@pytest.mark.parametrize("dead_feature_window", [1, 1000])
@pytest.mark.parametrize(("architecture", "overrides"), PLAIN, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_training_is_that_of_saelens(
    architecture: str,
    overrides: dict[str, Any],
    dead_feature_window: int,
    dtype: str,
    tolerance: float,
):
    trainers, losses = [], []
    for kernels in ("auto", "reference"):
        sae = plain_sae(architecture, kernels, dtype=dtype, **overrides)
        data = batches(dtype=sae.dtype)
        trainer = trainer_for(sae, 30, data, dead_feature_window=dead_feature_window)
        outputs = [trainer.step(x) for x in itertools.islice(data, 30)]
        losses.append([{n: v.item() for n, v in o.losses.items()} for o in outputs])
        logs = trainer.build_train_step_log_dict(outputs[-1], 0)
        trainers.append((trainer, outputs, logs))
    (ours, sparse, our_log), (theirs, dense, their_log) = trainers
    assert all(isinstance(o.feature_acts, SparseActivations) for o in sparse)
    assert not isinstance(dense[0].feature_acts, SparseActivations)
    revived = [of["auxiliary_reconstruction_loss"] for of in losses[1]]
    assert any(revived) == (dead_feature_window == 1)
    for our_losses, their_losses in zip(*losses, strict=True):
        assert our_losses == pytest.approx(their_losses, rel=tolerance)
    for name, weights in theirs.sae.state_dict().items():
        error = (ours.sae.state_dict()[name] - weights).norm()
        assert error <= tolerance * weights.norm(), name
    assert torch.equal(ours.act_freq_scores, theirs.act_freq_scores)
    assert torch.equal(
        ours.n_forward_passes_since_fired, theirs.n_forward_passes_since_fired
    )
    assert our_log == pytest.approx(their_log, rel=1e-3)


@pytest.mark.parametrize(("architecture", "overrides"), PLAIN, ids=str)
def test_nothing_that_is_saved_shows_it(
    architecture: str, overrides: dict[str, Any], tmp_path: Path
):
    for kernels in ("auto", "reference"):
        sae = plain_sae(architecture, kernels, **overrides)
        assert isinstance(sae, get_sae_training_class(architecture)[0])
        trainer = trainer_for(sae, 10, batches())
        trainer.fit()
        trainer.save_checkpoint("checkpoint", base_path=tmp_path / kernels)
        sae.save_inference_model(tmp_path / kernels / "final")
        assert isinstance(
            JumpReLUSAE.load_from_disk(tmp_path / kernels / "final"), JumpReLUSAE
        )
    for folder in ("checkpoint", "final"):
        ours, theirs = (tmp_path / each / folder for each in ("auto", "reference"))
        assert [f.name for f in sorted(ours.iterdir())] == [
            f.name for f in sorted(theirs.iterdir())
        ]
        configs = [json.loads((of / "cfg.json").read_text()) for of in (ours, theirs)]
        for config in configs:
            of_training = config["metadata"].pop("l0"), config["metadata"]
            assert of_training[0] == pytest.approx(K)
        assert configs[0] == configs[1]
        weights = [load_file(of / "sae_weights.safetensors") for of in (ours, theirs)]
        torch.testing.assert_close(*weights)


def test_a_training_goes_on_from_a_checkpoint_of_either(tmp_path: Path):
    sae = plain_sae("batchtopk", "reference")
    train(sae, steps=5)
    sae.save_model(tmp_path)
    saes = [plain_sae("batchtopk", kernels) for kernels in ("auto", "reference")]
    for sae in saes:
        sae.load_weights_from_checkpoint(tmp_path)
        train(sae, steps=5)
    torch.testing.assert_close(saes[0].state_dict(), saes[1].state_dict())


def test_copies_are_trained_apart():
    sae = plain_sae("batchtopk", "auto")
    twin = copy.deepcopy(sae)
    before = sae.W_dec.clone()
    train(twin, steps=2)
    assert torch.equal(sae.W_dec, before)
    assert not torch.equal(twin.W_dec, before)
    assert is_sparse(sae, next(batches()))


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("batchtopk", {"k": D_SAE / 4}),
        ("batchtopk", {"normalize_activations": "layer_norm"}),
        ("topk", {"k": 4}),
        ("standard", {"k": None}),
    ],
    ids=str,
)
def test_other_saes_are_left_as_they_are(architecture: str, overrides: dict[str, Any]):
    values = {"d_in": D_IN, "d_sae": D_SAE, **overrides}
    given = {name: value for name, value in values.items() if value is not None}
    sae_class, config_class = get_sae_training_class(architecture)
    sae = sae_class(config_class(**given))
    assert on_kernels(sae) is sae


def test_saelens_s_own_code_can_be_asked_for(monkeypatch: pytest.MonkeyPatch):
    batch = next(batches())
    sae = plain_sae("batchtopk", "reference")
    assert type(sae) is get_sae_training_class("batchtopk")[0]
    sae = plain_sae("batchtopk", "auto")
    for asked in ("auto", "reference"):
        monkeypatch.setenv("SAELENS_SCAFFOLD_KERNELS", asked)
        assert is_sparse(sae, batch) == (asked == "auto")


@pytest.mark.parametrize("point", ["hook_sae_acts_pre", "hook_sae_acts_post"])
def test_hooks_get_real_tensors(point: str):
    sae, seen = plain_sae("batchtopk", "auto"), []
    with sae.hooks(fwd_hooks=[(point, lambda acts, hook: seen.append(acts.sum()))]):  # noqa: ARG005
        assert not is_sparse(sae, next(batches()))
    assert len(seen) == 1
    assert is_sparse(sae, next(batches()))
