"""Training that goes on from a saved SAE."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TrainingSAE,
)
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
from sae_lens.saes.matching_pursuit_sae import (
    MatchingPursuitSAE,
    MatchingPursuitSAEConfig,
)
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from safetensors.torch import load_file

from helpers import (
    D_IN,
    D_SAE,
    RANK,
    activations,
    batches,
    scaffold_sae,
    train,
    trainer_for,
)
from saelens_scaffold import (
    ResumableTrainingRunner,
    ScaffoldBatchTopKTrainingSAEConfig,
    ScaffoldMatryoshkaTrainingSAEConfig,
)
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.models import (
    load_embedded_model,
    load_stdlib_text,
    register_embedded_model,
)
from saelens_scaffold.saes.fine_tuning import start_from
from saelens_scaffold.training.export import export_checkpoint
from saelens_scaffold.training.fine_tuning import (
    check_pretrained,
    fine_tuned_sae,
    start,
)

HOOK = "blocks.1.hook_resid_post"

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


@pytest.mark.parametrize("sparse_encoder_input", INPUTS)
@pytest.mark.parametrize(
    "norm", ["expected_average_only_in", "covariance_whitening", "layer_norm"]
)
def test_the_start_has_the_scale_of_the_training(
    norm: Any, sparse_encoder_input: Any
) -> None:
    options: dict[str, Any] = {
        "normalize_activations": norm,
        "sparse_encoder_input": sparse_encoder_input,
        "aux_loss_coefficient": 0.0,
    }
    saved = train(scaffold_sae(**options)).to_inference()
    x = activations(500)
    before, acts = saved(x), saved.encode(x)
    trainer = trainer_for(scaffold_sae(seed=1, **options), 1, batches())
    start(trainer, saved)
    # as the trainer does at the end
    sae, scaler = trainer.sae, trainer.activation_scaler
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if (white := scaler.whitening) is not None:
        sae.fold_activation_whitening(white.mean, white.matrix, white.inverse_matrix)
    after = sae.to_inference()
    torch.testing.assert_close(after(x), before, atol=1e-4, rtol=1e-4)
    assert ((after.encode(x) != 0) == (acts != 0)).float().mean() > 0.9999


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("sae_class", [StandardSAE, TopKSAE])
def test_an_unused_latent_of_a_plain_sae_stays_unused(
    sae_class: Any, rescale: bool
) -> None:
    torch.manual_seed(0)
    of_topk = {"k": 4} if sae_class is TopKSAE else {}
    cfg_class: Any = TopKSAEConfig if of_topk else StandardSAEConfig
    plain = sae_class(cfg_class(d_in=D_IN, d_sae=D_SAE, **of_topk))
    plain.W_dec.data[5] = 0
    trainer = trainer_for(
        scaffold_sae(
            d_sae=D_SAE + RANK,
            rescale_acts_by_decoder_norm=rescale,
            sparse_encoder_input="activation",
        ),
        steps=5,
        data=batches(),
    )
    start(trainer, plain)
    x = activations(500)
    assert torch.equal(
        trainer.sae.W_dec[RANK:].norm(dim=1) > 0,
        torch.arange(D_SAE).ne(5) | torch.tensor(rescale),
    )
    inference = trainer.sae.to_inference()
    assert not (
        inference.encode(x)[:, RANK + 5] * inference.W_dec[RANK + 5].norm()
    ).any()
    assert trainer.fit()(x).isfinite().all()


def runner_config(folder: Path, **changes: Any) -> LanguageModelSAERunnerConfig[Any]:
    sae = {
        "d_in": 256,
        "d_sae": 260,
        "k": 8,
        "scaffold_rank": 4,
        "normalize_activations": "expected_average_only_in",
    }
    names = {f.name for f in fields(ScaffoldBatchTopKTrainingSAEConfig)}
    names.add("matryoshka_widths")
    sae |= {name: changes.pop(name) for name in {*changes} & names}
    cfg_class: Any = ScaffoldBatchTopKTrainingSAEConfig
    if "matryoshka_widths" in sae:
        cfg_class = ScaffoldMatryoshkaTrainingSAEConfig
    values: dict[str, Any] = {
        "model_name": register_embedded_model(),
        "hook_name": HOOK,
        "context_size": 64,
        "training_tokens": 12 * 256,
        "train_batch_size_tokens": 256,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 16,
        "n_batches_for_norm_estimate": 4,
        "lr": 3e-4,
        "output_path": str(folder / "sae"),
        "checkpoint_path": None,
        "verbose": False,
        "logger": LoggingConfig(log_to_wandb=False),
        **changes,
    }
    return LanguageModelSAERunnerConfig(sae=cfg_class(**sae), **values)


class Recorded(ResumableTrainingRunner):
    """Keeps losses, and the inference form with which the training begins."""

    n_measured_tokens = 1024
    start: Any
    batch: torch.Tensor
    untrained: Any

    def run_trainer_with_interruption_handling(self, trainer: Any) -> Any:
        self.losses: list[float] = []
        self.losses_of_start: list[float] = []
        step = trainer.step

        def record(batch: torch.Tensor) -> Any:
            # the saved SAE takes raw activations
            scale = trainer.activation_scaler.scaling_factor or 1.0
            if not self.losses:
                self.start, self.batch = trainer.sae.to_inference(), batch
                self.start.fold_activation_norm_scaling_factor(scale)
                untrained: Any = TrainingSAE.from_dict(trainer.sae.cfg.to_dict())
                untrained.load_state_dict(trainer.sae.state_dict())
                self.untrained = untrained
            output = step(batch)
            self.losses.append(output.loss.item())
            x = batch * scale
            error = (x - self.untrained(x)).pow(2).sum(1).mean()
            self.losses_of_start.append(error.item())
            return output

        trainer.step = record
        return super().run_trainer_with_interruption_handling(trainer)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_embedded_model()


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Scaffold SAEs of both encoder inputs, a checkpoint, and an SAE without a scaffold."""
    folders = {}
    for name in INPUTS:
        folder = tmp_path_factory.mktemp(name)
        cfg = runner_config(
            folder,
            sparse_encoder_input=name,
            training_tokens=32 * 256,
            lr=1e-3,
            n_checkpoints=1,
            checkpoint_path=str(folder / "checkpoints"),
        )
        run(ResumableTrainingRunner, cfg, model)
        folders[name] = folder / "sae"
        (folders[f"checkpoint of {name}"],) = (folder / "checkpoints").glob("*/*")
    folder = tmp_path_factory.mktemp("plain")
    cfg = runner_config(folder, scaffold_rank=0, training_tokens=32 * 256)
    cfg.sae = BatchTopKTrainingSAEConfig(d_in=256, d_sae=256, k=8)
    run(ResumableTrainingRunner, cfg, model)
    folders["plain"] = folder / "sae"
    return folders


def run(runner: Any, cfg: Any, model: Any, **others: Any) -> Any:
    made = runner(
        cfg, override_dataset=load_stdlib_text("train"), override_model=model, **others
    )
    made.run()
    return made


@pytest.mark.parametrize(
    ("name", "matryoshka"),
    [
        ("residual", False),
        ("activation", True),
        ("checkpoint of residual", True),
        ("checkpoint of activation", False),
    ],
)
def test_training_goes_on_from_a_scaffold_sae(
    name: str, matryoshka: bool, model: Any, saved: dict[str, Path], tmp_path: Path
) -> None:
    widths: Any = {"matryoshka_widths": [64, 260]} if matryoshka else {}
    cfg = runner_config(
        tmp_path,
        sparse_encoder_input=name.split()[-1],
        from_pretrained_path=str(saved[name]),
        **widths,
    )
    runner = run(Recorded, cfg, model)
    if "checkpoint" in name:
        before: Any = export_checkpoint(saved[name], tmp_path / "exported")
    else:
        before = SAE.load_from_disk(saved[name])
    x = runner.batch
    torch.testing.assert_close(
        runner.start(x), before(x), atol=1e-5 * x.std().item(), rtol=1e-5
    )
    l0 = [
        (of.encode(x)[:, 4:] > 0).sum(1).float().mean() for of in (runner.start, before)
    ]
    assert l0[0] == pytest.approx(l0[1].item(), rel=1e-3)
    if not matryoshka:  # whose loss has a term for each level
        assert runner.losses[0] == pytest.approx(runner.losses_of_start[0], rel=1e-4)
        assert sum(runner.losses[-5:]) < sum(runner.losses_of_start[-5:])
    text = SAE.load_from_disk(tmp_path / "sae").cfg.metadata.measured["text"]
    assert "may have read" in text


@pytest.mark.parametrize("sparse_encoder_input", INPUTS)
def test_a_plain_sae_gets_the_scaffold_of_one_pass(
    sparse_encoder_input: str, model: Any, saved: dict[str, Path], tmp_path: Path
) -> None:
    cfg = runner_config(
        tmp_path,
        sparse_encoder_input=sparse_encoder_input,
        from_pretrained_path=str(saved["plain"]),
        d_sae=260,
    )
    runner = run(Recorded, cfg, model)
    plain: Any = SAE.load_from_disk(saved["plain"])
    x, start = runner.batch, runner.start
    # the threshold of the short training is far too low; the start has that of k
    acts = start.encode(x)[:, 4:]
    # k is 8, and texts differ
    assert (acts > 0).sum() / len(x) < 16 < (plain.encode(x) > 0).sum() / len(x)
    norms = start.W_dec[4:].norm(dim=1) / plain.W_dec.norm(dim=1)
    close: Any = {"atol": 1e-4 * acts.max().item(), "rtol": 1e-4}
    expected = torch.where(acts > 0, plain.encode(x) / norms, 0.0)
    torch.testing.assert_close(acts, expected, **close)
    # more of the variance is explained than by the same latents alone, on later text
    b_dec = plain.b_dec
    alone = (acts * norms) @ plain.W_dec + b_dec
    assert (x - start(x)).pow(2).sum() < 0.9 * (x - alone).pow(2).sum()
    # the scaffold reads and writes the principal part of the error's regression on x
    s = start.scaffold(x)
    assert torch.linalg.matrix_rank(s - s.mean(0), rtol=1e-4) == 4
    assert sum(runner.losses[-5:]) < sum(runner.losses_of_start[-5:])


def test_saelens_runner_takes_the_start(
    model: Any, saved: dict[str, Path], tmp_path: Path
) -> None:
    options = {"from_pretrained_path": str(saved["residual"])}
    cfg = runner_config(tmp_path, normalize_activations="none", lr=1e-9, **options)
    run(LanguageModelSAETrainingRunner, cfg, model, override_sae=fine_tuned_sae(cfg))
    before = SAE.load_from_disk(saved["residual"])
    after = SAE.load_from_disk(tmp_path / "sae")
    torch.testing.assert_close(after.W_dec, before.W_dec, atol=1e-5, rtol=0)
    torch.testing.assert_close(after.W_enc, before.W_enc, atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="'expected_average_only_in' needs activations"):
        fine_tuned_sae(runner_config(tmp_path, **options))
    options["from_pretrained_path"] = str(saved["plain"])
    with pytest.raises(UserError, match="without a scaffold in .* needs activations"):
        fine_tuned_sae(runner_config(tmp_path, normalize_activations="none", **options))


def test_a_resumed_training_does_not_start_again(
    model: Any, saved: dict[str, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "from_pretrained_path": str(saved["plain"]),
        "d_sae": 260,
        "checkpoint_path": str(tmp_path / "checkpoints"),
    }
    run(Recorded, runner_config(tmp_path, n_checkpoints=1, **options), model)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/*")
    weights = load_file(checkpoint / "sae_weights.safetensors")
    cfg = runner_config(tmp_path, resume_from_checkpoint=str(checkpoint), **options)
    runner = Recorded(
        cfg, override_dataset=load_stdlib_text("train"), override_model=model
    )
    trained = runner.run()
    assert len(runner.losses) < 12
    start = trained.to_inference()
    for name in "W_dec", "b_dec":
        close = torch.nn.functional.cosine_similarity(
            getattr(start, name).flatten(), weights[name].flatten(), dim=0
        )
        assert close > 0.99


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("residual", {"d_in": 128}, "has d_in 256, not 128"),
    ("residual", {"scaffold_rank": 5}, "has scaffold_rank 4, not 5"),
    ("residual", {"d_sae": 512}, "has d_sae 260; the SAE to train has 512"),
    ("plain", {"d_sae": 256}, "has d_sae 256, to which a scaffold of rank 4 adds 4"),
    ("residual", {"hook_name": "blocks.2.hook_resid_post"}, "has hook_name"),
    ("residual", {"model_name": "gpt2"}, "has model_name 'py-neox', not 'gpt2'"),
    (
        "residual",
        {"normalize_activations": "layer_norm", "aux_loss_coefficient": 0.0},
        "has normalize_activations 'none', not 'layer_norm'",
    ),
]


@pytest.mark.parametrize(("name", "changes", "message"), WRONG)
def test_what_does_not_fit_is_one_line(
    name: str,
    changes: dict[str, Any],
    message: str,
    saved: dict[str, Path],
    tmp_path: Path,
) -> None:
    path = str(saved[name])
    cfg = runner_config(tmp_path, from_pretrained_path=path, **changes)
    for check in check_pretrained, ResumableTrainingRunner:
        with pytest.raises(UserError) as raised:
            check(cfg)
        said = str(raised.value)
        assert said.startswith(f"from_pretrained_path {path!r} {message}")
        assert "\n" not in said


def test_architectures_that_are_no_start_are_refused(tmp_path: Path) -> None:
    sae = MatchingPursuitSAE(MatchingPursuitSAEConfig(d_in=256, d_sae=256))
    sae.save_model(tmp_path / "pursuit")
    cfg = runner_config(tmp_path, from_pretrained_path=str(tmp_path / "pursuit"))
    with pytest.raises(UserError, match="architecture 'matching_pursuit'; .* standard"):
        check_pretrained(cfg)
