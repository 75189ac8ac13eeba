"""Which SAEs are compared with which: at the same k, and at the same l0_total."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np

from saelens_scaffold.compare.grid import Arm, Run
from saelens_scaffold.compare.metrics import ComparisonMetric, Results
from saelens_scaffold.compare.statistics import Judgement, judge, seed_interval

Matching = Literal["k", "l0_total"]
"""Same k for the sparse latents, or the same number of active latents in all, the
scaffold's rank paid for out of k."""


class MeasuredSAE(NamedTuple):
    """
    An SAE and what was measured of it.

    Attributes:
        run: The SAE.
        values: Its metrics, by their ids.
        l0_total: Active latents per token, scaffold included; by k if it was not measured.
    """

    run: Run
    values: Mapping[str, float | None]
    l0_total: float | None


@dataclass(frozen=True)
class Comparison:
    """
    What one metric says of two kinds of SAEs.

    Attributes:
        matching: What they have in common.
        treatment: SAEs with a scaffold, or whatever else has a baseline.
        baseline: What they are compared with. Where it is interpolated, it has no k.
        interpolated: Whether the baseline's value is read off its sparsity curve, between
            values of k that it was trained with.
        metric: Id of the metric.
        treatment_mean: Mean over the seeds that have a pair.
        baseline_mean: Likewise.
        differences: Treatment minus baseline, by seed.
        judgement: What they say.
        note: What else there is to say.
    """

    matching: Matching
    treatment: Arm
    baseline: Arm
    interpolated: bool
    metric: str
    treatment_mean: float | None
    baseline_mean: float | None
    differences: Mapping[int, float]
    judgement: Judgement
    note: str = ""


class CurvePoint(NamedTuple):
    """
    SAEs of one sparsity, over their seeds.

    Attributes:
        arm: The SAEs.
        l0_total: Mean of their active latents per token.
        mean: Mean of the metric.
        ci_low: Lower end of its interval; None with a single seed, or if all agree.
        ci_high: Upper end.
        n_seeds: Number of seeds.
    """

    arm: Arm
    l0_total: float
    mean: float
    ci_low: float | None
    ci_high: float | None
    n_seeds: int


class Curve(NamedTuple):
    """A metric against sparsity, of SAEs that differ in k only."""

    arm: Arm
    metric: str
    points: list[CurvePoint]


def l0_total(run: Run, results: Results) -> float | None:
    """Active latents per token, as far as an evaluation counted them, else by k."""
    dense = results.get("dense_latents", {}).get("eval_result_metrics", {})
    core = results.get("core", {}).get("eval_result_metrics", {})
    for metrics, name in ((dense, "l0_total"), (core, "l0")):
        counted = metrics.get("sparsity", {}).get(name)
        if counted is not None:
            return float(counted)
    return run.nominal_l0_total


def compare_arms(
    saes: Sequence[MeasuredSAE],
    metrics: Sequence[ComparisonMetric],
    baselines: Mapping[str, str],
    confidence: float,
) -> list[Comparison]:
    """
    Compare every kind of SAEs with its baseline, if it has one, in both ways.

    Args:
        saes: All SAEs.
        metrics: What to compare them by. A metric that only one side has is left out.
        baselines: For each architecture that has one, the one it is compared with.
        confidence: Of the intervals, as in 0.95.
    """
    arms = _by_arm(saes)
    comparisons: list[Comparison] = []
    for treatment in arms:
        rivals = [
            arm
            for arm in arms
            if arm.architecture == baselines.get(treatment.architecture)
        ]
        for metric in metrics:
            comparisons += _at_same_k(treatment, rivals, arms, metric, confidence)
            comparisons += _at_same_l0(treatment, rivals, arms, metric, confidence)
    # in the order in which they are read, all of one matching first
    return sorted(comparisons, key=lambda comparison: comparison.matching)


def curves(
    saes: Sequence[MeasuredSAE],
    metrics: Sequence[ComparisonMetric],
    confidence: float,
) -> list[Curve]:
    """Each metric but sparsity itself against l0_total, with intervals over seeds."""
    arms = _by_arm(saes)
    found: list[Curve] = []
    for metric in metrics:
        if _is_sparsity(metric.id):
            continue
        points: dict[Arm, list[CurvePoint]] = {}
        for arm, by_seed in arms.items():
            pairs = [
                (sae.l0_total, value)
                for sae in by_seed.values()
                if (value := sae.values.get(metric.id)) is not None
                and sae.l0_total is not None
            ]
            if pairs:
                points.setdefault(arm.without("k"), []).append(
                    _curve_point(arm, pairs, metric, confidence)
                )
        found += [
            Curve(arm, metric.id, sorted(of_arm, key=lambda point: point.l0_total))
            for arm, of_arm in points.items()
        ]
    return found


def _is_sparsity(metric: str) -> bool:
    return metric.rpartition(".")[2] in ("l0", "l0_sparse", "l0_total")


_Arms = Mapping[Arm, Mapping[int, MeasuredSAE]]


def _by_arm(saes: Sequence[MeasuredSAE]) -> dict[Arm, dict[int, MeasuredSAE]]:
    arms: dict[Arm, dict[int, MeasuredSAE]] = {}
    for sae in saes:
        arms.setdefault(sae.run.arm, {})[sae.run.seed] = sae
    return arms


def _at_same_k(
    treatment: Arm,
    rivals: Sequence[Arm],
    arms: _Arms,
    metric: ComparisonMetric,
    confidence: float,
) -> list[Comparison]:
    return [
        comparison
        for rival in rivals
        if treatment.agrees_with(rival)
        and _k(arms, treatment) == _k(arms, rival) is not None
        for comparison in _direct("k", treatment, rival, arms, metric, confidence)
    ]


def _at_same_l0(
    treatment: Arm,
    rivals: Sequence[Arm],
    arms: _Arms,
    metric: ComparisonMetric,
    confidence: float,
) -> list[Comparison]:
    some_run = next(iter(arms[treatment].values())).run
    if some_run.scaffold_rank == 0 or some_run.nominal_l0_total is None:
        return []
    by_curve: dict[Arm, list[Arm]] = {}
    for rival in rivals:
        if treatment.without("k").agrees_with(rival.without("k")):
            by_curve.setdefault(rival.without("k"), []).append(rival)
    comparisons: list[Comparison] = []
    for curve, rivals_of_curve in by_curve.items():
        exact = [
            rival
            for rival in rivals_of_curve
            if next(iter(arms[rival].values())).run.nominal_l0_total
            == some_run.nominal_l0_total
        ]
        if exact:
            comparisons += _direct(
                "l0_total", treatment, exact[0], arms, metric, confidence
            )
        elif not _is_sparsity(metric.id):  # which would be compared with itself
            comparisons += _interpolated(
                treatment, curve, rivals_of_curve, arms, metric, confidence
            )
    return comparisons


def _k(arms: _Arms, arm: Arm) -> float | None:
    return getattr(next(iter(arms[arm].values())).run.config, "k", None)


def _direct(
    matching: Matching,
    treatment: Arm,
    rival: Arm,
    arms: _Arms,
    metric: ComparisonMetric,
    confidence: float,
) -> list[Comparison]:
    pairs = {
        seed: (value, arms[rival][seed].values.get(metric.id))
        for seed, sae in arms[treatment].items()
        if (value := sae.values.get(metric.id)) is not None and seed in arms[rival]
    }
    return _comparison(matching, treatment, rival, False, metric, pairs, confidence)


def _interpolated(
    treatment: Arm,
    curve: Arm,
    rivals: Sequence[Arm],
    arms: _Arms,
    metric: ComparisonMetric,
    confidence: float,
) -> list[Comparison]:
    pairs: dict[int, tuple[float, float | None]] = {}
    outside: list[str] = []
    for seed, sae in arms[treatment].items():
        value = sae.values.get(metric.id)
        points = sorted(
            (rival_sae.l0_total, rival_value)
            for rival in rivals
            if (rival_sae := arms[rival].get(seed)) is not None
            and (rival_value := rival_sae.values.get(metric.id)) is not None
            and rival_sae.l0_total is not None
        )
        if value is None or not points or sae.l0_total is None:
            continue
        l0s = [l0 for l0, _ in points]
        if not l0s[0] <= sae.l0_total <= l0s[-1]:
            outside.append(
                f"{sae.l0_total:.1f} of seed {seed} is not within {l0s[0]:.1f} to "
                f"{l0s[-1]:.1f}"
            )
            continue
        at = np.interp(sae.l0_total, l0s, [rival_value for _, rival_value in points])
        pairs[seed] = (value, float(at))
    found = _comparison("l0_total", treatment, curve, True, metric, pairs, confidence)
    if outside and found:
        return [replace(each, note=f"l0_total {outside[0]}") for each in found]
    if outside:
        return [
            Comparison(
                "l0_total",
                treatment,
                curve,
                interpolated=True,
                metric=metric.id,
                treatment_mean=None,
                baseline_mean=None,
                differences={},
                judgement=Judgement(None, None, None, "", "out of range"),
                note=f"l0_total {outside[0]}: train the baseline with other values of k",
            )
        ]
    return found


def _comparison(
    matching: Matching,
    treatment: Arm,
    rival: Arm,
    interpolated: bool,
    metric: ComparisonMetric,
    pairs: Mapping[int, tuple[float, float | None]],
    confidence: float,
) -> list[Comparison]:
    whole = {
        seed: (value, other)
        for seed, (value, other) in pairs.items()
        if other is not None
    }
    if not whole:
        return []
    differences = {seed: value - other for seed, (value, other) in whole.items()}
    return [
        Comparison(
            matching,
            treatment,
            rival,
            interpolated,
            metric.id,
            fmean(value for value, _ in whole.values()),
            fmean(other for _, other in whole.values()),
            differences,
            judge(
                differences,
                confidence,
                metric.is_count,
                magnitude=max(abs(value) for pair in whole.values() for value in pair),
            ),
        )
    ]


def _curve_point(
    arm: Arm,
    pairs: Sequence[tuple[float, float]],
    metric: ComparisonMetric,
    confidence: float,
) -> CurvePoint:
    values = np.array([value for _, value in pairs])
    low = high = None
    if len(values) > 1:
        found, _ = seed_interval(values, confidence, metric.is_count)
        low, high = found[1:] if found else (None, None)
    return CurvePoint(
        arm, fmean(l0 for l0, _ in pairs), float(values.mean()), low, high, len(pairs)
    )
