"""Whether the intervals over seeds are what they say, and who is compared with whom."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("sae_bench")

from saelens_scaffold.compare.grid import Arm, Run  # noqa: E402
from saelens_scaffold.compare.matching import (  # noqa: E402
    Comparison,
    MeasuredSAE,
    compare_arms,
    curves,
)
from saelens_scaffold.compare.metrics import ComparisonMetric  # noqa: E402
from saelens_scaffold.compare.statistics import judge, seed_interval  # noqa: E402

METRIC = ComparisonMetric("score", "score", value=lambda _: None)


class FakeConfig:
    """All that matching asks of an SAE's configuration."""

    def __init__(self, k: float, scaffold_rank: int):
        self.k = k  # None of an architecture without
        self.scaffold_rank = scaffold_rank


def measured(
    architecture: str,
    k: float,
    seed: int,
    score: float | None,
    rank: int = 0,
    l0_total: float | None = None,
    **axes: Any,
) -> MeasuredSAE:
    of_scaffold = {"scaffold_rank": rank} if rank else {}
    arm = Arm(architecture, {"k": k, **of_scaffold, **axes})
    cfg: Any = FakeConfig(k, rank)
    run = Run(f"{arm.label} {seed}", arm, seed, cfg, "hook", {}, False)
    return MeasuredSAE(
        run, {"score": score}, k + rank if l0_total is None else l0_total
    )


def compared(*saes: MeasuredSAE, **wanted: Any) -> list[Comparison]:
    found = compare_arms(saes, [METRIC], {"scaffold": "plain"}, 0.95)
    return [c for c in found if all(getattr(c, n) == v for n, v in wanted.items())]


@pytest.mark.parametrize("n_seeds", [3, 5, 8])
@pytest.mark.parametrize("difference", [0.0, 0.7])
def test_intervals_hold_the_truth_as_often_as_they_say(
    n_seeds: int, difference: float
) -> None:
    # Whole comparisons, not only intervals: seeds share what makes an SAE better or
    # worse than others, which pairing must take out.
    rng = np.random.default_rng(n_seeds)
    held = indistinct = 0
    for _ in range(1000):
        of_seed = rng.normal(scale=3.0, size=n_seeds)
        plain = of_seed + rng.normal(size=n_seeds)
        scaffold = of_seed + difference + rng.normal(size=n_seeds)
        (found,) = compared(
            *(measured("plain", 4, seed, x) for seed, x in enumerate(plain)),
            *(measured("scaffold", 4, s, x, rank=2) for s, x in enumerate(scaffold)),
            matching="k",
        )
        judgement = found.judgement
        assert judgement.ci_low is not None
        assert judgement.ci_high is not None
        held += judgement.ci_low <= difference <= judgement.ci_high
        indistinct += judgement.verdict == "not distinguishable"
    assert 0.92 <= held / 1000 <= 0.98
    if difference == 0:
        assert indistinct / 1000 >= 0.95 - 0.02  # three standard errors of 1,000 draws


@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=2, max_size=12))
@example([1.9, 1.9, 1.9])  # whose mean is not 1.9
@example([0.1, 0.1, 0.1, 0.1, 0.1])
def test_intervals_are_around_the_mean(values: list[float]) -> None:
    (mean, low, high), method = seed_interval(np.array(values), 0.95)
    assert low <= mean + 1e-6 * abs(mean) and mean - 1e-6 * abs(mean) <= high
    assert math.isclose(mean, np.mean(values), rel_tol=1e-9, abs_tol=1e-9)
    assert math.isfinite(low) and math.isfinite(high)
    # fewer seeds than four leave the studentised bootstrap without a finite interval
    assert method == "student_t" or len(values) > 3
    mirrored, _ = seed_interval(-np.array(values), 0.95)
    assert math.isclose(
        mirrored.low, -high, rel_tol=0.05, abs_tol=0.1 * (high - low) + 1e-9
    )


@pytest.mark.parametrize("n_seeds", [2, 3, 4])
def test_counts_without_a_difference_are_not_told_apart(n_seeds: int) -> None:
    rng = np.random.default_rng(0)
    verdicts = [
        judge(dict(enumerate(rng.integers(-1, 2, n_seeds).astype(float))), 0.95).verdict
        for _ in range(1000)
    ]
    assert verdicts.count("not distinguishable") >= 950


def test_verdicts() -> None:
    assert judge({}, 0.95).verdict == "not measured"
    assert judge({0: 3.0}, 0.95).verdict == "one seed"
    assert judge({0: 3.0}, 0.95).ci_low is None
    assert judge({0: 7.0, 1: 7.0, 2: 7.0}, 0.95).verdict == "higher"
    # counts that differ by one, and accuracies that agree to the last digit
    assert judge({0: 1.0, 1: 1.0, 2: 1.0}, 0.95).verdict == "not distinguishable"
    assert judge({0: 0.1, 1: 0.1, 2: 0.1}, 0.95).verdict == "not distinguishable"
    assert judge(dict.fromkeys(range(6), 0.1), 0.95).verdict == "higher"
    assert judge({0: 0.0, 1: 0.0, 2: 0.0}, 0.95).verdict == "not distinguishable"
    assert judge({0: -7.0, 1: -7.1, 2: -6.9}, 0.95).verdict == "lower"
    assert judge({0: -7.0, 1: 7.1, 2: 1.0}, 0.95).verdict == "not distinguishable"


def test_student_interval_of_three_seeds() -> None:
    # by hand: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.302653
    (mean, low, high), method = seed_interval(np.array([1.0, 2.0, 3.0]), 0.95)
    assert method == "student_t"
    assert mean == pytest.approx(2)
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))


def test_same_k_pairs_seeds() -> None:
    (found,) = compared(
        *(measured("plain", 4, seed, 1.0 + seed) for seed in range(3)),
        *(measured("plain", 8, seed, 100.0) for seed in range(3)),
        *(measured("scaffold", 4, seed, 3.5 + seed, rank=2) for seed in (0, 1, 5)),
        matching="k",
    )
    assert dict(found.differences) == {0: 2.5, 1: 2.5}  # seed 5 has no twin
    assert found.baseline.axes == {"k": 4}
    assert (found.treatment_mean, found.baseline_mean) == (4.0, 1.5)
    assert not found.interpolated


def test_same_l0_total_where_the_grid_meets_it() -> None:
    (found,) = compared(
        *(measured("plain", k, 0, float(k)) for k in (4, 6, 8)),
        measured("scaffold", 4, 0, 5.0, rank=2),
        matching="l0_total",
    )
    assert found.baseline.axes == {"k": 6}
    assert dict(found.differences) == {0: -1.0}
    assert not found.interpolated


def test_same_l0_total_between_the_grids_points() -> None:
    # by hand: at the measured l0_total of 7, three quarters of the way from 4 to 8
    (found,) = compared(
        measured("plain", 4, 0, 10.0),
        measured("plain", 8, 0, 20.0),
        measured("plain", 16, 0, 1000.0),
        measured("scaffold", 4, 0, 18.0, rank=2, l0_total=7.0),
        matching="l0_total",
    )
    assert found.interpolated
    assert found.baseline.axes == {}
    assert found.baseline_mean == pytest.approx(17.5)
    assert found.differences[0] == pytest.approx(0.5)


def test_nothing_is_extrapolated() -> None:
    (found,) = compared(
        *(measured("plain", k, 0, 1.0) for k in (4, 8)),
        measured("scaffold", 8, 0, 1.0, rank=2),
        matching="l0_total",
    )
    assert found.judgement.verdict == "out of range"
    assert "10.0 of seed 0 is not within 4.0 to 8.0" in found.note


def test_seeds_without_a_counterpart_are_said() -> None:
    l0s = (5.5, 9.0)
    (found,) = compared(
        *(measured("plain", k, seed, 1.0) for k in (4, 8) for seed in (0, 1)),
        *(measured("scaffold", 4, s, 2.0, 1, l0) for s, l0 in enumerate(l0s)),
        matching="l0_total",
    )
    assert set(found.differences) == {0}
    assert "9.0 of seed 1 is not within 4.0 to 8.0" in found.note


def test_saes_without_a_k_are_not_at_the_same_k() -> None:
    none: Any = None
    assert not compared(
        measured("plain", none, 0, 1.0, l0_total=3.0),
        measured("scaffold", none, 0, 1.0, l0_total=3.0),
        matching="k",
    )


def test_only_saes_that_agree_elsewhere_are_compared() -> None:
    found = compared(
        *(measured("plain", 4, 0, lr, lr=lr) for lr in (1.0, 2.0)),
        measured("scaffold", 4, 0, 5.0, rank=2, lr=2.0),
        measured("unrelated", 4, 0, 5.0),
        matching="k",
    )
    assert [c.baseline.axes["lr"] for c in found] == [2.0]


def test_a_metric_that_one_side_lacks_is_left_out() -> None:
    assert not compared(
        measured("plain", 4, 0, None), measured("scaffold", 4, 0, 1.0, rank=2)
    )


def test_curves_are_of_saes_that_differ_in_k() -> None:
    saes = [
        measured("plain", k, seed, k + seed) for k in (8, 4) for seed in range(3)
    ] + [measured("scaffold", 4, 0, 1.0, rank=rank) for rank in (2, 3)]
    found = {curve.arm.label: curve for curve in curves(saes, [METRIC], 0.95)}
    assert set(found) == {
        "plain",
        "scaffold scaffold_rank=2",
        "scaffold scaffold_rank=3",
    }
    first, second = found["plain"].points
    assert (first.l0_total, first.mean, first.n_seeds) == (4, 5, 3)
    assert second.l0_total == 8
    assert first.ci_low is not None
    # t(0.975, 2) / sqrt(3), the standard deviation being 1
    assert first.mean - first.ci_low == pytest.approx(4.302653 / 3**0.5)
    assert found["scaffold scaffold_rank=2"].points[0].ci_low is None
