"""Start of a scaffold on the first training batch: its principal subspace."""

import warnings
from typing import TYPE_CHECKING

import torch

from saelens_scaffold.plugins.hookspecs import ScaffoldStart
from saelens_scaffold.plugins.manager import plugins_of

if TYPE_CHECKING:
    from saelens_scaffold.saes import ScaffoldBatchTopKTrainingSAE as ScaffoldSAE

# A token whose norm exceeds this multiple of the median norm is a massive
# activation (BOS, attention sinks; Sun et al., arXiv 2402.17762): one rare direction
# that would own the first principal component and shift the mean, though it is
# sparse and belongs in the dictionary.
MASSIVE_NORM_MULTIPLE = 10.0


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
    shapes = {"A": (d_in, rank), "B": (rank, d_in), "b_dec": (d_in,)}
    for name, shape in shapes.items():
        value: torch.Tensor | None = getattr(start, name)
        if value is None:  # b_dec, which then stays as it is
            continue
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


@torch.no_grad()
def principal_subspace(
    x: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """
    Mean and top-`rank` principal directions of the usable tokens of a batch.

    Tokens with a non-finite component are left out, and so are massive activations
    (norm above 10 times the median norm). Everything is computed in float64, outside
    autocast, by a full eigendecomposition, so it is deterministic and uses no random
    numbers; the sign of each direction makes its largest component positive.

    Args:
        x: Activations, shape (..., d_in).
        rank: Number of directions, at most d_in.

    Returns:
        The mean, shape (d_in,), float64; the directions, orthonormal rows with the largest
        variance first, shape (rank, d_in), float64; the number of rows with variance in the
        batch, the others being an arbitrary orthonormal completion; and the number of
        tokens used.

    Raises:
        ValueError: No token is finite.
    """
    x = x.reshape(-1, x.shape[-1])
    # linalg.eigh and float64 do not exist on MPS
    x = x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)
    with torch.autocast(x.device.type, enabled=False):
        usable = x[_is_usable(x)]
        mean = usable.mean(dim=0)
        centred = usable - mean
        eigenvalues, eigenvectors = torch.linalg.eigh(centred.T @ centred)
        variances = eigenvalues.flip(0)[:rank]
        directions = eigenvectors.flip(1)[:, :rank].T
        tolerance = torch.finfo(x.dtype).eps * x.shape[-1] * eigenvalues[-1].abs()
        largest = directions.abs().argmax(dim=1, keepdim=True)
        directions = directions * directions.gather(1, largest).sign()
        n_determined = int((variances > tolerance).sum())
        return mean, directions.contiguous(), n_determined, len(usable)


def _is_usable(x: torch.Tensor) -> torch.Tensor:
    """Mask of finite tokens without massive activations, shape (n_tokens,)."""
    finite = x.isfinite().all(dim=1)
    if not finite.any():
        raise ValueError(
            f"scaffold_init='pca' needs activations, but none of the {len(x)} tokens "
            "of the first training batch is finite. Check the hook point, and the "
            "language model's dtype (float16 overflows in some models)."
        )
    norms = x.norm(dim=1)
    nonzero = finite & (norms > 0)
    if not nonzero.any():
        return finite
    return finite & (norms <= MASSIVE_NORM_MULTIPLE * norms[nonzero].median())
