"""Encoding and decoding without gradients, with few active latents."""

from collections.abc import Iterator
from types import ModuleType

import torch

from saelens_scaffold.kernels.entries import Entries

MAX_DENSITY = 1 / 16
"""Share of active latents up to which a sum over them beats a dense product."""

_MIN_TOKENS = 1024
"""Fewer tokens in a block would read the weights too often."""


def jumprelu_encode(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor,
    cuts: torch.Tensor,
    max_elements: int,
) -> torch.Tensor:
    """
    x W + b where it exceeds its latent's cut or is NaN, and 0 elsewhere.

    Computed one block of tokens and latents at a time, so that each stays in the cache.

    Args:
        x: Shape (n_tokens, d_in).
        W: Shape (d_in, n_latents).
        b: Shape (n_latents,).
        cuts: Shape (n_latents,).
        max_elements: Number of pre-activations per block.

    Returns:
        Shape (n_tokens, n_latents).
    """
    n_tokens, n_latents = len(x), W.shape[1]
    acts, zero = x.new_empty(n_tokens, n_latents), x.new_zeros(())
    wide = max(1, max_elements // max(1, min(n_tokens, _MIN_TOKENS)))
    wide = min(wide, n_latents)
    high = max(1, max_elements // wide)
    for tokens in _slices(n_tokens, high):
        for latents in _slices(n_latents, wide):
            of_block = acts[tokens, latents]
            torch.mm(x[tokens], W[:, latents], out=of_block)
            of_block += b[latents]
            # on a CPU twice as fast as masked_fill_
            torch.where(of_block <= cuts[latents], zero, of_block, out=of_block)
    return acts


def _slices(n: int, at_a_time: int) -> Iterator[slice]:
    for start in range(0, n, at_a_time):
        yield slice(start, start + at_a_time)


def decode_few(
    acts: torch.Tensor, W: torch.Tensor, ops: ModuleType
) -> torch.Tensor | None:
    """
    acts W, from the nonzero acts; None if there are too many.

    Args:
        acts: Shape (n_tokens, n_latents).
        W: Shape (n_latents, d_in).
        ops: The kernels.

    Returns:
        Shape (n_tokens, d_in).
    """
    active = acts != 0
    if int(active.count_nonzero()) > MAX_DENSITY * acts.numel():
        return None
    tokens, latents = active.nonzero().unbind(1)
    entries = Entries(tokens, latents, len(acts), *acts.shape)
    out = W.new_empty(len(acts), W.shape[1])
    ops.row_sums(entries.row_offsets, latents, acts[tokens, latents], W, out)
    return out
