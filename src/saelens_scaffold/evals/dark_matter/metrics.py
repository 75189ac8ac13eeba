"""Metrics of one SAE, from the sums over all tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from saelens_scaffold.evals.dark_matter import eval_output as output
from saelens_scaffold.evals.dark_matter import norms
from saelens_scaffold.evals.dark_matter.errors import LinearErrors, r_squared
from saelens_scaffold.evals.dark_matter.norms import NormPredictions
from saelens_scaffold.evals.intervals import estimates
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.saes.subspaces import orthonormal_basis, subspace_overlap

_HEADLINE_NORMS = {
    "squared_error": (norms.SQUARED_ERROR, norms.X, False),
    "error": (norms.ERROR, norms.X, True),
    "error_from_norm": (norms.ERROR, norms.NORM_X, True),
    "error_from_l0": (norms.ERROR, norms.L0, True),
    "error_from_loss": (norms.ERROR, norms.LOSS, True),
    "error_from_token": (norms.ERROR, norms.TOKEN, True),
    "squared_nonlinear_error": (norms.SQUARED_NONLINEAR, norms.X, False),
    "squared_activation": (norms.SQUARED_X, norms.X, False),
    "squared_reconstruction": (norms.SQUARED_RECONSTRUCTION, norms.X, False),
}


@dataclass
class Metrics:
    """
    Metrics from sums.

    Attributes:
        errors: The error vectors.
        norms: Their norms.
        confidence: As in 0.95.
    """

    errors: LinearErrors
    norms: NormPredictions
    confidence: float

    def reconstruction(self, sae: SelectedSAE) -> output.ReconstructionMetrics:
        """Fractions of variance unexplained."""
        of, columns = self.errors, self.errors.of(sae.key)
        fvu, left = of.fvu(sae.key), of.fvu(sae.key, "left")
        variance = of.fitted.covariance_x.trace()
        mean_squares = of.fitted.variance_y + of.fitted.mean_y.pow(2)
        l0 = float(of.total(sae.key, "l0")[0] / of.sums["n"][0, 0])
        return output.ReconstructionMetrics(
            fvu_in_sample=float(mean_squares[columns].sum() / variance),
            fvu_nonlinear_in_sample=float(
                of.squared_errors[False][columns].sum() / variance
            ),
            l0_sparse=l0,
            l0_total=l0 + sae.rank,
            **estimates(
                self.confidence,
                fvu=fvu,
                fvu_linear=fvu - left,
                fvu_nonlinear=left,
                fvu_nonlinear_with_intercept=of.fvu(sae.key, "affine_left"),
            ),
        )

    def linear_error(self, key: str) -> output.LinearErrorMetrics:
        """R² of the error vector, and shares."""
        of, columns = self.errors, self.errors.of(key)
        in_sample = of.squared_errors[False][columns], of.fitted.variance_y[columns]
        squares = of.total(key, "error")
        return output.LinearErrorMetrics(
            r_squared_in_sample=float(r_squared(*in_sample, pooled=False)),
            r_squared_pooled_in_sample=float(r_squared(*in_sample, pooled=True)),
            **estimates(
                self.confidence,
                r_squared=of.r_squared(key, "left", pooled=False),
                r_squared_pooled=of.r_squared(key, "left", pooled=True),
                r_squared_with_intercept=of.r_squared(key, "affine_left", False),
                r_squared_pooled_with_intercept=of.r_squared(key, "affine_left", True),
                share_linear=of.total(key, "linear") / squares,
                share_nonlinear=of.total(key, "left") / squares,
            ),
        )

    def norm_metrics(
        self, sae: SelectedSAE, peers: Sequence[SelectedSAE]
    ) -> tuple[
        output.NormMetrics, list[output.NormPrediction], list[output.ErrorScaling]
    ]:
        """Headline R², all predictions, and those from other SAEs' errors."""
        explained = self.norms.r_squared()
        found = dict(zip(self.norms.predictions, explained.T, strict=True))
        headlines = {
            f"r_squared_{name}": found[
                norms.Prediction(*of, "" if of[0] == norms.SQUARED_X else sae.key)
            ]
            for name, of in _HEADLINE_NORMS.items()
        }
        details = [
            output.NormPrediction(
                target=of.target,
                predictor=of.predictor,
                intercept=of.intercept,
                r_squared_in_sample=in_sample,
                **estimates(self.confidence, r_squared=found[of]),
            )
            for of, in_sample in zip(
                self.norms.predictions, self.norms.in_sample, strict=True
            )
            if of.key in ("", sae.key) and not of.other
        ]
        scaling: list[output.ErrorScaling] = []
        for peer in peers:
            kinds = (norms.ERROR, norms.NONLINEAR)
            own, both = (
                found[norms.Prediction(norms.ERROR, kind, True, sae.key, peer.key)]
                for kind in kinds
            )
            figures = {
                "r_squared": own,
                "r_squared_with_nonlinear": both,
                "explained_by_nonlinear": (both - own) / (1 - own),
            }
            scaling.append(
                output.ErrorScaling(
                    predictor=peer.label, **estimates(self.confidence, **figures)
                )
            )
        return (
            output.NormMetrics(**estimates(self.confidence, **headlines)),
            details,
            scaling,
        )

    def cross_entropy(
        self, key: str, losses: Mapping[str, torch.Tensor]
    ) -> output.CrossEntropyMetrics:
        """
        Args:
            key: Key of the SAE.
            losses: Cross-entropy, by "clean", and by the key with "reconstruction",
                "linear" and "nonlinear", shape (1 + n_replicates,).
        """
        clean, of = losses["clean"], self.errors
        sae, linear, nonlinear = (
            losses[f"{key} {name}"]
            for name in ("reconstruction", "linear", "nonlinear")
        )
        squares = of.total(key, "error")
        return output.CrossEntropyMetrics(
            ce_clean=float(clean[0]),
            **estimates(
                self.confidence,
                ce_reconstruction=sae,
                ce_with_linear_error=linear,
                ce_with_nonlinear_error=nonlinear,
                ce_recovered_by_linear_error=(sae - linear) / (sae - clean),
                fvu_recovered_by_linear_error=1 - of.total(key, "left") / squares,
                ce_recovered_by_nonlinear_error=(sae - nonlinear) / (sae - clean),
                fvu_recovered_by_nonlinear_error=1 - of.total(key, "linear") / squares,
            ),
        )

    def scaffold(
        self, sae: SelectedSAE, twin: SelectedSAE | None
    ) -> tuple[output.ScaffoldMetrics, list[output.ScaffoldOverlap]]:
        """What a scaffold has taken of its twin's error, and where it lies."""
        if twin is None:
            return output.ScaffoldMetrics(), []
        left, twins_left = (self.errors.fvu(of.key, "left") for of in (sae, twin))
        linear = self.errors.fvu(sae.key) - left
        twins_linear = self.errors.fvu(twin.key) - twins_left
        basis = orthonormal_basis(sae.sae.W_dec[: sae.rank].detach().cpu())
        weight = self.errors.map_of(twin.key).weight.cpu()
        covariance = weight.T @ self.errors.fitted.covariance_x.cpu() @ weight
        variances, directions = torch.linalg.eigh(covariance)
        inside = torch.einsum("rd,de,re->", basis, covariance, basis)
        rank, d_in = basis.shape
        metrics = output.ScaffoldMetrics(
            share_of_linear_error=float(inside / variances.sum()),
            share_of_linear_error_random=rank / d_in,
            share_of_linear_error_best=float(variances[-rank:].sum() / variances.sum()),
            **estimates(
                self.confidence,
                linear_error_taken=1 - linear / twins_linear,
                nonlinear_error_taken=1 - left / twins_left,
                fvu_linear_difference=linear - twins_linear,
                fvu_nonlinear_difference=left - twins_left,
            ),
        )
        singular, principal = torch.linalg.svd(weight)[2], directions.T.flip(0)
        ranks = {rank, *(2**i for i in range(d_in.bit_length()) if 2**i < d_in)}
        overlaps = [
            output.ScaffoldOverlap(
                rank=n,
                with_singular_vectors=subspace_overlap(basis, singular[:n]),
                with_linear_error=subspace_overlap(basis, principal[:n]),
                of_random=max(rank, n) / d_in,
            )
            for n in sorted(ranks)
        ]
        return metrics, overlaps

    def earlier(self, key: str) -> output.EarlierMetrics:
        """Linear maps with inputs from an earlier SAE, if there is one."""
        if f"{key} earlier_0" not in self.errors.sums:
            return output.EarlierMetrics()
        left = self.errors.fvu(key, "left")
        first, second = (self.errors.fvu(key, f"earlier_{i}") for i in range(2))
        return output.EarlierMetrics(
            **estimates(
                self.confidence,
                fvu_nonlinear_with_reconstruction=first,
                fvu_nonlinear_with_reconstruction_and_error=second,
                nonlinear_error_explained=1 - first / left,
                nonlinear_error_explained_with_error=1 - second / left,
            )
        )

    def pursuit(self, key: str) -> output.PursuitMetrics:
        """
        Args:
            key: Key of the errors with activations by gradient pursuit, if there are any.
        """
        if key not in self.errors.keys:
            return output.PursuitMetrics()
        return output.PursuitMetrics(
            **estimates(
                self.confidence,
                fvu_pursuit=self.errors.fvu(key),
                fvu_nonlinear_pursuit=self.errors.fvu(key, "left"),
            )
        )
