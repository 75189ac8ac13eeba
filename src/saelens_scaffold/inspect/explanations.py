"""What a coordinate or an activation is explained by: held-out R² of simple predictors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

PREDICTORS = {
    "position": "position in the sequence",
    "line": "distance to the beginning of the line",
    "sentence": "distance to the beginning of the sentence",
    "topic": "topic of the text",
    "frequency": "frequency of the token",
    "entropy": "entropy of the next token",
    "token": "identity of the token",
    "norm": "norm of the activation",
}
"""What each predictor is, the simplest first: a token's frequency is a function of its
identity, and so is explained by that as well. The norm comes last, since it is computed from
the activation itself."""

MOSTLY, PARTLY = 0.5, 0.25
"""R² from which a label says "mostly" and "partly"."""

SIMPLER = 0.8
"""Share of the best R² with which a simpler predictor is preferred."""

SHRINKAGE = 4.0
"""Tokens' worth of the overall mean in the mean of a group."""

BLOCK = 16
"""Consecutive sequences that are in the same half: neighbours share texts."""

N_GROUPS = {
    "line": 64,
    "sentence": 64,
    "topic": 1000,
    "frequency": 64,
    "entropy": 64,
    "norm": 256,
}
"""Groups of the predictors that have as many for every text, beyond which the last holds
all: distances in tokens; topics; frequencies by half octaves; nats / 4; norms by eighths of
an octave from 2^-8 on."""


def label_of(r_squared: Mapping[str, float]) -> str:
    """
    A label by rule: the simplest predictor with at least `SIMPLER` of the best R², with
    "mostly" from `MOSTLY`, "partly" from `PARTLY` on; below, "unexplained".

    Args:
        r_squared: Held-out R² by predictor, those of `PREDICTORS` that are known.
    """
    best = max(r_squared.values(), default=0.0)
    if best < PARTLY:
        return "unexplained"
    name = next(n for n in PREDICTORS if r_squared.get(n, 0) >= SIMPLER * best)
    how = "mostly" if r_squared[name] >= MOSTLY else "partly"
    return f"{how} {PREDICTORS[name]} (R² {r_squared[name]:.2f})"


@dataclass
class Tokens:
    """
    Sequences as they are read, and what the language model makes of them.

    Attributes:
        tokens: Shape (n_sequences, seq).
        counts: Mask of the tokens that count, of that shape.
        topics: Number of each token's topic, of that shape; 0 for none.
        x: Activations, shape (n_sequences, seq, d_in).
        entropy: Entropy of the prediction at each token in nats, shape (n_sequences, seq).
        first_sequence: Number of the first sequence.
    """

    tokens: torch.Tensor
    counts: torch.Tensor
    topics: torch.Tensor
    x: torch.Tensor
    entropy: torch.Tensor
    first_sequence: int

    def parts(self, n: int) -> "list[Tokens]":
        """The same in parts of n sequences."""
        tensors = (self.tokens, self.counts, self.topics, self.x, self.entropy)
        split = enumerate(zip(*(of.split(n) for of in tensors), strict=True))
        return [
            Tokens(tokens, counts, topics, x, entropy, self.first_sequence + i * n)
            for i, (tokens, counts, topics, x, entropy) in split
        ]


class Explanations:
    """
    Held-out R² of targets from single predictors, from one pass over the tokens.

    The prediction is the mean of the target over the tokens of the same group: the same
    position, token, topic, or bin of a number. So any function of the predictor is found,
    not only a linear one. Means come from one half of the text and are tested on the other,
    both ways; blocks of `BLOCK` sequences alternate. All that is kept is a sum for each
    group, target and half: 8 bytes * (size of the vocabulary + context) * targets.

    Args:
        texts: Text of each id of a token.
        special: Ids of special tokens, at which lines and sentences begin anew.
        context_size: Tokens per sequence.
        n_targets: Number of targets.
        device: Where they are.
    """

    def __init__(
        self,
        texts: Sequence[str],
        special: torch.Tensor,
        context_size: int,
        n_targets: int,
        device: torch.device | str,
    ):
        def which(predicate: Callable[[str], bool]) -> torch.Tensor:
            found = torch.tensor([predicate(text) for text in texts])
            return found.index_fill(0, special, True).to(device)

        self._ends_line = which(lambda text: "\n" in text)
        self._ends_sentence = which(lambda text: text.rstrip().endswith((*".!?",)))
        self._begins_with_space = which(lambda text: text[:1].isspace())
        self._position_bins = _position_bins(context_size).to(device)
        sizes = {"position": int(self._position_bins[-1]) + 1, "token": len(texts)}
        like = torch.zeros(n_targets, device=device)
        self._means = {
            name: _GroupMeans((sizes | N_GROUPS)[name], like) for name in PREDICTORS
        }
        self._squares = torch.zeros(2, n_targets, dtype=torch.float64)
        self._centre: torch.Tensor | None = None

    @torch.no_grad()
    def update(self, batch: Tokens, targets: torch.Tensor) -> None:
        """
        Args:
            batch: The tokens.
            targets: Of the tokens that count, shape (n_tokens, n_targets).
        """
        if self._centre is None:  # about which sums are exact enough
            self._centre = targets.mean(dim=0)
        y = targets - self._centre
        number = batch.first_sequence + torch.arange(len(batch.tokens))
        half = (number // BLOCK % 2).to(y.device)[:, None].expand_as(batch.tokens)
        half = half[batch.counts]
        for name, group in self._groups(batch).items():
            self._means[name].update(half, group[batch.counts], y)
        for i in (0, 1):
            self._squares[i] += y[half == i].pow(2).sum(dim=0).cpu()

    def _groups(self, batch: Tokens) -> dict[str, torch.Tensor]:
        """Number of each token's group, shape (n_sequences, seq), by predictor."""
        tokens = batch.tokens
        spaced = self._begins_with_space[tokens.roll(-1, dims=1)]
        groups = {
            "line": _distance(self._ends_line[tokens]),
            "sentence": _distance(self._ends_sentence[tokens] & spaced),
            "topic": batch.topics,
            "entropy": (4 * batch.entropy).long(),
            "norm": (8 * batch.x.float().norm(dim=2).log2()).long() + 64,
        }
        groups = {n: of.clamp(0, N_GROUPS[n] - 1) for n, of in groups.items()}
        positions = self._position_bins.expand_as(tokens)
        return {"position": positions, "token": tokens, **groups}

    def r_squared(self) -> list[dict[str, float]]:
        """Held-out R² of each target, by predictor; without topic if there is but one."""
        means, of_tokens = dict(self._means), self._means["token"]
        octaves = (2 * of_tokens.counts.sum(dim=0).clamp_min(1).log2()).long()
        n_groups = N_GROUPS["frequency"]
        means["frequency"] = of_tokens.joined(octaves.clamp(max=n_groups - 1), n_groups)
        if (means["topic"].counts.sum(dim=0) > 0).sum() < 2:
            del means["topic"]
        found = {n: means[n].r_squared(self._squares) for n in PREDICTORS if n in means}
        return [
            {name: round(float(of[i]), 4) for name, of in found.items()}
            for i in range(self._squares.shape[1])
        ]


class _GroupMeans:
    """
    Means of targets over the tokens of each group, in each half of the text.

    Attributes:
        counts: Number of tokens, shape (2, n_groups).
        sums: Sums of the targets, shape (2, n_groups, n_targets).
    """

    def __init__(self, n_groups: int, like: torch.Tensor):
        self.counts = like.new_zeros(2, n_groups)
        self.sums = like.new_zeros(2, n_groups, len(like))

    def update(self, half: torch.Tensor, group: torch.Tensor, y: torch.Tensor) -> None:
        place = half * self.counts.shape[1] + group
        self.counts.view(-1).index_add_(0, place, torch.ones_like(place).to(y))
        self.sums.view(-1, y.shape[1]).index_add_(0, place, y)

    def joined(self, group: torch.Tensor, n_groups: int) -> "_GroupMeans":
        """The same of fewer groups, in which each of these has its place."""
        means = _GroupMeans(n_groups, self.sums[0, 0])
        means.counts.index_add_(1, group, self.counts)
        means.sums.index_add_(1, group, self.sums)
        return means

    def r_squared(self, squares: torch.Tensor) -> torch.Tensor:
        """
        Args:
            squares: Sums of the targets' squares, shape (2, n_targets).

        Returns:
            Shape (n_targets,); 0 for a constant.
        """
        # on the CPU, since MPS has no double precision
        all_sums = self.sums.cpu().double()
        counts = self.counts.cpu().double()[..., None]
        errors = torch.zeros_like(squares[0])
        variances = torch.zeros_like(errors)
        for fit, test in ((0, 1), (1, 0)):
            n, sums = counts[fit], all_sums[fit]
            overall = sums.sum(dim=0) / n.sum().clamp_min(1)
            means = overall + (sums - n * overall) / (n + SHRINKAGE)
            n, sums = counts[test], all_sums[test]
            errors += squares[test] - (2 * means * sums - n * means.pow(2)).sum(dim=0)
            variances += squares[test] - sums.sum(dim=0).pow(2) / n.sum().clamp_min(1)
        tiny = torch.finfo(torch.float32).eps * squares.sum(dim=0)
        return (1 - errors / variances).where(variances > tiny, 0.0)


def _position_bins(length: int) -> torch.Tensor:
    """Numbers of the positions' bins, shape (length,): one each, then eight an octave."""
    positions = torch.arange(length)
    octaves = (positions.clamp_min(16) / 16).log2()
    return positions.clamp(max=16) + (8 * octaves).long()


def _distance(ends: torch.Tensor) -> torch.Tensor:
    """Tokens since the last end before each, shape (n_sequences, seq)."""
    places = torch.arange(ends.shape[1], device=ends.device).expand_as(ends)
    last = places.where(ends, -1).cummax(dim=1).values.roll(1, dims=1)
    last[:, 0] = -1
    return places - last - 1
