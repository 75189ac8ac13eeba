"""Principal subspace of a batch of activations, to initialise a scaffold."""

from typing import NamedTuple

import torch

# A token whose norm exceeds this multiple of the median norm is a massive
# activation (BOS, attention sinks; Sun et al., arXiv 2402.17762): one rare direction
# that would own the first principal component and shift the mean, though it is
# sparse and belongs in the dictionary.
MASSIVE_NORM_MULTIPLE = 10.0


class PrincipalSubspace(NamedTuple):
    """
    The leading principal directions of a batch of activations.

    Attributes:
        mean: Mean activation, shape (d_in,), float64.
        directions: Orthonormal rows, largest variance first, shape (rank, d_in), float64.
        n_determined: Number of rows with variance in the batch. The others are an
            arbitrary orthonormal completion.
        n_tokens: Number of tokens used.
    """

    mean: torch.Tensor
    directions: torch.Tensor
    n_determined: int
    n_tokens: int


@torch.no_grad()
def principal_subspace(x: torch.Tensor, rank: int) -> PrincipalSubspace:
    """
    Mean and top-`rank` principal directions of the usable tokens of a batch.

    Tokens with a non-finite component are left out, and so are massive activations
    (norm above 10 times the median norm). Everything is computed in float64, outside
    autocast, by a full eigendecomposition, so it is deterministic and uses no random
    numbers; the sign of each direction makes its largest component positive.

    Args:
        x: Activations, shape (..., d_in).
        rank: Number of directions, at most d_in.

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
        return PrincipalSubspace(
            mean=mean,
            directions=directions.contiguous(),
            n_determined=int((variances > tolerance).sum()),
            n_tokens=len(usable),
        )


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
