"""Texts of `saelens-scaffold compare`, and what the report has in common with them."""

from collections.abc import Mapping, Sequence
from functools import partial
from textwrap import fill
from typing import Any

from jinja2 import Environment
from rich.box import MARKDOWN
from rich.markup import escape
from rich.table import Table

from saelens_scaffold._util import pages
from saelens_scaffold._util.tables import markdown
from saelens_scaffold.compare.comparisons import MeasuredSAE, pairs_of
from saelens_scaffold.compare.config import CompareConfig
from saelens_scaffold.compare.grid import Arm, Run
from saelens_scaffold.compare.metrics import metric_name
from saelens_scaffold.compare.statistics import POWER

Rows = dict[tuple[str, str], list[dict[str, Any]]]
"""Comparisons by the judged SAEs and their baseline."""


def environment() -> Environment:
    """The environment of the templates in `report`."""
    made = pages.environment("compare/report")
    # tables are as wide as they must be
    made.filters.update(fill=partial(fill, width=120), table=_table)
    made.globals["power"] = POWER
    return made


def comparison_text(results: Mapping[str, Any]) -> str:
    """
    A table for each pair of kinds of SAEs: every metric with interval and verdict; and the
    published figures beside ours, where there are any.
    """
    n_seeds = len(results["summary"]["seeds"])
    pairs, rows = rows_by_pair(results), one_sided(results)
    text = _text("comparisons.txt", n_seeds=n_seeds, comparisons=pairs, one_sided=rows)
    if results["reference"]:
        text += "\n\n" + reference_text(results["reference"]).rstrip()
    return text + "\n"


def reference_text(figures: Sequence[Mapping[str, Any]]) -> str:
    """A table of the published figures beside ours, followed by their definitions."""
    headers = ("", "figure", "published", "SAE", "ours", "definition")
    rows: list[dict[str, str]] = []
    for number, figure in enumerate(figures, start=1):
        about = [str(number), figure["what"], figure["value"]]
        mark = figure["mark"].partition(":")[0]
        for of_arm in figure["ours"] or [{"arm": "", "shown": "not measured"}]:
            cells = (*about, of_arm["arm"], of_arm["shown"], mark)
            rows.append(dict(zip(headers, cells, strict=True)))
            about, mark = [""] * 3, ""
    return _text("reference.txt", rows=rows, figures=figures) + "\n"


def plan_text(
    config: CompareConfig, runs: Sequence[Run], waves: Sequence[Sequence[Run]]
) -> str:
    """
    What will be trained, and compared as far as that is known by k.

    Args:
        config: The experiment.
        runs: Its SAEs.
        waves: Those that are trained together.
    """
    seeds: dict[Arm, list[int]] = {}
    for run in runs:
        seeds.setdefault(run.arm, []).append(run.seed)
    by_k = [MeasuredSAE(run, {}, run.nominal_l0_total) for run in runs]
    pairs = pairs_of(by_k, config.baselines, config.max_bracket)
    about = {
        "n_saes": len(runs),
        "seeds": seeds,
        "waves": [*filter(len, waves)],
        "pairs": pairs,
    }
    return _text("plan.txt", **about, baselines=config.baselines)


def rows_by_pair(results: Mapping[str, Any]) -> dict[str, Rows]:
    """
    The comparisons of each matching.

    A row is a comparison, its metric, and the cells of a table by column header.
    """
    metrics = {metric["id"]: metric for metric in results["metrics"]}
    n_seeds = len(results["summary"]["seeds"])
    found: dict[str, Rows] = {}
    for comparison in results["comparisons"]:
        treatment = comparison["treatment"]
        judged = _at_l0(treatment["arm"], treatment["l0_total"])
        pair = (judged, _baseline(comparison["baseline"]))
        metric = metrics[comparison["metric"]]
        cells = _cells(comparison, metric, n_seeds)
        row = {"comparison": comparison, "metric": metric, "cells": cells}
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
    shown = {
        (curve["metric"], Arm(curve["architecture"], point["axes"]).label): estimate(
            point, "mean", digits_of_means(metrics[curve["metric"]])
        )
        for curve in results["curves"]
        for point in curve["points"]
    }
    arms = dict.fromkeys(sae["arm"] for sae in results["saes"])
    return [
        {
            "SAE": arm,
            "metric": metric_name(metric),
            "mean": shown[id_, arm],
            "at random": shown.get((metric["random"], arm), "-"),
        }
        for arm in arms
        for id_, metric in metrics.items()
        if id_ not in compared and id_ not in at_random and (id_, arm) in shown
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


def _cells(
    comparison: Mapping[str, Any], metric: Mapping[str, Any], n_seeds: int
) -> dict[str, str]:
    digits = digits_of_means(metric)
    verdict = comparison["verdict"]
    detectable = ""
    if verdict == "not distinguishable" and comparison["detectable"] is not None:
        detectable = number(comparison["detectable"], digits)
    n, n_baseline = comparison["n_treatment"], comparison["n_baseline"]
    if 0 < min(n, n_baseline) < n_seeds:
        verdict += f" ({n} against {n_baseline} seeds)"
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
    ends = baseline["measured"]
    if len(ends) == 1:
        return _at_l0(ends[0]["arm"], ends[0]["l0_total"])
    low, high = (_at_l0(f"k={end['k']:g}", end["l0_total"]) for end in ends)
    return f"{baseline['arm']} between {low} and {high}"


def _at_l0(arm: str, l0_total: float | None) -> str:
    return arm if l0_total is None else f"{arm} (l0_total {l0_total:.1f})"


def _text(template: str, **values: Any) -> str:
    return environment().get_template(template).render(values).rstrip()


def _table(rows: Sequence[Mapping[str, str]], align: str) -> str:
    """A table in Markdown; `align` has a letter for each column, "l" or "r"."""
    table = Table(box=MARKDOWN)
    for letter, header in zip(align, rows[0], strict=True):
        justify = "right" if letter == "r" else "left"
        table.add_column(header, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row.values()))
    return markdown(table)
