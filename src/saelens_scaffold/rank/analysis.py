"""Dimensions of the dense part of activations, each counted in another way."""

from dataclasses import dataclass, field

import torch

from saelens_scaffold.evals.language_model import (
    activations_at,
    by_hook_point,
    check_finite,
    load_language_model,
)
from saelens_scaffold.evals.selected_saes import SelectedSAE
from saelens_scaffold.evals.text_data import TokenStream
from saelens_scaffold.evals.text_eval_config import TextEvalConfig
from saelens_scaffold.firing import DENSE_THRESHOLD, FiringStatistics
from saelens_scaffold.subspaces import ActivationMoments, share_in_subspace

SPANNED = 0.95
"""Share of dense latents' decoder directions that counts as their span."""

COVERED = 0.8
"""Share of them that counts as covered by principal directions."""


@dataclass
class RankCandidate:
    """A rank, and what speaks for it."""

    name: str
    rank: int
    reason: str


@dataclass
class RankAnalysis:
    """
    What activations say of a scaffold's rank.

    Attributes:
        suggestion: The candidate that is suggested.
        candidates: All candidates.
        variance_shares: Share of the variance along each principal direction, largest
            first.
        noise_shares: The same where every dimension is shuffled over the tokens.
        n_tokens: Tokens that it was measured on.
        n_dense_latents: Dense latents of the plain SAE; None if there is none.
    """

    suggestion: RankCandidate
    candidates: list[RankCandidate]
    variance_shares: list[float] = field(repr=False)
    noise_shares: list[float] = field(repr=False)
    n_tokens: int
    n_dense_latents: int | None = None


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
        ValueError: The model, the hook point or the text cannot be used, and why.
    """
    model = load_language_model(config.model_name, device, config.llm_dtype)
    if hook_name not in model.hook_dict or not hook_name.startswith("blocks."):
        raise ValueError(
            f"the model {config.model_name} has no hook point {hook_name!r} in a layer"
        )
    if sae is not None:
        if sae.rank:
            raise ValueError(
                f"SAE {sae.label!r} has a scaffold (of rank {sae.rank}), which has taken "
                "over dense latents already; name a plain SAE of this hook point, or none"
            )
        if sae.hook_name != hook_name:
            raise ValueError(
                f"SAE {sae.label!r} was trained at {sae.hook_name}, not at {hook_name}"
            )
        by_hook_point(model, [sae])  # sees that it fits
    stream = TokenStream(config, model, [sae] if sae else [])
    firing = FiringStatistics(sae.sae, n_replicates=0) if sae else None
    moments: ActivationMoments | None = None
    shuffled: ActivationMoments | None = None
    generator = torch.Generator().manual_seed(config.random_seed)
    for tokens, counts in stream.batches(config.n_tokens, "Reading activations"):
        x = activations_at(model, tokens, [hook_name])[hook_name][counts]
        check_finite(x, hook_name)
        if moments is None or shuffled is None:
            moments = ActivationMoments(x.shape[1], device)
            shuffled = ActivationMoments(x.shape[1], device)
        moments.update(x)
        shuffled.update(_shuffled(x, generator))
        if firing is not None:
            firing.update_unsampled(x)
    assert moments is not None and shuffled is not None
    variances, directions = moments.principal_directions()
    noise, _ = shuffled.principal_directions()

    candidates = spectrum_candidates(variances.cpu(), noise.cpu())
    n_dense = None
    if sae is not None and firing is not None:
        dense = (firing.fired / moments.n > DENSE_THRESHOLD).cpu()
        n_dense = int(dense.sum())
        decoder = sae.sae.W_dec.detach().cpu()[dense]
        candidates += dense_latent_candidates(decoder, directions.cpu())
    return RankAnalysis(
        suggestion=suggested(candidates),
        candidates=candidates,
        variance_shares=(variances / variances.sum()).tolist(),
        noise_shares=(noise / noise.sum()).tolist(),
        n_tokens=moments.n,
        n_dense_latents=n_dense,
    )


def _shuffled(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every dimension with its own order of tokens: the variances, but no correlation."""
    order = torch.rand(x.shape, generator=generator).argsort(dim=0).to(x.device)
    return x.gather(0, order)


def spectrum_candidates(
    variances: torch.Tensor, noise: torch.Tensor
) -> list[RankCandidate]:
    """
    Ranks that the variances along the principal directions speak for.

    Args:
        variances: Largest first, shape (d_in,).
        noise: Those of shuffled activations, largest first, shape (d_in,).
    """
    shares = variances / variances.sum()
    participation = float(1 / shares.pow(2).sum())
    above = int((variances > noise).int().cumprod(0).sum())
    knee = knee_of(variances)
    return [
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
            max(1, above),
            f"{above} directions have more variance than those of activations whose "
            "dimensions are shuffled (Horn 1965): an upper bound",
        ),
    ]


def knee_of(variances: torch.Tensor) -> int:
    """
    The number of directions before the spectrum's knee: where the logarithm of the
    variances lies farthest below the line through the first and the median one.

    The upper half of the spectrum only, as the smallest variances fall off again.
    """
    logs = variances[: max(3, len(variances) // 2)].clamp_min(1e-30).log()
    line = torch.linspace(float(logs[0]), float(logs[-1]), len(logs)).to(logs)
    return max(1, int((line - logs).argmax()))


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


def suggested(candidates: list[RankCandidate]) -> RankCandidate:
    """
    The candidate to try first: the span of the dense latents that the scaffold is to take
    over, if they are known; else the knee, but no more than parallel analysis allows.
    """
    by_name = {candidate.name: candidate for candidate in candidates}
    if "dense latents" in by_name:
        return by_name["dense latents"]
    return min(
        by_name["knee"], by_name["parallel analysis"], key=lambda found: found.rank
    )
