"""What the terminal's tables and the report say alike of a comparison's results."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from saelens_scaffold.compare.grid import Arm
from saelens_scaffold.compare.statistics import POWER, Verdict

REFUSALS: tuple[Verdict, ...] = ("out of range", "bracket too wide")
"""Verdicts that say the same whatever the metric."""

Comparisons = Sequence[Mapping[str, Any]]


class OneSided(NamedTuple):
    """
    A metric of SAEs that no others are compared with by it.

    Attributes:
        arm: The SAEs.
        metric: The metric, as in results.json.
        points: Its mean and interval over seeds, and those of its value at random, None
            where there is none.
    """

    arm: str
    metric: Mapping[str, Any]
    points: tuple[Mapping[str, Any], Mapping[str, Any] | None]


def baseline_text(baseline: Mapping[str, Any]) -> str:
    """A baseline with its measured l0_total, or the bracket that it is interpolated in."""
    if len(baseline["measured"]) == 2:
        ends = [
            at_l0(f"k={end['k']:g}", end["l0_total"]) for end in baseline["measured"]
        ]
        return f"{baseline['arm']} between {' and '.join(ends)}"
    (end,) = baseline["measured"]
    return at_l0(end["arm"], end["l0_total"])


def at_l0(arm: str, l0_total: float | None) -> str:
    """SAEs with their measured l0_total, if it is known."""
    return arm if l0_total is None else f"{arm} (l0_total {l0_total:.1f})"


def verdict_text(comparison: Mapping[str, Any], n_seeds: int) -> str:
    """A verdict, and how many seeds it is of where some are missing."""
    sides = (comparison["n_treatment"], comparison["n_baseline"])
    if 0 < min(sides) < n_seeds:
        return f"{comparison['verdict']} ({sides[0]} against {sides[1]} seeds)"
    return comparison["verdict"]


def legend(comparisons: Comparisons) -> str:
    """What stands below the comparisons of one matching."""
    tested = [c for c in comparisons if c["p_value"] is not None]
    if not tested:
        return ""
    told_apart = sum(c["verdict"] in ("higher", "lower") for c in tested)
    by_chance = sum(1 - c["confidence"] for c in tested)
    family = [c for c in tested if c["p_holm"] is not None]
    after = sum(c["p_holm"] < 1 - c["confidence"] for c in family)
    sentences = [
        f"In brackets: the {confidence_text(tested)} interval of the difference of means "
        f"({'; '.join(sorted({c['method'] for c in tested}))}).",
        f"{told_apart} of {len(tested)} differences are told from zero, each for itself; "
        f"about {by_chance:.2g} would be by chance if there were none.",
    ]
    if family:
        sentences.append(
            f"{after} of {len(family)} are after Holm's correction for all that are "
            "matched like this, but for those of sparsity itself."
        )
    if any(c["verdict"] == "not distinguishable" for c in tested):
        sentences.append(
            f"Detectable: the true difference that as many seeds of this spread find in "
            f"{POWER:.0%} of experiments."
        )
    if any(c["interpolated"] and c["mean"] is not None for c in comparisons):
        sentences.append(
            "Interpolated baselines: a verdict holds against both ends of the bracket, "
            "and the interval reaches over those of both."
        )
    return " ".join(sentences)


def confidence_text(comparisons: Comparisons) -> str:
    """The confidence of all intervals."""
    levels = sorted({comparison["confidence"] for comparison in comparisons})
    return " or ".join(f"{level:.0%}" for level in levels)


def one_sided(results: Mapping[str, Any]) -> list[OneSided]:
    """
    The metrics that no comparison has, as those that only SAEs with a scaffold have.

    Args:
        results: As in results.json.
    """
    compared = {comparison["metric"] for comparison in results["comparisons"]}
    metrics = {metric["id"]: metric for metric in results["metrics"]}
    at_random = {metric["random"] for metric in results["metrics"]}
    points = {
        (curve["metric"], Arm(curve["architecture"], point["axes"]).label): point
        for curve in results["curves"]
        for point in curve["points"]
    }
    arms = dict.fromkeys(sae["arm"] for sae in results["saes"])
    return [
        OneSided(arm, metric, (points[id_, arm], points.get((metric["random"], arm))))
        for arm in arms
        for id_, metric in metrics.items()
        if id_ not in compared and id_ not in at_random and (id_, arm) in points
    ]
