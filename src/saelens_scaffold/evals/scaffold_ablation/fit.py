"""What interventions need to know of the activations: means, directions, frequencies."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch

from saelens_scaffold.evals.language_model import HookedModel, check_finite
from saelens_scaffold.evals.scaffold_ablation import ScaffoldAblationEvalConfig
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

    def like_weights(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor with dtype and device of the SAE's weights."""
        return tensor.to(device=self.sae.sae.device, dtype=self.sae.sae.dtype)

    def most_aligned(self, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Its alive sparse latents, most aligned with a subspace first, and the cosines."""
        decoder = self.sae.sae.W_dec[self.sae.rank :].detach()
        return most_aligned(decoder, self.fired > 0, basis)


class Fit:
    """
    Statistics of some tokens at one hook point.

    Attributes:
        moments: Mean and covariance of the activations.
        saes: Statistics of each SAE, by its key.
    """

    def __init__(
        self,
        config: ScaffoldAblationEvalConfig,
        group: Sequence[SelectedSAE],
        device: str | torch.device,
    ):
        self.moments = ActivationMoments(group[0].sae.cfg.d_in, device)
        self.saes = {
            sae.key: SAEFit(sae, config.pca_rank or sae.subspace_rank) for sae in group
        }

    def update(self, x: torch.Tensor) -> None:
        """As `SAEFit.update`."""
        self.moments.update(x)
        for of in self.saes.values():
            of.update(x)

    @property
    def mean(self) -> torch.Tensor:
        """E[x], shape (d_in,), float64."""
        return self.moments.mean

    @cached_property
    def directions(self) -> torch.Tensor:
        """Orthonormal principal directions, largest variance first, shape (d_in, d_in),
        float64."""
        return self.moments.principal_directions()[1]

    @cached_property
    def root_mean_squares(self) -> torch.Tensor:
        """Root mean square of each dimension of the residual stream, shape (d_in,)."""
        return (self.moments.covariance.diagonal() + self.mean.pow(2)).sqrt()

    @cached_property
    def outliers(self) -> torch.Tensor:
        """
        Dimensions of the residual stream, largest root mean square first, shape (d_in,).

        By magnitude, as outlier dimensions are known in the literature (arXiv 2208.07339),
        and so also by their mean.
        """
        return self.root_mean_squares.argsort(descending=True, stable=True)


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
    kinds = (False, True) if config.include_special_tokens else (False,)
    device = hooked.model.cfg.device or "cpu"
    fits = {special: Fit(config, group, device) for special in kinds}
    for tokens, counts in stream.batches(config.n_fit_tokens, "Fitting ablations"):
        full = hooked.below(tokens)[0]
        for special, of in fits.items():
            x = full.flatten(0, 1) if special else full[counts]
            check_finite(x, hooked.hook_name)
            of.update(x)
    for of in fits.values():
        for key in of.saes.keys() & baselines.keys():
            of.saes[key].baseline = of.saes[baselines[key].key]
    return fits
