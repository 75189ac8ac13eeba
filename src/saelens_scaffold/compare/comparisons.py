"""Which SAEs are compared with which, and how each metric compares them."""

import math
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal, NamedTuple, get_args

from saelens_scaffold.compare import statistics
from saelens_scaffold.compare.grid import Arm, Run
from saelens_scaffold.compare.metrics import ComparisonMetric, Results

Matching = Literal["k", "l0_total"]
"""Same k for the sparse latents, or the same number of active latents in all, the
scaffold's rank paid for out of k."""

SAME_L0_WITHIN = 0.1
"""Relative difference of the measured l0_total up to which the same nominal one counts."""


class MeasuredSAE(NamedTuple):
    """
    An SAE and its measurements.

    Attributes:
        run: The SAE.
        values: Its metrics, by their ids.
        l0_total: Active latents per token, scaffold included; by k if it was not measured.
    """

    run: Run
    values: Mapping[str, float | None]
    l0_total: float | None


class Known(NamedTuple):
    """
    SAEs that a baseline's values are taken from.

    Attributes:
        arm: The SAEs.
        k: Their k, None for architectures without.
        l0_total: Mean of their active latents per token, None if it is not known.
        nominal_l0_total: The same by their k, None without one.
    """

    arm: Arm
    k: float | None
    l0_total: float | None
    nominal_l0_total: float | None


@dataclass(frozen=True)
class Pair:
    """
    Two kinds of SAEs to be compared.

    Attributes:
        matching: What they have in common.
        treatment: SAEs with a scaffold, or whatever else has a baseline.
        baseline: Their baseline. Where it is interpolated, it has no k.
        known: The SAEs of the baseline: one kind, or the two ends of a bracket, that with
            the lower l0_total first. The nearest ones, where none is near enough.
        treatment_l0: l0_total of the judged SAEs, as measured.
        refusal: Why there is no comparison, if there is none.
        note: What else there is to say.
    """

    matching: Matching
    treatment: Arm
    baseline: Arm
    known: Sequence[Known]
    treatment_l0: float | None
    refusal: str | None = None
    note: str = ""

    @property
    def interpolated(self) -> bool:
        """Whether the baseline's value is read off its curve, between two values of k."""
        return len(self.known) == 2

    @property
    def weights(self) -> list[float]:
        """Weights of the baseline's SAEs: where log L0 lies between the two ends."""
        if not self.interpolated:
            return [1.0]
        low, high = map(_l0, self.known)
        assert self.treatment_l0 is not None
        upper = math.log(self.treatment_l0 / low) / math.log(high / low)
        return [1 - upper, upper]


def l0_total(run: Run, results: Results) -> float | None:
    """Active latents per token, as far as an evaluation counted them, else by k."""
    for evaluation, name in (("dense_latents", "l0_total"), ("core", "l0")):
        metrics = results.get(evaluation, {}).get("eval_result_metrics", {})
        counted = metrics.get("sparsity", {}).get(name)
        if counted is not None:
            return float(counted)
    return run.nominal_l0_total


def by_arm(saes: Sequence[MeasuredSAE]) -> dict[Arm, dict[int, MeasuredSAE]]:
    """SAEs by their seeds, for each kind of them."""
    arms: dict[Arm, dict[int, MeasuredSAE]] = {}
    for sae in saes:
        arms.setdefault(sae.run.arm, {})[sae.run.seed] = sae
    return arms


def pairs_of(
    saes: Sequence[MeasuredSAE], baselines: Mapping[str, str], max_bracket: float
) -> list[Pair]:
    """
    Every kind of SAEs with its baseline, if it has one, in both ways.

    Args:
        saes: All SAEs.
        baselines: The baseline's architecture, for each architecture that has one.
        max_bracket: Largest ratio of the l0_total of two SAEs between which a third is
            interpolated.
    """
    arms = by_arm(saes)
    known = {arm: _known(arm, by_seed) for arm, by_seed in arms.items()}
    pairs: list[Pair] = []
    for treatment, by_seed in arms.items():
        baseline = baselines.get(treatment.architecture)
        rivals = [of for arm, of in known.items() if arm.architecture == baseline]
        pairs += _at_same_k(known[treatment], rivals)
        if any(sae.run.scaffold_rank for sae in by_seed.values()):
            pairs += _at_same_l0(known[treatment], rivals, max_bracket)
    # in the order in which they are read, all of one matching first
    return sorted(pairs, key=lambda pair: pair.matching)


def _known(arm: Arm, by_seed: Mapping[int, MeasuredSAE]) -> Known:
    l0s = [sae.l0_total for sae in by_seed.values() if sae.l0_total is not None]
    run = next(iter(by_seed.values())).run
    k = getattr(run.config, "k", None)
    return Known(arm, k, fmean(l0s) if l0s else None, run.nominal_l0_total)


def _at_same_k(judged: Known, rivals: Sequence[Known]) -> Iterator[Pair]:
    for rival in rivals:
        if judged.arm.agrees_with(rival.arm) and judged.k == rival.k is not None:
            yield Pair("k", judged.arm, rival.arm, [rival], judged.l0_total)


def _at_same_l0(
    judged: Known, rivals: Sequence[Known], max_bracket: float
) -> Iterator[Pair]:
    if judged.nominal_l0_total is None or not judged.l0_total:
        return
    by_curve: dict[Arm, list[Known]] = {}
    for rival in rivals:
        curve = rival.arm.without("k")
        if rival.l0_total and judged.arm.without("k").agrees_with(curve):
            by_curve.setdefault(curve, []).append(rival)
    for curve, points in by_curve.items():
        yield _pair_on_curve(judged, curve, sorted(points, key=_l0), max_bracket)


def _pair_on_curve(
    judged: Known, curve: Arm, points: Sequence[Known], max_bracket: float
) -> Pair:
    """The pair at an l0_total, of all points of a curve in their order."""
    l0 = _l0(judged)
    same = [point for point in points if _l0(point) == l0] or [
        point for point in points if point.nominal_l0_total == judged.nominal_l0_total
    ]
    if same and abs(_l0(same[0]) / l0 - 1) <= SAME_L0_WITHIN:
        return Pair("l0_total", judged.arm, same[0].arm, same[:1], l0)
    notes = [
        f"k={point.k:g} has the same l0_total by k, but {_l0(point) / l0 - 1:+.0%} as "
        f"measured ({point.l0_total:.1f}, not {l0:.1f})"
        for point in same[:1]
    ]
    above = bisect(points, l0, key=_l0)
    bracket = points[max(above - 1, 0) : above + 1]
    ratio = _l0(bracket[-1]) / _l0(bracket[0])
    refusal: str | None = None
    if len(bracket) == 1:
        refusal = "out of range"
        ends = f"{points[0].l0_total:.1f} to {points[-1].l0_total:.1f}"
        notes.append(f"l0_total {l0:.1f} is not within {ends}")
    elif ratio > max_bracket:
        refusal = "bracket too wide"
        ends = " and ".join(f"k={p.k:g} (l0_total {p.l0_total:.1f})" for p in bracket)
        notes.append(
            f"{ends} are a factor of {ratio:.1f} apart (max_bracket {max_bracket:g})"
        )
    note = "; ".join(notes)
    if refusal and bracket[0].k is not None:
        note += f": train {curve.label} with k={_k_at(l0, bracket)}"
    return Pair("l0_total", judged.arm, curve, bracket, l0, refusal, note)


def _k_at(l0: float, points: Sequence[Known]) -> str:
    """The k that comes nearest to an l0_total, on a line through the points in log-log."""
    logs = [(math.log(_l0(point)), math.log(point.k or 1.0)) for point in points]
    (x, y), (x_1, y_1) = logs[0], logs[-1]
    slope = (y_1 - y) / (x_1 - x) if x_1 != x else 1.0
    return str(max(1, round(math.exp(y + slope * (math.log(l0) - x)))))


def _l0(known: Known) -> float:
    assert known.l0_total is not None
    return known.l0_total


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
    tested = [each for each in found if each["metric"] not in sparsity]
    tested = [each for each in tested if each["p_value"] is not None]
    for way in get_args(Matching):
        family = [each for each in tested if each["matching"] == way]
        corrected = statistics.holm([comparison["p_value"] for comparison in family])
        for comparison, p_holm in zip(family, corrected, strict=True):
            comparison["p_holm"] = p_holm
    return found


def curves(
    saes: Sequence[MeasuredSAE], metrics: Sequence[ComparisonMetric], confidence: float
) -> list[dict[str, Any]]:
    """
    The curves of results.json: each metric but sparsity itself against l0_total.

    A curve is of SAEs that differ in k only; a point has the mean over seeds with its
    interval, whose ends are None with a single seed, or if all agree.
    """
    found: dict[tuple[str, Arm], list[dict[str, Any]]] = {}
    for metric in metrics:
        for arm, by_seed in by_arm(saes).items():
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
    pair: Pair,
    arms: Mapping[Arm, Mapping[int, MeasuredSAE]],
    metric: ComparisonMetric,
    confidence: float,
) -> dict[str, Any] | None:
    """Comparison of a pair by a metric; None if a side does not have it."""
    treatment = _values(arms[pair.treatment], metric.id)
    baselines = [_values(arms[known.arm], metric.id) for known in pair.known]
    if not treatment or not all(baselines):
        return None

    def at_l0(values: Sequence[float]) -> float:
        return math.fsum(w * v for w, v in zip(pair.weights, values, strict=True))

    if pair.refusal:
        treatment, baselines = {}, []
        judgement = statistics.Judgement(verdict=pair.refusal)
    else:
        judged, *known = ([*values.values()] for values in (treatment, *baselines))
        judgement = statistics.judge_interpolated(
            judged, known, pair.weights, confidence, metric.is_count, metric.bounds
        )
    means = [fmean(values.values()) for values in baselines]
    measured = [
        {"arm": end.arm.label, "k": end.k, "l0_total": end.l0_total}
        for end in pair.known
    ]
    return {
        "matching": pair.matching,
        "treatment": {**pair.treatment.facts, "l0_total": pair.treatment_l0},
        "baseline": {**pair.baseline.facts, "measured": measured},
        "interpolated": pair.interpolated,
        "metric": metric.id,
        "treatment_mean": fmean(treatment.values()) if treatment else None,
        "baseline_mean": at_l0(means) if means else None,
        "n_treatment": len(treatment),
        "n_baseline": min(map(len, baselines), default=0),
        "differences": {
            str(seed): value - at_l0([values[seed] for values in baselines])
            for seed, value in treatment.items()
            if all(seed in values for values in baselines)
        },
        **asdict(judgement),
        "confidence": confidence,
        "note": pair.note,
    }


def _values(by_seed: Mapping[int, MeasuredSAE], metric: str) -> dict[int, float]:
    values = {seed: sae.values.get(metric) for seed, sae in sorted(by_seed.items())}
    return {seed: value for seed, value in values.items() if value is not None}
