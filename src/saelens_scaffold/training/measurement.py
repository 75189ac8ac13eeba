"""Measurement of an SAE in inference form on tokens that its training has not seen."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from sae_lens import SAE
from typing_extensions import Self

from saelens_scaffold.saes import facts
from saelens_scaffold.saes.subspaces import ActivationMoments


class NotMeasuredError(Exception):
    """Why an SAE cannot be measured."""


@dataclass(frozen=True)
class Measurement:
    """
    Measurement of an SAE in inference form: `metadata.measured` in its cfg.json.

    Definitions are those of the `dense_latents` evaluation.

    Attributes:
        n_tokens: Number of tokens.
        text: Description of the text.
        l0_sparse: Mean number of active sparse latents per token.
        l0_total: l0_sparse plus the rank of the scaffold.
        explained_variance: Share of the variance that the whole SAE explains.
        dense_latents: Number of sparse latents that fire on more than `threshold` of
            the tokens.
        threshold: Share of the tokens above which a latent is dense.
        weights_sha256: Hash of the weights that were measured.
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
        """The measurement as plain JSON values."""
        values = asdict(self)
        threshold = values.pop("threshold")
        values["dense_latents"] = {"threshold": threshold, "count": self.dense_latents}
        return {"form": "inference", **values}

    @classmethod
    def of(cls, sae: SAE[Any]) -> Self | None:
        """
        The measurement in an SAE's metadata, if it is of these very weights.

        Metadata outlive changes of the weights, and are copied to views, so a measurement
        counts only if its hash is that of the SAE's weights.
        """
        try:
            values = dict(sae.cfg.metadata.measured)
            dense = values["dense_latents"]
            values.update(dense_latents=dense["count"], threshold=dense["threshold"])
            found = cls(**{f.name: f.type(values[f.name]) for f in fields(cls)})  # type: ignore[operator]
        except (TypeError, KeyError, ValueError):
            return None
        return found if found.weights_sha256 == facts.weights_sha256(sae) else None


def measure(
    sae: SAE[Any], batches: Iterable[torch.Tensor], n_tokens: int, text: str
) -> Measurement:
    """
    Measure an SAE on activations.

    Args:
        sae: SAE in inference form.
        batches: Activations, each of shape (n, d_in), at the scale that the SAE reads.
        n_tokens: Maximum number of tokens.
        text: Description of the text.

    Returns:
        The measurement, on fewer tokens if there are no more.

    Raises:
        NotMeasuredError: There are no tokens, or the SAE or the activations are not
            finite.
    """
    firing = facts.FiringStatistics(sae, n_replicates=0)
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
        dense_latents=int((firing.fired / moments.n > facts.DENSE_THRESHOLD).sum()),
        threshold=facts.DENSE_THRESHOLD,
        weights_sha256=facts.weights_sha256(sae),
    )
