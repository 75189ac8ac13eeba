"""How many dimensions of a covariance stand out: by themselves, together, and by chance."""

from typing import NamedTuple

import numpy as np
import torch

OUTLIER_Z = 3.5
"""Modified z-score of an outlier (Iglewicz & Hoaglin 1993)."""

OUTLIER_RATIO = 4.0
"""Variance of an outlier dimension, as a multiple of the median: twice the typical spread."""

NULL_DRAWS = 19
NULL_QUANTILE = NULL_DRAWS / (NULL_DRAWS + 1)
"""Quantile of the null that counts as chance (Glorfeld 1995): 95 %. The largest of 19 draws
is exceeded by chance in one of 20 (a Monte Carlo test)."""


class ParallelAnalysis(NamedTuple):
    """
    Which principal directions of correlations are more than chance.

    Attributes:
        rank: Number of leading eigenvalues above the null's quantile.
        eigenvalues: Of the correlation matrix, largest first, shape (d,).
        null: Quantile of each eigenvalue over draws without correlation, shape (d,).
    """

    rank: int
    eigenvalues: torch.Tensor
    null: torch.Tensor


def outlier_dimensions(variances: torch.Tensor) -> torch.Tensor:
    """
    Dimensions (basis vectors, not directions) whose variance is far from the others'.

    The logarithm of the variance has a modified z-score above 3.5, and the variance is
    above 4 times the median. The first alone would name the largest of nearly equal
    variances, the second the upper tail of widely spread ones. Medians, since outliers
    would hide each other in a mean.

    Args:
        variances: Of each dimension, shape (d_in,). About the mean: a dimension that is
            large but constant is b_dec's to take, not a scaffold's.

    Returns:
        Indices, largest variance first, shape (n_outliers,).
    """
    logs = variances.clamp_min(torch.finfo(variances.dtype).tiny).log()
    deviations = logs - logs.median()
    # 0.6745: the median absolute deviation of a standard normal variable
    spread = deviations.abs().median() / 0.6745
    is_outlier = (deviations > OUTLIER_Z * spread) & (
        variances > OUTLIER_RATIO * variances.median()
    )
    order = variances.argsort(descending=True)
    return order[is_outlier[order]]


def without_dimensions(
    covariance: torch.Tensor, dimensions: torch.Tensor
) -> torch.Tensor:
    """
    Covariance of the other dimensions given these: what is linear in these is gone.

    So ranks add up: that of a covariance is the number of these dimensions plus the rank
    of what is returned (Guttman's rank additivity of the Schur complement).

    Args:
        covariance: Shape (d_in, d_in).
        dimensions: Indices, shape (m,).

    Returns:
        Shape (d_in - m, d_in - m).
    """
    is_other = torch.ones(
        len(covariance), dtype=torch.bool, device=covariance.device
    ).index_fill(0, dimensions, False)
    others = covariance[is_other]
    across = others[:, dimensions]
    own = covariance[dimensions][:, dimensions]
    explained = across @ torch.linalg.pinv(own, hermitian=True) @ across.T
    return others[:, is_other] - explained


def parallel_analysis(
    covariance: torch.Tensor, n_tokens: int, rng: np.random.Generator
) -> ParallelAnalysis:
    """
    Parallel analysis of the correlations (Horn 1965), by a quantile (Glorfeld 1995).

    Correlations, since dimensions of different variance and no correlation have a steep
    spectrum too. By the same token it is blind to an outlier dimension that correlates
    with no other: see `outlier_dimensions`.

    Args:
        covariance: Shape (d, d).
        n_tokens: Tokens that it is of, more than d.
        rng: Of the null's draws.
    """
    eigenvalues = _correlation_eigenvalues(covariance)
    null = null_eigenvalues(len(covariance), n_tokens, rng).to(eigenvalues)
    rank = int((eigenvalues > null).int().cumprod(0).sum())
    return ParallelAnalysis(rank, eigenvalues, null)


def null_eigenvalues(d: int, n_tokens: int, rng: np.random.Generator) -> torch.Tensor:
    """
    Eigenvalues of correlation matrices of independent normal variables.

    The covariance of n normal samples is drawn as a whole (Wishart's distribution, by
    Bartlett's decomposition), so that a draw costs as much for a million tokens as for
    one. Shuffling each dimension over the tokens gives the same to within its own
    scatter, at the price of another pass for each draw.

    Args:
        d: Number of variables.
        n_tokens: Number of samples, more than d.
        rng: Of the draws.

    Returns:
        The 95 % quantile of each, the largest of 19 draws; largest first, shape (d,),
        float64.
    """
    draws: list[torch.Tensor] = []
    for _ in range(NULL_DRAWS):
        factor = np.tril(rng.normal(size=(d, d)), -1)
        np.fill_diagonal(factor, rng.chisquare(n_tokens - 1 - np.arange(d)) ** 0.5)
        draws.append(_correlation_eigenvalues(torch.from_numpy(factor @ factor.T)))
    return torch.stack(draws).amax(dim=0)


def knee_of(variances: torch.Tensor) -> int:
    """
    The number of directions before the spectrum's knee: where the logarithm of the
    variances lies farthest below the line through the first and the median one.

    The upper half of the spectrum only, as the smallest variances fall off again.
    """
    logs = variances[: max(3, len(variances) // 2)].clamp_min(1e-30).log()
    line = torch.linspace(float(logs[0]), float(logs[-1]), len(logs)).to(logs)
    return max(1, int((line - logs).argmax()))


def _correlation_eigenvalues(covariance: torch.Tensor) -> torch.Tensor:
    """Largest first. A constant dimension correlates with nothing."""
    tiny = torch.finfo(covariance.dtype).tiny
    scale = covariance.diagonal().clamp_min(tiny).rsqrt()
    return torch.linalg.eigvalsh(covariance * scale[:, None] * scale).flip(0)
