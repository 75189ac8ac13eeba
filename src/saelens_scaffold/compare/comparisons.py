"""Each metric's comparison of the pairs of SAEs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import get_args

from saelens_scaffold.compare.grid import Arm
from saelens_scaffold.compare.matching import (
    Arms,
    Matching,
    MeasuredSAE,
    Pair,
    by_arm,
    pairs_of,
)
from saelens_scaffold.compare.metrics import ComparisonMetric
from saelens_scaffold.compare.statistics import Judgement, holm, judge_interpolated


@dataclass(frozen=True)
class Comparison:
    """
    Comparison of two kinds of SAEs by one metric.

    Attributes:
        pair: The SAEs.
        metric: Id of the metric.
        judgement: Difference, interval and verdict.
        treatment_mean: Mean over the seeds of the judged SAEs.
        baseline_mean: Mean of the baseline, interpolated in log L0 between two values of k.
        n_treatment: Number of seeds of the judged SAEs.
        n_baseline: Seeds of the baseline; of a bracket, at the end that has fewer.
        differences: Treatment minus baseline, for each seed that both have.
    """

    pair: Pair
    metric: str
    judgement: Judgement
    treatment_mean: float | None = None
    baseline_mean: float | None = None
    n_treatment: int = 0
    n_baseline: int = 0
    differences: Mapping[int, float] = field(default_factory=dict)


def compare_arms(
    saes: Sequence[MeasuredSAE],
    metrics: Sequence[ComparisonMetric],
    baselines: Mapping[str, str],
    confidence: float,
    max_bracket: float,
) -> list[Comparison]:
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
    """
    arms = by_arm(saes)
    found = [
        comparison
        for pair in pairs_of(saes, baselines, max_bracket)
        for metric in metrics
        # an interpolated l0_total would be compared with itself
        if not (pair.interpolated and metric.is_sparsity)
        and (comparison := _comparison(pair, arms, metric, confidence)) is not None
    ]
    sparsity = {metric.id for metric in metrics if metric.is_sparsity}
    for matching in get_args(Matching):
        family = [
            (comparison.judgement, p)
            for comparison in found
            if comparison.pair.matching == matching
            and comparison.metric not in sparsity
            and (p := comparison.judgement.p_value) is not None
        ]
        corrected = holm([p for _, p in family])
        for (judgement, _), p_holm in zip(family, corrected, strict=True):
            judgement.p_holm = p_holm
    return found


def _comparison(
    pair: Pair, arms: Arms, metric: ComparisonMetric, confidence: float
) -> Comparison | None:
    """Comparison of a pair by a metric; None if a side does not have it."""
    treatment = _values(arms, pair.treatment, metric.id)
    baselines = [_values(arms, known.arm, metric.id) for known in pair.known]
    if not treatment or not all(baselines):
        return None
    if pair.refusal:
        return Comparison(pair, metric.id, Judgement(verdict=pair.refusal))
    judged, *known = (list(values.values()) for values in (treatment, *baselines))
    weights = pair.weights

    def at_l0(values: Sequence[float]) -> float:
        return math.fsum(w * value for w, value in zip(weights, values, strict=True))

    return Comparison(
        pair,
        metric.id,
        judge_interpolated(
            judged, known, weights, confidence, metric.is_count, metric.bounds
        ),
        treatment_mean=fmean(judged),
        baseline_mean=at_l0([fmean(sample) for sample in known]),
        n_treatment=len(treatment),
        n_baseline=min(map(len, baselines)),
        differences={
            seed: value - at_l0([values[seed] for values in baselines])
            for seed, value in treatment.items()
            if all(seed in values for values in baselines)
        },
    )


def _values(arms: Arms, arm: Arm, metric: str) -> dict[int, float]:
    return {
        seed: value
        for seed, sae in sorted(arms[arm].items())
        if (value := sae.values.get(metric)) is not None
    }
