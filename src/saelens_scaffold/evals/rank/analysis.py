"""Dimensions of the dense part of activations, each counted in another way."""

from dataclasses import dataclass, field

import numpy as np
import torch

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.eval_configs import TextEvalConfig
from saelens_scaffold.evals.language_model import (
    HookedModel,
    activations_at,
    by_hook_point,
    check_finite,
    load_language_model,
)
from saelens_scaffold.evals.overlap import TextSeenInTraining, text_seen_in_training
from saelens_scaffold.evals.rank import spectrum
from saelens_scaffold.evals.selected_saes import SelectedSAE
from saelens_scaffold.evals.text_data import TokenStream
from saelens_scaffold.saes.firing import DENSE_THRESHOLD, FiringStatistics
from saelens_scaffold.saes.subspaces import ActivationMoments, share_in_subspace

SPANNED = 0.95
"""Share of dense latents' decoder directions that counts as their span."""

COVERED = 0.8
"""Share of them that counts as covered by principal directions."""

MAX_NAMED = 12
"""How many outlier dimensions a reason names; rank.json has all."""


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


@dataclass
class OutlierDimension:
    """
    A dimension of the residual stream with far more variance than most.

    Attributes:
        dimension: Its index.
        variance_share: Its share of the whole variance.
        ratio_to_median: Its variance, as a multiple of the median dimension's.
    """

    dimension: int
    variance_share: float
    ratio_to_median: float


@dataclass
class RankAnalysis:
    """
    What activations say of a scaffold's rank.

    Attributes:
        suggestion: The candidate that is suggested; None if nothing stands out.
        candidates: All candidates.
        outlier_dimensions: Largest variance first.
        dimension_variances: Variance of each dimension.
        variance_shares: Share of the variance along each principal direction, largest
            first.
        correlation_eigenvalues: Those of the correlations of the dimensions that are no
            outliers, what is linear in the outliers removed; largest first.
        null_eigenvalues: The null's quantile of each.
        null_quantile: Which quantile that is.
        null_draws: From how many draws.
        n_tokens: Tokens that it was measured on.
        n_dense_latents: Dense latents of the plain SAE; None if there is none.
        text_seen_in_training: Whether it was trained on this text; None likewise.
    """

    suggestion: RankCandidate | None
    candidates: list[RankCandidate]
    outlier_dimensions: list[OutlierDimension]
    dimension_variances: list[float] = field(repr=False)
    variance_shares: list[float] = field(repr=False)
    correlation_eigenvalues: list[float] = field(repr=False)
    null_eigenvalues: list[float] = field(repr=False)
    null_quantile: float
    null_draws: int
    n_tokens: int
    n_dense_latents: int | None = None
    text_seen_in_training: TextSeenInTraining | None = None


def analyse_rank(
    config: TextEvalConfig,
    hook_name: str,
    device: str,
    sae: SelectedSAE | None = None,
) -> RankAnalysis:
    """
    Look at a language model's activations, and at a plain SAE's dense latents.

    Args:
        config: Which language model reads which text.
        hook_name: The hook point, as in "blocks.12.hook_resid_post".
        device: Where to compute.
        sae: A plain SAE that was trained there.

    Raises:
        UserError: The model, the hook point or the text cannot be used, and why.
    """
    saes = [] if sae is None else [sae]
    for plain in saes:
        _check_plain(plain, hook_name)
    model = load_language_model(config.model_name, device, config.llm_dtype)
    hooked = HookedModel(model, hook_name)
    by_hook_point(model, saes)  # sees that it fits
    any_tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
    d_in = hooked.below(any_tokens)[0].shape[-1]
    _check_enough(config.n_tokens, d_in, hook_name)
    seen = text_seen_in_training(
        saes, config.dataset, config.dataset_split, config.text_column
    )
    firing = FiringStatistics(sae.sae, n_replicates=0) if sae else None
    moments = ActivationMoments(d_in, device)
    stream = TokenStream(config, model, saes)
    for tokens, counts in stream.batches(config.n_tokens, "Reading activations"):
        x = activations_at(model, tokens, [hook_name])[hook_name][counts]
        check_finite(x, hook_name)
        moments.update(x)
        if firing is not None:
            firing.update_unsampled(x)
    _check_enough(moments.n, d_in, hook_name)

    analysis = analyse_covariance(moments.covariance, moments.n, config.random_seed)
    if sae is not None and firing is not None:
        dense = (firing.fired / moments.n > DENSE_THRESHOLD).cpu()
        _, directions = moments.principal_directions()
        decoder = sae.sae.W_dec.detach().cpu()[dense]
        analysis.candidates += dense_latent_candidates(decoder, directions.cpu())
        analysis.n_dense_latents = int(dense.sum())
        analysis.text_seen_in_training = seen[sae.key]
        analysis.suggestion = suggested(analysis.candidates)
    return analysis


def _check_plain(sae: SelectedSAE, hook_name: str) -> None:
    if sae.rank:
        raise UserError(
            f"SAE {sae.label!r} has a scaffold (of rank {sae.rank}), which has taken over "
            "dense latents already; name a plain SAE of this hook point, or none"
        )
    if sae.hook_name != hook_name:
        raise UserError(
            f"SAE {sae.label!r} was trained at {sae.hook_name}, not at {hook_name}"
        )


def _check_enough(n_tokens: int, d_in: int, hook_name: str) -> None:
    if n_tokens <= d_in:
        raise UserError(
            f"n_tokens is {n_tokens}; a spectrum of the {d_in} dimensions at {hook_name} "
            f"needs more than {d_in} tokens, and says little with fewer than {10 * d_in}"
        )


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
    outliers = spectrum.outlier_dimensions(of_dimensions)
    # each outlier dimension takes a degree of freedom
    beyond = spectrum.parallel_analysis(
        spectrum.without_dimensions(covariance, outliers),
        n_tokens - len(outliers),
        np.random.default_rng(seed),
    )
    variances = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0)
    total = of_dimensions.sum()
    found = [
        OutlierDimension(
            int(i),
            float(of_dimensions[i] / total),
            float(of_dimensions[i] / of_dimensions.median()),
        )
        for i in outliers
    ]
    candidates = spectrum_candidates(variances, found, beyond.rank)
    return RankAnalysis(
        suggestion=suggested(candidates),
        candidates=candidates,
        outlier_dimensions=found,
        dimension_variances=of_dimensions.tolist(),
        variance_shares=(variances / variances.sum()).tolist(),
        correlation_eigenvalues=beyond.eigenvalues.tolist(),
        null_eigenvalues=beyond.null.tolist(),
        null_quantile=spectrum.NULL_QUANTILE,
        null_draws=spectrum.NULL_DRAWS,
        n_tokens=n_tokens,
    )


def spectrum_candidates(
    variances: torch.Tensor, outliers: list[OutlierDimension], beyond_chance: int
) -> list[RankCandidate]:
    """
    Ranks that the variances speak for.

    Args:
        variances: Along the principal directions, largest first, shape (d_in,).
        outliers: The outlier dimensions.
        beyond_chance: Number of principal directions of the other dimensions'
            correlations that are more than chance.
    """
    shares = variances / variances.sum()
    participation = float(1 / shares.pow(2).sum())
    knee = spectrum.knee_of(variances)
    held = sum(outlier.variance_share for outlier in outliers)
    named = ", ".join(str(outlier.dimension) for outlier in outliers[:MAX_NAMED])
    if len(outliers) > MAX_NAMED:
        named += f" and {len(outliers) - MAX_NAMED} more"
    return [
        RankCandidate(
            "outlier dimensions",
            len(outliers),
            f"dimensions {named} hold {held:.0%} of the variance; each has more than "
            f"{spectrum.OUTLIER_RATIO:g} times the median: a lower bound"
            if outliers
            else f"no dimension has more than {spectrum.OUTLIER_RATIO:g} times the median variance, "
            f"and a modified z-score above {spectrum.OUTLIER_Z}",
        ),
        RankCandidate(
            "knee",
            knee,
            f"from the spectrum's knee on, variances fall slowly; the first {knee} "
            f"directions hold {float(shares[:knee].sum()):.0%} of the variance",
        ),
        RankCandidate(
            "participation ratio",
            max(1, round(participation)),
            f"(Σλ)² / Σλ² = {participation:.1f}: so many equal directions would be as "
            "concentrated",
        ),
        RankCandidate(
            "parallel analysis",
            len(outliers) + beyond_chance,
            f"the outlier dimensions, and {beyond_chance} directions of the others whose "
            f"correlations exceed the {spectrum.NULL_QUANTILE:.0%} quantile of chance (Horn 1965, "
            "Glorfeld 1995): an upper bound",
        ),
    ]


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
        RankCandidate(
            "dense latents",
            span,
            f"{n_dense} latents of the plain SAE fire on more than {DENSE_THRESHOLD:.0%} of "
            f"the tokens, and span {span} dimensions ({SPANNED:.0%} of their directions); the "
            f"first {span} principal directions hold {held:.0%} of them",
        ),
        RankCandidate(
            "dense latents in PCA",
            covered,
            f"so many principal directions hold {COVERED:.0%} of the dense latents' "
            "directions",
        ),
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
