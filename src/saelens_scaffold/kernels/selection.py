"""Exact BatchTopK selection in one pass, without holding all pre-activations."""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch


class Selected(NamedTuple):
    """
    Selected pre-activations.

    Attributes:
        places: token · n_latents + latent, shape (n,), in no particular order.
        values: The pre-activations, times the latents' scale, shape (n,).
    """

    places: torch.Tensor
    values: torch.Tensor


class Encoder(NamedTuple):
    """
    Pre-activations (x W + b) · scale.

    Attributes:
        x: Shape (n_tokens, d_in).
        W: Shape (d_in, n_latents).
        b: Shape (n_latents,).
        scale: Positive factor of each latent, shape (n_latents,), or None for 1.
        multiplied: x W, shape (n_tokens, n_latents), if it is at hand.
    """

    x: torch.Tensor
    W: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor | None
    multiplied: torch.Tensor | None = None

    def products(
        self, tokens: slice = slice(None), latents: slice = slice(None)
    ) -> torch.Tensor:
        """x W of some tokens and latents, contiguous, in autocast's dtype if it is on."""
        if self.multiplied is not None:
            return self.multiplied[tokens, latents].contiguous()
        return self.x[tokens] @ self.W[:, latents]

    def multiply(self) -> "Encoder":
        """The same encoder, which multiplies now, once for all that is asked of it."""
        return self._replace(multiplied=self.products())

    def pre_activations(
        self, products: torch.Tensor, latents: torch.Tensor | slice = slice(None)
    ) -> torch.Tensor:
        """Pre-activations from products whose last dimension is that of `latents`."""
        pre_activations = products + _of(self.b, latents)
        if self.scale is None:
            return pre_activations
        return pre_activations * _of(self.scale, latents)

    def among(self, latents: torch.Tensor) -> "Encoder":
        """The encoder of some latents only."""
        scale = None if self.scale is None else _of(self.scale, latents)
        # on a CPU much faster than W[:, latents]
        W, multiplied = self.W.index_select(1, latents), self.multiplied
        if multiplied is not None:
            multiplied = multiplied.index_select(1, latents)
        return Encoder(self.x, W, _of(self.b, latents), scale, multiplied)


class TopSelection:
    """
    Selects the largest positive pre-activations of a batch.

    Pre-activations are computed one block of latents at a time, and of each block only the
    candidates are kept: those above a guess of the cut. The guess is somewhat below the last
    batch's cut, or that of a sample of tokens. If there are enough candidates, the largest
    of them are the largest of all; if not, the guess was too high, and a lower one is tried,
    finally 0, which every positive value exceeds.

    So the guess affects only the time. The result is that of `torch.topk` on the rectified
    pre-activations: the same values with the same multiplicity of ties, as many as
    requested, or all positive ones if there are fewer, and NaN as the largest.
    """

    MARGIN = 0.85
    """The guess as a multiple of the last cut. Twice as many candidates as needed cost
    little; a second pass costs the encoder's product."""

    def __init__(self) -> None:
        self._last_guess: float | None = None

    def __call__(self, encoder: Encoder, n: int, ops: ModuleType) -> Selected:
        """
        Args:
            encoder: The encoder.
            n: Number of pre-activations to select.
            ops: The kernels.
        """
        if n == 0:
            return Selected(encoder.x.new_empty(0, dtype=torch.long), encoder.b[:0])
        for guess in self._guesses(encoder, n):
            selected, cut = self._largest(_above(encoder, guess, ops), n)
            if cut > self._safely_above(guess, encoder) or guess == 0:
                break
        self._last_guess = self.MARGIN * cut if 0 < cut < float("inf") else None
        return selected

    def _guesses(self, encoder: Encoder, n: int) -> Iterator[float]:
        if self._last_guess is not None:
            yield self._last_guess
        yield self._from_a_sample(encoder, n)
        yield 0.0

    def _from_a_sample(self, encoder: Encoder, n: int) -> float:
        # every n-th token instead of random ones, so that no random numbers are drawn
        stride = max(1, len(encoder.x) // 64)
        products = encoder.products(tokens=slice(None, None, stride))
        values = encoder.pre_activations(products).flatten()
        cut = self.cut(values, max(1, n // stride))
        return self.MARGIN * cut if 0 < cut < float("inf") else 0.0

    def cut(self, values: torch.Tensor, n: int) -> float:
        """The n-th largest of some values; 0 if there are fewer."""
        return self._largest(Selected(values, values), n)[1]

    def _largest(self, candidates: Selected, n: int) -> tuple[Selected, float]:
        """The n largest candidates, and the least of them; 0 if there are fewer."""
        places, values = candidates
        if len(values) > n:
            values, indices = values.topk(n, sorted=False)
            places = places.index_select(0, indices)
        cut = float(values.min()) if 0 < n == len(values) else 0.0
        return Selected(places, values), cut

    def _safely_above(self, guess: float, encoder: Encoder) -> float:
        """
        An upper bound of the pre-activations that `_above(guess)` leaves out.

        It leaves out products p <= fl(guess / scale - b). So (p + b) · scale is at most the
        guess up to the rounding of that cut, relative to guess and bias in the cut's
        precision, and at most two roundings of its own, relative to itself in the bias's
        precision. The rounding of the products does not matter.
        """
        scaled_bias = encoder.b if encoder.scale is None else encoder.b * encoder.scale
        of_values = torch.finfo(encoder.b.dtype).eps
        of_cuts = torch.finfo(_dtype_of_cuts(encoder)).eps
        bias = float(scaled_bias.abs().max())
        return guess + 8 * (of_values * guess + of_cuts * bias)

    def of_each_token(
        self, encoder: Encoder, latents: torch.Tensor, k: int, ops: ModuleType
    ) -> Selected:
        """See `largest_of_each_token`."""
        block = ops.block_elements(encoder.x.device)
        return largest_of_each_token(encoder, latents, k, block)


def largest_of_each_token(
    encoder: Encoder, latents: torch.Tensor, k: int, max_elements: int
) -> Selected:
    """
    The k largest pre-activations of each token, positive or not, among some latents.

    Args:
        encoder: The encoder.
        latents: Indices of the latents, shape (n,).
        k: At most n.
        max_elements: Number of pre-activations per block.
    """
    n_tokens, n_latents = len(encoder.x), encoder.W.shape[1]
    among = encoder.among(latents)
    at_a_time = max(1, max_elements // max(1, len(latents)))
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
    All pre-activations above a cut, and some that are at the cut up to rounding.

    The cut is transformed instead of the many products: with each latent's bias and scale,
    (p + b) · scale > cut is p > cut / scale - b. For a cut of 0 that is exact.
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
    # All blocks at once, since each operation synchronises a CPU's threads. Places in
    # blocks side by side, of which the last is narrower, become places in the whole.
    indices = torch.cat([of_block for of_block, _ in found])
    device = indices.device
    starts = torch.arange(0, n_latents, at_a_time, device=device)
    widths = (n_latents - starts).clamp_max(at_a_time)
    sizes = torch.tensor([len(of_block) for of_block, _ in found], device=device)
    block = torch.arange(len(found), device=device).repeat_interleave(
        sizes, output_size=len(indices)
    )
    width = widths.index_select(0, block)
    tokens = indices // width
    latents = indices - tokens * width + block * at_a_time
    values = encoder.pre_activations(torch.cat([of for _, of in found]), latents)
    return Selected(latents.add_(tokens, alpha=n_latents), values)


def _of(values: torch.Tensor, latents: torch.Tensor | slice) -> torch.Tensor:
    if isinstance(latents, slice):
        return values[latents]
    return values.index_select(0, latents)  # on a CPU much faster than values[latents]


def _dtype_of_cuts(encoder: Encoder) -> torch.dtype:
    return torch.promote_types(encoder.b.dtype, torch.float32)
