"""What the terminal's tables and the report alike show of a comparison's results."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from saelens_scaffold.compare.grid import Arm
from saelens_scaffold.compare.metrics import metric_name
from saelens_scaffold.compare.statistics import POWER, Verdict

REFUSALS: tuple[Verdict, ...] = ("out of range", "bracket too wide")
"""Verdicts that do not depend on the metric."""

Comparisons = Sequence[Mapping[str, Any]]


class Row(NamedTuple):
    """
    A comparison as tables show it.

    Attributes:
        comparison: The comparison, as in results.json.
        metric: Its metric, likewise.
        cells: Texts of the table's cells, by column header.
    """

    comparison: Mapping[str, Any]
    metric: Mapping[str, Any]
    cells: dict[str, str]


def rows_by_pair(
    results: Mapping[str, Any],
) -> dict[str, dict[tuple[str, str], list[Row]]]:
    """The comparisons of each matching, by the judged SAEs and their baseline."""
    metrics = {metric["id"]: metric for metric in results["metrics"]}
    n_seeds = len(results["summary"]["seeds"])
    found: dict[str, dict[tuple[str, str], list[Row]]] = {}
    for comparison in results["comparisons"]:
        treatment = comparison["treatment"]
        judged = _at_l0(treatment["arm"], treatment["l0_total"])
        pair = (judged, _baseline(comparison["baseline"]))
        metric = metrics[comparison["metric"]]
        row = Row(comparison, metric, _cells(comparison, metric, n_seeds))
        found.setdefault(comparison["matching"], {}).setdefault(pair, []).append(row)
    return found


def one_sided(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """
    Rows for metrics without any comparison, as those that only scaffold SAEs have.

    Args:
        results: Contents of results.json.

    Returns:
        Cells by column header: the SAEs, the metric, and its mean and value at random,
        both with their intervals over seeds.
    """
    compared = {comparison["metric"] for comparison in results["comparisons"]}
    metrics = {metric["id"]: metric for metric in results["metrics"]}
    at_random = {metric["random"] for metric in results["metrics"]}
    points = {
        (curve["metric"], Arm(curve["architecture"], point["axes"]).label): point
        for curve in results["curves"]
        for point in curve["points"]
    }

    def mean(id_: str, arm: str, metric: Mapping[str, Any]) -> str:
        point = points.get((id_, arm), {"mean": None})
        return estimate(point, "mean", digits_of_means(metric))

    arms = dict.fromkeys(sae["arm"] for sae in results["saes"])
    return [
        {
            "SAE": arm,
            "metric": metric_name(metric),
            "mean": mean(id_, arm, metric),
            "at random": mean(metric["random"], arm, metric),
        }
        for arm in arms
        for id_, metric in metrics.items()
        if id_ not in compared and id_ not in at_random and (id_, arm) in points
    ]


def number(value: float | None, digits: int, sign: str = "-") -> str:
    """A number, or a dash if there is none."""
    return "-" if value is None else f"{value:{sign},.{digits}f}"


def estimate(found: Mapping[str, Any], field: str, digits: int, sign: str = "-") -> str:
    """A number with its interval, if it has one."""
    shown = number(found[field], digits, sign)
    if found.get("ci_low") is None or found.get("ci_high") is None:
        return shown
    ends = (number(found[end], digits, sign) for end in ("ci_low", "ci_high"))
    return f"{shown} [{', '.join(ends)}]"


def p_value(p: float | None) -> str:
    """A p-value to three digits; empty if there is none."""
    if p is None:
        return ""
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def digits_of_means(metric: Mapping[str, Any]) -> int:
    """Digits of a metric's means: those of counts are not whole."""
    return max(int(metric["digits"]), 1)


def legend(comparisons: Comparisons) -> str:
    """Explanation below the comparisons of one matching."""
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
    """Confidence of the intervals."""
    levels = sorted({comparison["confidence"] for comparison in comparisons})
    return " or ".join(f"{level:.0%}" for level in levels)


def _cells(
    comparison: Mapping[str, Any], metric: Mapping[str, Any], n_seeds: int
) -> dict[str, str]:
    digits = digits_of_means(metric)
    verdict = comparison["verdict"]
    detectable = ""
    if verdict == "not distinguishable" and comparison["detectable"] is not None:
        detectable = number(comparison["detectable"], digits)
    sides = (comparison["n_treatment"], comparison["n_baseline"])
    if 0 < min(sides) < n_seeds:
        verdict += f" ({sides[0]} against {sides[1]} seeds)"
    return {
        "metric": metric_name(metric),
        "SAE": number(comparison["treatment_mean"], digits),
        "against": number(comparison["baseline_mean"], digits),
        "difference": estimate(comparison, "mean", digits, "+"),
        "detectable": detectable,
        "p (Holm)": p_value(comparison["p_holm"]),
        "verdict": verdict,
    }


def _baseline(baseline: Mapping[str, Any]) -> str:
    """A baseline with its measured l0_total, or the bracket that it is interpolated in."""
    if len(baseline["measured"]) == 2:
        ends = [
            _at_l0(f"k={end['k']:g}", end["l0_total"]) for end in baseline["measured"]
        ]
        return f"{baseline['arm']} between {' and '.join(ends)}"
    (end,) = baseline["measured"]
    return _at_l0(end["arm"], end["l0_total"])


def _at_l0(arm: str, l0_total: float | None) -> str:
    return arm if l0_total is None else f"{arm} (l0_total {l0_total:.1f})"
