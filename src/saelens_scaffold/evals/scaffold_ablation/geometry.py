"""Where the scaffold's subspace lies, beside principal and random directions."""

import torch

from saelens_scaffold.evals.scaffold_ablation.eval_output import (
    GeometryMetrics,
    PrincipalAngles,
)
from saelens_scaffold.evals.scaffold_ablation.fit import ModelFit, SAEFit
from saelens_scaffold.saes.subspaces import principal_angle_cosines


def geometry(
    fit: ModelFit, of: SAEFit, rank: int
) -> tuple[GeometryMetrics, PrincipalAngles | None]:
    """
    Compare the scaffold's subspace with the top principal directions (claim i of the
    paper, arXiv 2606.14040).

    Args:
        fit: Of the activations.
        of: Of the SAE. A plain one has only the figures of the principal directions.
        rank: Number of principal directions.
    """
    d_in = len(fit.mean)
    pca = fit.directions[:rank].cpu()
    outliers = fit.outliers[:rank].cpu()
    moments = fit.moments

    def outlier_share(basis: torch.Tensor) -> float:
        return float(basis[:, outliers].pow(2).sum() / len(outliers))

    of_pca = {
        "pca_rank": rank,
        "variance_explained_by_pca": moments.explained_variance(
            pca.to(fit.mean.device)
        ),
        "variance_explained_by_random": rank / d_in,
        "outlier_share_in_pca": outlier_share(pca),
        "outlier_share_in_random": rank / d_in,
        "outlier_rms_ratio": float(
            fit.root_mean_squares[rank - 1] / fit.root_mean_squares.median()
        ),
    }
    scaffold = of.scaffold_basis
    if scaffold is None:
        return GeometryMetrics(**of_pca), None
    cosines = principal_angle_cosines(scaffold, pca)
    return (
        GeometryMetrics(
            **of_pca,
            overlap_with_pca=float(cosines.pow(2).mean()),
            overlap_of_random=max(rank, len(scaffold)) / d_in,
            variance_explained_by_scaffold=moments.explained_variance(
                scaffold.to(fit.mean.device)
            ),
            outlier_share_in_scaffold=outlier_share(scaffold),
            outlier_share_of_random=len(scaffold) / d_in,
        ),
        PrincipalAngles(degrees=cosines.acos().rad2deg().tolist()),
    )
