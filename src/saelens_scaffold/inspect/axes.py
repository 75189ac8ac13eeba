"""The principal axes of a scaffold's output."""

from dataclasses import dataclass
from typing import Any

import torch

from saelens_scaffold.saes.subspaces import ActivationMoments, orthonormal_basis


@dataclass
class ScaffoldAxes:
    """
    A basis of a scaffold's subspace that means something.

    The SAE's own basis does not: any invertible map may sit between encoder and decoder. The
    principal axes of s(x), the scaffold's output, do not depend on it.

    Attributes:
        sae: The SAE.
        rows: The axes, orthonormal, largest variance first, shape (r, d_in). The largest
            component of each is positive.
        mean: Mean of s, shape (d_in,).
        stds: Standard deviation along each axis, shape (r,).
    """

    sae: Any
    rows: torch.Tensor
    mean: torch.Tensor
    stds: torch.Tensor

    def coordinates(self, x: torch.Tensor) -> torch.Tensor:
        """
        Coordinates of s(x) - E[s].

        Args:
            x: Activations, shape (..., d_in).

        Returns:
            Shape (..., r).
        """
        return (self.sae.scaffold(x).float() - self.mean) @ self.rows.T


class AxesFit:
    """
    Axes of an SAE's scaffold, from the second moments of its output on some tokens.

    Args:
        sae: The SAE, which has a scaffold.
    """

    def __init__(self, sae: Any):
        self._sae = sae
        rows = sae.W_dec[: sae.cfg.scaffold_rank].detach().float()
        # on the CPU, since MPS has no double precision
        self._basis = orthonormal_basis(rows.cpu()).to(rows)
        self._moments = ActivationMoments(len(self._basis), rows.device)

    @torch.no_grad()
    def update(self, x: torch.Tensor) -> None:
        """
        Args:
            x: Activations, shape (n_tokens, d_in).
        """
        self._moments.update(self._sae.scaffold(x).float() @ self._basis.T)

    def result(self) -> ScaffoldAxes:
        """The axes, once all tokens are seen."""
        variances, directions = self._moments.principal_directions()
        rows = directions.to(self._basis) @ self._basis
        largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
        mean = self._moments.mean.to(self._basis) @ self._basis
        # of a scaffold that writes a constant, too
        stds = variances.sqrt().to(self._basis).clamp_min(1e-12)
        return ScaffoldAxes(self._sae, rows * largest.sign(), mean, stds)
