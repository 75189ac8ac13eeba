"""What is wrong with a training's configuration, found before anything is loaded."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from sae_lens import LanguageModelSAERunnerConfig, TrainingSAE
from sae_lens.constants import SAE_CFG_FILENAME, TRAINER_STATE_FILENAME
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.util import str_to_dtype

from saelens_scaffold._util.errors import UserError, one_line
from saelens_scaffold._util.files import make_writable
from saelens_scaffold.models.hook_points import (
    check_activations,
    check_context,
)
from saelens_scaffold.models.language_models import ModelClass, check_model_class
from saelens_scaffold.saes.validation import MAX_CFG_BYTES, read_json_object
from saelens_scaffold.training.cached_activations import check_cache
from saelens_scaffold.training.data import n_positions, training_data
from saelens_scaffold.training.fine_tuning import (
    check_is_sae,
    check_pretrained,
    is_fine_tuning,
)

RunnerConfig = LanguageModelSAERunnerConfig[Any]

_COUNTS = ("context_size", "n_batches_in_buffer", "store_batch_size_prompts")
_MODEL_CLASSES = (*get_args(ModelClass), "HookedMamba")


def check_runner_config(cfg: RunnerConfig) -> None:
    """
    See that an SAE can be trained, as far as that can be known without the language
    model's weights and without reading more than the first row of the text.

    Raises:
        UserError: It cannot, and why.
    """
    check_steps(cfg)
    if not 0 < cfg.lr < math.inf:
        raise UserError(f"lr is {cfg.lr}; it must be above 0 and finite")
    _check_sae(cfg)
    for field in ("device", "llm_device", "act_store_device"):
        _check_device(field, getattr(cfg, field))
    _check_checkpoint("resume_from_checkpoint", cfg, TRAINER_STATE_FILENAME)
    if is_fine_tuning(cfg):
        check_pretrained(cfg)
    else:
        _check_checkpoint("from_pretrained_path", cfg)
    if cfg.use_cached_activations:
        if n_positions(cfg) != cfg.context_size:
            raise UserError(
                f"seqpos_slice is {cfg.seqpos_slice}; SAELens reads cached activations of "
                "all positions"
            )
        check_cache(cfg, cfg.hook_name, cfg.sae.d_in)
    check_language_model(cfg, cfg.hook_name, cfg.sae.d_in, cfg.hook_head_index)
    training_data(cfg)
    for field in ("output_path", "checkpoint_path"):
        if getattr(cfg, field) is not None:
            _check_writable(field, getattr(cfg, field))


def check_steps(cfg: Any) -> None:
    """
    See that batches, buffer and schedule of a runner's configuration go together.

    Raises:
        UserError: They do not.
    """
    batch = cfg.train_batch_size_tokens
    for field in (*_COUNTS, "train_batch_size_tokens"):
        value = getattr(cfg, field)
        if value < 1:
            raise UserError(f"{field} is {value}; it must be at least 1")
    positions = n_positions(cfg)
    for field, n_tokens in (
        (f"n_batches_in_buffer * {positions}", cfg.n_batches_in_buffer * positions),
        ("training_tokens", cfg.training_tokens),
    ):
        if n_tokens < batch:
            raise UserError(
                f"{field} is {n_tokens}; it must be at least train_batch_size_tokens, "
                f"which is {batch}"
            )
    steps = cfg.total_training_steps
    if cfg.lr_warm_up_steps + cfg.lr_decay_steps > steps:
        raise UserError(
            f"lr_warm_up_steps is {cfg.lr_warm_up_steps} and lr_decay_steps "
            f"{cfg.lr_decay_steps}; the training has {steps} steps"
        )


def _check_sae(cfg: RunnerConfig) -> None:
    """See that SAE and trainer can be made: there SAELens finds what it cannot do."""
    k, d_sae = getattr(cfg.sae, "k", 1), cfg.sae.d_sae
    if not 0 < k <= d_sae:  # topk itself would fail, in the first step
        raise UserError(f"k is {k}; it must be above 0 and at most d_sae, {d_sae}")
    try:
        str_to_dtype(cfg.dtype)
        sae = TrainingSAE.from_dict({**cfg.sae.to_dict(), "device": "meta"})
        trainer = replace(cfg.to_sae_trainer_config(), device="meta", autocast=False)
        SAETrainer(trainer, sae, data_provider=iter(()))
    except (TypeError, ValueError) as error:
        raise UserError(one_line(error)) from error


def _check_device(field: str, device: str | None) -> None:
    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{field} {device!r} cannot be used: {reason}") from error


def _check_writable(field: str, path: str) -> None:
    if not path:
        raise UserError(f"{field} is empty; name a directory")
    directory = Path(path).absolute()
    made = [each for each in (directory, *directory.parents) if not each.exists()]
    make_writable(directory, field)
    for each in made:
        each.rmdir()


def _check_checkpoint(field: str, cfg: RunnerConfig, *others: str) -> None:
    """See that the SAE in a directory is of the architecture that is to be trained."""
    path, architecture = getattr(cfg, field), cfg.sae.architecture()
    if path is None:
        return
    check_is_sae(field, path, *others)
    saved = read_json_object(Path(path) / SAE_CFG_FILENAME, MAX_CFG_BYTES)
    # SAELens would train what is there, whatever was asked for
    if (found := saved.get("architecture", "standard")) != architecture:
        raise UserError(
            f"{field} {path!r} holds an SAE of architecture {found!r}; training one of "
            f"{architecture!r} can only start from a checkpoint of {architecture!r}"
        )


def check_language_model(
    cfg: Any, hook_name: str, d_in: int, head_index: int | None
) -> None:
    """
    See that the language model of a runner's configuration has the activations that an
    SAE reads, and room for its context.

    Raises:
        UserError: It has not.
    """
    kind, name = cfg.model_class_name, cfg.model_name
    if kind not in _MODEL_CLASSES:
        raise UserError(
            f"model_class_name is {kind!r}; it must be one of {', '.join(_MODEL_CLASSES)}"
        )
    check_model_class(kind)
    keywords = cfg.model_from_pretrained_kwargs or {}
    check_context(cfg.context_size, name, kind, **keywords)
    where = (hook_name, d_in, head_index)
    if kind in get_args(ModelClass):
        check_activations(name, *where, kind, **keywords)
