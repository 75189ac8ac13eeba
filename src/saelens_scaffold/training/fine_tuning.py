"""Fine-tuning: trainings of scaffold SAEs that start from a saved SAE."""

import math
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sae_lens import SAE, LanguageModelSAERunnerConfig, TrainingSAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.training.sae_trainer import SAETrainer

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.models.local import official_name
from saelens_scaffold.saes import (
    ScaffoldBatchTopKTrainingSAE,
    ScaffoldBatchTopKTrainingSAEConfig,
    ScaffoldJumpReLUSAE,
    validation,
)
from saelens_scaffold.saes.absorption import absorb_scaffold, jumprelu_form
from saelens_scaffold.saes.calibration import N_SAMPLED_TOKENS, threshold_at_l0
from saelens_scaffold.saes.facts import tokens_at_once
from saelens_scaffold.saes.fine_tuning import start_from
from saelens_scaffold.saes.loading import load_scaffold_sae
from saelens_scaffold.saes.runner_config import read_runner_config
from saelens_scaffold.training.export import export_checkpoint

RunnerConfig = LanguageModelSAERunnerConfig[Any]

_PLAIN = (
    *("standard", "jumprelu", "gated", "topk"),
    *("batchtopk", "matryoshka_batchtopk"),  # of checkpoints
)
# Tokens per dimension for the regression of a plain SAE's error.
_TOKENS_PER_DIMENSION = 32


def is_fine_tuning(cfg: RunnerConfig) -> bool:
    """Whether a runner's configuration trains a scaffold SAE from a saved SAE."""
    of_scaffold = isinstance(cfg.sae, ScaffoldBatchTopKTrainingSAEConfig)
    return of_scaffold and cfg.from_pretrained_path is not None


def fine_tuned_sae(cfg: RunnerConfig) -> ScaffoldBatchTopKTrainingSAE:
    """
    The SAE that a fine-tuning starts from, for runners other than
    `ResumableTrainingRunner`: `LanguageModelSAETrainingRunner(cfg, override_sae=...)`.

    SAELens's own runner would train what `cfg.from_pretrained_path` holds, whatever
    `cfg.sae` says.

    Raises:
        UserError: The saved SAE is not one that the training can start from, or activations
            are needed, which are only there once a runner has begun.
    """
    needs = None
    if cfg.sae.normalize_activations in validation.ESTIMATED_SCALES:
        needs = f"normalize_activations {cfg.sae.normalize_activations!r}"
    sae, saved = begin(cfg)
    if not isinstance(saved, ScaffoldJumpReLUSAE):
        needs = f"the SAE without a scaffold in {cfg.from_pretrained_path!r}"
    if needs:
        raise UserError(f"{needs} needs activations: use ResumableTrainingRunner")
    return sae


def begin(cfg: RunnerConfig) -> tuple[ScaffoldBatchTopKTrainingSAE, SAE[Any]]:
    """
    The SAE to train, and the saved one that it starts from, in inference form.

    The SAE to train has the saved weights already, unless there is no scaffold in them.

    Raises:
        UserError: The training cannot start from that SAE, and why.
    """
    check_pretrained(cfg)
    path = Path(str(cfg.from_pretrained_path))
    if validation.is_checkpoint(_read_config(path)):
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            saved = export_checkpoint(path, Path(folder) / "sae")
    else:
        saved = load_scaffold_sae(path)
    # runners flatten heads before an SAE sees them
    saved.cfg.reshape_activations = "none"
    saved.turn_off_forward_pass_hook_z_reshaping()
    saved.to(device=cfg.device)
    sae: Any = TrainingSAE.from_dict(cfg.get_training_sae_cfg_dict())
    if isinstance(saved, ScaffoldJumpReLUSAE):
        start_from(sae, saved)
    return sae, saved


def start(trainer: SAETrainer[Any, Any], saved: SAE[Any]) -> None:
    """
    Start a training from a saved SAE, at the scale of the activations in the training.

    The scale is estimated here, and the trainer finds it known. A plain SAE gets the
    scaffold that one pass over the next activations gives it.

    Args:
        trainer: A trainer that has not begun.
        saved: The SAE; see `begin`.
    """
    sae, stream, d_in = trainer.sae, trainer.data_provider, trainer.sae.cfg.d_in
    scaler: Any = trainer.activation_scaler
    if not isinstance(saved, ScaffoldJumpReLUSAE):
        saved = _absorbed(saved, sae.cfg, (x.to(sae.device) for x in stream))
    of_scale: Any = {
        "d_in": d_in,
        "data_provider": stream,
        "n_batches_for_norm_estimate": trainer.cfg.n_batches_for_norm_estimate,
    }
    if sae.cfg.normalize_activations == "expected_average_only_in":
        scaler.estimate_scaling_factor(**of_scale)
        saved.fold_activation_norm_scaling_factor(1 / scaler.scaling_factor)
    elif sae.cfg.normalize_activations == "covariance_whitening":
        scaler.estimate_whitening(**of_scale)
        white = scaler.whitening
        # folding the inverse of the whitening, x = (z + mean M) M⁻¹
        mean = -white.mean @ white.matrix
        saved.fold_activation_whitening(mean, white.inverse_matrix, white.matrix)
    start_from(sae, saved)


def _absorbed(
    plain: SAE[Any], cfg: Any, stream: Iterator[torch.Tensor]
) -> ScaffoldJumpReLUSAE:
    """
    An SAE with the scaffold that reduces its error most where, as in the training, k latents
    fire per token: thresholds of running averages may be far too low.
    """
    first = next(stream)
    n_first = math.ceil(N_SAMPLED_TOKENS / len(first))
    sample = torch.cat([first, *islice(stream, n_first - 1)])
    form = jumprelu_form(plain, sample)
    if cfg.rescale_acts_by_decoder_norm:
        form.fold_W_dec_norm()
    parts = sample.split(tokens_at_once(form))
    with torch.no_grad():
        form.threshold.zero_()
        acts = (form.encode(x) for x in parts)
        form.threshold.fill_(threshold_at_l0(cfg.k, acts, len(sample)))
    n_tokens = _TOKENS_PER_DIMENSION * cfg.d_in - len(sample)
    more = islice(stream, max(0, math.ceil(n_tokens / len(first))))
    return absorb_scaffold(form, chain(parts, more), cfg.scaffold_rank)


def check_pretrained(cfg: RunnerConfig) -> None:
    """
    See that a training can start from the SAE that its configuration names, as far as
    configurations tell.

    Raises:
        UserError: It cannot, and why.
    """
    named = f"from_pretrained_path {cfg.from_pretrained_path!r}"
    path = Path(str(cfg.from_pretrained_path))
    check_is_sae("from_pretrained_path", str(cfg.from_pretrained_path))
    saved, wanted = _read_config(path), cfg.sae
    architecture, rank = saved.get("architecture"), wanted.scaffold_rank
    has_scaffold = str(architecture).startswith("scaffold_")
    if not has_scaffold and architecture not in _PLAIN:
        raise UserError(
            f"{named} has an SAE of architecture {architecture!r:.100}; "
            f"{wanted.architecture()!r} can start from a scaffold SAE, or from "
            f"{', '.join(_PLAIN)}"
        )
    metadata = saved.get("metadata")
    known = read_runner_config(path) | (metadata if isinstance(metadata, dict) else {})
    model_name = known.get("model_name")
    if model_name and _short(str(model_name)) == _short(cfg.model_name):
        known["model_name"] = cfg.model_name
    found = {
        "d_in": (saved.get("d_in"), wanted.d_in),
        "scaffold_rank": (saved.get("scaffold_rank") if has_scaffold else rank, rank),
        "normalize_activations": (
            _run_time(saved.get("normalize_activations")),
            _run_time(wanted.normalize_activations),
        ),
    }
    for name in ("model_name", "hook_name", "hook_head_index"):
        if known.get(name) is not None:
            found[name] = (known[name], getattr(cfg, name))
    for name, (then, now) in found.items():
        if then != now:
            raise UserError(f"{named} has {name} {then!r:.100}, not {now!r}")
    d_sae, added = saved.get("d_sae"), 0 if has_scaffold else rank
    if not isinstance(d_sae, int) or d_sae + added != wanted.d_sae:
        more = f", to which a scaffold of rank {rank} adds {rank}" if added else ""
        raise UserError(
            f"{named} has d_sae {d_sae!r:.100}{more}; the SAE to train has {wanted.d_sae}"
        )


def check_is_sae(field: str, path: str, *others: str) -> None:
    """
    Raises:
        UserError: A directory lacks the files of an SAE, or others.
    """
    if not (path and Path(path).exists()):
        raise UserError(f"{field} {path!r} does not exist")
    for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, *others):
        if not (Path(path) / name).is_file():
            raise UserError(
                f"{field} {path!r} is no checkpoint or SAE: it has no {name}"
            )


def _read_config(path: Path) -> dict[str, Any]:
    return validation.read_json_object(
        path / SAE_CFG_FILENAME, validation.MAX_CFG_BYTES
    )


def _run_time(normalize_activations: Any) -> Any:
    """The normalisation that an SAE does itself; an estimated scale is folded in."""
    estimated = (None, *validation.ESTIMATED_SCALES)
    return "none" if normalize_activations in estimated else normalize_activations


def _short(model_name: str) -> str:
    """A model's name without the owner, or the folder."""
    with suppress(UserError):  # no longer where it was, or of another library
        model_name = official_name(model_name)
    return Path(model_name).name
