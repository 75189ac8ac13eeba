"""Statistics that interventions need: means, directions, firing frequencies, alignments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from saelens_scaffold.evals.model import HookedModel, check_finite
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.evals.scaffold_ablation import ScaffoldAblationEvalConfig
from saelens_scaffold.evals.tokens import TokenStream
from saelens_scaffold.saes import subspaces
from saelens_scaffold.saes.facts import FiringStatistics
from saelens_scaffold.saes.scaffold import ScaffoldMixin


class SAEFit:
    """
    Statistics of one SAE on the text to fit on.

    Attributes:
        sae: The SAE.
        pca_rank: Number of principal directions that it is compared with.
        firing: How its sparse latents fired.
        baseline: The same of its baseline, if it has one.
    """

    def __init__(self, sae: SelectedSAE, pca_rank: int):
        self.sae = sae
        self.pca_rank = pca_rank
        self.baseline: SAEFit | None = None
        self.firing = FiringStatistics(sae.sae, n_replicates=0)
        self._scaffold_sum = torch.zeros(sae.sae.cfg.d_in, dtype=torch.float64)
        self._n = 0

    @torch.no_grad()
    def update(self, x: torch.Tensor) -> None:
        """
        Args:
            x: Activations of the tokens that count, shape (n_tokens, d_in).
        """
        self.firing.update_unsampled(x)
        self._n += len(x)
        if isinstance(self.sae.sae, ScaffoldMixin):
            s = self.sae.sae.scaffold(x, fix_gauge=True)
            self._scaffold_sum += s.sum(dim=0, dtype=torch.float32).cpu().double()

    @property
    def scaffold_mean(self) -> torch.Tensor:
        """E[s] in the fixed gauge, shape (d_in,), float64."""
        return self._scaffold_sum / self._n

    @cached_property
    def scaffold_basis(self) -> torch.Tensor | None:
        """Orthonormal rows that span the scaffold's subspace, shape (r, d_in), float64, on
        the CPU; None for a plain SAE."""
        rows = self.sae.sae.W_dec[: self.sae.rank].detach().cpu()
        return subspaces.orthonormal_basis(rows) if len(rows) else None

    def like_weights(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor with dtype and device of the SAE's weights."""
        return tensor.to(device=self.sae.sae.device, dtype=self.sae.sae.dtype)

    def most_aligned(self, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Its alive sparse latents, most aligned with a subspace first, and the cosines."""
        decoder = self.sae.sae.W_dec[self.sae.rank :].detach()
        return most_aligned(decoder, self.firing.fired > 0, basis)


@dataclass
class Fit:
    """
    Statistics of some tokens at one hook point.

    Attributes:
        moments: Mean and covariance of the activations.
        saes: Statistics of each SAE, by its key.
    """

    moments: subspaces.ActivationMoments
    saes: dict[str, SAEFit]

    @cached_property
    def directions(self) -> torch.Tensor:
        """Orthonormal principal directions, largest variance first, shape (d_in, d_in),
        float64."""
        return self.moments.principal_directions()[1]

    @cached_property
    def root_mean_squares(self) -> torch.Tensor:
        """Root mean square of each dimension of the residual stream, shape (d_in,)."""
        return (self.moments.covariance.diagonal() + self.moments.mean.pow(2)).sqrt()

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
    d_in, device = group[0].sae.cfg.d_in, hooked.model.cfg.device or "cpu"
    fits: dict[bool, Fit] = {}
    for special in (False, True) if config.include_special_tokens else (False,):
        saes = {s.key: SAEFit(s, config.pca_rank or s.subspace_rank) for s in group}
        for key in saes.keys() & baselines.keys():
            saes[key].baseline = saes[baselines[key].key]
        fits[special] = Fit(subspaces.ActivationMoments(d_in, device), saes)
    for tokens, counts in stream.batches(config.n_fit_tokens, "Fitting ablations"):
        full = hooked.below(tokens)[0]
        for special, of in fits.items():
            x = full[stream.counts(tokens, special=True) if special else counts]
            check_finite(x, hooked.hook_name)
            of.moments.update(x)
            for sae in of.saes.values():
                sae.update(x)
    return fits


def most_aligned(
    decoder: torch.Tensor, alive: torch.Tensor, basis: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The alive latents, most aligned with a subspace first.

    Args:
        decoder: Decoder directions, shape (n, d_in).
        alive: Which latents fire at all, shape (n,). The direction of one that never
            fires means nothing.
        basis: Orthonormal rows that span the subspace, shape (r, d_in).

    Returns:
        Their indices, and the cosines of their decoder directions with the subspace,
        both of shape (n_alive,).
    """
    # on the CPU, since MPS has no double precision
    indices = alive.cpu().nonzero()[:, 0]
    shares = subspaces.share_in_subspace(decoder.cpu()[indices], basis.cpu())
    cosines, order = shares.sqrt().sort(descending=True, stable=True)
    return indices[order], cosines


def matched_frequency(
    fired: torch.Tensor, chosen: torch.Tensor, generator: torch.Generator
) -> torch.Tensor | None:
    """
    Other alive latents that fire about as often as the chosen ones.

    Each chosen latent, in random order, gets the unused latent outside the choice whose
    log frequency is nearest to its own, ties broken at random.

    Args:
        fired: Tokens on which each latent fired, shape (n,).
        chosen: Indices of the chosen latents, all alive, shape (m,).
        generator: Of the random order, on the CPU.

    Returns:
        Indices, shape (m,); None if there are fewer than m other alive latents.
    """
    fired, chosen = fired.cpu(), chosen.cpu()
    others = fired > 0
    others[chosen] = False
    candidates = others.nonzero()[:, 0]
    if len(candidates) < len(chosen):
        return None
    candidates = candidates[torch.randperm(len(candidates), generator=generator)]
    logs = fired.double().log()
    free = torch.ones(len(candidates), dtype=torch.bool)
    matched = torch.empty_like(chosen)
    for i in torch.randperm(len(chosen), generator=generator).tolist():
        distance = (logs[candidates] - logs[chosen[i]]).abs()
        best = int(distance.where(free, torch.inf).argmin())
        free[best] = False
        matched[i] = candidates[best]
    return matched
