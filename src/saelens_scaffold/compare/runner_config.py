"""SAELens's configuration of a training, and whether it can be carried out."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sae_lens import LoggingConfig, MultiSAETrainingRunnerConfig, TrainingSAE
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from transformer_lens.HookedTransformer import DTYPE_FROM_STRING

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.compare.config import CompareConfig
from saelens_scaffold.compare.grid import Run
from saelens_scaffold.compare.training_fields import checked_training
from saelens_scaffold.evals.language_model import known_model_name
from saelens_scaffold.models.hook_points import model_config, width_at
from saelens_scaffold.training.checks import check_steps

_DEFAULTS: dict[str, Any] = {
    # a checkpoint drops the text in the buffer, an interruption the steps since the last
    "n_checkpoints": 9,
    # SAELens's 1,000 batches are gigabytes; the mean norm of 100 is as good
    "n_batches_for_norm_estimate": 100,
}


def runner_config(
    config: CompareConfig, wave: Sequence[Run], device: str = "cpu"
) -> MultiSAETrainingRunnerConfig:
    """
    SAELens's configuration of a wave.

    Raises:
        UserError: A field of `training` has a value that makes no sense.
    """
    training = {**_DEFAULTS, **config.training, **wave[0].training}
    try:
        cfg = MultiSAETrainingRunnerConfig(
            saes={run.name: run.config for run in wave},
            hook_names={run.name: run.hook_name for run in wave},
            model_name=known_model_name(config.model_name),
            dataset_path=config.dataset_path,
            device=device,
            seed=config.data_seed,
            checkpoint_path=None,
            output_path=None,
            logger=LoggingConfig(log_to_wandb=False),
            **checked_training(training),
        )
        check_steps(cfg)
    except (TypeError, ValueError) as error:
        raise UserError(f"training: {error}") from error
    return cfg


def check_training(config: CompareConfig, runs: Sequence[Run]) -> None:
    """
    Check that every SAE can be trained, without text and without the weights of the
    language model.

    Raises:
        UserError: One cannot be trained.
    """
    for run in runs:
        cfg = runner_config(config, [run])
        try:
            # SAELens checks a schedule only when it makes a trainer
            sae = TrainingSAE.from_dict({**run.config.to_dict(), "device": "meta"})
            MultiSAETrainer(
                replace(cfg.to_sae_trainer_config(), device="meta", autocast=False),
                saes={run.name: sae},
                hook_names={run.name: run.hook_name},
                data_provider=iter(()),
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"{run.arm.label}: {error}") from error
        _check_language_model(config, run, cfg)


def _check_language_model(
    config: CompareConfig, run: Run, cfg: MultiSAETrainingRunnerConfig
) -> None:
    dtype = (cfg.model_from_pretrained_kwargs or {}).get("dtype", "float32")
    if dtype not in DTYPE_FROM_STRING:
        raise UserError(
            f"training: model_from_pretrained_kwargs has the dtype {dtype!r}; allowed are "
            f"{', '.join(DTYPE_FROM_STRING)}"
        )
    if re.match(r"blocks\.\d+\.", run.hook_name) is None:
        raise UserError(
            f"hook_name is {run.hook_name!r}; it must be a hook point of a layer, as in "
            "blocks.12.hook_resid_post"
        )
    model = model_config(cfg.model_name)
    if cfg.model_class_name == "HookedTransformer" and not cfg.hook_head_indices:
        width = width_at(model, run.hook_name)
        if width not in (None, run.config.d_in):
            raise UserError(
                f"d_in is {run.config.d_in}; {config.model_name} has width {width} at "
                f"{run.hook_name}"
            )
