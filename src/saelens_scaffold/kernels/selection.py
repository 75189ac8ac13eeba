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
        scale: Factor of each latent, shape (n_latents,), or None for 1.
    """

    x: torch.Tensor
    W: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor | None

    def pre_activations(
        self, tokens: slice | torch.Tensor, latents: slice | torch.Tensor
    ) -> torch.Tensor:
        """Those of some tokens and latents, shape (n_tokens, n_latents), contiguous."""
        x, W, b = self.x[tokens], self.W[:, latents], self.b[latents]
        if torch.is_autocast_enabled(x.device.type):
            # as in dense code under autocast: the product is rounded, not what follows
            pre_activations = x @ W + b
        else:
            pre_activations = torch.addmm(b, x, W)
        if self.scale is not None:
            pre_activations *= self.scale[latents]
        return pre_activations


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
        for guess in self._guesses(encoder, n):
            candidates = _above(encoder, guess, ops)
            if guess == 0 or len(candidates.values) >= n:
                break
        selected = _largest(candidates, n)
        self._last_guess = self._below_cut_of(selected.values, n)
        return selected

    def _guesses(self, encoder: Encoder, n: int) -> Iterator[float]:
        if self._last_guess is not None:
            yield self._last_guess
        yield self._from_a_sample(encoder, n)
        yield 0.0

    def _below_cut_of(self, selected: torch.Tensor, n: int) -> float | None:
        """A guess for a batch like that of which n were to be selected."""
        if n == 0:
            return None
        cut = float(selected.min()) if len(selected) == n else 0.0
        # NaN and inf are the mark of a batch that says nothing of the next
        return self.MARGIN * cut if 0 <= cut < float("inf") else None

    def _from_a_sample(self, encoder: Encoder, n: int) -> float:
        # every n-th token rather than random ones, so that no random number is used up
        stride = max(1, len(encoder.x) // 64)
        sample = encoder.pre_activations(slice(None, None, stride), slice(None))
        values = sample.flatten()
        n_of_sample = min(len(values), max(1, n // stride))
        return self._below_cut_of(values.topk(n_of_sample).values, n_of_sample) or 0.0


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
    among = Encoder(
        encoder.x,
        encoder.W[:, latents],
        encoder.b[latents],
        None if encoder.scale is None else encoder.scale[latents],
    )
    n_tokens, n_latents = len(encoder.x), encoder.W.shape[1]
    at_a_time = max(1, max_elements // len(latents))
    places, values = [], []
    for start in range(0, n_tokens, at_a_time):
        of_tokens = among.pre_activations(slice(start, start + at_a_time), slice(None))
        top = of_tokens.topk(k, dim=-1, sorted=False)
        tokens = torch.arange(start, start + len(of_tokens), device=latents.device)
        places.append(tokens[:, None] * n_latents + latents[top.indices])
        values.append(top.values)
    return Selected(torch.cat(places).flatten(), torch.cat(values).flatten())


def _above(encoder: Encoder, cut: float, ops: ModuleType) -> Selected:
    """All pre-activations above a cut."""
    n_tokens, n_latents = len(encoder.x), encoder.W.shape[1]
    at_a_time = max(1, ops.block_elements(encoder.x.device) // max(1, n_tokens))
    places, values = [], []
    for start in range(0, n_latents, at_a_time):
        block = encoder.pre_activations(slice(None), slice(start, start + at_a_time))
        indices, above = ops.above(block, cut)
        width = block.shape[1]
        tokens = indices // width
        # token · n_latents + start + (index - token · width)
        places.append(indices.add_(tokens, alpha=n_latents - width).add_(start))
        values.append(above)
    return Selected(torch.cat(places), torch.cat(values))


def _largest(candidates: Selected, n: int) -> Selected:
    if len(candidates.values) <= n:
        return candidates
    top = candidates.values.topk(n, sorted=False)
    return Selected(candidates.places[top.indices], top.values)

