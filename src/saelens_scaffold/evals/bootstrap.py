"""Intervals over sequences, in one pass and without keeping the sequences."""

from typing import NamedTuple

import torch

from saelens_scaffold.evals.base import UNBOUNDED, Bounds, within


class Interval(NamedTuple):
    """An estimate with the ends of its bootstrap interval."""

    estimate: float
    low: float
    high: float


class SequenceBootstrap:
    """
    A Poisson bootstrap over sequences (Chamandy et al. 2012, "Estimating uncertainty for
    massive data streams").

    Tokens of one sequence depend on each other, so whole sequences are resampled. Each
    replicate counts a sequence Poisson(1) times, drawn when the sequence is seen, so sums
    per replicate are all that is kept. The draws depend only on the seed and on the order
    of the sequences: replicates of two SAEs, or two interventions, that have seen the same
    sequences are paired, and so is any difference or ratio taken between them.

    Args:
        n_replicates: Number of replicates.
        seed: Of the draws.
    """

    def __init__(self, n_replicates: int, seed: int):
        self.n_replicates = n_replicates
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, n_sequences: int) -> torch.Tensor:
        """
        How often each replicate counts each of the next sequences.

        Returns:
            Shape (1 + n_replicates, n_sequences), float32. Row 0 is all ones: the sample
            itself, so that whatever is computed along the rows has its estimate first.
        """
        rates = torch.ones(self.n_replicates, n_sequences)
        counts = torch.poisson(rates, generator=self._generator)
        return torch.cat([torch.ones(1, n_sequences), counts])


def interval(statistics: torch.Tensor, confidence: float) -> Interval:
    """
    The percentile interval of a statistic that was computed for every replicate.

    Args:
        statistics: Shape (1 + n_replicates,), the sample's own first. NaN stands for a
            replicate without any sequence, which has no such statistic.
        confidence: As in 0.95.
    """
    statistics = statistics.double().cpu()
    replicates = statistics[1:][~statistics[1:].isnan()]
    if len(replicates) == 0:
        return Interval(float(statistics[0]), float("nan"), float("nan"))
    tail = (1 - confidence) / 2
    low, high = replicates.quantile(
        torch.tensor([tail, 1 - tail], dtype=torch.float64)
    ).tolist()
    return Interval(float(statistics[0]), low, high)


def student_interval(
    values: list[float],
    confidence: float,
    least_spread: float = 0.0,
    bounds: Bounds = UNBOUNDED,
) -> Interval:
    """
    Mean of a few independent values (one a seed) with its Student-t interval.

    Args:
        values: At least one. Of a single value nothing can be said but the value, and
            the ends are NaN.
        confidence: As in 0.95.
        least_spread: What their standard deviation is known to be at least.
        bounds: The least and the largest value that there can be.
    """
    # imported here, since scipy is SAEBench's dependency and takes its time to load
    from scipy import stats

    sample = torch.tensor(values, dtype=torch.float64)
    mean = float(sample.mean())
    if len(values) < 2:
        return Interval(mean, float("nan"), float("nan"))
    standard_error = max(float(sample.std()), least_spread) / len(values) ** 0.5
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * standard_error
    return Interval(mean, *within(bounds, mean - half, mean + half))
