"""How often intervals over a few seeds hold the truth, and how often tests find a difference.

Of the mean of one kind of SAEs, and of the difference between two: draws of known
distributions, of which 95 % intervals by several methods should hold the truth 95 times
in a hundred. `--means` and `--differences` print one of the two tables alone.

    python benchmarks/seed_intervals.py
"""

import argparse
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from saelens_scaffold.compare.statistics import judge, seed_interval
from saelens_scaffold.evals.intervals import student_interval

COUNTS = "counts (Poisson, mean 2)"
MEANS: dict[str, tuple[Callable[..., np.ndarray], float]] = {
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "skewed (exponential)": (lambda rng, n: rng.exponential(size=n), 1.0),
    "heavy tails (t, 3 d.f.)": (lambda rng, n: rng.standard_t(3, size=n), 0.0),
    COUNTS: (lambda rng, n: rng.poisson(2, size=n) + 0.0, 2.0),
}


class Sides(NamedTuple):
    """
    Two kinds of SAEs, as functions of standard normal draws, which can have something in
    common.

    Attributes:
        treatment: Makes the values of one.
        baseline: Those of the other, of the same mean.
        spread: Their standard deviation, root mean square of both.
    """

    treatment: Callable[[np.ndarray], np.ndarray]
    baseline: Callable[[np.ndarray], np.ndarray]
    spread: float = 1.0


def exponential(z: np.ndarray) -> np.ndarray:
    return -stats.norm.logsf(z) - 1


def poisson(z: np.ndarray) -> np.ndarray:
    return stats.poisson.ppf(stats.norm.cdf(z), 2)


SIDES = {
    "normal": Sides(lambda z: z, lambda z: z),
    "normal, spreads 3 : 1": Sides(lambda z: z * 3 / 5**0.5, lambda z: z / 5**0.5),
    "skewed (exponential)": Sides(exponential, exponential),
    COUNTS: Sides(poisson, poisson, 2**0.5),
}


def percentile(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """The plain bootstrap: quantiles of the resamples' means."""
    n = len(values)
    means = values[rng.integers(n, size=(2000, n))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return low, high


def means_table(seeds: Sequence[int], draws: int) -> None:
    """Coverage of intervals of one mean."""
    rng = np.random.default_rng(0)
    print("| values | seeds | percentile | Student's t | ours |")
    print("|---|---:|---:|---:|---:|")
    for name, (draw, truth) in MEANS.items():
        for n in seeds:
            held = np.zeros(3)
            for _ in range(draws):
                values = draw(rng, n)
                ours = seed_interval(values.tolist(), 0.95, is_count=name == COUNTS)
                assert ours is not None, "equal draws of no counts"
                student = student_interval(values.tolist(), 0.95)
                for i, (low, high) in enumerate(
                    (
                        percentile(values, rng),
                        (student.low, student.high),
                        (ours.low, ours.high),
                    )
                ):
                    held[i] += low <= truth <= high
            shares = " | ".join(f"{share:.3f}" for share in held / draws)
            print(f"| {name} | {n} | {shares} |", flush=True)


def differences_table(
    seeds: Sequence[int], correlations: Sequence[float], draws: int
) -> None:
    """Coverage, and power against 3 standard deviations, of tests of a difference."""
    print(
        "| values | correlation of a seed's two SAEs | seeds | coverage: paired t | pooled t "
        "| ours (Welch's t) | power: paired t | pooled t | ours |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name in SIDES:
        for correlation in correlations:
            for n in seeds:
                shares = coverage_and_power(name, correlation, n, draws)
                shown = " | ".join(
                    [*(f"{c:.3f}" for c, _ in shares), *(f"{p:.2f}" for _, p in shares)]
                )
                print(f"| {name} | {correlation} | {n} | {shown} |", flush=True)


def coverage_and_power(
    name: str, correlation: float, n_seeds: int, draws: int
) -> list[tuple[float, float]]:
    """
    Of the paired t-test, of the unpaired one with one variance, and of ours.

    Args:
        name: Of the distribution, one of SIDES.
        correlation: Of the normal draws behind the two SAEs of a seed.
        n_seeds: Number of seeds of either side.
        draws: Number of experiments.
    """
    sides = SIDES[name]
    rng = np.random.default_rng(n_seeds)
    z, other = rng.normal(size=(2, draws, n_seeds))
    other = correlation * z + (1 - correlation**2) ** 0.5 * other
    equal, baseline = sides.treatment(z), sides.baseline(other)
    found: list[np.ndarray] = []
    for treatment in (equal, equal + 3 * sides.spread):
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of counts that are all the same
            paired: Any = stats.ttest_rel(treatment, baseline, axis=1)
            pooled: Any = stats.ttest_ind(treatment, baseline, axis=1)
        ours = [
            judge(a.tolist(), b.tolist(), 0.95, is_count=name == COUNTS).p_value
            for a, b in zip(treatment, baseline, strict=True)
        ]
        # an interval holds zero where the test finds nothing
        tests = np.array([paired.pvalue, pooled.pvalue, np.array(ours, dtype=float)])
        found.append((tests < 0.05).mean(axis=1))
    return list(zip((1 - found[0]).tolist(), found[1].tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4, 5, 8])
    parser.add_argument(
        "--correlations", type=float, nargs="+", default=[0.0, 0.3, 0.6]
    )
    parser.add_argument("--means", action="store_true")
    parser.add_argument("--differences", action="store_true")
    options = parser.parse_args()
    if options.means or not options.differences:
        means_table(options.seeds, options.draws)
    if options.differences or not options.means:
        differences_table(options.seeds, options.correlations, options.draws)


if __name__ == "__main__":
    main()
