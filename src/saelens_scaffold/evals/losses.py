"""Next-token losses of a language model, clean and with other activations."""

from collections.abc import Iterator
from typing import Any

import torch

from saelens_scaffold.evals.tokens import is_text


def predicting_text(
    tokens: torch.Tensor, counts: torch.Tensor, tokenizer: Any
) -> torch.Tensor:
    """
    Mask of the tokens that count, if the token that follows is text, shape (batch, seq).

    What follows the last token of a sequence is not known. At tokens that do not count,
    activations are not changed, and predictions hardly.
    """
    follows = is_text(tokens, tokenizer).roll(-1, dims=1)
    follows[:, -1] = False
    return counts & follows


class CleanPredictions:
    """
    Predictions of the language model when nothing is changed, for one batch.

    Args:
        logits: Shape (batch, seq, d_vocab).
        tokens: Shape (batch, seq).
        counts: Mask of the tokens at which predictions count, shape (batch, seq), as
            `predicting_text`.

    Attributes:
        surprise: Loss of the token after each, in nats, shape (batch, seq). Of the last
            token of a sequence it means nothing.
        n_predictions: Number of predictions that count in each sequence, shape (batch,),
            float64.
        entropy: Entropy of the prediction at each token, in nats, shape (batch, seq).
        losses: Losses as of `compare`; the KL divergence is 0.
    """

    def __init__(
        self, logits: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor
    ):
        self._targets = tokens.roll(-1, dims=1).flatten()
        self._counts = counts.cpu().double()
        self.n_predictions = self._counts.sum(dim=1)
        flat = logits.flatten(0, 1)
        self._probabilities = torch.empty_like(flat, dtype=torch.float32)
        for rows, log_p in _log_softmax_in_parts(logits):
            torch.exp(log_p, out=self._probabilities[rows])
        surprise, self._clean_expectation = self._surprise_and_expectation(logits)
        self.surprise = surprise.view(tokens.shape)
        self.entropy = -self._clean_expectation.view(tokens.shape)
        self.losses = self.compare(logits)

    def compare(self, logits: torch.Tensor) -> torch.Tensor:
        """
        Losses of other predictions for the same batch.

        Args:
            logits: Shape (batch, seq, d_vocab).

        Returns:
            Sums over the predictions of each sequence, in nats, shape (2, batch), float64:
            cross-entropy of the next token, and KL divergence from the clean prediction.
        """
        return (self.by_token(logits).cpu().double() * self._counts).sum(dim=2)

    def by_token(self, logits: torch.Tensor) -> torch.Tensor:
        """
        As `compare`, at each token, shape (2, batch, seq); also of those that do not count.
        """
        surprise, expectation = self._surprise_and_expectation(logits)
        # KL(p || q) = E_p[log p] - E_p[log q], of which the first is the same for all q
        both = torch.stack([surprise, self._clean_expectation - expectation])
        return both.view(2, *self._counts.shape)

    def _surprise_and_expectation(
        self, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-log q(next token) and E_p[log q], both of shape (batch * seq,)."""
        surprises: list[torch.Tensor] = []
        expectations: list[torch.Tensor] = []
        for rows, log_q in _log_softmax_in_parts(logits):
            targets = self._targets[rows, None]
            surprises.append(-log_q.gather(1, targets).squeeze(1))
            p = self._probabilities[rows]
            expectations.append(torch.bmm(p[:, None], log_q[:, :, None]).flatten())
        return torch.cat(surprises), torch.cat(expectations)


def _log_softmax_in_parts(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Log probabilities in float32, in parts small enough for a CPU's cache."""
    flat = logits.flatten(0, 1)
    step = max(1, (2**20 if flat.device.type == "cpu" else 2**26) // flat.shape[1])
    for start in range(0, len(flat), step):
        rows = slice(start, start + step)
        yield rows, flat[rows].float().log_softmax(dim=-1)
