"""Metrics of one SAE: headline figures, and where the scaffold's subspace lies."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from saelens_scaffold.evals.intervals import headlines, repeated
from saelens_scaffold.evals.scaffold_ablation import ScaffoldAblationEvalConfig
from saelens_scaffold.evals.scaffold_ablation import eval_output as output
from saelens_scaffold.evals.scaffold_ablation.fit import Fit, SAEFit
from saelens_scaffold.evals.scaffold_ablation.interventions import WITH_SPECIAL_TOKENS
from saelens_scaffold.evals.scaffold_ablation.topics import TopicProbes
from saelens_scaffold.saes.subspaces import principal_angle_cosines

PAPER_ALIGNED_LATENTS = 787
"""How many aligned latents the paper (arXiv 2606.14040) ablates for its headline."""


def cross_entropy_metrics(
    config: ScaffoldAblationEvalConfig,
    details: Sequence[output.ScaffoldAblationResultDetail],
    alignments: Sequence[output.DictionaryAlignment],
) -> output.CrossEntropyMetrics:
    """
    Args:
        config: Numbers of aligned latents.
        details: One for each intervention on one SAE.
        alignments: Of the dictionaries whose latents were ablated.
    """
    of = {detail.intervention: detail for detail in details}
    clean, zero = of["clean"], of["zero_ablation"]
    reconstruction = of["sae_reconstruction"]
    metrics = headlines(output.CrossEntropyMetrics, details, "ce_ratio")
    numbers = config.n_aligned_latents
    n = PAPER_ALIGNED_LATENTS if PAPER_ALIGNED_LATENTS in numbers else max(numbers)
    for alignment in alignments:
        prefix = "baseline_" if alignment.dictionary == "baseline" else ""
        metrics["n_aligned_latents"] = n
        if alignment.n_alive < n:
            note = f"{alignment.n_alive} alive, fewer than {n}"
            metrics[f"{prefix}aligned_latents_note"] = note
        else:
            name = f"ce_ratio_{prefix}aligned_latents"
            detail = of[f"{prefix}aligned_{n}_latents"]
            metrics |= repeated(output.CrossEntropyMetrics, name, detail, "ce_ratio")
    return output.CrossEntropyMetrics(
        ce_clean=clean.ce,
        ce_loss_score=(zero.ce - reconstruction.ce) / (zero.ce - clean.ce),
        ce_ratio_reconstruction=reconstruction.ce_ratio,
        **metrics,
    )


def topic_metrics(
    probes: TopicProbes | None, accuracies: Sequence[output.TopicAccuracy], fit: SAEFit
) -> output.TopicMetrics:
    """
    Args:
        probes: The probes; None if topics were not classified.
        accuracies: Of one SAE, after the last layer.
        fit: Statistics of that SAE, special tokens excluded.
    """
    if probes is None:
        return output.TopicMetrics()
    size = {accuracy.intervention: accuracy.size for accuracy in accuracies}
    return output.TopicMetrics(
        chance=probes.chance,
        n_topics=probes.n_topics,
        n_topic_latents=size["topic_latents_ablated"],
        n_topic_latents_alive=int((fit.firing.fired > 0).sum()),
        **headlines(output.TopicMetrics, accuracies, "accuracy"),
        **headlines(output.TopicMetrics, accuracies, "accuracy", "_retrained"),
    )


def special_token_metrics(
    fits: Mapping[bool, Fit],
    sae_key: str,
    details: Sequence[output.ScaffoldAblationResultDetail],
    accuracies: Sequence[output.TopicAccuracy],
) -> output.SpecialTokenMetrics:
    """
    Args:
        fits: Statistics without special tokens under False, and with them under True if
            they are included.
        sae_key: Key of one SAE.
        details: One for each intervention on that SAE.
        accuracies: Of that SAE, after the last layer; none if topics were not classified.
    """
    if True not in fits:
        return output.SpecialTokenMetrics()
    metrics: dict[str, Any] = {}
    for special, fit in fits.items():
        name = f"top_direction_variance{WITH_SPECIAL_TOKENS if special else ''}"
        metrics[name] = fit.moments.explained_variance(fit.directions[:1])
    with_them, _ = geometry_metrics(fits[True], fits[True].saes[sae_key])
    return output.SpecialTokenMetrics(
        overlap_with_pca_with_special_tokens=with_them.overlap_with_pca,
        **metrics,
        **headlines(output.SpecialTokenMetrics, details, "ce_ratio"),
        **headlines(output.SpecialTokenMetrics, accuracies, "accuracy"),
    )


def geometry_metrics(
    fit: Fit, of: SAEFit
) -> tuple[output.GeometryMetrics, output.PrincipalAngles | None]:
    """
    Compare the scaffold's subspace with the top principal directions (claim i of the
    paper, arXiv 2606.14040).

    Args:
        fit: Statistics of the activations.
        of: Statistics of the SAE. A plain one has only the figures of the principal
            directions.
    """
    moments, rms = fit.moments, fit.root_mean_squares
    d_in, rank = len(rms), of.pca_rank
    pca, outliers = fit.directions[:rank].cpu(), fit.outliers[:rank].cpu()

    def explained_variance(basis: torch.Tensor) -> float:
        return moments.explained_variance(basis.to(rms.device))

    def outlier_share(basis: torch.Tensor) -> float:
        return float(basis[:, outliers].pow(2).sum() / len(outliers))

    metrics = output.GeometryMetrics(
        pca_rank=rank,
        variance_explained_by_pca=explained_variance(pca),
        variance_explained_by_random=rank / d_in,
        outlier_share_in_pca=outlier_share(pca),
        outlier_share_in_random=rank / d_in,
        outlier_rms_ratio=float(rms[outliers[-1]] / rms.median()),
    )
    scaffold = of.scaffold_basis
    if scaffold is None:
        return metrics, None
    cosines = principal_angle_cosines(scaffold, pca)
    metrics.overlap_with_pca = float(cosines.pow(2).mean())
    metrics.overlap_of_random = max(rank, len(scaffold)) / d_in
    metrics.variance_explained_by_scaffold = explained_variance(scaffold)
    metrics.outlier_share_in_scaffold = outlier_share(scaffold)
    metrics.outlier_share_of_random = len(scaffold) / d_in
    return metrics, output.PrincipalAngles(cosines.acos().rad2deg().tolist())


def dictionary_alignments(
    config: ScaffoldAblationEvalConfig, of: SAEFit
) -> Iterator[output.DictionaryAlignment]:
    """How many sparse latents of an SAE, and of its baseline, are how well aligned with its
    scaffold's subspace. None for a plain SAE."""
    basis, numbers = of.scaffold_basis, config.n_aligned_latents
    for dictionary, owner in {"own": of, "baseline": of.baseline}.items():
        if basis is None or owner is None:
            continue
        _, cosines = owner.most_aligned(basis)
        yield output.DictionaryAlignment(
            dictionary=dictionary,
            sae=owner.sae.label,
            n_alive=len(cosines),
            cosines=config.aligned_cosines,
            n_above=[int((cosines > bound).sum()) for bound in config.aligned_cosines],
            n_aligned_latents=numbers,
            cosine_of_last=[
                float(cosines[n - 1]) if n <= len(cosines) else None for n in numbers
            ],
        )
