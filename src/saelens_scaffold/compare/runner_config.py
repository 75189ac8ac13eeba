"""SAELens's configuration of a training, and whether it can be carried out."""

import re
import warnings
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from typing import Annotated, Any, get_type_hints

import torch
from pydantic import AfterValidator, ConfigDict, Field, create_model
from sae_lens import LoggingConfig, MultiSAETrainingRunnerConfig, TrainingSAE
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.util import str_to_dtype
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import get_pretrained_model_config

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.compare.config import TRAINING_FIELDS, CompareConfig
from saelens_scaffold.compare.grid import Run
from saelens_scaffold.evals.configs import make_config
from saelens_scaffold.evals.language_model import known_model_name

_DEFAULTS: dict[str, Any] = {
    # as many repeated steps as one loses without complaint, at little cost of dropped text
    "n_checkpoints": 9,
    # SAELens's 1,000 batches are gigabytes, and the mean norm of 100 is as good
    "n_batches_for_norm_estimate": 100,
}

# SAELens annotates types, and leaves it at that: what a number may be.
_ALLOWED: dict[str, Any] = {
    **dict.fromkeys(
        (
            "context_size",
            "eval_batch_size_prompts",
            "n_batches_in_buffer",
            "n_restart_cycles",
            "store_batch_size_prompts",
            "train_batch_size_tokens",
            "training_tokens",
        ),
        Field(ge=1),
    ),
    **dict.fromkeys(
        (
            "dead_feature_threshold",
            "dead_feature_window",
            "feature_sampling_window",
            "lr_decay_steps",
            "lr_end",
            "lr_warm_up_steps",
            "n_batches_for_norm_estimate",
            "n_checkpoints",
            "n_eval_batches",
        ),
        Field(ge=0),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Field(ge=0, lt=1)),
    "activations_mixing_fraction": Field(ge=0, le=1),
    "dtype": AfterValidator(lambda name: str_to_dtype(name) and name),
    "lr": Field(gt=0),
    # a tuple, which YAML does not have
    "seqpos_slice": Field(strict=False),
}
_TYPES = get_type_hints(MultiSAETrainingRunnerConfig)
_TRAINING_FIELDS: dict[str, Any] = {
    name: (Annotated[_TYPES[name], _ALLOWED.get(name, Field())], None)
    for name in TRAINING_FIELDS
}
_Training: Any = create_model(
    "Training",
    __config__=ConfigDict(
        strict=True, allow_inf_nan=False, extra="forbid", protected_namespaces=()
    ),
    **_TRAINING_FIELDS,
)


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
        checked = make_config(_Training, training)
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
            **checked.model_dump(exclude_unset=True),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"training: {error}") from error
    batch = cfg.train_batch_size_tokens
    if cfg.n_batches_in_buffer * cfg.context_size < batch:
        raise UserError(
            f"training: train_batch_size_tokens is {batch}; the buffer has "
            f"n_batches_in_buffer * context_size = "
            f"{cfg.n_batches_in_buffer * cfg.context_size} tokens, and must have as many"
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
    return cfg


def check_training(config: CompareConfig, runs: Sequence[Run]) -> None:
    """
    See that every SAE can be trained, as far as that can be known without its text and
    without the language model's weights.

    Raises:
        UserError: One cannot, and why.
    """
    for run in runs:
        cfg = runner_config(config, [run])
        try:
            # SAELens finds out what is wrong with a schedule when it makes a trainer
            sae = TrainingSAE.from_dict({**run.config.to_dict(), "device": "meta"})
            MultiSAETrainer(
                replace(cfg.to_sae_trainer_config(), device="meta", autocast=False),
                saes={run.name: sae},
                hook_names={run.name: run.hook_name},
                data_provider=iter(()),
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"{run.arm.label}: {error}") from error
    cfg = runner_config(config, runs[:1])
    if cfg.model_class_name == "HookedTransformer":
        _check_hook_names(config, {run.hook_name for run in runs})


def _check_hook_names(config: CompareConfig, hook_names: Set[str]) -> None:
    """See that a HookedTransformer has hook points, without loading it."""
    layer = get_pretrained_model_config(known_model_name(config.model_name))
    # one layer, without weights, has the hook points that every layer has
    layer.n_layers, layer.init_weights, layer.tokenizer_name = 1, False, None
    layer.device = "meta"
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(layer, move_to_device=False)
    known = {name.removeprefix("blocks.0."): name for name in model.hook_dict}
    for hook_name in sorted(hook_names):
        if re.sub(r"^blocks\.\d+\.", "", hook_name) not in known:
            raise no_hook_point(config, hook_name, model.hook_dict)


def no_hook_point(
    config: CompareConfig, hook_name: str, known: Iterable[str]
) -> ValueError:
    """What to say of a hook point that the language model does not have."""
    examples = sorted(name for name in known if ".0." in name)[:8]
    return ValueError(
        f"{config.model_name} has no hook point {hook_name!r}; those of a layer are "
        f"called, for example, {', '.join(examples)}"
    )
