"""Sums over the tokens: of an SAE's latents, and of its scaffold's directions."""

from typing import Any

import torch

from saelens_scaffold.inspect.axes import ScaffoldAxes
from saelens_scaffold.inspect.contexts import StrongestContexts, Vocabulary
from saelens_scaffold.inspect.explanations import Tokens
from saelens_scaffold.inspect.logit_lens import Tops
from saelens_scaffold.inspect.output import Antipode, Latents, Positions
from saelens_scaffold.saes.facts import antipodality, scaffold_rank
from saelens_scaffold.saes.subspaces import share_in_subspace

LOG2_FIRST, N_BINS = -20, 40
"""The first bin of the activations' histograms, in half octaves, and their number."""

DIRECTION_BIN, DIRECTION_BINS = 0.25, 48
"""Width of a bin of the coordinates' histograms in standard deviations, and their number."""


class LatentStatistics:
    """
    How the sparse latents of an SAE fire.

    Args:
        sae: The SAE.
        dense: Dense latents, indices among the sparse ones, shape (n_dense,).
        n_contexts: Contexts kept of each latent.

    Attributes:
        rank: Number of linear latents.
        decoder: Decoder directions, shape (n_sparse, d_in).
        fired: Number of tokens on which each fired, shape (n_sparse,).
        sums: Sums of its activations, shape (n_sparse,).
        squares: Sums of their squares, shape (n_sparse,).
        histogram: Number of tokens by activation, shape (n_sparse, N_BINS).
        contexts: Strongest contexts.
    """

    def __init__(self, sae: Any, dense: torch.Tensor, n_contexts: int):
        self._sae, self.dense = sae, dense
        self.rank = scaffold_rank(sae)
        self.decoder = sae.W_dec[self.rank :].detach().float()
        device, n = self.decoder.device, len(self.decoder)
        # MPS has no float64
        double = torch.float32 if device.type == "mps" else torch.float64
        self.fired = torch.zeros(n, dtype=torch.int64, device=device)
        self.sums, self.squares = torch.zeros(2, n, dtype=double, device=device)
        self.histogram = torch.zeros(n, N_BINS, dtype=torch.int64, device=device)
        self.contexts = StrongestContexts(n, n_contexts, device)
        encoder = sae.W_enc[:, self.rank :].T.detach()
        self.antipode = antipodality(encoder, self.decoder, dense)[1]
        cosines = torch.nn.functional.cosine_similarity
        self._cosines = [
            cosines(of[dense].float(), of[self.antipode].float()).tolist()
            for of in (encoder, self.decoder)
        ]
        self._both_fired = torch.zeros_like(dense)

    @torch.no_grad()
    def update(self, batch: Tokens) -> torch.Tensor:
        """
        Returns:
            Activations of the tokens that count, shape (n_tokens, n_sparse).
        """
        all_acts = self._sae.encode(batch.x.flatten(0, 1))[:, self.rank :]
        shaped = all_acts.view(*batch.tokens.shape, -1)
        self.contexts.update(batch.tokens, batch.counts, shaped, batch.first_sequence)
        acts = shaped[batch.counts]
        token, latent = acts.nonzero(as_tuple=True)
        values = acts[token, latent]
        self.fired += torch.bincount(latent, minlength=len(self.fired))
        self.sums.index_add_(0, latent, values.to(self.sums.dtype))
        self.squares.index_add_(0, latent, values.to(self.sums.dtype).pow(2))
        bins = (2 * values.log2()).floor().long() - LOG2_FIRST
        places = latent * N_BINS + bins.clamp(0, N_BINS - 1)
        counts = torch.bincount(places, minlength=self.histogram.numel())
        self.histogram += counts.view_as(self.histogram)
        both = (acts[:, self.dense] > 0) & (acts[:, self.antipode] > 0)
        self._both_fired += both.sum(dim=0)
        return acts

    def antipodes(self, n_tokens: int) -> list[Antipode | None]:
        """The antipodal partner of each dense latent, if a latent is opposite at all."""
        one, other = (self.fired[of] / n_tokens for of in (self.dense, self.antipode))
        both = self._both_fired / n_tokens
        columns = zip(
            self.antipode.tolist(),
            *self._cosines,
            both.tolist(),
            (one * other).tolist(),
            (one + other - both).tolist(),
            strict=True,
        )
        return [
            Antipode(latent + self.rank, *of) if max(of[:2]) < 0 else None
            for latent, *of in columns
        ]

    def result(
        self,
        n_tokens: int,
        scaffold: torch.Tensor | None,
        tops: Tops,
        vocabulary: Vocabulary,
    ) -> Latents:
        """
        Args:
            n_tokens: Number of tokens seen.
            scaffold: Orthonormal rows of the scaffold's subspace.
            tops: Tokens that each latent promotes and suppresses.
            vocabulary: Gets the tokens that are shown.
        """
        # a latent is in a context only where it fires
        values = self.contexts.values
        values[values <= 0] = -torch.inf
        scale = values[:, 0].clamp_min(0).tolist()
        alive = [*enumerate(self.fired.tolist())]
        first_bin, histogram = zip(*map(_trimmed, self.histogram.tolist()), strict=True)
        share = None
        if scaffold is not None:
            share = share_in_subspace(self.decoder.cpu(), scaffold.cpu().double())
        return Latents(
            index=[i + self.rank for i, _ in alive],
            frequency=(self.fired / n_tokens).tolist(),
            mean=(self.sums / self.fired.clamp_min(1)).tolist(),
            scale=scale,
            share_in_scaffold=None if share is None else share.tolist(),
            first_bin=[bin + LOG2_FIRST for bin in first_bin],
            histogram=[*histogram],
            promoted=[vocabulary.weighted(high) for high, _ in tops],
            suppressed=[vocabulary.weighted(low) for _, low in tops],
            contexts=[self.contexts.windows(i, scale[i], vocabulary) for i, _ in alive],
        )


def _trimmed(counts: list[int]) -> tuple[int, list[int]]:
    """The index of the first bin that is not empty, and the counts up to the last."""
    used = [i for i, n in enumerate(counts) if n]
    return (used[0], counts[used[0] : used[-1] + 1]) if used else (0, [])


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
        self.axes, self._mean_x = axes, mean_x
        rank, device = len(axes.rows), mean_x.device
        self.contexts = StrongestContexts(2 * rank, n_contexts, device)
        self.histogram = torch.zeros(rank, DIRECTION_BINS, dtype=torch.int64)
        self._by_position = torch.zeros(5, context_size, dtype=torch.float64)

    @torch.no_grad()
    def update(self, batch: Tokens) -> torch.Tensor:
        """
        Returns:
            Coordinates of the tokens that count, shape (n_tokens, r).
        """
        coordinates = self.axes.coordinates(batch.x)
        ends = torch.cat([coordinates, -coordinates], dim=2)
        self.contexts.update(batch.tokens, batch.counts, ends, batch.first_sequence)
        of_counted = coordinates[batch.counts]
        bins = (of_counted / self.axes.stds / DIRECTION_BIN).floor().long()
        bins = (bins + DIRECTION_BINS // 2).clamp(0, DIRECTION_BINS - 1).cpu()
        places = bins + DIRECTION_BINS * torch.arange(bins.shape[1])
        counts = torch.bincount(places.flatten(), minlength=self.histogram.numel())
        self.histogram += counts.view_as(self.histogram)
        s, x = self.axes.sae.scaffold(batch.x, fix_gauge=True), batch.x
        differences = coordinates, x - self._mean_x, s, x
        squares = [of.float().pow(2).sum(dim=(0, 2)).cpu() for of in differences]
        n = torch.full_like(squares[0], len(x))
        self._by_position += torch.stack([n, *squares])
        return of_counted

    def positions(self) -> Positions:
        """What the scaffold carries at each position."""
        n, centred_s, centred_x, s, x = self._by_position
        return Positions(
            n=n.long().tolist(),
            share_of_variance=(centred_s / centred_x).nan_to_num(0, 0, 0).tolist(),
            share_of_squares=(s / x).nan_to_num(0, 0, 0).tolist(),
            share_of_total=(s / s.sum()).nan_to_num(0, 0, 0).tolist(),
        )
