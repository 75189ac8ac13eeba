"""What `saelens-scaffold compare` prints: the plan before, the comparisons after."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from rich.box import MARKDOWN
from rich.markup import escape
from rich.table import Table

from saelens_scaffold._util.tables import markdown
from saelens_scaffold.compare.memory import GB
from saelens_scaffold.compare.metrics import metric_name
from saelens_scaffold.compare.wording import (
    REFUSALS,
    at_l0,
    baseline_text,
    legend,
    one_sided,
    verdict_text,
)

if TYPE_CHECKING:
    from saelens_scaffold.compare.experiment import Plan

_WIDTH = 120
"""Of lines of text; tables are as wide as they must be."""

_MATCHINGS = {
    "k": "at the same k for the sparse latents",
    "l0_total": "at the same l0_total (the scaffold's rank is paid for out of k)",
}


def comparison_text(results: Mapping[str, Any]) -> str:
    """A table for each two kinds of SAEs: every metric with its interval and verdict."""
    metrics = {metric["id"]: metric for metric in results["metrics"]}
    seeds = len(results["summary"]["seeds"])
    parts: list[str] = []
    for matching, said in _MATCHINGS.items():
        comparisons = [c for c in results["comparisons"] if c["matching"] == matching]
        if not comparisons:
            continue
        parts.append(
            f"{said[0].upper()}{said[1:]}, {seeds} seed{'s' * (seeds != 1)}:\n"
        )
        by_pair: dict[str, list[Mapping[str, Any]]] = {}
        for comparison in comparisons:
            by_pair.setdefault(_pair(comparison), []).append(comparison)
        for pair, of_pair in by_pair.items():
            note = of_pair[0]["note"]
            if of_pair[0]["verdict"] in REFUSALS:
                # for the same reason whatever the metric
                refused = f"{pair}: {of_pair[0]['verdict']}, {note}"
                parts.append(fill(refused, _WIDTH) + "\n")
            else:
                table = _pair_table(of_pair, metrics, seeds)
                heading = fill(f"{pair}{note and f'; {note}'}:", _WIDTH)
                parts.append(f"{heading}\n{table}")
        if said := legend(comparisons):
            parts.append(fill(said, _WIDTH) + "\n")
    if not parts:
        parts.append(
            "Nothing to compare: no SAE has a baseline in the grid, or no evaluation of "
            "both.\n"
        )
    return "\n".join([*parts, *_one_sided_table(results)])


def _pair(comparison: Mapping[str, Any]) -> str:
    """Both sides, with the l0_total that was measured of each."""
    treatment = comparison["treatment"]
    judged = at_l0(treatment["arm"], treatment["l0_total"])
    return f"{judged} against {baseline_text(comparison['baseline'])}"


def _pair_table(
    comparisons: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Mapping[str, Any]],
    n_seeds: int,
) -> str:
    table = Table(box=MARKDOWN)
    table.add_column("metric", no_wrap=True)
    for title in ("SAE", "against", "difference", "detectable", "p (Holm)"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for comparison in comparisons:
        metric = metrics[comparison["metric"]]
        table.add_row(
            escape(metric_name(metric)),
            *_numbers(comparison, int(metric["digits"])),
            _p_value(comparison["p_holm"]),
            verdict_text(comparison, n_seeds),
        )
    return markdown(table)


def _one_sided_table(results: Mapping[str, Any]) -> list[str]:
    """Metrics of SAEs that have no counterpart to be compared with."""
    rows = one_sided(results)
    if not rows:
        return []
    table = Table(box=MARKDOWN)
    for title in ("SAE", "metric"):
        table.add_column(title, no_wrap=True)
    for title in ("mean", "at random"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        digits = max(int(row.metric["digits"]), 1)
        table.add_row(
            escape(row.arm),
            escape(metric_name(row.metric)),
            *("-" if point is None else _mean(point, digits) for point in row.points),
        )
    return [f"What only one side has, mean and interval over seeds:\n{markdown(table)}"]


def plan_text(plan: "Plan", tflops: float | None) -> str:
    """What will be trained, and what that needs."""
    needs = plan.estimate
    seeds: dict[str, list[str]] = {}
    for run in plan.runs:
        seeds.setdefault(run.arm.label, []).append(str(run.seed))
    waves = len(plan.waves)
    largest = max(sum(needs.per_sae[run.name] for run in wave) for wave in plan.waves)
    lines = [
        f"{len(plan.runs)} SAEs:",
        *(f"  {arm}, seed {', '.join(of_arm)}" for arm, of_arm in seeds.items()),
        f"in {waves} wave{'s' * (waves != 1)} "
        f"(of {', '.join(str(len(wave)) for wave in plan.waves)}), each on one pass of "
        "the language model",
        f"memory: about {needs.shared / GB:.1f} GB for the language model, the "
        f"activations and a training step, {largest / GB:.1f} GB for the largest wave; "
        f"{plan.available / GB:.1f} GB may be used",
        f"operations: {waves} x {needs.llm_flops:.1e} of the language model, "
        f"{sum(needs.sae_flops.values()):.1e} of the SAEs",
    ]
    if tflops is not None:
        hours = needs.seconds(plan.waves, tflops) / 3600
        lines.append(f"training: about {hours:.1f} hours at {tflops:g} TFLOP/s")
    return "\n".join(lines)


def _numbers(comparison: Mapping[str, Any], digits: int) -> list[str]:
    # means over seeds of a count are no counts
    digits = max(digits, 1)

    def shown(value: float | None, sign: str = "") -> str:
        return "-" if value is None else f"{value:{sign}.{digits}f}"

    difference = shown(comparison["mean"], "+")
    if comparison["ci_low"] is not None:
        ends = (comparison["ci_low"], comparison["ci_high"])
        difference += f" [{', '.join(shown(end, '+') for end in ends)}]"
    is_open = comparison["verdict"] == "not distinguishable"
    return [
        shown(comparison["treatment_mean"]),
        shown(comparison["baseline_mean"]),
        difference,
        shown(comparison["detectable"]) if is_open else "",
    ]


def _mean(point: Mapping[str, Any], digits: int) -> str:
    if point["ci_low"] is None:
        return f"{point['mean']:.{digits}f}"
    ends = ", ".join(f"{point[end]:.{digits}f}" for end in ("ci_low", "ci_high"))
    return f"{point['mean']:.{digits}f} [{ends}]"


def _p_value(p: float | None) -> str:
    return "" if p is None else f"{p:.3f}" if p >= 0.001 else "<0.001"
