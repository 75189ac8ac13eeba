"""How much worse a language model predicts after an intervention."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class SequenceLosses:
    """
    Sums over the predictions of each sequence of a batch.

    Attributes:
        cross_entropy: Of the next token, in nats, shape (batch,), float64.
        kl: KL divergence of the changed prediction from the clean one, in nats, shape
            (batch,), float64.
    """

    cross_entropy: torch.Tensor
    kl: torch.Tensor

    @classmethod
    def mean(cls, draws: "Sequence[SequenceLosses]") -> "SequenceLosses":
        """The mean over several draws of an intervention."""
        return cls(
            torch.stack([draw.cross_entropy for draw in draws]).mean(dim=0),
            torch.stack([draw.kl for draw in draws]).mean(dim=0),
        )


class CleanPredictions:
    """
    What the language model predicts when nothing is changed, for one batch.

    Args:
        logits: Shape (batch, seq, d_vocab).
        tokens: Shape (batch, seq).
        counts: Mask of the tokens that count, shape (batch, seq). A prediction counts if
            both the token it is made at and the token it is about do: elsewhere the
            activations are not changed, and the predictions hardly.
    """

    def __init__(
        self, logits: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor
    ):
        self._shape = tokens.shape
        # what follows the last token of a sequence is not known, and never counts
        self._targets = tokens.roll(-1, dims=1).flatten()
        follows = counts.roll(-1, dims=1)
        follows[:, -1] = False
        self._counts = (counts & follows).cpu().double()
        self._probabilities = torch.empty_like(logits, dtype=torch.float32).flatten(
            0, 1
        )
        for rows, log_probabilities in _log_softmax_in_parts(logits):
            torch.exp(log_probabilities, out=self._probabilities[rows])
        surprise, self._clean_expectation = self._surprise_and_expectation(logits)
        self.losses = self._losses(surprise, self._clean_expectation)

    @property
    def n_predictions(self) -> torch.Tensor:
        """Number of predictions that count in each sequence, shape (batch,), float64."""
        return self._counts.sum(dim=1)

    def compare(self, logits: torch.Tensor) -> SequenceLosses:
        """
        Losses of other predictions for the same batch.

        Args:
            logits: Shape (batch, seq, d_vocab).
        """
        return self._losses(*self._surprise_and_expectation(logits))

    def _losses(
        self, surprise: torch.Tensor, expectation: torch.Tensor
    ) -> SequenceLosses:
        # KL(p || q) = E_p[log p] - E_p[log q], of which the first is the same for all q
        return SequenceLosses(
            cross_entropy=self._sum(surprise),
            kl=self._sum(self._clean_expectation - expectation),
        )

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

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        return (values.cpu().double().view(self._shape) * self._counts).sum(dim=1)


def _log_softmax_in_parts(
    logits: torch.Tensor,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Log probabilities in float32, a part at a time: so many as stay in a CPU's cache."""
    flat = logits.flatten(0, 1)
    step = max(1, (2**20 if flat.device.type == "cpu" else 2**26) // flat.shape[1])
    for start in range(0, len(flat), step):
        rows = slice(start, start + step)
        yield rows, flat[rows].float().log_softmax(dim=-1)


def _zero() -> torch.Tensor:
    return torch.zeros((), dtype=torch.float64)


@dataclass
class ReplicateLosses:
    """
    Sums over all predictions in every bootstrap replicate, the sample's own first.

    Attributes:
        cross_entropy: Shape (1 + n_replicates,), float64.
        kl: Shape (1 + n_replicates,), float64.
    """

    cross_entropy: torch.Tensor = field(default_factory=_zero)
    kl: torch.Tensor = field(default_factory=_zero)

    def add(self, weights: torch.Tensor, losses: SequenceLosses) -> None:
        """
        Args:
            weights: How often each replicate counts each sequence, shape
                (1 + n_replicates, batch), float64.
            losses: Of the batch.
        """
        self.cross_entropy = self.cross_entropy + weights @ losses.cross_entropy
        self.kl = self.kl + weights @ losses.kl
