"""Sums over the tokens: of an SAE's latents, and of its scaffold's directions."""

from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from saelens_scaffold.inspect.axes import ScaffoldAxes
from saelens_scaffold.inspect.contexts import StrongestContexts
from saelens_scaffold.inspect.explanations import Tokens
from saelens_scaffold.inspect.output import Antipode, Positions
from saelens_scaffold.inspect.removal import WrittenByLatents
from saelens_scaffold.saes.facts import antipodality, scaffold_rank

FIRST_BIN, N_BINS = -20, 40
"""First bin of the activations' histograms, in half octaves, and their number."""

DIRECTION_BIN, DIRECTION_BINS = 0.25, 48
"""Width of a bin of the coordinates' histograms in standard deviations, and their number."""


class LatentStatistics:
    """
    How the sparse latents of an SAE fire.

    Args:
        sae: The SAE.
        candidates: Latents that may be dense, indices among the sparse ones, shape
            (n_candidates,).
        n_contexts: Contexts kept of each latent.

    Attributes:
        candidates: The same.
        rank: Number of linear latents.
        decoder: Decoder directions, shape (n_sparse, d_in).
        fired: Number of tokens on which each fired, shape (n_sparse,).
        sums: Sums of its activations, shape (n_sparse,).
        squares: Sums of their squares, shape (n_sparse,).
        histogram: Number of tokens by activation, shape (n_sparse, N_BINS).
        contexts: Strongest contexts.
    """

    def __init__(self, sae: Any, candidates: torch.Tensor, n_contexts: int):
        self._sae, self.candidates = sae, candidates
        self.rank = scaffold_rank(sae)
        self._encoder = sae.W_enc[:, self.rank :].T.detach().float()
        self.decoder = sae.W_dec[self.rank :].detach().float()
        device, n = self.decoder.device, len(self.decoder)
        # MPS has no float64
        double = torch.float32 if device.type == "mps" else torch.float64
        self.fired = torch.zeros(n, dtype=torch.int64, device=device)
        self.sums, self.squares = torch.zeros(2, n, dtype=double, device=device)
        self.histogram = torch.zeros(n, N_BINS, dtype=torch.int64, device=device)
        self.contexts = StrongestContexts(n, n_contexts, device)
        self._antipode = antipodality(self._encoder, self.decoder, candidates)[1]
        self._both_fired = torch.zeros_like(candidates)

    @torch.no_grad()
    def update(self, batch: Tokens) -> torch.Tensor:
        """
        Returns:
            Activations of the tokens that count, shape (n_tokens, n_sparse).
        """
        acts = self._sae.encode(batch.x.flatten(0, 1))[:, self.rank :]
        acts = acts.view(*batch.tokens.shape, -1)
        self.contexts.update(batch.tokens, batch.counts, acts, batch.first_sequence)
        acts = acts[batch.counts]
        token, latent = acts.nonzero(as_tuple=True)
        bins = (2 * acts[token, latent].abs().log2()).floor().long() - FIRST_BIN
        places = latent * N_BINS + bins.clamp(0, N_BINS - 1)
        counts = torch.bincount(places, minlength=self.histogram.numel())
        self.histogram += counts.view_as(self.histogram)
        self.fired += torch.bincount(latent, minlength=len(self.fired))
        self.sums += acts.float().sum(dim=0)
        self.squares += acts.float().pow(2).sum(dim=0)
        both = (acts[:, self.candidates] > 0) & (acts[:, self._antipode] > 0)
        self._both_fired += both.sum(dim=0)
        return acts

    def written_by(self, latents: torch.Tensor, n_tokens: int) -> WrittenByLatents:
        """What some of the latents write."""
        means = (self.sums[latents] / n_tokens).float()
        return WrittenByLatents(self._sae, latents, means)

    def antipode(self, place: int, n_tokens: int) -> Antipode | None:
        """The antipodal partner of a candidate, if a latent is opposite at all."""
        latent, other = int(self.candidates[place]), int(self._antipode[place])
        encoder, decoder = (
            float(cosine_similarity(of[latent], of[other], dim=0))
            for of in (self._encoder, self.decoder)
        )
        if max(encoder, decoder) >= 0:
            return None
        one, two = (float(self.fired[of]) / n_tokens for of in (latent, other))
        both = float(self._both_fired[place]) / n_tokens
        number = other + self.rank
        return Antipode(number, encoder, decoder, both, one * two, one + two - both)


class DirectionStatistics:
    """
    How the coordinates along a scaffold's axes are distributed.

    Args:
        axes: The axes.
        mean_x: Mean activation by a first guess, shape (d_in,).
        context_size: Tokens per sequence.
        n_contexts: Contexts kept of each end.

    Attributes:
        axes: The axes.
        contexts: Strongest contexts, of the positive ends and then the negative ones.
        histogram: Number of tokens by coordinate, shape (r, DIRECTION_BINS).
    """

    def __init__(
        self,
        axes: ScaffoldAxes,
        mean_x: torch.Tensor,
        context_size: int,
        n_contexts: int,
    ):
        self.axes, self._mean_x, rank = axes, mean_x, len(axes.rows)
        self.contexts = StrongestContexts(2 * rank, n_contexts, mean_x.device)
        self.histogram = torch.zeros(rank, DIRECTION_BINS, dtype=torch.int64)
        self._by_position = torch.zeros(5, context_size, dtype=torch.float64)

    @torch.no_grad()
    def update(self, batch: Tokens) -> torch.Tensor:
        """
        Returns:
            Coordinates of the tokens that count, shape (n_tokens, r).
        """
        x, coordinates = batch.x, self.axes.coordinates(batch.x)
        ends = torch.cat([coordinates, -coordinates], dim=2)
        self.contexts.update(batch.tokens, batch.counts, ends, batch.first_sequence)
        s = self.axes.sae.scaffold(x, fix_gauge=True)
        vectors = torch.ones_like(x[..., :1]), coordinates, x - self._mean_x, s, x
        squares = [of.float().pow(2).sum(dim=(0, 2)).cpu() for of in vectors]
        self._by_position += torch.stack(squares)
        coordinates = coordinates[batch.counts]
        bins = (coordinates / self.axes.stds / DIRECTION_BIN).floor().long().cpu()
        bins = (bins + DIRECTION_BINS // 2).clamp(0, DIRECTION_BINS - 1)
        places = bins + DIRECTION_BINS * torch.arange(bins.shape[1])
        counts = torch.bincount(places.flatten(), minlength=self.histogram.numel())
        self.histogram += counts.view_as(self.histogram)
        return coordinates

    def positions(self) -> Positions:
        """What the scaffold carries at each position."""
        n, centred_s, centred_x, s, x = self._by_position
        shares = centred_s / centred_x, s / x, s / s.sum()
        return Positions(
            n.long().tolist(), *(of.nan_to_num(0).tolist() for of in shares)
        )
