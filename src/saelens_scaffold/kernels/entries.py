"""Active latents of each token: the entries of a sparse matrix, sorted both ways."""

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Entries:
    """
    Places of the entries of a sparse matrix, sorted by row, then by latent.

    A row is a token, or a part of a token's reconstruction (a Matryoshka level, the
    auxiliary reconstruction): part p of token n is row p · n_tokens + n.

    Args:
        rows: Shape (n_entries,), ascending.
        latents: Shape (n_entries,), ascending within a row.
        n_tokens: Number of tokens.
        n_rows: Number of rows, a multiple of n_tokens.
        n_latents: Number of latents.
    """

    rows: torch.Tensor
    latents: torch.Tensor
    n_tokens: int
    n_rows: int
    n_latents: int

    @cached_property
    def tokens(self) -> torch.Tensor:
        """Each entry's token, shape (n_entries,)."""
        return self.rows % self.n_tokens if self.n_rows > self.n_tokens else self.rows

    @cached_property
    def row_offsets(self) -> torch.Tensor:
        """Start of each row's entries, and the end of the last, shape (n_rows + 1,)."""
        return _offsets(self.rows, self.n_rows)

    @cached_property
    def by_latent(self) -> torch.Tensor:
        """Permutation that sorts the entries by latent, shape (n_entries,)."""
        return self.latents.argsort(stable=True)

    @cached_property
    def latent_offsets(self) -> torch.Tensor:
        """`row_offsets` of the entries in the order `by_latent`, shape (n_latents + 1,)."""
        return _offsets(self.latents, self.n_latents)


def sorted_entries(
    rows: torch.Tensor,
    latents: torch.Tensor,
    values: torch.Tensor,
    n_tokens: int,
    n_rows: int,
    n_latents: int,
) -> tuple[Entries, torch.Tensor]:
    """Entries and their values from places in any order."""
    order = (rows * n_latents + latents).argsort()
    rows, latents, values = (
        of.index_select(0, order) for of in (rows, latents, values)
    )
    return Entries(rows, latents, n_tokens, n_rows, n_latents), values


def _offsets(of: torch.Tensor, n: int) -> torch.Tensor:
    offsets = of.new_zeros(n + 1)
    torch.cumsum(torch.bincount(of, minlength=n), dim=0, out=offsets[1:])
    return offsets
