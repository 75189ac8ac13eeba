"""Metrics against sparsity, with intervals over seeds."""

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from saelens_scaffold.compare.grid import Arm
from saelens_scaffold.compare.matching import MeasuredSAE, by_arm
from saelens_scaffold.compare.metrics import ComparisonMetric
from saelens_scaffold.compare.statistics import seed_interval


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


def curves(
    saes: Sequence[MeasuredSAE],
    metrics: Sequence[ComparisonMetric],
    confidence: float,
) -> list[Curve]:
    """Each metric but sparsity itself against l0_total, with intervals over seeds."""
    arms = by_arm(saes)
    found: list[Curve] = []
    for metric in metrics:
        by_curve: dict[Arm, list[CurvePoint]] = {}
        for arm, by_seed in arms.items():
            point = _point(arm, by_seed.values(), metric, confidence)
            if point is not None and not metric.is_sparsity:
                by_curve.setdefault(arm.without("k"), []).append(point)
        found += [
            Curve(arm, metric.id, sorted(points, key=lambda point: point.l0_total))
            for arm, points in by_curve.items()
        ]
    return found


def _point(
    arm: Arm, seeds: Iterable[MeasuredSAE], metric: ComparisonMetric, confidence: float
) -> CurvePoint | None:
    known = [
        (sae.l0_total, value)
        for sae in seeds
        if (value := sae.values.get(metric.id)) is not None and sae.l0_total is not None
    ]
    if not known:
        return None
    values = [value for _, value in known]
    found = seed_interval(values, confidence, metric.is_count, metric.bounds)
    low, high = found[1:] if found else (None, None)
    l0_total = fmean(l0 for l0, _ in known)
    return CurvePoint(arm, l0_total, fmean(values), low, high, len(known))
