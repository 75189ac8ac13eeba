"""Intervals and verdicts over seeds, and the choice of pairs."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from scipy import stats

from saelens_scaffold.compare.comparisons import (
    MeasuredSAE,
    compare_arms,
    curves,
)
from saelens_scaffold.compare.grid import Arm, Run
from saelens_scaffold.compare.metrics import ComparisonMetric
from saelens_scaffold.compare.statistics import (
    holm,
    judge,
    judge_interpolated,
    seed_interval,
)

METRIC = ComparisonMetric("score", "score", value=lambda _: None)


class FakeConfig:
    """The fields of an SAE's configuration that matching reads."""

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


def compared(*saes: MeasuredSAE, **wanted: Any) -> list[dict[str, Any]]:
    found = compare_arms(saes, [METRIC], {"scaffold": "plain"}, 0.95, 2.0)
    return [c for c in found if wanted.items() <= c.items()]


@pytest.mark.parametrize("n_seeds", [2, 3, 5, 8])
@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_intervals_hold_the_truth_as_often_as_they_say(
    n_seeds: int, correlation: float
) -> None:
    # of sides whose spreads differ, also where seeds have something in common
    rng = np.random.default_rng(n_seeds)
    difference, draws = 0.7, 600
    held = 0
    for _ in range(draws):
        plain, other = rng.normal(size=(2, n_seeds))
        scaffold = correlation * plain + math.sqrt(1 - correlation**2) * other
        found = judge(list(3 * scaffold + difference), list(plain), 0.95)
        assert found.ci_low is not None and found.ci_high is not None
        held += found.ci_low <= difference <= found.ci_high
    # three standard errors below
    assert held / draws >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / draws)


def test_unpaired_finds_more_than_paired_where_seeds_have_nothing_in_common() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(500, 2, 3))
    unpaired = sum(
        judge(list(plain + 3), list(other), 0.95).verdict == "higher"
        for plain, other in draws
    )
    of_pairs: Any = stats.ttest_rel(draws[:, 0] + 3, draws[:, 1], axis=1)
    paired = int((of_pairs.pvalue < 0.05).sum())
    # 0.67 and 0.50 of 2,000 draws in benchmarks/README.md
    assert unpaired / 500 == pytest.approx(0.67, abs=0.07)
    assert paired / 500 == pytest.approx(0.50, abs=0.07)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 3), (3, 5), (8, 4)])
def test_intervals_and_p_values_are_scipys(n: int, m: int) -> None:
    rng = np.random.default_rng(n * m)
    a, b = rng.normal(1, 2, n).tolist(), rng.normal(0, 1, m).tolist()
    found = judge(a, b, 0.9)
    expected: Any = stats.ttest_ind(a, b, equal_var=False)
    interval = expected.confidence_interval(0.9)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.ci_low, found.ci_high) == pytest.approx((interval.low, interval.high))
    assert found.mean == pytest.approx(np.mean(a) - np.mean(b))


@pytest.mark.parametrize("n", [3, 5])
def test_detectable_differences_are_found_in_four_experiments_of_five(n: int) -> None:
    # of a side of its own spread only, so that the degrees of freedom are n - 1 as said
    rng = np.random.default_rng(n)
    spread = rng.normal(size=n)
    spread = (spread - spread.mean()) / spread.std(ddof=1)
    detectable = judge(list(spread), [0.0] * n, 0.95).detectable
    assert detectable is not None
    samples = rng.normal(detectable, 1, size=(20_000, n))
    tests: Any = stats.ttest_1samp(samples, 0, axis=1)
    assert (tests.pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.01)


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_by_its_definition(p_values: list[float]) -> None:
    corrected = holm(p_values)
    for level in (0.01, 0.05, 0.3):
        # reject in the order of p until one is too large for those that are left
        rejected: set[int] = set()
        for i in sorted(range(len(p_values)), key=p_values.__getitem__):
            if p_values[i] * (len(p_values) - len(rejected)) > level:
                break
            rejected.add(i)
        assert {i for i, p in enumerate(corrected) if p <= level} == rejected


def test_each_matching_is_a_family_of_its_own_without_sparsity() -> None:
    rng = np.random.default_rng(0)
    l0 = ComparisonMetric("dense.l0_total", "l0", value=lambda _: None)
    saes = [
        sae._replace(values={**sae.values, l0.id: rng.normal()})
        for k, rank, name in ((4, 0, "plain"), (6, 0, "plain"), (4, 2, "scaffold"))
        for seed in range(3)
        for sae in [measured(name, k, seed, rng.normal(), rank=rank)]
    ]
    found = compare_arms(saes, [METRIC, l0], {"scaffold": "plain"}, 0.95, 2.0)
    assert [(c["matching"], c["metric"]) for c in found] == [
        (matching, metric)
        for matching in ("k", "l0_total")
        for metric in ("score", l0.id)
    ]
    for comparison in found:
        of_one = comparison["p_value"] if comparison["metric"] == "score" else None
        assert comparison["p_holm"] == of_one


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=9),
    st.lists(st.floats(0, 1), min_size=1, max_size=9),
)
def test_intervals_of_shares_are_within_their_bounds(
    a: list[float], b: list[float]
) -> None:
    found = judge(a, b, 0.95, bounds=(0, 1))
    free = judge(a, b, 0.95)
    assert (found.verdict, found.p_value) == (free.verdict, free.p_value)
    if found.ci_low is not None and found.ci_high is not None and found.mean:
        assert -1 <= found.ci_low <= found.mean <= found.ci_high <= 1
    interval = seed_interval(a, 0.95, bounds=(0, 1))
    if interval is not None:
        mean, low, high = interval
        assert 0 <= low <= mean + 1e-9 and mean - 1e-9 <= high <= 1


def test_bounds_cut_off_what_cannot_be() -> None:
    # by hand: mean 0.7, standard deviation 0.0884, t(0.975, 1) = 12.7062
    values = [0.7625, 0.6375]
    free = seed_interval(values, 0.95)
    assert free is not None and free.high == pytest.approx(0.7 + 12.7062 * 0.0625)
    bounded = seed_interval(values, 0.95, bounds=(0.0, 1.0))
    assert bounded is not None and bounded[1:] == (0.0, 1.0)
    at_most = seed_interval(values, 0.95, bounds=(None, 1.0))
    assert at_most is not None and at_most[1:] == (free.low, 1.0)


@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=2, max_size=12))
@example([1.9, 1.9, 1.9])  # whose mean is not 1.9
@example([0.1, 0.1, 0.1, 0.1, 0.1])
def test_intervals_are_around_the_mean(values: list[float]) -> None:
    found = seed_interval(values, 0.95)
    all_equal = np.ptp(values) <= 1e-9 * np.abs(values).max()
    assert (found is None) == all_equal
    if found is None:
        return
    mean, low, high = found
    assert low <= mean + 1e-6 * abs(mean) and mean - 1e-6 * abs(mean) <= high
    assert math.isclose(mean, np.mean(values), rel_tol=1e-9, abs_tol=1e-9)
    assert math.isfinite(low) and math.isfinite(high)
    mirrored = seed_interval([-value for value in values], 0.95)
    assert mirrored is not None
    assert math.isclose(
        mirrored.low, -high, rel_tol=0.05, abs_tol=0.1 * (high - low) + 1e-9
    )


@pytest.mark.parametrize("n_seeds", [2, 3, 4])
@pytest.mark.parametrize("expected", [0.3, 2.0])
def test_counts_without_a_difference_are_not_told_apart(
    n_seeds: int, expected: float
) -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(expected, size=(600, 2, n_seeds)).astype(float)
    told_apart = sum(
        judge(list(a), list(b), 0.95, True).verdict != "not distinguishable"
        for a, b in counts
    )
    assert told_apart <= 30 + 3 * 5.4  # three standard errors


@pytest.mark.parametrize("n_seeds", [2, 3, 4])
def test_shares_of_few_examples_without_a_difference_are_not_told_apart(
    n_seeds: int,
) -> None:
    # accuracies on 200 examples, which are often equal
    rng = np.random.default_rng(0)
    told_apart = 0
    for _ in range(1000):
        plain, scaffold = (rng.integers(158, 163, n_seeds) / 200 for _ in range(2))
        (found,) = compared(
            *(measured("plain", 4, seed, x) for seed, x in enumerate(plain)),
            *(measured("scaffold", 4, s, x, rank=2) for s, x in enumerate(scaffold)),
            matching="k",
        )
        told_apart += found["verdict"] != "not distinguishable"
    assert told_apart <= 50 + 3 * 7  # three standard errors


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8), st.booleans())
def test_equal_saes_have_a_difference_of_exactly_zero(
    values: list[float], is_count: bool
) -> None:
    found = judge(values, values, 0.95, is_count)
    assert found.mean == 0.0
    assert (found.verdict, found.p_value) == ("not distinguishable", 1.0)
    # nor does it matter in which order the seeds come
    assert judge(values[::-1], values, 0.95, is_count).mean == 0.0


@pytest.mark.parametrize(("n", "verdict"), [(3, "not distinguishable"), (4, "higher")])
def test_values_without_any_spread_are_judged_by_permutation(
    n: int, verdict: str
) -> None:
    # 2 of 20, and 2 of 70 ways to divide the values set them apart like this
    found = judge([0.2] * n, [0.1 + 1e-17 * i for i in range(n)], 0.95)
    assert (found.method, found.verdict) == ("permutation test", verdict)
    assert found.p_value == pytest.approx(2 / math.comb(2 * n, n))
    assert (found.ci_low, found.ci_high, found.detectable) == (None, None, None)
    # equal but for rounding, of numbers so large that this is all they differ by
    large = judge([1e6 + 1e-5] * 9, [1e6] * 9, 0.95)
    assert large.verdict == "not distinguishable"
    # equal counts have a spread that rounding hides
    counts = judge([2.0] * n, [2.0] * n, 0.95, is_count=True)
    assert counts.ci_low is not None and counts.ci_high == -counts.ci_low > 0


def test_whether_a_metric_is_a_count_is_said_by_it_and_not_by_its_values() -> None:
    assert ComparisonMetric("dense", "dense", lambda _: None, digits=0).is_count
    assert not METRIC.is_count
    saes = [
        measured(architecture, 4, seed, 1.0, rank=rank)
        for architecture, rank in (("plain", 0), ("scaffold", 2))
        for seed in range(3)
    ]
    (found, _) = compare_arms(saes, [METRIC], {"scaffold": "plain"}, 0.95, 2.0)
    assert found["ci_low"] is None
    assert curves(saes, [METRIC], 0.95)[0]["points"][0]["ci_low"] is None
    count = METRIC._replace(digits=0)
    (found, _) = compare_arms(saes, [count], {"scaffold": "plain"}, 0.95, 2.0)
    # t(0.975, 4) standard errors of two variances of 1/12
    assert found["ci_low"] == pytest.approx(-2.776445 * math.sqrt(2 / 36))


def test_verdicts() -> None:
    assert judge([], [1.0], 0.95).verdict == "not measured"
    assert judge([3.0], [1.0, 2.0], 0.95).verdict == "one seed"
    assert judge([3.0], [1.0, 2.0], 0.95).mean == 1.5
    assert judge([-7.0, -7.1, -6.9], [0.0, 0.1, 0.2], 0.95).verdict == "lower"
    assert judge([7.0, 7.1, 6.9], [0.0, 0.1, 0.2], 0.95).verdict == "higher"
    assert judge([-7.0, 7.1, 1.0], [0.0] * 3, 0.95).verdict == "not distinguishable"
    assert judge([7.0] * 3, [0.0] * 3, 0.95, is_count=True).verdict == "higher"


def test_interval_of_three_seeds() -> None:
    # by hand: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.302653
    found = seed_interval([1.0, 2.0, 3.0], 0.95)
    assert found is not None
    mean, low, high = found
    assert mean == pytest.approx(2)
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert seed_interval([1.0], 0.95) is None


def test_between_two_ends_a_verdict_holds_against_both() -> None:
    low, high = [0.1, 0.11, 0.09], [0.3, 0.31, 0.29]
    for values, verdict in (
        ([0.5, 0.51, 0.49], "higher"),
        ([0.01, 0.02, 0.0], "lower"),
        ([0.2, 0.21, 0.19], "not distinguishable"),  # as a curve may run anywhere
    ):
        found = judge_interpolated(values, [low, high], [0.25, 0.75], 0.95)
        ends = [judge(values, end, 0.95) for end in (low, high)]
        assert found.verdict == verdict
        assert found.mean == pytest.approx(np.mean(values) - 0.25)
        assert (found.ci_low, found.ci_high) == (ends[1].ci_low, ends[0].ci_high)
        is_open = verdict == "not distinguishable"
        assert found.p_value == (1.0 if is_open else max(e.p_value or 0 for e in ends))
        # what is detectable against one end is so only beyond it
        assert found.detectable == pytest.approx(0.15 + (ends[0].detectable or 0))
    for values, ends, verdict in (
        ([0.5], [low, high], "one seed"),
        ([0.5] * 3, [low, []], "not measured"),
    ):
        found = judge_interpolated(values, ends, [0.5, 0.5], 0.95)
        assert found.verdict == verdict
    single = judge_interpolated([0.5, 0.51], [low], [1.0], 0.95)
    assert single == judge([0.5, 0.51], low, 0.95)


def saturating(a: float, b: float, exponent: float) -> Callable[[float], float]:
    return lambda l0: a - b * l0**-exponent


def broken_line(slopes: list[float]) -> Callable[[float], float]:
    """Rising ever more slowly in log L0: concave, with corners anywhere."""
    falling = np.cumsum(sorted(slopes, reverse=True))
    knots = np.linspace(0, math.log(100), len(slopes) + 1)
    heights = np.concatenate([[0.0], falling])
    return lambda l0: float(np.interp(math.log(l0), knots, heights))


CURVES = st.one_of(
    st.builds(saturating, st.floats(0, 1), st.floats(0.1, 3), st.floats(0.1, 4)),
    st.builds(broken_line, st.lists(st.floats(0, 1), min_size=1, max_size=9)),
)


@given(
    CURVES,
    st.lists(st.floats(2, 100), min_size=2, max_size=5, unique=True),
    st.floats(2, 100),
    st.floats(-0.2, 0.2),
    st.floats(1e-7, 1e-3),
)
def test_interpolation_on_a_concave_curve_turns_no_verdict_around(
    curve: Callable[[float], float],
    l0s: list[float],
    at: float,
    difference: float,
    spread: float,
) -> None:
    assume(abs(difference) > spread)
    # three seeds whose mean is exact, however small their spread
    noise = (-spread, 0.0, spread)
    saes = [
        measured("plain", l0, seed, curve(l0) + e)
        for l0 in l0s
        for seed, e in enumerate(noise)
    ]
    saes += [
        measured("scaffold", 1, seed, curve(at) + difference + e, 2, l0_total=at)
        for seed, e in enumerate(noise)
    ]
    (found,) = compared(*saes, matching="l0_total")
    verdict = found["verdict"]
    assert verdict in (
        ("higher" if difference > 0 else "lower"),
        "not distinguishable",
        "out of range",
        "bracket too wide",
    )
    below, above = [x for x in l0s if x < at], [x for x in l0s if x > at]
    if at not in l0s:
        is_bracketed = bool(below and above)
        assert is_bracketed != (verdict == "out of range")
        if is_bracketed:
            is_wide = min(above) / max(below) > 2
            assert is_wide == (verdict == "bracket too wide")


def test_a_straight_line_between_far_sparsities_turned_verdicts_around() -> None:
    # what a line in L0 between k 4 and 32 made of SAEs that are worse by 0.02
    curve = saturating(1.0, 1.2, 0.5)
    worse = curve(12) - 0.02
    assert worse > np.interp(12, [4, 32], [curve(4), curve(32)])
    for k_high, verdict in ((32, "bracket too wide"), (8, "out of range")):
        (found,) = compared(
            *(
                measured("plain", k, seed, curve(k) + 1e-4 * seed)
                for k in (4, k_high)
                for seed in range(3)
            ),
            *(measured("scaffold", 4, s, worse + 1e-4 * s, rank=8) for s in range(3)),
            matching="l0_total",
        )
        assert found["verdict"] == verdict
        assert found["mean"] is None
        assert "train plain with k=12" in found["note"]
        assert [end["k"] for end in found["baseline"]["measured"]] == (
            [4, 32] if k_high == 32 else [8]
        )


def test_same_k_takes_all_seeds_of_both_sides() -> None:
    (found,) = compared(
        *(measured("plain", 4, seed, 1.0 + seed) for seed in range(3)),
        *(measured("plain", 8, seed, 100.0) for seed in range(3)),
        *(measured("scaffold", 4, seed, 3.5 + seed, rank=2) for seed in (0, 1, 5)),
        matching="k",
    )
    assert found["differences"] == {"0": 2.5, "1": 2.5}  # seed 5 has no twin
    assert found["baseline"]["axes"] == {"k": 4}
    assert (found["treatment_mean"], found["baseline_mean"]) == (5.5, 2.0)
    assert (found["n_treatment"], found["n_baseline"]) == (3, 3)
    assert found["mean"] == 3.5
    assert not found["interpolated"]


def test_same_l0_total_where_the_grid_meets_it() -> None:
    (found,) = compared(
        *(measured("plain", k, 0, float(k)) for k in (4, 6, 8)),
        measured("scaffold", 4, 0, 5.0, rank=2, l0_total=6.3),
        matching="l0_total",
    )
    assert found["baseline"]["axes"] == {"k": 6}
    assert found["differences"] == {"0": -1.0}
    assert not found["interpolated"]
    (measured_l0,) = found["baseline"]["measured"]
    assert (found["treatment"]["l0_total"], measured_l0["l0_total"]) == (6.3, 6)
    assert found["note"] == ""


def test_the_same_l0_total_by_k_is_not_the_same_if_it_is_measured_to_be_another() -> (
    None
):
    scaffold = measured("scaffold", 4, 0, 5.0, rank=2, l0_total=6.0)
    saes = [measured("plain", 6, 0, 3.0, l0_total=7.2), scaffold]
    (alone,) = compared(*saes, matching="l0_total")
    note = "k=6 has the same l0_total by k, but +20% as measured (7.2, not 6.0)"
    assert alone["verdict"] == "out of range"
    assert alone["note"] == (
        f"{note}; l0_total 6.0 is not within 7.2 to 7.2: train plain with k=5"
    )
    # with others on the curve, it is read off where it was measured
    saes.append(measured("plain", 5, 0, 2.0, l0_total=5.0))
    (found,) = compared(*saes, matching="l0_total")
    assert found["note"] == note
    assert found["interpolated"]
    weight = math.log(6 / 5) / math.log(7.2 / 5)
    assert found["baseline_mean"] == pytest.approx(2 + weight)


def test_same_l0_total_between_the_grids_points() -> None:
    # by hand: sqrt(4 * 8) is half way from 4 to 8 in log L0
    (found,) = compared(
        *(measured("plain", 4, seed, 10.0 + seed) for seed in range(2)),
        *(measured("plain", 8, seed, 20.0 + seed) for seed in range(3)),
        measured("plain", 16, 0, 1000.0),
        *(measured("scaffold", 4, s, 18.0, 2, l0_total=32**0.5) for s in range(2)),
        matching="l0_total",
    )
    assert found["interpolated"]
    assert found["baseline"]["axes"] == {}
    assert [(end["k"], end["l0_total"]) for end in found["baseline"]["measured"]] == [
        (4, 4),
        (8, 8),
    ]
    assert found["baseline_mean"] == pytest.approx(15.75)
    assert found["mean"] == pytest.approx(2.25)
    assert found["differences"] == pytest.approx({"0": 3.0, "1": 2.0})
    assert (found["n_treatment"], found["n_baseline"]) == (2, 2)


def test_nothing_is_extrapolated() -> None:
    (found,) = compared(
        *(measured("plain", k, 0, 1.0) for k in (4, 8)),
        measured("scaffold", 8, 0, 1.0, rank=2),
        matching="l0_total",
    )
    assert found["verdict"] == "out of range"
    assert found["note"] == (
        "l0_total 10.0 is not within 4.0 to 8.0: train plain with k=10"
    )


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
    assert [c["baseline"]["axes"]["lr"] for c in found] == [2.0]


def test_a_metric_that_one_side_lacks_is_left_out() -> None:
    assert not compared(
        measured("plain", 4, 0, None), measured("scaffold", 4, 0, 1.0, rank=2)
    )


def test_curves_are_of_saes_that_differ_in_k() -> None:
    saes = [
        measured("plain", k, seed, k + seed) for k in (8, 4) for seed in range(3)
    ] + [measured("scaffold", 4, 0, 1.0, rank=rank) for rank in (2, 3)]
    found = {curve["label"]: curve for curve in curves(saes, [METRIC], 0.95)}
    assert set(found) == {
        "plain",
        "scaffold scaffold_rank=2",
        "scaffold scaffold_rank=3",
    }
    first, second = found["plain"]["points"]
    assert (first["l0"], first["mean"], first["n_seeds"]) == (4, 5, 3)
    assert second["l0"] == 8
    assert first["ci_low"] is not None
    # t(0.975, 2) / sqrt(3), the standard deviation being 1
    assert first["mean"] - first["ci_low"] == pytest.approx(4.302653 / 3**0.5)
    assert found["scaffold scaffold_rank=2"]["points"][0]["ci_low"] is None


def test_no_k_is_advised_where_there_is_none() -> None:
    none: Any = None
    (found,) = compared(
        measured("plain", none, 0, 1.0, l0_total=3.0),
        measured("scaffold", 4, 0, 1.0, rank=2),
        matching="l0_total",
    )
    assert found["note"] == "l0_total 6.0 is not within 3.0 to 3.0"
