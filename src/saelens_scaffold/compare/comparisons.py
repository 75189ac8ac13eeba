"""Each metric against sparsity, and its comparison of the pairs of SAEs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, get_args

from saelens_scaffold.compare import matching, statistics
from saelens_scaffold.compare.grid import Arm
from saelens_scaffold.compare.matching import MeasuredSAE
from saelens_scaffold.compare.metrics import ComparisonMetric


def compare_arms(
    saes: Sequence[MeasuredSAE],
    metrics: Sequence[ComparisonMetric],
    baselines: Mapping[str, str],
    confidence: float,
    max_bracket: float,
) -> list[dict[str, Any]]:
    """
    Compare every kind of SAEs with its baseline, if it has one, in both ways.

    p-values are corrected for all comparisons of one matching, but for those of sparsity
    itself, which show how well it was matched.

    Args:
        saes: All SAEs.
        metrics: Metrics to compare them by. A metric that only one side has is left out.
        baselines: The baseline's architecture, for each architecture that has one.
        confidence: Confidence of the intervals, as in 0.95.
        max_bracket: Largest ratio of the l0_total of two SAEs between which a third is
            interpolated.

    Returns:
        The comparisons of results.json: the pair, the means over seeds (the baseline's
        interpolated in log L0 between two values of k), the number of seeds (the smaller
        one of a bracket's ends), treatment minus baseline for each seed that both have,
        and the fields of the `Judgement`.
    """
    arms = matching.by_arm(saes)
    found = [
        comparison
        for pair in matching.pairs_of(saes, baselines, max_bracket)
        for metric in metrics
        # an interpolated l0_total would be compared with itself
        if not (pair.interpolated and metric.is_sparsity)
        and (comparison := _comparison(pair, arms, metric, confidence)) is not None
    ]
    sparsity = {metric.id for metric in metrics if metric.is_sparsity}
    for way in get_args(matching.Matching):
        family = [
            comparison
            for comparison in found
            if comparison["matching"] == way
            and comparison["metric"] not in sparsity
            and comparison["p_value"] is not None
        ]
        corrected = statistics.holm([comparison["p_value"] for comparison in family])
        for comparison, p_holm in zip(family, corrected, strict=True):
            comparison["p_holm"] = p_holm
    return found


def curves(
    saes: Sequence[MeasuredSAE],
    metrics: Sequence[ComparisonMetric],
    confidence: float,
) -> list[dict[str, Any]]:
    """
    The curves of results.json: each metric but sparsity itself against l0_total.

    A curve is of SAEs that differ in k only; a point has the mean over seeds with its
    interval, whose ends are None with a single seed, or if all agree.
    """
    found: dict[tuple[str, Arm], list[dict[str, Any]]] = {}
    for metric in metrics:
        for arm, by_seed in matching.by_arm(saes).items():
            known = [
                (sae.l0_total, value)
                for sae in by_seed.values()
                if (value := sae.values.get(metric.id)) is not None
                and sae.l0_total is not None
            ]
            if not known or metric.is_sparsity:
                continue
            l0s, values = zip(*known, strict=True)
            interval = statistics.seed_interval(
                values, confidence, metric.is_count, metric.bounds
            )
            point = {
                "axes": dict(arm.axes),
                "l0": fmean(l0s),
                "mean": fmean(values),
                "ci_low": interval and interval.low,
                "ci_high": interval and interval.high,
                "n_seeds": len(known),
            }
            found.setdefault((metric.id, arm.without("k")), []).append(point)
    return [
        {
            "architecture": arm.architecture,
            "label": arm.label,
            "metric": metric,
            "points": sorted(points, key=lambda point: point["l0"]),
        }
        for (metric, arm), points in found.items()
    ]


def _comparison(
    pair: matching.Pair,
    arms: matching.Arms,
    metric: ComparisonMetric,
    confidence: float,
) -> dict[str, Any] | None:
    """Comparison of a pair by a metric; None if a side does not have it."""
    treatment = _values(arms, pair.treatment, metric.id)
    baselines = [_values(arms, known.arm, metric.id) for known in pair.known]
    if not treatment or not all(baselines):
        return None

    def at_l0(values: Sequence[float]) -> float:
        return math.fsum(w * v for w, v in zip(pair.weights, values, strict=True))

    judgement = statistics.Judgement(verdict=pair.refusal or "not measured")
    numbers: dict[str, Any] = {
        "treatment_mean": None,
        "baseline_mean": None,
        "n_treatment": 0,
        "n_baseline": 0,
        "differences": {},
    }
    if not pair.refusal:
        judged, *known = ([*values.values()] for values in (treatment, *baselines))
        judgement = statistics.judge_interpolated(
            judged, known, pair.weights, confidence, metric.is_count, metric.bounds
        )
        numbers = {
            "treatment_mean": fmean(judged),
            "baseline_mean": at_l0([fmean(sample) for sample in known]),
            "n_treatment": len(treatment),
            "n_baseline": min(map(len, baselines)),
            "differences": {
                str(seed): value - at_l0([values[seed] for values in baselines])
                for seed, value in treatment.items()
                if all(seed in values for values in baselines)
            },
        }
    return {
        **pair.facts,
        "metric": metric.id,
        **numbers,
        **asdict(judgement),
        "confidence": confidence,
        "note": pair.note,
    }


def _values(arms: matching.Arms, arm: Arm, metric: str) -> dict[int, float]:
    return {
        seed: value
        for seed, sae in sorted(arms[arm].items())
        if (value := sae.values.get(metric)) is not None
    }
