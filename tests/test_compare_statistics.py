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
    found, method = seed_interval(np.array(values), 0.95)
    all_equal = np.ptp(values) <= 1e-9 * np.abs(values).max()
    assert (found is None) == (method == "sign test") == all_equal
    if found is None:
        return
    mean, low, high = found
    assert low <= mean + 1e-6 * abs(mean) and mean - 1e-6 * abs(mean) <= high
    assert math.isclose(mean, np.mean(values), rel_tol=1e-9, abs_tol=1e-9)
    assert math.isfinite(low) and math.isfinite(high)
    # fewer seeds than four leave the studentised bootstrap without a finite interval
    assert method == "student_t" or len(values) > 3
    mirrored, _ = seed_interval(-np.array(values), 0.95)
    assert mirrored is not None
    assert math.isclose(
        mirrored.low, -high, rel_tol=0.05, abs_tol=0.1 * (high - low) + 1e-9
    )


@pytest.mark.parametrize("n_seeds", [2, 3, 4])
def test_counts_without_a_difference_are_not_told_apart(n_seeds: int) -> None:
    rng = np.random.default_rng(0)
    verdicts = [
        judge(dict(enumerate(rng.integers(-1, 2, n_seeds).astype(float))), 0.95, True)
        for _ in range(1000)
    ]
    told_apart = [v for v in verdicts if v.verdict != "not distinguishable"]
    assert len(told_apart) <= 50


@pytest.mark.parametrize("n_seeds", [2, 3, 4])
def test_shares_of_few_examples_without_a_difference_are_not_told_apart(
    n_seeds: int,
) -> None:
    # accuracies on 200 examples, whose differences are often equal, but for rounding
    rng = np.random.default_rng(0)
    told_apart = 0
    for _ in range(1000):
        plain, scaffold = (rng.integers(158, 163, n_seeds) / 200 for _ in range(2))
        (found,) = compared(
            *(measured("plain", 4, seed, x) for seed, x in enumerate(plain)),
            *(measured("scaffold", 4, s, x, rank=2) for s, x in enumerate(scaffold)),
            matching="k",
        )
        told_apart += found.judgement.verdict != "not distinguishable"
    assert told_apart <= 50 + 3 * 7  # three standard errors


@pytest.mark.parametrize("n_seeds", [2, 3, 6])
def test_no_difference_in_any_seed_has_no_interval_unless_of_counts(
    n_seeds: int,
) -> None:
    found = judge(dict.fromkeys(range(n_seeds), 0.0), 0.95)
    assert (found.verdict, found.method) == ("not distinguishable", "sign test")
    assert (found.mean, found.ci_low, found.ci_high) == (0.0, None, None)
    counts = judge(dict.fromkeys(range(n_seeds), 0.0), 0.95, is_count=True)
    assert counts.verdict == "not distinguishable"
    # equal counts have a spread that rounding hides
    assert counts.ci_low is not None and counts.ci_high == -counts.ci_low > 0


def test_differences_are_equal_but_for_rounding() -> None:
    found = judge({0: 0.8 - 0.75, 1: 0.85 - 0.8}, 0.95)
    assert (found.verdict, found.ci_low) == ("not distinguishable", None)
    # of numbers so large that the differences are little but rounding
    large = {seed: (1e6 + seed + 0.1) - (1e6 + seed) for seed in range(3)}
    assert judge(large, 0.95, magnitude=1e6).method == "sign test"
    nothing = dict(enumerate([0.1 + 0.2 - 0.3] * 6))
    assert judge(nothing, 0.95, magnitude=0.3).verdict == "not distinguishable"
    # equal values among others leave no absurdly large t
    found = judge({0: 0.8 - 0.75, 1: 0.85 - 0.8, 2: 0.05, 3: 0.05, 4: 0.06}, 0.95)
    assert found.method == "student_t"
    assert found.ci_low is not None and 0.04 < found.ci_low < 0.06


def test_whether_a_metric_is_a_count_is_said_by_it_and_not_by_its_values() -> None:
    assert ComparisonMetric("dense", "dense", lambda _: None, digits=0).is_count
    assert not METRIC.is_count
    saes = [
        measured(architecture, 4, seed, 1.0, rank=rank)
        for architecture, rank in (("plain", 0), ("scaffold", 2))
        for seed in range(3)
    ]
    (found, _) = compare_arms(saes, [METRIC], {"scaffold": "plain"}, 0.95)
    assert found.judgement.ci_low is None
    assert curves(saes, [METRIC], 0.95)[0].points[0].ci_low is None
    count = METRIC._replace(digits=0)
    (found, _) = compare_arms(saes, [count], {"scaffold": "plain"}, 0.95)
    assert found.judgement.ci_low == pytest.approx(-1.0141, abs=1e-4)


def test_verdicts() -> None:
    assert judge({}, 0.95).verdict == "not measured"
    assert judge({0: 3.0}, 0.95).verdict == "one seed"
    assert judge({0: 3.0}, 0.95).ci_low is None
    # counts that differ by seven and by one, and accuracies that agree to the last digit
    assert judge({0: 7.0, 1: 7.0, 2: 7.0}, 0.95, is_count=True).verdict == "higher"
    ones = judge({0: 1.0, 1: 1.0, 2: 1.0}, 0.95, is_count=True)
    assert ones.verdict == "not distinguishable"
    assert judge({0: 0.1, 1: 0.1, 2: 0.1}, 0.95).verdict == "not distinguishable"
    assert judge(dict.fromkeys(range(6), 0.1), 0.95).verdict == "higher"
    assert judge({0: 0.0, 1: 0.0, 2: 0.0}, 0.95).verdict == "not distinguishable"
    assert judge({0: -7.0, 1: -7.1, 2: -6.9}, 0.95).verdict == "lower"
    assert judge({0: -7.0, 1: 7.1, 2: 1.0}, 0.95).verdict == "not distinguishable"


def test_student_interval_of_three_seeds() -> None:
    # by hand: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.302653
    found, method = seed_interval(np.array([1.0, 2.0, 3.0]), 0.95)
    assert found is not None
    mean, low, high = found
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
