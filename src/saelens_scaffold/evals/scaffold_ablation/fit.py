"""What interventions need to know of the activations: means, directions, frequencies."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from saelens_scaffold.evals.selected_saes import SelectedSAE
from saelens_scaffold.saes.firing import FiringStatistics
from saelens_scaffold.saes.scaffold import ScaffoldMixin
from saelens_scaffold.saes.subspaces import ActivationMoments, orthonormal_basis


class SAEFit:
    """
    What is learnt of one SAE from the text to fit on.

    Attributes:
        sae: The SAE.
        fired: Tokens on which each sparse latent fired, shape (n_sparse,).
    """

    def __init__(self, sae: SelectedSAE):
        self.sae = sae
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


@dataclass
class ModelFit:
    """
    What is learnt of the activations at one hook point.

    Attributes:
        mean: E[x], shape (d_in,), float64.
        moments: Mean and covariance.
        directions: Orthonormal principal directions, largest variance first, shape
            (d_in, d_in), float64.
        outliers: Dimensions of the residual stream, largest root mean square first,
            shape (d_in,). By magnitude, as outlier dimensions are known in the
            literature (arXiv 2208.07339), and so also by their mean.
        root_mean_squares: Of those, in that order, shape (d_in,), float64.
    """

    mean: torch.Tensor
    moments: ActivationMoments
    directions: torch.Tensor
    outliers: torch.Tensor
    root_mean_squares: torch.Tensor

    @classmethod
    def of(cls, moments: ActivationMoments) -> "ModelFit":
        _, directions = moments.principal_directions()
        mean_squares = moments.covariance.diagonal() + moments.mean.pow(2)
        outliers = mean_squares.argsort(descending=True, stable=True)
        return cls(
            mean=moments.mean,
            moments=moments,
            directions=directions,
            outliers=outliers,
            root_mean_squares=mean_squares[outliers].sqrt(),
        )


class Fit(NamedTuple):
    """
    What is learnt of some tokens at one hook point.

    Attributes:
        model: Of the activations.
        saes: Of each SAE, by its key.
    """

    model: ModelFit
    saes: dict[str, SAEFit]

    def baseline(
        self, sae: SelectedSAE, baseline_keys: Mapping[str, str]
    ) -> SAEFit | None:
        """Of the baseline of an SAE, if it has one among `baseline_keys`."""
        key = baseline_keys.get(sae.key)
        return None if key is None else self.saes[key]
