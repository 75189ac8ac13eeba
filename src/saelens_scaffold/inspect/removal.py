"""What the language model loses without a scaffold direction, and on which tokens."""

from collections.abc import Sequence

import torch

from saelens_scaffold.evals.losses import CleanPredictions, predicting_text
from saelens_scaffold.evals.model import HookedBatch, HookedModel
from saelens_scaffold.inspect.axes import ScaffoldAxes
from saelens_scaffold.inspect.output import Removal

N_TOKENS = 10
"""Tokens named of each direction."""


class Removals:
    """
    Losses of the language model without each direction alone, on some of the sequences.

    A direction is removed as the scaffold is mean-ablated: the activation loses the
    coordinate's difference from its mean, along the axis. Each takes one more run of the
    layers above the hook point for each sequence, so the sequences are few, and spread
    evenly over the text.

    Args:
        hooked: The language model at the hook point.
        axes: Axes of each SAE with a scaffold.
        tokenizer: The language model's tokenizer.
        share: Share of the sequences.
        batch_size: Sequences at once.
    """

    def __init__(
        self,
        hooked: HookedModel,
        axes: Sequence[ScaffoldAxes],
        tokenizer: object,
        share: float,
        batch_size: int,
    ):
        self._hooked, self._axes, self._tokenizer = hooked, axes, tokenizer
        self._share, self._batch_size = share, batch_size
        n_directions = sum(len(of.rows) for of in axes)
        n_vocab, device = hooked.model.cfg.d_vocab, hooked.model.cfg.device
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._n_seen = 0
        self._by_token = torch.zeros(n_directions, n_vocab, device=device)
        self._counts = torch.zeros(n_vocab, device=device)
        self._kl = torch.zeros(n_directions)
        self._clean = 0.0

    @property
    def n_predictions(self) -> int:
        """Number of predictions so far."""
        return int(self._counts.sum())

    @property
    def cross_entropy(self) -> float:
        """Clean cross-entropy of these."""
        return self._clean / max(1, self.n_predictions)

    def update(self, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """
        Args:
            tokens: Sequences, shape (batch, seq), of which a share is used.
            counts: Mask of the tokens from which directions may be removed.
        """
        for of in zip(tokens, counts, strict=True):
            if int(self._n_seen * self._share) < int((self._n_seen + 1) * self._share):
                self._waiting.append(of)
            self._n_seen += 1
            if len(self._waiting) == self._batch_size:
                self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Measure what waits for a full batch."""
        if not self._waiting or not self._axes:
            return
        tokens, counts = (torch.stack(of) for of in zip(*self._waiting, strict=True))
        self._waiting = []
        run = HookedBatch(self._hooked, tokens, counts)
        predicts = predicting_text(tokens, counts, self._tokenizer)
        clean = CleanPredictions(run.above(run.full), tokens, predicts)
        following = tokens.roll(-1, dims=1)[predicts]
        ones = torch.ones_like(following).to(self._counts)
        self._counts.index_add_(0, following, ones)
        self._clean += float(clean.surprise[predicts].double().sum())
        direction = 0
        for axes in self._axes:
            coordinates = axes.coordinates(run.x)
            for row, of_row in zip(axes.rows, coordinates.T, strict=True):
                without = run.x - of_row[:, None] * row
                surprise, kl = clean.by_token(run.above(run.full_with(without)))
                more = (surprise - clean.surprise)[predicts]
                self._by_token[direction].index_add_(0, following, more)
                self._kl[direction] += float(kl[predicts].sum())
                direction += 1

    def result(self) -> list[Removal]:
        """One for each direction, in order."""
        n, found = max(1, self.n_predictions), []
        for total, kl in zip(self._by_token, self._kl, strict=True):
            most = total.topk(N_TOKENS)
            tokens = [
                (int(token), int(self._counts[token]), float(of / self._counts[token]))
                for of, token in zip(*most, strict=True)
                if of > 0
            ]
            increase = float(total.double().sum()) / n
            entropy = self.cross_entropy + increase
            found.append(Removal(entropy, increase, float(kl) / n, tokens))
        return found
