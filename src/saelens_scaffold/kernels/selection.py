"""Exact BatchTopK selection, in one pass over pre-activations that are never all held."""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch


class Selected(NamedTuple):
    """
    Pre-activations that were selected.

    Attributes:
        places: token · n_latents + latent, shape (n,), in no particular order.
        values: The pre-activations, times the latents' scale, shape (n,).
    """

    places: torch.Tensor
    values: torch.Tensor


class Encoder(NamedTuple):
    """
    What pre-activations are made of: (x W + b) · scale.

    Attributes:
        x: Shape (n_tokens, d_in).
        W: Shape (d_in, n_latents).
        b: Shape (n_latents,).
        scale: Positive factor of each latent, shape (n_latents,), or None for 1.
    """

    x: torch.Tensor
    W: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor | None

    def products(
        self, tokens: slice = slice(None), latents: slice = slice(None)
    ) -> torch.Tensor:
        """x W of some tokens and latents, contiguous, of autocast's dtype if it is on."""
        return self.x[tokens] @ self.W[:, latents]

    def pre_activations(
        self, products: torch.Tensor, latents: torch.Tensor | slice = slice(None)
    ) -> torch.Tensor:
        """Products, whose last dimension runs over `latents`, as pre-activations."""
        pre_activations = products + self.b[latents]
        return (
            pre_activations
            if self.scale is None
            else pre_activations * self.scale[latents]
        )

    def among(self, latents: torch.Tensor) -> "Encoder":
        """That of some latents alone."""
        scale = None if self.scale is None else self.scale[latents]
        return Encoder(self.x, self.W[:, latents], self.b[latents], scale)


class TopSelection:
    """
    Selects the largest positive pre-activations of a batch.

    The pre-activations are made a block of latents at a time, and of each block only the
    candidates are kept: those above a guess of where the cut will be. The guess is
    somewhat below the last batch's cut, or that of a sample of tokens. If there are enough
    candidates, then the largest of them are the largest of all; if not, the guess was too
    high, and a lower one is tried, at last 0, which no positive value is below.

    So the guess decides about time only. The result is that of `torch.topk` on the
    rectified pre-activations: the same values, ties included as often, as many
    as asked for, or all positive ones where there are fewer, and NaN as the largest.
    """

    MARGIN = 0.85
    """The guess as a multiple of the last cut. Twice as many candidates as are needed
    cost little, and a second pass the price of the encoder's product."""

    def __init__(self) -> None:
        self._last_guess: float | None = None

    def __call__(self, encoder: Encoder, n: int, ops: ModuleType) -> Selected:
        """
        Args:
            encoder: What makes the pre-activations.
            n: How many to select.
            ops: The kernels to use.
        """
        if n == 0:
            return Selected(encoder.x.new_empty(0, dtype=torch.long), encoder.b[:0])
        for guess in self._guesses(encoder, n):
            selected = _largest(_above(encoder, guess, ops), n)
            cut = _cut(selected.values, n)
            if cut > _safely_above(guess, encoder) or guess == 0:
                break
        self._last_guess = self.MARGIN * cut if 0 < cut < float("inf") else None
        return selected

    def _guesses(self, encoder: Encoder, n: int) -> Iterator[float]:
        if self._last_guess is not None:
            yield self._last_guess
        yield self._from_a_sample(encoder, n)
        yield 0.0

    def _from_a_sample(self, encoder: Encoder, n: int) -> float:
        # every n-th token rather than random ones, so that no random number is used up
        stride = max(1, len(encoder.x) // 64)
        products = encoder.products(tokens=slice(None, None, stride))
        values = encoder.pre_activations(products).flatten()
        n_of_sample = min(len(values), max(1, n // stride))
        cut = _cut(values.topk(n_of_sample).values, n_of_sample)
        return self.MARGIN * cut if 0 < cut < float("inf") else 0.0


def largest_of_each_token(
    encoder: Encoder, latents: torch.Tensor, k: int, max_elements: int
) -> Selected:
    """
    The k largest pre-activations of each token, positive or not, among some latents.

    Args:
        encoder: What makes the pre-activations.
        latents: Indices of the latents, shape (n,).
        k: At most n.
        max_elements: How many pre-activations to make at a time.
    """
    n_tokens, n_latents = len(encoder.x), encoder.W.shape[1]
    among = encoder.among(latents)
    at_a_time = max(1, max_elements // len(latents))
    places, values = [], []
    for start in range(0, n_tokens, at_a_time):
        products = among.products(tokens=slice(start, start + at_a_time))
        top = among.pre_activations(products).topk(k, dim=-1, sorted=False)
        tokens = torch.arange(start, start + len(products), device=latents.device)
        places.append(tokens[:, None] * n_latents + latents[top.indices])
        values.append(top.values)
    return Selected(torch.cat(places).flatten(), torch.cat(values).flatten())


def _above(encoder: Encoder, cut: float, ops: ModuleType) -> Selected:
    """
    All pre-activations above a cut, and some that are there but for rounding.

    The cut is moved rather than the products, of which there are so many more: with
    each latent's bias and scale, (p + b) · scale > cut is p > cut / scale - b. For a cut of
    0 that is exact.
    """
    n_tokens, n_latents = len(encoder.x), encoder.W.shape[1]
    precise = _dtype_of_cuts(encoder)
    cuts = -encoder.b.to(precise)
    if cut > 0:
        cuts += cut if encoder.scale is None else cut / encoder.scale.to(precise)
    at_a_time = max(1, ops.block_elements(encoder.x.device) // max(1, n_tokens))
    found = []
    for start in range(0, n_latents, at_a_time):
        block = slice(start, min(start + at_a_time, n_latents))
        found.append(ops.above(encoder.products(latents=block), cuts[block]))
    # All blocks at once, since each operation is a rendezvous of a CPU's threads. Places
    # in blocks side by side, of which the last is narrower, become places in all.
    indices = torch.cat([of_block for of_block, _ in found])
    device = indices.device
    starts = torch.arange(0, n_latents, at_a_time, device=device)
    widths = (n_latents - starts).clamp_max(at_a_time)
    sizes = torch.tensor([len(of_block) for of_block, _ in found], device=device)
    block = torch.arange(len(found), device=device).repeat_interleave(
        sizes, output_size=len(indices)
    )
    width = widths[block]
    tokens = indices // width
    latents = indices - tokens * width + block * at_a_time
    values = encoder.pre_activations(torch.cat([of for _, of in found]), latents)
    return Selected(latents.add_(tokens, alpha=n_latents), values)


def _safely_above(guess: float, encoder: Encoder) -> float:
    """
    A value that no pre-activation exceeds that `_above(guess)` leaves out.

    What is left out is a product p <= fl(guess / scale - b), so that (p + b) · scale is at
    most the guess but for the rounding of that cut, relative to guess and bias in the
    cut's precision, and at most two roundings of its own, relative to itself in the
    bias's precision. How products are rounded plays no part, for they are what they are.
    """
    scaled_bias = encoder.b if encoder.scale is None else encoder.b * encoder.scale
    of_values = torch.finfo(encoder.b.dtype).eps
    of_cuts = torch.finfo(_dtype_of_cuts(encoder)).eps
    return guess + 8 * (of_values * guess + of_cuts * float(scaled_bias.abs().max()))


def _dtype_of_cuts(encoder: Encoder) -> torch.dtype:
    return torch.promote_types(encoder.b.dtype, torch.float32)


def _cut(selected: torch.Tensor, n: int) -> float:
    """The least of the n values that are selected; 0 if there are fewer."""
    return float(selected.min()) if 0 < n == len(selected) else 0.0


def _largest(candidates: Selected, n: int) -> Selected:
    if len(candidates.values) <= n:
        return candidates
    top = candidates.values.topk(n, sorted=False)
    return Selected(candidates.places[top.indices], top.values)
