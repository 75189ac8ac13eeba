"""Metrics of the scaffold during training."""

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

from saelens_scaffold.plugins.hookspecs import hookimpl
from saelens_scaffold.saes import ScaffoldBatchTopKTrainingSAE as ScaffoldSAE
from saelens_scaffold.saes import subspaces
from saelens_scaffold.saes.facts import DENSE_THRESHOLD


class LiveMetrics:
    """
    Metrics of the scaffold in SAELens's logs, computed in logged steps only.

    - scaffold_explained_variance: share of the batch's variance that s(x) explains
    - scaffold_pca_overlap: mean squared cosine of the principal angles between the
      scaffold's decoder rows and the batch's top-r principal directions
    - scaffold_effective_rank: exp of the entropy of the normalised variances of s along
      its principal axes (Roy and Vetterli, 2007), from 1 to r
    - dense_latents: sparse latents that fire on more than 10 % of the tokens

    Args:
        window: Number of steps of the exponential average of firing frequencies.
    """

    fit_for_shards = True

    def __init__(self, window: int = 100):
        if window < 1:
            raise ValueError(f"window is {window}; it must be at least 1")
        self.window = window
        self._frequencies: torch.Tensor | None = None
        self._n_steps = 0

    @hookimpl
    def training_metrics(
        self, sae: ScaffoldSAE, step_input: TrainStepInput, output: TrainStepOutput
    ) -> dict[str, float]:
        rank = sae.cfg.scaffold_rank
        frequencies = self._count(output.feature_acts.detach(), rank)
        if not step_input.is_logging_step:
            return {}
        (n_dense,) = sae.sum_over_shards((frequencies > DENSE_THRESHOLD).sum())
        metrics = {"dense_latents": float(n_dense)}
        if rank > 0:
            with torch.no_grad():
                s = sae.scaffold(step_input.sae_in).flatten(0, -2).float()
                basis = subspaces.orthonormal_basis(sae.W_dec[:rank].cpu())
            x = step_input.sae_in.detach().flatten(0, -2).float()
            explained = 1 - (x - s).var(dim=0).sum() / x.var(dim=0).sum()
            metrics |= {
                "scaffold_explained_variance": float(explained),
                "scaffold_pca_overlap": _pca_overlap(x, basis),
                "scaffold_effective_rank": _effective_rank(s, basis),
            }
        return metrics

    def _count(self, feature_acts: torch.Tensor, rank: int) -> torch.Tensor:
        """The average firing frequencies, shape (n_sparse,)."""
        if feature_acts.ndim > 2:
            feature_acts = feature_acts.flatten(0, -2)
        # as SAELens's trainer counts, which sparse kernels answer without a dense tensor
        firing = feature_acts.bool().float().sum(0)[rank:]
        frequencies = firing / len(feature_acts)
        self._n_steps += 1
        if self._frequencies is None:
            self._frequencies = frequencies
        # a plain mean until the window is full
        self._frequencies.lerp_(frequencies, 1 / min(self._n_steps, self.window))
        return self._frequencies


def _pca_overlap(x: torch.Tensor, basis: torch.Tensor) -> float:
    moments = subspaces.ActivationMoments(x.shape[1], x.device)
    moments.update(x)
    _, directions = moments.principal_directions()
    return subspaces.subspace_overlap(basis, directions[: len(basis)].cpu())


def _effective_rank(s: torch.Tensor, basis: torch.Tensor) -> float:
    # s lies in the span of the scaffold's decoder rows, so r coordinates determine it
    coordinates = (s - s.mean(dim=0)).cpu().double() @ basis.T
    variances = torch.linalg.svdvals(coordinates).pow(2)
    shares = variances / variances.sum()
    shares = shares[shares > 0]
    return float((-(shares * shares.log()).sum()).exp())
