"""What an SAE does in its inference form, on tokens that its training has not seen."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from sae_lens import SAE
from sae_lens.constants import RUNNER_CFG_FILENAME
from typing_extensions import Self

from saelens_scaffold.saes.digest import weights_sha256
from saelens_scaffold.saes.firing import DENSE_THRESHOLD, FiringStatistics
from saelens_scaffold.saes.subspaces import ActivationMoments

L0_TOLERANCE = 0.1
"""Share of k by which a measured L0 may differ from it without a warning."""


class NotMeasuredError(Exception):
    """There is nothing to measure, or it cannot be measured, and why."""


class Metadata(Protocol):
    """An SAE's metadata: SAELens's object, or the dictionary in a file."""

    def get(self, key: str, /) -> Any: ...


@dataclass(frozen=True)
class Measurement:
    """
    An SAE in inference form, as `metadata.measured` in its cfg.json has it.

    The definitions are those of the `dense_latents` evaluation.

    Attributes:
        n_tokens: Number of tokens.
        text: What the tokens are.
        l0_sparse: Sparse latents that fire per token.
        l0_total: l0_sparse plus the rank of the scaffold.
        explained_variance: Share of the variance that the whole SAE explains.
        dense_latents: Number of sparse latents that fire on more than `threshold` of
            the tokens.
        threshold: Share of the tokens above which a latent is dense.
        weights_sha256: Digest of the weights that were measured.
    """

    n_tokens: int
    text: str
    l0_sparse: float
    l0_total: float
    explained_variance: float
    dense_latents: int
    threshold: float
    weights_sha256: str

    def __str__(self) -> str:
        return (
            f"l0_sparse {self.l0_sparse:.1f}, l0_total {self.l0_total:.1f}, "
            f"{self.dense_latents} dense latents (on more than {self.threshold:.0%} of the "
            f"tokens), explained variance {self.explained_variance:.3f}; in inference form, "
            f"on {self.n_tokens:,} tokens ({self.text})"
        )

    def to_metadata(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {
            "form": "inference",
            "n_tokens": self.n_tokens,
            "text": self.text,
            "l0_sparse": self.l0_sparse,
            "l0_total": self.l0_total,
            "explained_variance": self.explained_variance,
            "dense_latents": {"threshold": self.threshold, "count": self.dense_latents},
            "weights_sha256": self.weights_sha256,
        }

    @classmethod
    def of(cls, sae: SAE[Any]) -> Self | None:
        """
        What an SAE's metadata say was measured of these very weights.

        None if that is nothing: metadata outlive a change of the weights, and go along
        with views, so they count only where the digest is that of the SAE.
        """
        try:
            said = dict(sae.cfg.metadata.measured)
            dense = said["dense_latents"]
            found = cls(
                n_tokens=int(said["n_tokens"]),
                text=str(said["text"]),
                l0_sparse=float(said["l0_sparse"]),
                l0_total=float(said["l0_total"]),
                explained_variance=float(said["explained_variance"]),
                dense_latents=int(dense["count"]),
                threshold=float(dense["threshold"]),
                weights_sha256=str(said["weights_sha256"]),
            )
        except (TypeError, KeyError, ValueError):
            return None
        return found if found.weights_sha256 == weights_sha256(sae) else None


def measure(
    sae: SAE[Any], batches: Iterable[torch.Tensor], n_tokens: int, text: str
) -> Measurement:
    """
    Measure an SAE on activations.

    Args:
        sae: The SAE, in inference form.
        batches: Activations, each of shape (n, d_in), at the scale that the SAE reads.
        n_tokens: How many of them count, at most.
        text: What the tokens are.

    Returns:
        What was measured, on fewer tokens if there are no more.

    Raises:
        NotMeasuredError: There are none, or the SAE or the activations are not finite.
    """
    firing = FiringStatistics(sae, n_replicates=0)
    moments = ActivationMoments(sae.cfg.d_in, sae.device)
    for batch in batches:
        x = batch[: n_tokens - moments.n].to(sae.device)
        if len(x):
            firing.update_unsampled(x)
            moments.update(x)
        if moments.n >= n_tokens:
            break
    if moments.n == 0:
        raise NotMeasuredError("training has read all of its text")
    variance = float(moments.covariance.trace()) * moments.n
    explained = 1 - float(firing.squared_errors[0]) / variance if variance else math.nan
    if not math.isfinite(explained):
        raise NotMeasuredError("the SAE or the activations are not finite, or constant")
    l0_sparse = int(firing.fired.sum()) / moments.n
    return Measurement(
        n_tokens=moments.n,
        text=text,
        l0_sparse=l0_sparse,
        l0_total=l0_sparse + firing.rank,
        explained_variance=explained,
        dense_latents=int((firing.fired / moments.n > DENSE_THRESHOLD).sum()),
        threshold=DENSE_THRESHOLD,
        weights_sha256=weights_sha256(sae),
    )


def trained_k(metadata: Metadata) -> float | None:
    """The k that an SAE was trained with, as far as its metadata say so."""
    details = metadata.get("training_architecture_details")
    for k in (metadata.get("k"), details.get("k") if isinstance(details, dict) else 0):
        if isinstance(k, (int, float)) and not isinstance(k, bool) and k > 0:
            return float(k)
    return None


def note_trained_k(sae: SAE[Any], directory: Path) -> None:
    """
    Let an SAE's metadata say what k was, where only the runner's configuration, beside
    the weights, does: older SAELens did not write it into the SAE's own.

    Args:
        sae: The SAE.
        directory: Where it was loaded from.
    """
    file = directory / RUNNER_CFG_FILENAME
    if trained_k(sae.cfg.metadata) is not None or not file.is_file():
        return
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        sae.cfg.metadata.k = trained_k(said["sae"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # of another program, or of several SAEs


def l0_warning(
    name: str, l0_sparse: float, n_tokens: int, metadata: Metadata
) -> str | None:
    """
    What to say of an SAE whose L0 is not the k that it was trained with.

    Args:
        name: What the SAE is called.
        l0_sparse: Its sparse latents per token, measured in inference form.
        n_tokens: How many tokens that was measured on.
        metadata: The SAE's, which say what k was.

    Returns:
        One line, or None if they differ by no more than `L0_TOLERANCE` of k, or there is
        no k.
    """
    k = trained_k(metadata)
    if k is None or abs(l0_sparse - k) <= L0_TOLERANCE * k:
        return None
    return (
        f"{name}: l0_sparse is {l0_sparse:.1f}, measured in inference form on "
        f"{n_tokens:,} tokens, but k was {k:g} in training ({l0_sparse / k - 1:+.0%}). "
        f"State and compare it at the measured l0_sparse, not at k. {_remedy(metadata)}"
    )


def _remedy(metadata: Metadata) -> str:
    calibration = metadata.get("threshold_calibration")
    if (
        isinstance(calibration, dict)
        and calibration.get("estimator") == "training_activations"
    ):
        return (
            "Its threshold was calibrated on a sample of the training, and texts differ: "
            "measure on more tokens of such text (`saelens-scaffold eval dense_latents`), "
            "or train on more."
        )
    return (
        "Its threshold is a running average, which lags in short trainings: train for "
        "more steps, or where it is calibrated at the end (scaffold architectures, and "
        "`saelens-scaffold compare`)."
    )
