"""SAEs from the checkpoints of a training, and their plain forms: `saelens-scaffold export`.

A checkpoint has the weights of a training SAE, for activations at the scale of the training.
SAELens brings them into the form in which SAEs are used, and folds the scale in, only when
the training ends.
"""

import math
from pathlib import Path
from typing import Any, Literal

from sae_lens import SAE, TrainingSAE, constants
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors import SafetensorError
from safetensors.torch import load_file

from saelens_scaffold._util.errors import UserError, one_line
from saelens_scaffold._util.files import make_writable, new_directory
from saelens_scaffold.saes import validation
from saelens_scaffold.saes.calibration import record_calibration
from saelens_scaffold.saes.facts import scaffold_rank, trained_k
from saelens_scaffold.saes.loading import load_scaffold_sae
from saelens_scaffold.saes.runner_config import complete_metadata
from saelens_scaffold.saes.scaffold import ScaffoldMixin

Form = Literal["jumprelu", "sparse"]

_UNREADABLE: tuple[type[Exception], ...] = (
    *(KeyError, NotImplementedError, OSError, RuntimeError, SafetensorError),
    *(TypeError, ValueError),
)
"""What SAELens and PyTorch raise where files do not fit together."""


def run(checkpoint: str, output_path: str, form: Form | None) -> tuple[str, list[str]]:
    """
    The command `saelens-scaffold export`.

    Returns:
        What was exported, and notes for the standard error.
    """
    scaler = _read_scaler(Path(checkpoint))
    sae = export_checkpoint(checkpoint, output_path, form)
    metadata: Any = sae.cfg.metadata
    facts = [
        f"{sae.cfg.architecture()} SAE, d_in {sae.cfg.d_in}, d_sae {sae.cfg.d_sae}"
    ]
    if rank := scaffold_rank(sae):
        facts.append(f"scaffold_rank {rank}")
    if k := trained_k(metadata):
        facts.append(f"k {k:g}")
    if scaler.scaling_factor is not None:
        facts.append(f"the activations' scale of {scaler.scaling_factor:.4g} folded in")
    if scaler.whitening is not None:
        facts.append("the activations' whitening folded in")
    text = f"{output_path}: {', '.join(facts)}."
    if calibration := metadata.threshold_calibration:
        n_tokens = calibration["n_tokens"]
        text += (
            f" Its threshold is calibrated on {n_tokens:,} tokens of the training."
            if n_tokens
            else " Its threshold is the training's running average, not calibrated: see its "
            "L0 with `saelens-scaffold eval dense_latents`."
        )
    missing = [n for n in ("model_name", "hook_name") if not metadata.get(n)]
    return text, [f"{name} is not known; set it in cfg.json" for name in missing]


def export_checkpoint(
    checkpoint: str | Path, output_path: str | Path, form: Form | None = None
) -> SAE[Any]:
    """
    Save the SAE of a training's checkpoint in the form in which SAEs are used.

    The scale of the activations is folded into the weights. Metadata that are missing are
    those of the runner's configuration. A BatchTopK SAE has the threshold that the
    checkpoint has: of a scaffold SAE that calibrates its own, the calibrated one, else the
    running average.

    Args:
        checkpoint: Directory of an SAE in a checkpoint, final or not, of SAELens's runners
            or of those of this package; with `form`, that of a saved SAE too.
        output_path: Directory to make.
        form: Plain form of a scaffold SAE, that of `to_jumprelu` or of `sparse_sae`; None
            for the inference form of its architecture.

    Returns:
        The SAE.

    Raises:
        UserError: There is no checkpoint, it lacks the scale, its files do not fit
            together, `form` is of scaffold SAEs only, or the directory exists already or
            cannot be written.
        InvalidSAEError: Weights are not finite, or the configuration makes no SAE.
    """
    checkpoint, output_path = Path(checkpoint), Path(output_path)
    if output_path.exists():
        raise UserError(f"{output_path} exists already; remove it or name another")
    cfg = _read_config(checkpoint, form)
    scaler = _read_scaler(checkpoint)
    is_checkpoint = validation.is_checkpoint(cfg)
    scale = cfg.get("normalize_activations")
    needs_scale = is_checkpoint and scale in validation.ESTIMATED_SCALES
    if needs_scale and scaler == ActivationScaler():
        raise UserError(
            f"{checkpoint} has no {constants.ACTIVATION_SCALER_CFG_FILENAME} with the scale "
            f"for normalize_activations {scale!r}; SAELens writes one into checkpoints on "
            "disk, not into those on Weights & Biases"
        )
    make_writable(output_path.parent)
    if is_checkpoint:
        sae = _of_checkpoint(checkpoint, cfg, scaler)
    else:
        sae = load_scaffold_sae(checkpoint)
    if form and not isinstance(sae, ScaffoldMixin):
        raise UserError(f"form {form!r} is of scaffold SAEs; {checkpoint} has none")
    complete_metadata(sae.cfg.metadata, checkpoint)
    with new_directory(output_path) as folder:
        if isinstance(sae, TrainingSAE) and not form:
            sae.save_inference_model(folder)
        elif isinstance(sae, ScaffoldMixin):
            plain = sae.to_jumprelu() if form == "jumprelu" else sae.sparse_sae()
            plain.save_model(folder)
        exported = SAE.load_from_disk(folder)
        with validation.named(checkpoint):
            validation.check_config(exported.cfg.to_dict())
            validation.check_weights(exported.cfg.to_dict(), exported.state_dict())
    return exported


def _of_checkpoint(
    checkpoint: Path, cfg: dict[str, Any], scaler: ActivationScaler
) -> TrainingSAE[Any]:
    try:
        sae = _load(checkpoint, cfg)
        _fold(sae, scaler)
    except _UNREADABLE as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{checkpoint}: no SAE can be made of it: {reason}") from error
    return sae


def _read_config(checkpoint: Path, form: Form | None) -> dict[str, Any]:
    file = checkpoint / constants.SAE_CFG_FILENAME
    if not file.is_file():
        inner = [
            *checkpoint.glob(f"*/{file.name}"),
            *checkpoint.glob(f"*/*/{file.name}"),
        ]
        named = ", ".join(sorted(str(found.parent) for found in inner)[:5])
        raise UserError(
            f"{checkpoint} is no checkpoint of an SAE: it has no {file.name}"
            + (f"; name one of those in it: {named}" if named else "")
        )
    cfg = validation.read_json_object(file, validation.MAX_CFG_BYTES)
    architecture = cfg.get("architecture")
    is_known = architecture in list(SAE_CLASS_REGISTRY)
    if not validation.is_checkpoint(cfg) and not (form and is_known):
        reason = "the form in which SAEs are used already (--form makes a plain one)"
        if not is_known:
            reason = f"not one of {sorted(SAE_TRAINING_CLASS_REGISTRY)}"
        raise UserError(
            f"{checkpoint} is no checkpoint of a training: its architecture is "
            f"{architecture!r:.100}, {reason}"
        )
    return cfg


def _read_scaler(checkpoint: Path) -> ActivationScaler:
    """The scale of the activations at the checkpoint; an empty one if there is no file."""
    scaler = ActivationScaler()
    file = checkpoint / constants.ACTIVATION_SCALER_CFG_FILENAME
    if not file.is_file():
        return scaler  # as of a checkpoint from Weights & Biases
    try:
        scaler.load(file)
    except _UNREADABLE as error:
        raise UserError(f"{file}: {type(error).__name__}: {one_line(error)}") from error
    scale: Any = scaler.scaling_factor
    is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if scale is not None and not (is_number and 0 < scale < math.inf):
        raise UserError(f"{file}: scaling_factor is {scale!r}, no positive number")
    return scaler


def _load(checkpoint: Path, cfg: dict[str, Any]) -> TrainingSAE[Any]:
    """The training SAE, its tensors in the dtypes that they have in the checkpoint."""
    # On the meta device first, as SAELens loads SAEs. Its own `load_from_disk` would round
    # the threshold, which has double precision, to the dtype of the weights.
    sae = TrainingSAE.from_dict({**cfg, "device": "meta"})
    weights = load_file(checkpoint / constants.SAE_WEIGHTS_FILENAME)
    sae.process_state_dict_for_loading(weights)
    sae.load_state_dict(weights, assign=True)
    return sae.to(device="cpu")


def _fold(sae: TrainingSAE[Any], scaler: ActivationScaler) -> None:
    """What SAELens's trainer does when the training ends."""
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if (whitening := scaler.whitening) is not None:
        sae.fold_activation_whitening(
            whitening.mean, whitening.matrix, whitening.inverse_matrix
        )
    is_batch_top_k = isinstance(sae, BatchTopKTrainingSAE)
    if is_batch_top_k and sae.cfg.metadata.threshold_calibration is None:
        record_calibration(sae, n_tokens=0)
