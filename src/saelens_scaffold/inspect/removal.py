"""What the language model loses without a direction or a latent, and on which tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from saelens_scaffold.evals.losses import CleanPredictions, predicting_text
from saelens_scaffold.evals.model import HookedBatch, HookedModel
from saelens_scaffold.inspect.axes import ScaffoldAxes
from saelens_scaffold.inspect.output import Removal
from saelens_scaffold.saes.facts import scaffold_rank, tokens_at_once

N_TOKENS = 10
"""Tokens named of each direction."""


@dataclass
class WrittenByLatents:
    """
    What sparse latents write, in the form of `ScaffoldAxes`.

    Attributes:
        sae: The SAE.
        latents: Indices among its sparse latents, shape (n_latents,).
        means: Their mean activations, shape (n_latents,).
    """

    sae: Any
    latents: torch.Tensor
    means: torch.Tensor

    @property
    def rows(self) -> torch.Tensor:
        """Decoder directions, shape (n_latents, d_in)."""
        return self.sae.W_dec[scaffold_rank(self.sae) + self.latents].detach().float()

    def coordinates(self, x: torch.Tensor) -> torch.Tensor:
        """Activations less their means, shape (n_tokens, n_latents), of x (n_tokens, d_in)."""
        parts: list[torch.Tensor] = []
        for part in x.split(tokens_at_once(self.sae)):
            acts = self.sae.encode(part)[:, scaffold_rank(self.sae) + self.latents]
            # what decoding multiplies by, where this part's tokens were normalised
            one = torch.ones_like(acts[:, :1])
            ends = self.sae.run_time_activation_norm_fn_out(torch.stack([0 * one, one]))
            parts.append((acts.float() - self.means) * (ends[1] - ends[0]))
        return torch.cat(parts)


class Removals:
    """
    Losses of the language model without each direction alone, on some of the sequences.

    A direction is removed as the scaffold is mean-ablated: the activation loses the
    coordinate's difference from its mean, along the axis. So is a latent, along its decoder
    direction. Each takes one more run of the layers above the hook point for each sequence,
    so the sequences are few, and spread evenly over the text.

    Args:
        hooked: The language model at the hook point.
        tokenizer: The language model's tokenizer.
        share: Share of the sequences.
    """

    def __init__(self, hooked: HookedModel, tokenizer: object, share: float):
        self._hooked, self._tokenizer, self._share = hooked, tokenizer, share
        self._batches: list[tuple[torch.Tensor, torch.Tensor]] = []
        n_vocab, device = hooked.model.cfg.d_vocab, hooked.model.cfg.device
        self._counts = torch.zeros(n_vocab, device=device)
        self._clean = 0.0

    @property
    def n_predictions(self) -> int:
        """Number of predictions that were measured."""
        return int(self._counts.sum())

    @property
    def cross_entropy(self) -> float:
        """Clean cross-entropy of these."""
        return self._clean / max(1, self.n_predictions)

    def keep(
        self, tokens: torch.Tensor, counts: torch.Tensor, first_sequence: int
    ) -> None:
        """
        Keep a share of the sequences to measure.

        Args:
            tokens: Sequences, shape (batch, seq).
            counts: Mask of the tokens from which directions may be removed.
            first_sequence: Number of the first sequence.
        """
        numbers = first_sequence + torch.arange(len(tokens) + 1)
        chosen = (numbers * self._share).ceil().diff() > 0
        if counts[chosen].any():
            self._batches.append((tokens[chosen], counts[chosen]))

    @torch.no_grad()
    def measure(
        self, removed: Sequence[ScaffoldAxes | WrittenByLatents]
    ) -> list[Removal]:
        """
        Measure the sequences that were kept.

        Args:
            removed: What to remove, one row at a time.

        Returns:
            One for each row, in order.
        """
        n_rows = sum(len(of.rows) for of in removed)
        by_token = self._counts.new_zeros(n_rows, len(self._counts))
        divergences = torch.zeros(n_rows)
        for tokens, counts in tqdm(self._batches if n_rows else [], "Removing"):
            run = HookedBatch(self._hooked, tokens, counts)
            predicts = predicting_text(tokens, counts, self._tokenizer)
            clean = CleanPredictions(run.above(run.full), tokens, predicts)
            following = tokens.roll(-1, dims=1)[predicts]
            ones = torch.ones_like(following).to(self._counts)
            self._counts.index_add_(0, following, ones)
            self._clean += float(clean.surprise[predicts].double().sum())
            pairs = ((of.coordinates(run.x).T, of.rows) for of in removed)
            rows = (of_row for pair in pairs for of_row in zip(*pair, strict=True))
            for i, (coordinate, row) in enumerate(rows):
                without = run.x - coordinate[:, None] * row
                surprise, kl = clean.by_token(run.above(run.full_with(without)))
                more = (surprise - clean.surprise)[predicts]
                by_token[i].index_add_(0, following, more)
                divergences[i] += float(kl[predicts].sum())
        return [*map(self._removal, by_token, divergences.tolist())]

    def _removal(self, by_token: torch.Tensor, divergence: float) -> Removal:
        """What is said, from sums of increases by the next token, and of divergences."""
        most, n = by_token.topk(N_TOKENS), max(1, self.n_predictions)
        tokens = [
            (int(token), int(self._counts[token]), float(of / self._counts[token]))
            for of, token in zip(*most, strict=True)
            if of > 0
        ]
        increase = float(by_token.double().sum()) / n
        return Removal(self.cross_entropy + increase, increase, divergence / n, tokens)
