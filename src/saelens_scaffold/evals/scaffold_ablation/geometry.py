"""Where the scaffold's subspace lies, beside principal directions and sparse latents."""

import torch

from saelens_scaffold.evals.scaffold_ablation import ScaffoldAblationEvalConfig
from saelens_scaffold.evals.scaffold_ablation.eval_output import (
    DictionaryAlignment,
    GeometryMetrics,
    PrincipalAngles,
)
from saelens_scaffold.evals.scaffold_ablation.fit import Fit, SAEFit
from saelens_scaffold.saes.subspaces import principal_angle_cosines


def geometry(fit: Fit, of: SAEFit) -> tuple[GeometryMetrics, PrincipalAngles | None]:
    """
    Compare the scaffold's subspace with the top principal directions (claim i of the
    paper, arXiv 2606.14040).

    Args:
        fit: Statistics of the activations.
        of: Statistics of the SAE. A plain one has only the figures of the principal
            directions.
    """
    d_in, rank = len(fit.mean), of.pca_rank
    pca = fit.directions[:rank].cpu()
    outliers = fit.outliers[:rank].cpu()
    rms = fit.root_mean_squares

    def explained_variance(basis: torch.Tensor) -> float:
        return fit.moments.explained_variance(basis.to(fit.mean.device))

    def outlier_share(basis: torch.Tensor) -> float:
        return float(basis[:, outliers].pow(2).sum() / len(outliers))

    metrics = GeometryMetrics(
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
    return metrics, PrincipalAngles(cosines.acos().rad2deg().tolist())


def dictionary_alignments(
    config: ScaffoldAblationEvalConfig, of: SAEFit
) -> list[DictionaryAlignment]:
    """How many sparse latents of an SAE, and of its baseline, are how well aligned with its
    scaffold's subspace. None for a plain SAE."""
    if of.scaffold_basis is None:
        return []
    found: list[DictionaryAlignment] = []
    for dictionary, owner in ("own", of), ("baseline", of.baseline):
        if owner is None:
            continue
        _, cosines = owner.most_aligned(of.scaffold_basis)
        alignment = DictionaryAlignment(
            dictionary=dictionary,
            sae=owner.sae.label,
            n_alive=len(cosines),
            cosines=config.aligned_cosines,
            n_above=[int((cosines > bound).sum()) for bound in config.aligned_cosines],
            n_aligned_latents=config.n_aligned_latents,
            cosine_of_last=[
                float(cosines[n - 1]) if n <= len(cosines) else None
                for n in config.n_aligned_latents
            ],
        )
        found.append(alignment)
    return found
