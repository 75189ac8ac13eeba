"""A training step in sparse kernels: what its methods hand to each other."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple

import torch

from saelens_scaffold.kernels.entries import Entries, sorted_entries
from saelens_scaffold.kernels.lazy import SparseActivations
from saelens_scaffold.kernels.selection import (
    Encoder,
    TopSelection,
    largest_of_each_token,
)
from saelens_scaffold.kernels.sparse_forward import SparseForward


class Revival(NamedTuple):
    """
    Dead latents that are to reconstruct what a level leaves (Gao et al. 2024, A.2).

    Attributes:
        latents: The dead latents, counted from the dictionary's first, shape (n_dead,).
        k: How many of them to use for a token.
        weight: Weight of the loss.
        level: Which level's error they are to reconstruct.
    """

    latents: torch.Tensor
    k: int
    weight: float
    level: int


@dataclass
class SparseStep:
    """
    One training step.

    The reconstruction has parts: what each Matryoshka level adds to the one before (one
    level for BatchTopK), and what the dead latents of each revival write. All are
    encoded, decoded and trained in one pass, each part as further rows of the same
    sparse matrix.

    Args:
        ops: The kernels.
        widths: Of the levels, in latents of the dictionary, ascending.
        revivals: Which dead latents are to be revived.
    """

    ops: ModuleType
    widths: Sequence[int]
    revivals: Sequence[Revival]

    feature_acts: SparseActivations | None = field(init=False, default=None)
    levels: Sequence[torch.Tensor] = field(init=False, default=())
    """The reconstruction of each level, without b_dec, of shape (n_tokens, d_in)."""
    revived: Sequence[torch.Tensor] = field(init=False, default=())
    """What the dead latents of each revival write, of shape (n_tokens, d_in)."""

    def run(
        self,
        x: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        W_dec: torch.Tensor,
        b_dec: torch.Tensor | None,
        rank: int,
        residual: bool,
        norms: torch.Tensor | None,
        selection: TopSelection,
        k: float,
    ) -> SparseActivations:
        """
        Find the active latents, and those of the revivals; set `levels` and `revived`.

        Args:
            x, W_enc, b_enc, W_dec, b_dec, rank, residual: As `SparseForward` takes them.
            norms: By which activations are multiplied before they compete, and as they
                are given out, shape (d_sae,), or None for 1.
            selection: Selects the active ones.
            k: How many are active for a token, on average.

        Returns:
            `feature_acts`.
        """
        scale = None if norms is None else norms[rank:].detach()
        n_active = int(k * len(x))

        def select(encoder: Encoder) -> tuple[Entries, torch.Tensor]:
            return self._select(encoder._replace(scale=scale), selection, n_active)

        found: list[Entries] = []
        z, values, written = SparseForward.apply(  # type: ignore[misc]
            x, W_enc, b_enc, W_dec, b_dec, rank, residual, select, self.ops, found
        )
        (entries,) = found
        n_levels = len(self.widths)
        parts = written.view(-1, *x.shape).unbind()
        self.levels = list(itertools.accumulate(parts[:n_levels]))
        self.revived = parts[n_levels:]

        # the entries of the revivals come last
        n_active = int(entries.row_offsets[n_levels * len(x)])
        tokens, latents = entries.tokens[:n_active], entries.latents[:n_active]
        active = values[:n_active]
        if norms is not None:
            z, active = z * norms[:rank], active * norms[rank + latents]
        self.feature_acts = SparseActivations(
            z, active, tokens, latents, entries.n_latents
        )
        return self.feature_acts

    def _select(
        self, encoder: Encoder, selection: TopSelection, n_active: int
    ) -> tuple[Entries, torch.Tensor]:
        n_tokens, n_latents = len(encoder.x), encoder.W.shape[1]
        active = selection(encoder, n_active, self.ops)
        block = self.ops.block_elements(encoder.x.device)
        dead = [
            largest_of_each_token(encoder, revival.latents, revival.k, block)
            for revival in self.revivals
        ]
        all_selected = [active, *dead]
        places = torch.cat([selected.places for selected in all_selected])
        values = torch.cat([selected.values for selected in all_selected])
        tokens = places // n_latents
        latents = places - tokens * n_latents
        if encoder.scale is not None:
            values = values / encoder.scale[latents]

        ends = torch.tensor(self.widths[:-1], device=places.device)
        n_levels, n_active = len(self.widths), len(active.values)
        levels = torch.bucketize(latents[:n_active], ends, right=True)
        parts = [levels] + [
            torch.full_like(selected.places, n_levels + i)
            for i, selected in enumerate(dead)
        ]
        rows = tokens.add_(torch.cat(parts), alpha=n_tokens)
        n_rows = n_tokens * (n_levels + len(dead))
        return sorted_entries(rows, latents, values, n_tokens, n_rows, n_latents)
