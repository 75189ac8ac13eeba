"""Training that goes on from a saved SAE."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig

from helpers import RANK, activations, scaffold_sae, train
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
            output = step(batch)
            self.losses.append(output.loss.item() / scale**2)
            error = (batch - self.start(batch)).pow(2).sum(1).mean()
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
        assert runner.losses[0] == pytest.approx(runner.losses_of_start[0], rel=0.05)
        assert sum(runner.losses[-5:]) < sum(runner.losses_of_start[-5:])
    text = SAE.load_from_disk(tmp_path / "sae").cfg.metadata.measured["text"]
    assert "may have read" in text
