"""How often intervals over a few seeds hold the truth, by several methods.

Draws differences of known mean, as paired SAEs of a few seeds have them, and counts how
often the 95 % interval of each method contains the mean.

    python benchmarks/seed_intervals.py
"""

import argparse
from collections.abc import Callable

import numpy as np

from saelens_scaffold.compare.statistics import seed_interval
from saelens_scaffold.evals.bootstrap import student_interval

COUNTS = "counts (Poisson, mean 2)"
DIFFERENCES: dict[str, tuple[Callable[..., np.ndarray], float]] = {
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "skewed (exponential)": (lambda rng, n: rng.exponential(size=n), 1.0),
    "heavy tails (t, 3 d.f.)": (lambda rng, n: rng.standard_t(3, size=n), 0.0),
    COUNTS: (lambda rng, n: rng.poisson(2, size=n) - 2.0, 0.0),
}


def percentile(values: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """The plain bootstrap: quantiles of the resamples' means."""
    n = len(values)
    means = values[rng.integers(n, size=(2000, n))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return low, high


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4, 5, 8, 10])
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    print("| differences | seeds | percentile | Student's t | ours |")
    print("|---|---:|---:|---:|---:|")
    for name, (draw, truth) in DIFFERENCES.items():
        for n in options.seeds:
            held = np.zeros(3)
            for _ in range(options.draws):
                values = draw(rng, n)
                ours, _ = seed_interval(values, 0.95, is_count=name == COUNTS)
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
            shares = " | ".join(f"{share:.3f}" for share in held / options.draws)
            print(f"| {name} | {n} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
