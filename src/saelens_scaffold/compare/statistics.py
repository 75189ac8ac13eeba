"""Differences between paired SAEs, one pair a seed, and what can be said of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from saelens_scaffold.evals.bootstrap import Interval

Verdict = Literal[
    "higher", "lower", "not distinguishable", "one seed", "out of range", "not measured"
]
"""What a comparison says of the judged SAEs against their baseline. "one seed": there is
no interval. "out of range": the baseline was trained at no comparable sparsity."""

N_RESAMPLES = 9_999

MIN_BOOTSTRAPPED = 4
"""Of three values, more than one resample in twenty is one value three times over."""

ROUNDING_SPREAD = (1 / 6) ** 0.5
"""Standard deviation of the difference of two numbers that is due to rounding them."""


@dataclass(frozen=True)
class Judgement:
    """
    The mean of paired differences.

    Attributes:
        mean: The mean difference; None if there is no pair.
        ci_low: Lower end of its interval; None with fewer than two pairs.
        ci_high: Upper end, likewise.
        method: How the interval was found.
        verdict: What it says.
    """

    mean: float | None
    ci_low: float | None
    ci_high: float | None
    method: str
    verdict: Verdict


def judge(differences: Mapping[int, float], confidence: float) -> Judgement:
    """
    Say whether paired differences tell two kinds of SAEs apart.

    They do if the interval of their mean leaves out zero. Each interval stands for
    itself: of twenty comparisons without any difference one is expected to "find" one.

    Args:
        differences: Judged SAE minus baseline, for each seed.
        confidence: As in 0.95.
    """
    values = np.array([*differences.values()], dtype=float)
    verdict: Verdict
    if len(values) == 0:
        return Judgement(None, None, None, "", "not measured")
    if len(values) == 1:
        return Judgement(float(values[0]), None, None, "", "one seed")
    if np.ptp(values) == 0 and not _are_counts(values):
        # No spread to learn from: only that all seeds agree, as chance does once in
        # 2^(n - 1) times.
        verdict = "not distinguishable"
        if values[0] != 0 and 2.0 ** (1 - len(values)) <= 1 - confidence:
            verdict = "higher" if values[0] > 0 else "lower"
        return Judgement(float(values[0]), None, None, "sign test", verdict)
    (mean, low, high), method = seed_interval(values, confidence)
    verdict = "not distinguishable"
    if low > 0:
        verdict = "higher"
    elif high < 0:
        verdict = "lower"
    return Judgement(mean, low, high, method, verdict)


def seed_interval(values: np.ndarray, confidence: float) -> tuple[Interval, str]:
    """
    Mean and interval of a few values, one a seed.

    By the studentised bootstrap (bootstrap-t, Efron and Tibshirani 1993, section 12.5).
    Resamples of the values as they are, without studentising, would be much too sure of
    themselves: of three values, such an interval holds the truth three times out of four
    at best. Where so many resamples have no spread that the studentised bootstrap has no
    finite interval, with fewer than MIN_BOOTSTRAPPED values, or among many equal ones, it
    is Student's t. See benchmarks/README.md for how often each covers the truth. Counts
    are taken for rounded numbers: their spread is at least what rounding makes.

    Args:
        values: At least two.
        confidence: As in 0.95.

    Returns:
        The interval, and the method: "bootstrap_t" or "student_t".
    """
    n, mean = len(values), float(values.mean())
    spread = float(values.std(ddof=1))
    floor = ROUNDING_SPREAD if _are_counts(values) else 0.0
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * max(spread, floor) / n**0.5
    student = Interval(mean, mean - half, mean + half)
    # equal values can have a spread by rounding
    if len(values) < MIN_BOOTSTRAPPED or spread <= floor or np.ptp(values) == 0:
        return student, "student_t"
    # its own generator, so that an interval does not depend on what was computed before
    draws = np.random.default_rng(0).integers(n, size=(N_RESAMPLES, n))
    resamples = values[draws]
    shift = resamples.mean(axis=1) - values.mean()
    errors = resamples.std(axis=1, ddof=1) / math.sqrt(n)
    errors[np.ptp(resamples, axis=1) == 0] = 0  # but for rounding
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # without a spread a resample is infinitely far off, in its direction
        t = np.nan_to_num(shift / errors, nan=0.0, posinf=np.inf, neginf=-np.inf)
    tail = (1 - confidence) / 2
    low_t = np.quantile(t, tail, method="lower")
    high_t = np.quantile(t, 1 - tail, method="higher")
    if not (np.isfinite(low_t) and np.isfinite(high_t)):
        return student, "student_t"
    error = spread / math.sqrt(n)
    ends = mean - float(high_t) * error, mean - float(low_t) * error
    return Interval(mean, *ends), "bootstrap_t"


def _are_counts(values: np.ndarray) -> bool:
    return bool((values == values.round()).all())
