"""What interventions need to know of the activations: means, directions, frequencies."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from saelens_scaffold.evals.language_model import HookedModel, check_finite
from saelens_scaffold.evals.scaffold_ablation.eval_config import (
    ScaffoldAblationEvalConfig,
)
from saelens_scaffold.evals.scaffold_ablation.latents import most_aligned
from saelens_scaffold.evals.selected_saes import SelectedSAE
from saelens_scaffold.evals.text_data import TokenStream
from saelens_scaffold.saes.firing import FiringStatistics
from saelens_scaffold.saes.scaffold import ScaffoldMixin
from saelens_scaffold.saes.subspaces import ActivationMoments, orthonormal_basis


class SAEFit:
    """
    Statistics of one SAE on the text to fit on.

    Attributes:
        sae: The SAE.
        pca_rank: Number of principal directions that it is compared with.
        baseline: The same of its baseline, if it has one.
    """

    def __init__(self, sae: SelectedSAE, pca_rank: int):
        self.sae = sae
        self.pca_rank = pca_rank
        self.baseline: SAEFit | None = None
        self._firing = FiringStatistics(sae.sae, n_replicates=0)
        self._scaffold_sum = torch.zeros(sae.sae.cfg.d_in, dtype=torch.float64)
        self._n = 0

    @torch.no_grad()
    def update(self, x: torch.Tensor) -> None:
        """
        Args:
            x: Activations of the tokens that count, shape (n_tokens, d_in).
        """
        self._firing.update_unsampled(x)
        self._n += len(x)
        if isinstance(self.sae.sae, ScaffoldMixin):
            s = self.sae.sae.scaffold(x, fix_gauge=True)
            self._scaffold_sum += s.sum(dim=0, dtype=torch.float32).cpu().double()

    @property
    def fired(self) -> torch.Tensor:
        """Tokens on which each sparse latent fired, shape (n_sparse,)."""
        return self._firing.fired

    @property
    def scaffold_mean(self) -> torch.Tensor:
        """E[s] in the fixed gauge, shape (d_in,), float64."""
        return self._scaffold_sum / self._n

    @cached_property
    def scaffold_basis(self) -> torch.Tensor | None:
        """Orthonormal rows that span the scaffold's subspace, shape (r, d_in), float64, on
        the CPU; None for a plain SAE."""
        if not self.sae.rank:
            return None
        return orthonormal_basis(self.sae.sae.W_dec[: self.sae.rank].detach().cpu())

    def most_aligned(self, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Its alive sparse latents, most aligned with a subspace first, and the cosines."""
        decoder = self.sae.sae.W_dec[self.sae.rank :].detach()
        return most_aligned(decoder, self.fired > 0, basis)


class ModelFit:
    """
    Statistics of the activations at one hook point.

    Attributes:
        moments: Mean and covariance.
        mean: E[x], shape (d_in,), float64.
        directions: Orthonormal principal directions, largest variance first, shape
            (d_in, d_in), float64.
        outliers: Dimensions of the residual stream, largest root mean square first,
            shape (d_in,). By magnitude, as outlier dimensions are known in the
            literature (arXiv 2208.07339), and so also by their mean.
        root_mean_squares: Their root mean squares, in that order, shape (d_in,), float64.
    """

    def __init__(self, moments: ActivationMoments):
        self.moments = moments
        self.mean = moments.mean
        _, self.directions = moments.principal_directions()
        mean_squares = moments.covariance.diagonal() + self.mean.pow(2)
        self.outliers = mean_squares.argsort(descending=True, stable=True)
        self.root_mean_squares = mean_squares[self.outliers].sqrt()


class Fit(NamedTuple):
    """
    Statistics of some tokens at one hook point.

    Attributes:
        model: Of the activations.
        saes: Of each SAE, by its key.
    """

    model: ModelFit
    saes: dict[str, SAEFit]


def fit(
    config: ScaffoldAblationEvalConfig,
    hooked: HookedModel,
    group: Sequence[SelectedSAE],
    baselines: Mapping[str, SelectedSAE],
    stream: TokenStream,
) -> dict[bool, Fit]:
    """
    Args:
        config: Number of tokens, and which.
        hooked: The language model at the SAEs' hook point.
        group: The SAEs, their baselines among them.
        baselines: The baselines of SAEs, by the SAEs' keys.
        stream: The text.

    Returns:
        Statistics without special tokens under False, and with them under True if they are
        included.
    """
    d_in, device = group[0].sae.cfg.d_in, hooked.model.cfg.device or "cpu"
    kinds = (False, True) if config.include_special_tokens else (False,)
    moments = {special: ActivationMoments(d_in, device) for special in kinds}
    saes = {
        special: {
            sae.key: SAEFit(sae, config.pca_rank or sae.subspace_rank) for sae in group
        }
        for special in kinds
    }
    for tokens, counts in stream.batches(config.n_fit_tokens, "Fitting ablations"):
        full = hooked.below(tokens)[0]
        for special in kinds:
            x = full.flatten(0, 1) if special else full[counts]
            check_finite(x, hooked.hook_name)
            moments[special].update(x)
            for of in saes[special].values():
                of.update(x)
    for by_key in saes.values():
        for key in by_key.keys() & baselines.keys():
            by_key[key].baseline = by_key[baselines[key].key]
    return {
        special: Fit(ModelFit(moments[special]), saes[special]) for special in kinds
    }
