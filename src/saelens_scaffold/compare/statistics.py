"""Differences between two kinds of SAEs, a few seeds of each, and what can be said of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np

from saelens_scaffold.evals.bootstrap import Interval, student_interval
from saelens_scaffold.evals.base import UNBOUNDED, Bounds, within

Verdict = Literal[
    "higher",
    "lower",
    "not distinguishable",
    "one seed",
    "out of range",
    "bracket too wide",
    "not measured",
]
"""What a comparison says of the judged SAEs against their baseline. "one seed": a side has
no second one to tell its spread. "out of range": the baseline was trained at no comparable
sparsity. "bracket too wide": it was, but the nearest ones are too far apart."""

N_RESAMPLES = 9_999

MIN_BOOTSTRAPPED = 4
"""Of three values, more than one resample in twenty is one value three times over."""

ROUNDING_VARIANCE = 1 / 12
"""Variance of a count that is due to its being whole."""

EQUAL_WITHIN = 1e-9
"""Share of their magnitude by which values differ that are equal but for the rounding of
floating-point numbers."""

POWER = 0.8
"""Probability of finding a difference of the size that is called detectable."""

N_QUANTILES = 200
"""By which a distribution is averaged over."""


@dataclass(frozen=True)
class Judgement:
    """
    A difference between two means over seeds.

    Attributes:
        mean: The difference; None if there is none.
        ci_low: Lower end of its interval; None if a side has fewer than two seeds, or
            neither side has any spread.
        ci_high: Upper end, likewise.
        method: How interval and p-value were found.
        verdict: What they say.
        p_value: Probability of a difference as large, either way, if there were none.
        p_holm: The same, corrected for the number of comparisons made (Holm 1979).
        detectable: The true difference that as many seeds with the same spread would
            tell from zero in POWER of all experiments.
    """

    mean: float | None
    ci_low: float | None
    ci_high: float | None
    method: str
    verdict: Verdict
    p_value: float | None = None
    p_holm: float | None = None
    detectable: float | None = None


class _Sample(NamedTuple):
    """One side of a comparison: mean, variance and number of its seeds."""

    mean: float
    variance: float
    n: int


def judge(
    treatment: Sequence[float],
    baseline: Sequence[float],
    confidence: float,
    is_count: bool = False,
    bounds: Bounds = UNBOUNDED,
) -> Judgement:
    """
    Say whether two kinds of SAEs can be told apart by a metric.

    By Welch's t-test, for samples of unequal variance (Welch 1947; degrees of freedom by
    Satterthwaite 1946). SAEs of the same seed are not taken for pairs: their metrics are
    as good as uncorrelated, and a paired test then gives away half of its degrees of
    freedom for nothing (see benchmarks/README.md for coverage and power of both).

    If neither side has any spread, there is no interval, and the p-value is that of the
    exact permutation test: 2 of all the ways to divide the seeds among the two sides set
    them apart as cleanly.

    Args:
        treatment: Values of the judged SAEs, one a seed.
        baseline: Values of those that they are judged against.
        confidence: As in 0.95.
        is_count: Whether they are whole numbers: the variance of either side is taken to
            be at least what rounding makes.
        bounds: The least and the largest value that the metric can have.
    """
    if not treatment or not baseline:
        return Judgement(None, None, None, "", "not measured")
    difference = fmean(treatment) - fmean(baseline)
    if min(len(treatment), len(baseline)) < 2:
        return Judgement(difference, None, None, "", "one seed")
    tolerance = EQUAL_WITHIN * max(map(abs, (*treatment, *baseline)))
    floor = ROUNDING_VARIANCE if is_count else 0.0
    judged, against = (_sample(s, tolerance, floor) for s in (treatment, baseline))
    if judged.variance == against.variance == 0:
        p = 1.0
        if abs(difference) > tolerance:
            p = 2 / math.comb(judged.n + against.n, judged.n)
        verdict = _verdict(difference, p, confidence)
        return Judgement(difference, None, None, "permutation test", verdict, p)
    return _welch(difference, judged, against, confidence, _of_differences(bounds))


def judge_between(
    treatment: Sequence[float],
    below: Sequence[float],
    above: Sequence[float],
    weight: float,
    confidence: float,
    is_count: bool = False,
    bounds: Bounds = UNBOUNDED,
) -> Judgement:
    """
    Say the same where the baseline is known on both sides of the sparsity in question.

    The difference is that from the interpolated baseline. How the curve runs between the
    two ends is not known, only that it runs from one to the other: whatever is said must
    hold against both ends (an intersection-union test, Berger 1982), so that no curve
    that rises or falls all the way can turn a verdict around. The interval reaches over
    those of both ends.

    Args:
        treatment: Values of the judged SAEs, one a seed.
        below: Values of the baseline at the lower end of the bracket.
        above: Values of the baseline at its upper end.
        weight: Of the upper end, 0 to 1; the lower end has the rest.
        confidence: As in 0.95.
        is_count: As for `judge`.
        bounds: As for `judge`.
    """
    ends = [
        judge(treatment, end, confidence, is_count, bounds) for end in (below, above)
    ]
    lower, upper = ends
    if lower.mean is None or upper.mean is None:
        return lower if lower.mean is None else upper
    mean = (1 - weight) * lower.mean + weight * upper.mean
    if lower.p_value is None or upper.p_value is None:
        return Judgement(mean, None, None, "", "one seed")
    p = max(lower.p_value, upper.p_value) if lower.mean * upper.mean > 0 else 1.0
    low = high = detectable = None
    lows = [end.ci_low for end in ends if end.ci_low is not None]
    highs = [end.ci_high for end in ends if end.ci_high is not None]
    if len(lows) == len(highs) == 2:
        low, high = min(lows), max(highs)
        # beyond the end that is nearer to it, either way
        detectable = max(
            abs(end.mean - mean) + end.detectable
            for end in ends
            if end.mean is not None and end.detectable is not None
        )
    methods = " and ".join(dict.fromkeys(end.method for end in ends))
    verdict = _verdict(mean, p, confidence)
    return Judgement(
        mean, low, high, f"{methods}, both ends", verdict, p, detectable=detectable
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """
    p-values corrected for their number (Holm 1979).

    Below 1 - confidence are then those differences of which all are real with that
    confidence, however many comparisons were made.

    Args:
        p_values: Of one family of comparisons.

    Returns:
        The corrected ones, in the same order.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected = [1.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def seed_interval(
    values: Sequence[float],
    confidence: float,
    is_count: bool = False,
    bounds: Bounds = UNBOUNDED,
) -> Interval | None:
    """
    Mean and interval of a few values, one a seed.

    By the studentised bootstrap (bootstrap-t, Efron and Tibshirani 1993, section 12.5).
    Resamples of the values as they are, without studentising, would be much too sure of
    themselves: of three values, such an interval holds the truth three times out of four
    at best. Where so many resamples have no spread that the studentised bootstrap has no
    finite interval, with fewer than MIN_BOOTSTRAPPED values, or among many equal ones, it
    is Student's t. See benchmarks/README.md for how often each covers the truth.

    Args:
        values: At least one.
        confidence: As in 0.95.
        is_count: Whether they are whole numbers: their spread is taken to be at least
            what rounding makes.
        bounds: The least and the largest value that there can be.

    Returns:
        The interval; None for a single value, or if values that are no counts are equal.
    """
    sample = np.array(values, dtype=float)
    n, mean = len(sample), float(sample.mean())
    tolerance = EQUAL_WITHIN * float(np.abs(sample).max())
    if n < 2 or (np.ptp(sample) <= tolerance and not is_count):
        return None
    floor = ROUNDING_VARIANCE**0.5 if is_count else 0.0
    student = student_interval(sample.tolist(), confidence, floor, bounds)
    spread = float(sample.std(ddof=1))
    if n < MIN_BOOTSTRAPPED or spread <= floor:
        return student
    # its own generator, so that an interval does not depend on what was computed before
    draws = np.random.default_rng(0).integers(n, size=(N_RESAMPLES, n))
    resamples = sample[draws]
    shift = resamples.mean(axis=1) - mean
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
        return student
    error = spread / math.sqrt(n)
    low, high = mean - float(high_t) * error, mean - float(low_t) * error
    return Interval(mean, *within(bounds, low, high))


def _sample(values: Sequence[float], tolerance: float, floor: float) -> _Sample:
    variance = float(np.var(values, ddof=1)) if np.ptp(values) > tolerance else 0.0
    return _Sample(fmean(values), max(variance, floor), len(values))


def _welch(
    difference: float,
    treatment: _Sample,
    baseline: _Sample,
    confidence: float,
    bounds: Bounds,
) -> Judgement:
    # imported here, since scipy takes its time to load
    from scipy import stats

    shares = [side.variance / side.n for side in (treatment, baseline)]
    error = math.sqrt(sum(shares))
    freedom = 1 / sum(
        (share / sum(shares)) ** 2 / (side.n - 1)
        for share, side in zip(shares, (treatment, baseline), strict=True)
    )
    p = float(2 * stats.t.sf(abs(difference) / error, freedom))
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * error
    return Judgement(
        difference,
        *within(bounds, difference - half, difference + half),
        "Welch's t",
        _verdict(difference, p, confidence),
        p,
        detectable=_detectable_errors(round(freedom, 2), confidence) * error,
    )


@cache
def _detectable_errors(freedom: float, confidence: float) -> float:
    """The difference that is found with probability POWER, in standard errors."""
    from scipy import optimize, stats

    critical = float(stats.t.ppf((1 + confidence) / 2, freedom))
    # scipy's noncentral t is NaN at few degrees of freedom, so over its definition: a
    # normal variable divided by the measured spread, which is that of chi
    quantiles = (np.arange(N_QUANTILES) + 0.5) / N_QUANTILES
    spreads = np.sqrt(stats.chi2.ppf(quantiles, freedom) / freedom)

    def excess(errors: float) -> float:
        return float(stats.norm.sf(critical * spreads - errors).mean()) - POWER

    ends = (0.0, 2 * critical + 3)
    return optimize.root_scalar(excess, bracket=ends, xtol=1e-4).root


def _verdict(difference: float, p: float, confidence: float) -> Verdict:
    if p >= 1 - confidence:
        return "not distinguishable"
    return "higher" if difference > 0 else "lower"


def _of_differences(bounds: Bounds) -> Bounds:
    """Between which differences of a metric lie that has two bounds."""
    low, high = bounds
    if low is None or high is None:
        return UNBOUNDED
    return low - high, high - low
