"""What can be told of any SAELens SAE, with or without a scaffold."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.constants import RUNNER_CFG_FILENAME

L0_TOLERANCE = 0.1
"""Relative difference between measured L0 and k up to which there is no warning."""


def scaffold_rank(sae: SAE[Any]) -> int:
    """Number of linear latents; 0 without a scaffold."""
    return int(getattr(sae.cfg, "scaffold_rank", 0))


def weights_sha256(sae: SAE[Any], dtype: torch.dtype | None = None) -> str:
    """
    SHA-256 hash of an SAE's weights, the same on every device.

    Args:
        sae: The SAE.
        dtype: Data type to convert the weights to first; None for their own.
    """
    digest = sha256()
    for name, weights in sorted(sae.state_dict().items()):
        weights = weights.detach().to(dtype=dtype or weights.dtype)
        digest.update(f"{name}{tuple(weights.shape)}{weights.dtype}".encode())
        weights = weights.cpu().flatten().contiguous().view(torch.uint8)
        digest.update(weights.numpy().data)
    return digest.hexdigest()


def trained_k(metadata: Any) -> float | None:
    """The k in an SAE's metadata: SAELens's object, or the dictionary from a file."""
    details = metadata.get("training_architecture_details")
    for k in (metadata.get("k"), details.get("k") if isinstance(details, dict) else 0):
        if isinstance(k, (int, float)) and not isinstance(k, bool) and k > 0:
            return float(k)
    return None


def note_trained_k(sae: SAE[Any], directory: Path) -> None:
    """
    Copy k from the runner's configuration into an SAE's metadata.

    Older versions of SAELens write k into the runner's configuration only.

    Args:
        sae: The SAE.
        directory: Directory it was loaded from.
    """
    if trained_k(sae.cfg.metadata) is not None:
        return
    try:
        runner_config = json.loads((directory / RUNNER_CFG_FILENAME).read_bytes())
        sae.cfg.metadata.k = trained_k(runner_config["sae"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # missing, written by another program, or for several SAEs


def l0_warning(name: str, l0_sparse: float, n_tokens: int, metadata: Any) -> str | None:
    """
    Warning about an SAE whose L0 differs from the k it was trained with.

    Args:
        name: Name of the SAE.
        l0_sparse: Active sparse latents per token, measured in inference form.
        n_tokens: Number of tokens it was measured on.
        metadata: The SAE's metadata, which hold k.

    Returns:
        One line; None if the difference is at most `L0_TOLERANCE` of k, or k is unknown.
    """
    k = trained_k(metadata)
    if k is None or abs(l0_sparse - k) <= L0_TOLERANCE * k:
        return None
    calibration = metadata.get("threshold_calibration")
    estimator = calibration.get("estimator") if isinstance(calibration, dict) else None
    remedy = (
        "Its threshold was calibrated on a sample of the training, and texts differ: "
        "measure on more tokens of such text (`saelens-scaffold eval dense_latents`), "
        "or train on more."
        if estimator == "training_activations"
        else "Its threshold is a running average, which lags in short trainings: train "
        "for more steps, or where it is calibrated at the end (scaffold architectures, "
        "and `saelens-scaffold compare`)."
    )
    return (
        f"{name}: l0_sparse is {l0_sparse:.1f}, measured in inference form on "
        f"{n_tokens:,} tokens, but k was {k:g} in training ({l0_sparse / k - 1:+.0%}). "
        f"State and compare it at the measured l0_sparse, not at k. {remedy}"
    )
