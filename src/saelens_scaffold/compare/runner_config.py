"""SAELens's configuration of a training, and whether it can be carried out."""

import re
import warnings
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from sae_lens import LoggingConfig, MultiSAETrainingRunnerConfig, TrainingSAE
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from transformer_lens import HookedTransformer
from transformer_lens.HookedTransformer import DTYPE_FROM_STRING
from transformer_lens.loading_from_pretrained import get_pretrained_model_config

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.compare.config import CompareConfig
from saelens_scaffold.compare.grid import Run
from saelens_scaffold.compare.training_fields import checked_training
from saelens_scaffold.evals.configs import check_model_name
from saelens_scaffold.evals.language_model import known_model_name

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
    except (TypeError, ValueError) as error:
        raise UserError(f"training: {error}") from error
    _check_sizes(cfg)
    return cfg


def _check_sizes(cfg: MultiSAETrainingRunnerConfig) -> None:
    batch = cfg.train_batch_size_tokens
    buffer = cfg.n_batches_in_buffer * cfg.context_size
    if buffer < batch:
        raise UserError(
            f"training: train_batch_size_tokens is {batch}; the buffer has "
            f"n_batches_in_buffer * context_size = {buffer} tokens, and must have as many"
        )
    if cfg.training_tokens < batch:
        raise UserError(
            f"training: training_tokens is {cfg.training_tokens}; it must be at least "
            f"train_batch_size_tokens, which is {batch}"
        )
    if cfg.lr_warm_up_steps + cfg.lr_decay_steps > cfg.total_training_steps:
        raise UserError(
            f"training: lr_warm_up_steps is {cfg.lr_warm_up_steps} and lr_decay_steps "
            f"{cfg.lr_decay_steps}; training_tokens and train_batch_size_tokens make no "
            f"more than {cfg.total_training_steps} steps"
        )


def check_training(config: CompareConfig, runs: Sequence[Run]) -> None:
    """
    Check that every SAE can be trained, without text and without the weights of the
    language model.

    Raises:
        UserError: One cannot be trained.
    """
    check_model_name(config.model_name)
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
    _check_language_model(config, runs)


def _check_language_model(config: CompareConfig, runs: Sequence[Run]) -> None:
    """Check hook points, dimensions and dtype without loading the language model."""
    model = get_pretrained_model_config(known_model_name(config.model_name))
    cfg = runner_config(config, runs[:1])
    dtype = (cfg.model_from_pretrained_kwargs or {}).get("dtype", "float32")
    if dtype not in DTYPE_FROM_STRING:
        raise UserError(
            f"training: model_from_pretrained_kwargs has the dtype {dtype!r}; allowed are "
            f"{', '.join(DTYPE_FROM_STRING)}"
        )
    for run in runs:
        found = re.fullmatch(r"blocks\.(\d+)\..+", run.hook_name)
        if found is None:
            raise UserError(
                f"hook_name is {run.hook_name!r}; it must be a hook point of a layer, as "
                "in blocks.12.hook_resid_post"
            )
        if int(found[1]) >= model.n_layers:
            raise UserError(
                f"hook_name names layer {found[1]}; {config.model_name} has the layers 0 "
                f"to {model.n_layers - 1}"
            )
        if "hook_resid" in run.hook_name and run.config.d_in != model.d_model:
            raise UserError(
                f"d_in is {run.config.d_in}; the residual stream of {config.model_name} "
                f"has {model.d_model} dimensions"
            )
    if cfg.model_class_name == "HookedTransformer":
        _check_hook_names(config, {run.hook_name for run in runs})


def _check_hook_names(config: CompareConfig, hook_names: Set[str]) -> None:
    layer = get_pretrained_model_config(known_model_name(config.model_name))
    # one layer, without weights, has the hook points of every layer
    layer.n_layers, layer.init_weights, layer.tokenizer_name = 1, False, None
    layer.device = "meta"
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(layer, move_to_device=False)
    for hook_name in sorted(hook_names):
        in_first_layer = re.sub(r"^blocks\.\d+\.", "blocks.0.", hook_name)
        if in_first_layer not in model.hook_dict:
            raise no_hook_point(config, hook_name, model.hook_dict)


def no_hook_point(
    config: CompareConfig, hook_name: str, known: Iterable[str]
) -> UserError:
    """The error for a hook point that the language model does not have."""
    examples = sorted(name for name in known if ".0." in name)[:8]
    return UserError(
        f"{config.model_name} has no hook point {hook_name!r}; those of a layer are "
        f"called, for example, {', '.join(examples)}"
    )
