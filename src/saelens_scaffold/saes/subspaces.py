"""Linear subspaces of the residual stream: bases, overlaps, principal directions."""

import torch


def orthonormal_basis(rows: torch.Tensor) -> torch.Tensor:
    """
    An orthonormal basis of the span of some rows.

    Args:
        rows: Shape (n, d_in).

    Returns:
        Orthonormal rows, shape (rank, d_in), float64; rank is n if the rows are
        linearly independent.
    """
    rows = rows.double()
    _, singular_values, basis = torch.linalg.svd(rows, full_matrices=False)
    if len(singular_values) == 0:
        return rows
    tolerance = singular_values[0] * max(rows.shape) * torch.finfo(rows.dtype).eps
    return basis[singular_values > tolerance]


def share_in_subspace(directions: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """
    Squared cosine of each direction with a subspace.

    Args:
        directions: Shape (n, d_in). A zero direction has cosine 0.
        basis: Orthonormal rows, shape (r, d_in).

    Returns:
        Shape (n,), from 0 (orthogonal) to 1 (inside).
    """
    directions = directions.double()
    inside = (directions @ basis.T).pow(2).sum(dim=1)
    norms = directions.pow(2).sum(dim=1)
    return inside / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def principal_angle_cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """
    Cosines of the principal angles between two subspaces, largest first.

    Args:
        a: Orthonormal rows, shape (n, d_in).
        b: Orthonormal rows, shape (m, d_in).

    Returns:
        Shape (min(n, m),).
    """
    return torch.linalg.svdvals(a @ b.T).clamp(max=1.0)


def subspace_overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    """
    Mean squared cosine of the principal angles between two subspaces.

    Args:
        a: Orthonormal rows, shape (n, d_in).
        b: Orthonormal rows, shape (m, d_in).

    Returns:
        1 if the smaller lies in the larger, 0 if they are orthogonal; m / d_in in
        expectation if a is a random subspace of dimension n <= m.
    """
    return float(principal_angle_cosines(a, b).pow(2).mean())


class ActivationMoments:
    """
    Running mean and covariance of activations, in float64.

    Attributes:
        n: Number of tokens.
        shift: First guess of the mean, shape (d_in,), from the first update on.
    """

    def __init__(self, d_in: int, device: torch.device | str):
        # MPS has no float64
        self._device = torch.device("cpu") if "mps" in str(device) else device
        self.n = 0
        self._sum = torch.zeros(d_in, dtype=torch.float64, device=self._device)
        self._products = self._sum.new_zeros(d_in, d_in)

    def update(self, x: torch.Tensor) -> None:
        """
        Args:
            x: Activations, shape (n_tokens, d_in).
        """
        x = x.to(self._device).float()
        if self.n == 0:
            # Residual streams lie far from zero, and rounding would destroy a variance that
            # is the difference of two large numbers: so moments are about a first guess.
            self.shift = x.mean(dim=0)
        x = x - self.shift
        self.n += len(x)
        self._sum += x.sum(dim=0, dtype=torch.float64)
        # Only the sum over batches is in float64: far faster, with the rounding of a single
        # batch.
        self._products += x.T @ x

    @property
    def mean(self) -> torch.Tensor:
        """Shape (d_in,)."""
        return self._sum / self.n + self.shift

    @property
    def covariance(self) -> torch.Tensor:
        """Shape (d_in, d_in)."""
        mean = self._sum / self.n
        return self._products / self.n - torch.outer(mean, mean)

    def principal_directions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns:
            Variances, largest first, shape (d_in,), and orthonormal rows, shape
            (d_in, d_in).
        """
        variances, directions = torch.linalg.eigh(self.covariance)
        return variances.flip(0).clamp_min(0), directions.flip(1).T.contiguous()

    def explained_variance(self, basis: torch.Tensor) -> float:
        """Share of the variance that lies in a subspace of orthonormal rows."""
        covariance = self.covariance
        inside = torch.einsum("rd,de,re->", basis, covariance, basis)
        return float(inside / covariance.trace())
