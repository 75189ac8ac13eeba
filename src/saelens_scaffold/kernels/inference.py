"""Encoding and decoding without gradients, with few active latents."""

from types import ModuleType

import torch

from saelens_scaffold.kernels.entries import Entries

MAX_DENSITY = 1 / 16
"""Share of active latents up to which a sum over them beats a dense product."""


def jumprelu_encode(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor,
    cuts: torch.Tensor,
    max_elements: int,
) -> torch.Tensor:
    """
    x W + b where it exceeds its latent's cut or is NaN, and 0 elsewhere.

    Computed one block of latents at a time, so that each block stays in the cache.

    Args:
        x: Shape (n_tokens, d_in).
        W: Shape (d_in, n_latents).
        b: Shape (n_latents,).
        cuts: Shape (n_latents,).
        max_elements: Number of pre-activations per block.

    Returns:
        Shape (n_tokens, n_latents).
    """
    acts = x.new_empty(len(x), W.shape[1])
    at_a_time = max(1, max_elements // max(1, len(x)))
    for start in range(0, W.shape[1], at_a_time):
        block = slice(start, start + at_a_time)
        of_block = acts[:, block]
        torch.mm(x, W[:, block], out=of_block)
        of_block += b[block]
        of_block.masked_fill_(of_block <= cuts[block], 0)
    return acts


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
