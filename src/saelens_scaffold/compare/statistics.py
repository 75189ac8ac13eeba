"""Differences between paired SAEs, one pair a seed, and what can be said of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from saelens_scaffold.evals.bootstrap import Interval, student_interval

Verdict = Literal[
    "higher", "lower", "not distinguishable", "one seed", "out of range", "not measured"
]
"""What a comparison says of the judged SAEs against their baseline. "one seed": there is
no interval. "out of range": the baseline was trained at no comparable sparsity."""

N_RESAMPLES = 9_999

MIN_BOOTSTRAPPED = 4
"""Of three values, more than one resample in twenty is one value three times over."""

ROUNDING_SPREAD = (1 / 6) ** 0.5
"""Standard deviation of the difference of two counts that is due to their being whole."""

EQUAL_WITHIN = 1e-9
"""Share of their magnitude by which values differ that are equal but for the rounding of
floating-point numbers. Of subtracted ones, that of the numbers they were subtracted from."""


@dataclass(frozen=True)
class Judgement:
    """
    The mean of paired differences.

    Attributes:
        mean: The mean difference; None if there is no pair.
        ci_low: Lower end of its interval; None with fewer than two pairs, or if they are
            all equal.
        ci_high: Upper end, likewise.
        method: How the interval was found.
        verdict: What it says.
    """

    mean: float | None
    ci_low: float | None
    ci_high: float | None
    method: str
    verdict: Verdict


def judge(
    differences: Mapping[int, float],
    confidence: float,
    is_count: bool = False,
    magnitude: float = 0.0,
) -> Judgement:
    """
    Say whether paired differences tell two kinds of SAEs apart.

    They do if the interval of their mean leaves out zero. Each interval stands for
    itself: of twenty comparisons without any difference one is expected to "find" one.
    Differences that are equal in all seeds, zero or not, have no interval: there is no
    spread to learn from, and they say only that all seeds agree on a direction, as by
    chance they do once in 2^(n - 1) times.

    Args:
        differences: Judged SAE minus baseline, for each seed.
        confidence: As in 0.95.
        is_count: Whether they are of counts.
        magnitude: The largest absolute value that was subtracted, or subtracted from.
    """
    values = np.array([*differences.values()], dtype=float)
    if len(values) == 0:
        return Judgement(None, None, None, "", "not measured")
    if len(values) == 1:
        return Judgement(float(values[0]), None, None, "", "one seed")
    found, method = seed_interval(values, confidence, is_count, magnitude)
    verdict: Verdict = "not distinguishable"
    if found is None:
        mean = float(values.mean())
        is_zero = abs(mean) <= _tolerance(values, magnitude)
        if not is_zero and 2.0 ** (1 - len(values)) <= 1 - confidence:
            verdict = "higher" if mean > 0 else "lower"
        return Judgement(mean, None, None, method, verdict)
    mean, low, high = found
    if low > 0:
        verdict = "higher"
    elif high < 0:
        verdict = "lower"
    return Judgement(mean, low, high, method, verdict)


def seed_interval(
    values: np.ndarray,
    confidence: float,
    is_count: bool = False,
    magnitude: float = 0.0,
) -> tuple[Interval | None, str]:
    """
    Mean and interval of a few values, one a seed.

    By the studentised bootstrap (bootstrap-t, Efron and Tibshirani 1993, section 12.5).
    Resamples of the values as they are, without studentising, would be much too sure of
    themselves: of three values, such an interval holds the truth three times out of four
    at best. Where so many resamples have no spread that the studentised bootstrap has no
    finite interval, with fewer than MIN_BOOTSTRAPPED values, or among many equal ones, it
    is Student's t. See benchmarks/README.md for how often each covers the truth.

    Args:
        values: At least two.
        confidence: As in 0.95.
        is_count: Whether they are whole numbers, or differences of whole numbers: their
            spread is taken to be at least what rounding makes.
        magnitude: Of the numbers that the values are differences of, if they are larger.

    Returns:
        The interval, None if values that are no counts are all equal, and the method:
        "bootstrap_t", "student_t" or, if there is none, "sign test".
    """
    n, mean = len(values), float(values.mean())
    tolerance = _tolerance(values, magnitude)
    if np.ptp(values) <= tolerance and not is_count:
        return None, "sign test"
    floor = ROUNDING_SPREAD if is_count else 0.0
    student = student_interval(values.tolist(), confidence, least_spread=floor)
    spread = float(values.std(ddof=1))
    if n < MIN_BOOTSTRAPPED or spread <= floor:
        return student, "student_t"
    # its own generator, so that an interval does not depend on what was computed before
    draws = np.random.default_rng(0).integers(n, size=(N_RESAMPLES, n))
    resamples = values[draws]
    shift = resamples.mean(axis=1) - values.mean()
    errors = resamples.std(axis=1, ddof=1) / math.sqrt(n)
    shift[np.abs(shift) <= tolerance] = 0  # but for rounding, as the next
    errors[np.ptp(resamples, axis=1) <= tolerance] = 0
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


def _tolerance(values: np.ndarray, magnitude: float) -> float:
    """By how much values differ that are equal."""
    return EQUAL_WITHIN * max(magnitude, float(np.abs(values).max()))
