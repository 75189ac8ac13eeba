"""Dimensions of the dense part of activations, each counted in another way."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from saelens_scaffold.evals.data import TextSeenInTraining
from saelens_scaffold.evals.tokens import TokenSelection
from saelens_scaffold.saes.facts import DENSE_THRESHOLD
from saelens_scaffold.saes.subspaces import share_in_subspace

OUTLIER_Z = 3.5
"""Modified z-score of an outlier (Iglewicz & Hoaglin 1993)."""

OUTLIER_RATIO = 4.0
"""Variance of an outlier dimension, as a multiple of the median: twice the typical spread."""

NULL_DRAWS = 19
NULL_QUANTILE = NULL_DRAWS / (NULL_DRAWS + 1)
"""Quantile of the null that counts as chance (Glorfeld 1995): 95 %. The largest of 19 draws
is exceeded by chance in one of 20 (a Monte Carlo test)."""

SPANNED = 0.95
"""Share of dense latents' decoder directions that counts as their span."""

COVERED = 0.8
"""Share of them that counts as covered by principal directions."""

MAX_NAMED = 12
"""How many outlier dimensions a reason names; rank.json has all."""

REASONS = yaml.safe_load(Path(__file__).with_name("reasons.yaml").read_text("utf-8"))
"""Templates of reasons, by the candidate's name."""


@dataclass
class RankCandidate:
    """
    A rank, and what speaks for it.

    Attributes:
        name: How it was counted.
        rank: 0 if nothing stands out.
        reason: What the count means.
    """

    name: str
    rank: int
    reason: str


@dataclass(kw_only=True)
class RankAnalysis:
    """
    What activations say of a scaffold's rank.

    Attributes:
        candidates: All candidates.
        outlier_dimensions: Index, share of the whole variance, and ratio to the median
            dimension's variance of each, largest variance first.
        dimension_variances: Variance of each dimension.
        variance_shares: Share of the variance along each principal direction, largest
            first.
        correlation_eigenvalues: Those of the correlations of the dimensions that are no
            outliers, what is linear in the outliers removed; largest first.
        null_eigenvalues: The null's quantile of each.
        null_quantile: Quantile of the null.
        null_draws: Number of the null's draws.
        n_tokens: Tokens that it was measured on.
        tokens: How the text became sequences, and which of their tokens count.
        n_dense_latents: Dense latents of the plain SAE; None if there is none.
        text_seen_in_training: Whether it was trained on this text; None likewise.
    """

    candidates: list[RankCandidate]
    outlier_dimensions: list[dict[str, float]]
    dimension_variances: list[float]
    variance_shares: list[float]
    correlation_eigenvalues: list[float]
    null_eigenvalues: list[float]
    null_quantile: float = NULL_QUANTILE
    null_draws: int = NULL_DRAWS
    n_tokens: int
    tokens: TokenSelection | None = None
    n_dense_latents: int | None = None
    text_seen_in_training: TextSeenInTraining | None = None

    @property
    def suggestion(self) -> RankCandidate | None:
        """The candidate to try first; None if nothing stands out."""
        return suggested(self.candidates)


def analyse_covariance(
    covariance: torch.Tensor, n_tokens: int, seed: int
) -> RankAnalysis:
    """
    Look at the covariance of activations.

    Args:
        covariance: Shape (d_in, d_in).
        n_tokens: Tokens that it is of, more than d_in.
        seed: Of the null's draws.
    """
    covariance = covariance.double().cpu()
    of_dimensions = covariance.diagonal()
    outliers = outlier_dimensions(of_dimensions)
    others, n_outliers = without_dimensions(covariance, outliers), len(outliers)
    # each outlier dimension takes a degree of freedom
    n_free, rng = n_tokens - n_outliers, np.random.default_rng(seed)
    beyond, eigenvalues, null = parallel_analysis(others, n_free, rng)
    variances = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0)
    shares = variances / variances.sum()
    total, median = of_dimensions.sum(), of_dimensions.median()
    found = [
        {
            "dimension": int(i),
            "variance_share": float(of_dimensions[i] / total),
            "ratio_to_median": float(of_dimensions[i] / median),
        }
        for i in outliers
    ]
    named = ", ".join(str(int(i)) for i in outliers[:MAX_NAMED])
    if n_outliers > MAX_NAMED:
        named += f" and {n_outliers - MAX_NAMED} more"
    template = "outlier dimensions" if found else "no outlier dimensions"
    held = sum(outlier["variance_share"] for outlier in found)
    knee, equal = knee_of(variances), float(1 / shares.pow(2).sum())
    candidates = [
        _candidate("outlier dimensions", n_outliers, template, named=named, held=held),
        _candidate("knee", knee, held=float(shares[:knee].sum())),
        _candidate("participation ratio", max(1, round(equal)), equal=equal),
        _candidate("parallel analysis", n_outliers + beyond, beyond=beyond),
    ]
    return RankAnalysis(
        candidates=candidates,
        outlier_dimensions=found,
        dimension_variances=of_dimensions.tolist(),
        variance_shares=shares.tolist(),
        correlation_eigenvalues=eigenvalues.tolist(),
        null_eigenvalues=null.tolist(),
        n_tokens=n_tokens,
    )


def dense_latent_candidates(
    decoder: torch.Tensor, directions: torch.Tensor
) -> list[RankCandidate]:
    """
    Ranks that a plain SAE's dense latents speak for.

    Args:
        decoder: Their decoder directions, shape (n_dense, d_in).
        directions: Principal directions, largest variance first, shape (d_in, d_in).
    """
    n_dense = len(decoder)
    if n_dense == 0:
        return []
    unit = torch.nn.functional.normalize(decoder.double(), dim=1)
    weights = torch.linalg.svdvals(unit).pow(2).cumsum(0) / n_dense
    span = int((weights < SPANNED).sum()) + 1
    inside = (unit @ directions.T).pow(2).cumsum(dim=1).mean(dim=0)
    covered = int((inside < COVERED).sum()) + 1
    held = float(share_in_subspace(unit, directions[:span]).mean())
    return [
        _candidate("dense latents", span, n_dense=n_dense, held=held),
        _candidate("dense latents in PCA", covered),
    ]


def suggested(candidates: list[RankCandidate]) -> RankCandidate | None:
    """
    The candidate to try first: the span of the dense latents that the scaffold is to take
    over, if they are known; else the knee, but no less than the outlier dimensions and no
    more than parallel analysis allows. None if that is 0.
    """
    by_name = {candidate.name: candidate for candidate in candidates}
    if "dense latents" in by_name:
        return by_name["dense latents"]
    bounds = [by_name[n] for n in ("outlier dimensions", "knee", "parallel analysis")]
    middle = sorted(bounds, key=lambda candidate: candidate.rank)[1]
    # a knee there always is, even in noise
    return middle if bounds[-1].rank else None


def _candidate(
    name: str, rank: int, template: str | None = None, **figures: object
) -> RankCandidate:
    figures |= {"ratio": OUTLIER_RATIO, "z": OUTLIER_Z, "quantile": NULL_QUANTILE}
    figures |= {"threshold": DENSE_THRESHOLD, "spanned": SPANNED, "covered": COVERED}
    reason = REASONS[template or name].format(rank=rank, **figures)
    return RankCandidate(name, rank, reason)


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
    is_far = deviations > OUTLIER_Z * spread
    is_large = variances > OUTLIER_RATIO * variances.median()
    order = variances.argsort(descending=True)
    return order[(is_far & is_large)[order]]


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
    is_other = torch.ones_like(covariance[0], dtype=torch.bool)
    is_other[dimensions] = False
    others = covariance[is_other]
    across = others[:, dimensions]
    own = covariance[dimensions][:, dimensions]
    explained = across @ torch.linalg.pinv(own, hermitian=True) @ across.T
    return others[:, is_other] - explained


def parallel_analysis(
    covariance: torch.Tensor, n_tokens: int, rng: np.random.Generator
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """
    Parallel analysis of the correlations (Horn 1965), by a quantile (Glorfeld 1995).

    Correlations, since dimensions of different variance and no correlation have a steep
    spectrum too. By the same token it is blind to an outlier dimension that correlates
    with no other: see `outlier_dimensions`.

    Args:
        covariance: Shape (d, d).
        n_tokens: Tokens that it is of, more than d.
        rng: Of the null's draws.

    Returns:
        Number of leading eigenvalues above the null's quantile; the eigenvalues of the
        correlation matrix, largest first, shape (d,); and the quantile of each over draws
        without correlation, shape (d,).
    """
    eigenvalues = _correlation_eigenvalues(covariance)
    null = null_eigenvalues(len(covariance), n_tokens, rng).to(eigenvalues)
    rank = int((eigenvalues > null).int().cumprod(0).sum())
    return rank, eigenvalues, null


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
