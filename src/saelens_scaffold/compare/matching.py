"""Which SAEs are compared with which: at the same k, and at the same l0_total."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

from saelens_scaffold.compare.grid import Arm, Run
from saelens_scaffold.compare.metrics import Results
from saelens_scaffold.compare.statistics import Verdict

Matching = Literal["k", "l0_total"]
"""Same k for the sparse latents, or the same number of active latents in all, the
scaffold's rank paid for out of k."""

SAME_L0_WITHIN = 0.1
"""Share by which the measured l0_total of SAEs may differ that have the same by their k."""


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


Arms = Mapping[Arm, Mapping[int, MeasuredSAE]]
"""Kinds of SAEs, each by its seeds."""


class Known(NamedTuple):
    """
    SAEs that a baseline's values are taken from.

    Attributes:
        arm: The SAEs.
        k: Their k, None for architectures without.
        l0_total: Mean of their active latents per token, None if it is not known.
    """

    arm: Arm
    k: float | None
    l0_total: float | None


@dataclass(frozen=True)
class Pair:
    """
    Two kinds of SAEs to be compared.

    Attributes:
        matching: What they have in common.
        treatment: SAEs with a scaffold, or whatever else has a baseline.
        baseline: What they are compared with. Where it is interpolated, it has no k.
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
    refusal: Verdict | None = None
    note: str = ""

    @property
    def interpolated(self) -> bool:
        """Whether the baseline's value is read off its curve, between two values of k."""
        return len(self.known) == 2

    @property
    def weight(self) -> float:
        """Of the upper end of the bracket: where log L0 lies between the two ends."""
        low, high = (known.l0_total for known in self.known)
        assert low is not None and high is not None and self.treatment_l0 is not None
        return math.log(self.treatment_l0 / low) / math.log(high / low)


def l0_total(run: Run, results: Results) -> float | None:
    """Active latents per token, as far as an evaluation counted them, else by k."""
    dense = results.get("dense_latents", {}).get("eval_result_metrics", {})
    core = results.get("core", {}).get("eval_result_metrics", {})
    for metrics, name in ((dense, "l0_total"), (core, "l0")):
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
        baselines: For each architecture that has one, the one it is compared with.
        max_bracket: Ratio of the l0_total of two SAEs between which a third is
            interpolated, at most.
    """
    arms = by_arm(saes)
    pairs: list[Pair] = []
    for treatment in arms:
        rivals = [
            arm
            for arm in arms
            if arm.architecture == baselines.get(treatment.architecture)
        ]
        pairs += _at_same_k(treatment, rivals, arms)
        pairs += _at_same_l0(treatment, rivals, arms, max_bracket)
    # in the order in which they are read, all of one matching first
    return sorted(pairs, key=lambda pair: pair.matching)


def _at_same_k(treatment: Arm, rivals: Sequence[Arm], arms: Arms) -> list[Pair]:
    judged = _known(arms, treatment)
    return [
        Pair("k", treatment, rival, [known], judged.l0_total)
        for rival in rivals
        if treatment.agrees_with(rival)
        and (known := _known(arms, rival)).k == judged.k is not None
    ]


def _at_same_l0(
    treatment: Arm, rivals: Sequence[Arm], arms: Arms, max_bracket: float
) -> list[Pair]:
    some_run = _some_run(arms, treatment)
    l0 = _known(arms, treatment).l0_total
    if some_run.scaffold_rank == 0 or some_run.nominal_l0_total is None or not l0:
        return []
    by_curve: dict[Arm, list[Arm]] = {}
    for rival in rivals:
        if treatment.without("k").agrees_with(rival.without("k")):
            by_curve.setdefault(rival.without("k"), []).append(rival)
    pairs: list[Pair] = []
    for curve, rivals_of_curve in by_curve.items():
        known = [_known(arms, rival) for rival in rivals_of_curve]
        known = [rival for rival in known if rival.l0_total]
        exact = [
            rival
            for rival in known
            if _some_run(arms, rival.arm).nominal_l0_total == some_run.nominal_l0_total
        ]
        if known:
            pairs.append(_pair_at(l0, treatment, curve, known, exact, max_bracket))
    return pairs


def _pair_at(
    l0: float,
    treatment: Arm,
    curve: Arm,
    known: Sequence[Known],
    exact: Sequence[Known],
    max_bracket: float,
) -> Pair:
    """With whom SAEs of some l0_total are compared, of all with some other k."""
    same = [rival for rival in known if rival.l0_total == l0] or exact
    if same and abs((same[0].l0_total or 0.0) / l0 - 1) <= SAME_L0_WITHIN:
        return Pair("l0_total", treatment, same[0].arm, same[:1], l0)
    notes = [
        f"k={_shown(rival.k)} has the same l0_total by k, but "
        f"{(rival.l0_total or 0.0) / l0 - 1:+.0%} as measured "
        f"({rival.l0_total:.1f}, not {l0:.1f})"
        for rival in same[:1]
    ]
    points = sorted(known, key=lambda rival: rival.l0_total or 0.0)
    below = [rival for rival in points if (rival.l0_total or 0.0) < l0]
    above = [rival for rival in points if (rival.l0_total or 0.0) > l0]
    bracket = [*below[-1:], *above[:1]]
    ratio = (bracket[-1].l0_total or 0.0) / (bracket[0].l0_total or 1.0)
    refusal: Verdict | None = None
    if len(bracket) == 1:
        refusal = "out of range"
        ends = f"{points[0].l0_total:.1f} to {points[-1].l0_total:.1f}"
        notes.append(f"l0_total {l0:.1f} is not within {ends}")
    elif ratio > max_bracket:
        refusal = "bracket too wide"
        notes.append(
            f"{_range(bracket)} are a factor of {ratio:.1f} apart (max_bracket "
            f"{max_bracket:g})"
        )
    note = "; ".join(notes)
    if refusal and bracket[0].k is not None:
        note += f": train {curve.label} with k={_k_at(l0, bracket)}"
    return Pair("l0_total", treatment, curve, bracket, l0, refusal, note)


def _k_at(l0: float, points: Sequence[Known]) -> str:
    """The k that comes nearest to an l0_total, on a line through the points in log-log."""
    logs = [(math.log(p.l0_total or 1.0), math.log(p.k or 1.0)) for p in points]
    (x, y), (x_1, y_1) = logs[0], logs[-1]
    slope = (y_1 - y) / (x_1 - x) if x_1 != x else 1.0
    return str(max(1, round(math.exp(y + slope * (math.log(l0) - x)))))


def _range(bracket: Sequence[Known]) -> str:
    return " and ".join(f"k={_shown(p.k)} (l0_total {p.l0_total:.1f})" for p in bracket)


def _shown(k: float | None) -> str:
    return "-" if k is None else f"{k:g}"


def _some_run(arms: Arms, arm: Arm) -> Run:
    return next(iter(arms[arm].values())).run


def _known(arms: Arms, arm: Arm) -> Known:
    l0s = [sae.l0_total for sae in arms[arm].values() if sae.l0_total is not None]
    k = getattr(_some_run(arms, arm).config, "k", None)
    return Known(arm, k, fmean(l0s) if l0s else None)
