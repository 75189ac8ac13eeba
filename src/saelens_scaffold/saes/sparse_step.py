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
from saelens_scaffold.kernels.sparse_autograd import (
    Reconstructions,
    SelectedPreActivations,
)


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
    encoded, decoded and trained together, each part as further rows of one sparse
    matrix.

    Args:
        ops: The kernels.
        widths: Of the levels, in latents of the dictionary, ascending.
        revivals: Which dead latents are to be revived.
    """

    ops: ModuleType
    widths: Sequence[int]
    revivals: Sequence[Revival]
    feature_acts: SparseActivations = field(init=False)
    levels: Sequence[torch.Tensor] = field(init=False, default=())
    """The reconstruction of each level, without b_dec, of shape (n_tokens, d_in)."""
    revived: Sequence[torch.Tensor] = field(init=False, default=())
    """What the dead latents of each revival write, of shape (n_tokens, d_in)."""

    _entries: Entries = field(init=False)
    _n_active: int = field(init=False)
    _z: torch.Tensor = field(init=False)
    _values: torch.Tensor = field(init=False)

    def encode(
        self,
        x: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        B: torch.Tensor | None,
        b_dec: torch.Tensor | None,
        rank: int,
        scale: torch.Tensor | None,
        selection: TopSelection,
        k: float,
    ) -> None:
        """
        Find the active latents, and those of the revivals, and encode them.

        Args:
            x, W_enc, b_enc, B, b_dec, rank: As `SelectedPreActivations` takes them.
            scale: By which pre-activations are multiplied before they compete, shape
                (n_latents,), or None for 1.
            selection: Selects the active ones.
            k: How many are active for a token, on average.
        """
        found: list[Entries] = []

        def select(encoder: Encoder) -> tuple[Entries, torch.Tensor]:
            return self._select(encoder._replace(scale=scale), selection, k)

        self._z, self._values = SelectedPreActivations.apply(  # type: ignore[misc]
            x, W_enc, b_enc, B, b_dec, rank, select, self.ops, found
        )
        (self._entries,) = found

    def _select(
        self, encoder: Encoder, selection: TopSelection, k: float
    ) -> tuple[Entries, torch.Tensor]:
        n_tokens, n_latents = len(encoder.x), encoder.W.shape[1]
        active = selection(encoder, int(k * n_tokens), self.ops)
        self._n_active = len(active.values)
        dead = [
            largest_of_each_token(
                encoder,
                revival.latents,
                revival.k,
                self.ops.block_elements(encoder.x.device),
            )
            for revival in self.revivals
        ]
        places = torch.cat([active.places, *(selected.places for selected in dead)])
        values = torch.cat([active.values, *(selected.values for selected in dead)])
        rows = places // n_latents
        latents = places - rows * n_latents
        if encoder.scale is not None:
            values = values / encoder.scale[latents]
        # so far a row is a token
        n_levels = len(self.widths)
        if n_levels > 1:
            ends = torch.tensor(self.widths[:-1], device=places.device)
            levels = torch.bucketize(latents[: self._n_active], ends, right=True)
            rows[: self._n_active] += n_tokens * levels
        start = self._n_active
        for part, selected in enumerate(dead, start=n_levels):
            stop = start + len(selected.values)
            rows[start:stop] += n_tokens * part
            start = stop
        n_rows = n_tokens * (n_levels + len(dead))
        return sorted_entries(rows, latents, values, n_tokens, n_rows, n_latents)

    def activations(self, norms: torch.Tensor | None) -> SparseActivations:
        """
        What the step gives out as `feature_acts`.

        Args:
            norms: The decoder's norms, shape (d_sae,), by which activations are
                multiplied, or None.
        """
        # those of revivals come last
        n, rank = self._n_active, self._z.shape[1]
        tokens, latents = self._entries.tokens[:n], self._entries.latents[:n]
        z, active = self._z, self._values[:n]
        if norms is not None:
            z, active = z * norms[:rank], active * norms[rank + latents]
        self.feature_acts = SparseActivations(
            z, active, tokens, latents, self._entries.n_latents
        )
        return self.feature_acts

    def decode(self, W_dec: torch.Tensor) -> None:
        """Make `levels` and `revived`."""
        written = Reconstructions.apply(
            self._z, self._values, W_dec, self._entries, self.ops
        )
        shape = (-1, self._entries.n_tokens, W_dec.shape[1])
        parts = written.view(shape).unbind()  # type: ignore[union-attr]
        n_levels = len(self.widths)
        self.levels = list(itertools.accumulate(parts[:n_levels]))
        self.revived = parts[n_levels:]
