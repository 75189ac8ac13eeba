"""Differences between two kinds of SAEs, a few seeds of each, and their verdicts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean

import numpy as np

from saelens_scaffold.evals.base import UNBOUNDED, Bounds, within
from saelens_scaffold.evals.intervals import Interval, student_interval

Verdict = str
"""Outcome of comparing the judged SAEs with their baseline: "higher", "lower", "not
distinguishable", "not measured"; "one seed": a side has no second seed, so its spread is
unknown; "out of range": the baseline was trained at no comparable sparsity; "bracket too
wide": it was, but the nearest ones are too far apart."""

N_RESAMPLES = 9_999

MIN_BOOTSTRAPPED = 4
"""Of three values, more than one resample in twenty is one value three times over."""

ROUNDING_VARIANCE = 1 / 12
"""Variance that rounding gives a count."""

EQUAL_WITHIN = 1e-9
"""Relative difference below which values count as equal, since floats are rounded."""

POWER = 0.8
"""Probability of finding a difference of the size that is called detectable."""


@dataclass
class Judgement:
    """
    A difference between two means over seeds.

    Attributes:
        mean: The difference; None if there is none.
        ci_low: Lower end of its interval; None if a side has fewer than two seeds, or
            neither side has any spread.
        ci_high: Upper end, likewise.
        method: Method of interval and p-value.
        verdict: Verdict.
        p_value: Two-sided p-value of the hypothesis that there is no difference.
        p_holm: The same, corrected for the number of comparisons (Holm 1979).
        detectable: True difference that as many seeds with the same spread would tell from
            zero in POWER of all experiments.
    """

    mean: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    method: str = ""
    verdict: Verdict = "not measured"
    p_value: float | None = None
    p_holm: float | None = None
    detectable: float | None = None


def judge(
    treatment: Sequence[float],
    baseline: Sequence[float],
    confidence: float,
    is_count: bool = False,
    bounds: Bounds = UNBOUNDED,
) -> Judgement:
    """
    Test whether two kinds of SAEs differ in a metric.

    By Welch's t-test, for samples of unequal variance (Welch 1947; degrees of freedom by
    Satterthwaite 1946). SAEs of the same seed are not taken for pairs: their metrics are
    as good as uncorrelated, so a paired test would give away half of its degrees of
    freedom for nothing (see benchmarks/README.md for coverage and power of both).

    If neither side has any spread, there is no interval, and the p-value is that of the
    exact permutation test: 2 of all the ways to divide the seeds among the two sides set
    them apart as cleanly.

    Args:
        treatment: Values of the judged SAEs, one for each seed.
        baseline: Values of their baseline.
        confidence: Confidence of the interval, as in 0.95.
        is_count: Whether the values are whole numbers: the variance of either side is then
            at least that of rounding.
        bounds: The least and the largest possible value of the metric.
    """
    if not treatment or not baseline:
        return Judgement()
    difference = fmean(treatment) - fmean(baseline)
    sides = treatment, baseline
    sizes = [len(side) for side in sides]
    if min(sizes) < 2:
        return Judgement(difference, verdict="one seed")
    tolerance = EQUAL_WITHIN * max(map(abs, (*treatment, *baseline)))
    floor = ROUNDING_VARIANCE if is_count else 0.0
    # squared standard error of either mean
    errors = [max(_variance(side, tolerance), floor) / len(side) for side in sides]
    if not any(errors):
        p = 2 / math.comb(sum(sizes), sizes[0]) if abs(difference) > tolerance else 1.0
        verdict = _verdict(difference, p, confidence)
        return Judgement(difference, None, None, "permutation test", verdict, p)
    # imported here, since scipy takes its time to load
    from scipy import stats

    error = math.sqrt(sum(errors))
    freedom = 1 / sum(
        (of_side / sum(errors)) ** 2 / (n - 1)
        for of_side, n in zip(errors, sizes, strict=True)
    )
    low, high = stats.t.interval(confidence, freedom, difference, error)
    p = float(2 * stats.t.sf(abs(difference) / error, freedom))
    return Judgement(
        difference,
        *within(_of_differences(bounds), float(low), float(high)),
        "Welch's t",
        _verdict(difference, p, confidence),
        p,
        detectable=_detectable_errors(round(freedom, 2), confidence) * error,
    )


def judge_interpolated(
    treatment: Sequence[float],
    ends: Sequence[Sequence[float]],
    weights: Sequence[float],
    confidence: float,
    is_count: bool = False,
    bounds: Bounds = UNBOUNDED,
) -> Judgement:
    """
    The same where the baseline is known on both sides of the sparsity in question.

    The difference is that from the interpolated baseline. How the curve runs between the
    two ends is not known, only that it runs from one to the other: a verdict must hold
    against both ends (an intersection-union test, Berger 1982), so that no monotonic curve
    can reverse it. The interval reaches over those of both ends.

    Args:
        treatment: Values of the judged SAEs, one for each seed.
        ends: Values of the baseline at the ends of the bracket; a single end is the
            baseline itself.
        weights: Weight of each end; their sum is 1.
        confidence: As for `judge`.
        is_count: As for `judge`.
        bounds: As for `judge`.
    """
    found = [judge(treatment, end, confidence, is_count, bounds) for end in ends]
    if len(found) == 1:
        return found[0]
    differences = [end.mean for end in found if end.mean is not None]
    p_values = [end.p_value for end in found if end.p_value is not None]
    if len(differences) < len(found):
        return Judgement()
    mean = sum(w * of_end for w, of_end in zip(weights, differences, strict=True))
    if len(p_values) < len(found):
        return Judgement(mean, verdict="one seed")
    p = max(p_values) if min(differences) * max(differences) > 0 else 1.0
    methods = " and ".join(dict.fromkeys(end.method for end in found))
    verdict = _verdict(mean, p, confidence)
    judgement = Judgement(mean, None, None, f"{methods}, both ends", verdict, p)
    lows = [end.ci_low for end in found if end.ci_low is not None]
    highs = [end.ci_high for end in found if end.ci_high is not None]
    if len(lows) == len(highs) == len(found):
        judgement.ci_low, judgement.ci_high = min(lows), max(highs)
        # beyond the end that is nearer to it, either way
        judgement.detectable = max(
            abs(of_end - mean) + (end.detectable or 0.0)
            for of_end, end in zip(differences, found, strict=True)
        )
    return judgement


def holm(p_values: Sequence[float]) -> list[float]:
    """
    p-values corrected for their number (Holm 1979).

    With confidence c, all differences whose corrected p-value is below 1 - c are real,
    however many comparisons were made.

    Args:
        p_values: p-values of one family of comparisons.

    Returns:
        The corrected p-values, in the same order.
    """
    p = np.array(p_values)
    order = np.argsort(p, kind="stable")
    corrected = np.minimum(1.0, np.arange(len(p), 0, -1) * p[order])
    p[order] = np.maximum.accumulate(corrected)
    return p.tolist()


def seed_interval(
    values: Sequence[float],
    confidence: float,
    is_count: bool = False,
    bounds: Bounds = UNBOUNDED,
) -> Interval | None:
    """
    Mean and interval of a few values, one for each seed.

    By the studentised bootstrap (bootstrap-t, Efron and Tibshirani 1993, section 12.5).
    Of three values, a percentile bootstrap without studentising covers the truth three
    times out of four at best. Student's t takes over where too many resamples have no
    spread for a finite interval: below MIN_BOOTSTRAPPED values, or among many equal ones.
    See benchmarks/README.md for the coverage of each.

    Args:
        values: At least one.
        confidence: Confidence of the interval, as in 0.95.
        is_count: Whether the values are whole numbers: their spread is then at least that
            of rounding.
        bounds: The least and the largest possible value.

    Returns:
        The interval; None for a single value, or if values that are not counts are equal.
    """
    sample = np.array(values, dtype=float)
    n, tolerance = len(sample), EQUAL_WITHIN * float(np.abs(sample).max())
    if n < 2 or (np.ptp(sample) <= tolerance and not is_count):
        return None
    floor = ROUNDING_VARIANCE**0.5 if is_count else 0.0
    student = student_interval(sample.tolist(), confidence, floor, bounds)
    mean, spread = float(sample.mean()), float(sample.std(ddof=1))
    if n < MIN_BOOTSTRAPPED or spread <= floor:
        return student
    t = _studentised_means(sample, tolerance)
    tail = (1 - confidence) / 2
    low_t = np.quantile(t, tail, method="lower")
    high_t = np.quantile(t, 1 - tail, method="higher")
    if not (np.isfinite(low_t) and np.isfinite(high_t)):
        return student
    error = spread / math.sqrt(n)
    low, high = mean - float(high_t) * error, mean - float(low_t) * error
    return Interval(mean, *within(bounds, low, high))


def _studentised_means(sample: np.ndarray, tolerance: float) -> np.ndarray:
    """Distances of resampled means from the sample's, each in its own standard errors."""
    n = len(sample)
    # its own generator, so that an interval does not depend on what was computed before
    draws = np.random.default_rng(0).integers(n, size=(N_RESAMPLES, n))
    resamples = sample[draws]
    shifts = resamples.mean(axis=1) - sample.mean()
    errors = resamples.std(axis=1, ddof=1) / math.sqrt(n)
    # zero but for rounding
    shifts[np.abs(shifts) <= tolerance] = 0
    errors[np.ptp(resamples, axis=1) <= tolerance] = 0
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # without a spread a resample is infinitely far off, in its direction
        return np.nan_to_num(shifts / errors, nan=0.0, posinf=np.inf, neginf=-np.inf)


def _variance(values: Sequence[float], tolerance: float) -> float:
    return float(np.var(values, ddof=1)) if np.ptp(values) > tolerance else 0.0


@cache
def _detectable_errors(freedom: float, confidence: float) -> float:
    """The difference that is found with probability POWER, in standard errors."""
    from scipy import optimize, stats

    critical = float(stats.t.ppf((1 + confidence) / 2, freedom))
    # scipy's noncentral t is NaN at few degrees of freedom, so over its definition: a
    # normal variable divided by the measured spread, which is that of chi
    quantiles = (np.arange(200) + 0.5) / 200
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
    """Bounds of the differences of a metric that has two bounds."""
    low, high = bounds
    return UNBOUNDED if low is None or high is None else (low - high, high - low)
