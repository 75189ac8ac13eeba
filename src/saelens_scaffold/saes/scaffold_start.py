"""Start of a scaffold on the first training batch."""

import warnings
from typing import TYPE_CHECKING

import torch

from saelens_scaffold.plugins.hookspecs import ScaffoldStart
from saelens_scaffold.plugins.manager import plugins_of
from saelens_scaffold.saes.pca import principal_subspace

if TYPE_CHECKING:
    from saelens_scaffold.saes import ScaffoldBatchTopKTrainingSAE as ScaffoldSAE


def scaffold_start(sae: "ScaffoldSAE", sae_in: torch.Tensor) -> ScaffoldStart | None:
    """
    A plugin's start, else the principal one with scaffold_init="pca", else None.

    Args:
        sae: The SAE.
        sae_in: Activations as the SAE takes them in training, shape (..., d_in).

    Raises:
        ValueError: No token is finite, or the plugin's start is not finite or does not
            have the scaffold's shape.
    """
    if sae.has_plugins:
        hook = plugins_of(sae).hook
        start = hook.initialize_scaffold(sae=sae, sae_in=sae_in)
        if start is not None:
            _check(start, sae.cfg.d_in, sae.cfg.scaffold_rank)
            return start
    return _principal_start(sae, sae_in) if sae.cfg.scaffold_init == "pca" else None


def _check(start: ScaffoldStart, d_in: int, rank: int) -> None:
    parts: list[tuple[str, torch.Tensor, tuple[int, ...]]] = [
        ("A", start.A, (d_in, rank)),
        ("B", start.B, (rank, d_in)),
    ]
    if start.b_dec is not None:
        parts.append(("b_dec", start.b_dec, (d_in,)))
    for name, value, shape in parts:
        if tuple(value.shape) != shape or not value.isfinite().all():
            raise ValueError(
                f"a plugin's initialize_scaffold gave {name} of shape "
                f"{tuple(value.shape)}; it must be finite and of shape {shape}"
            )


def _principal_start(sae: "ScaffoldSAE", sae_in: torch.Tensor) -> ScaffoldStart:
    rank = sae.cfg.scaffold_rank
    x = sae.run_time_activation_norm_fn_in(sae_in.to(sae.dtype))
    mean, directions, n_determined, n_tokens = principal_subspace(x, rank)
    if sae.cfg.normalize_activations == "covariance_whitening":
        warnings.warn(
            "scaffold_init='pca' finds no principal directions in activations "
            "whitened by normalize_activations='covariance_whitening': every "
            "direction has the same variance, so the scaffold starts arbitrarily."
        )
    elif n_determined < rank:
        warnings.warn(
            f"The first training batch ({n_tokens} usable tokens) determines only "
            f"{n_determined} of the scaffold_rank={rank} principal directions; the "
            "others start arbitrarily. Use a larger batch or a smaller scaffold_rank."
        )
    if not sae.cfg.apply_b_dec_to_input:
        # z then reads x itself, so that s already holds this part of the mean
        mean = mean - mean @ directions.T @ directions
    return ScaffoldStart(A=directions.T, B=directions, b_dec=mean)
