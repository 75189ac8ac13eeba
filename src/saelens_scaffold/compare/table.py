"""What `saelens-scaffold compare` prints: the plan before, the comparisons after."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.box import MARKDOWN
from rich.markup import escape
from rich.table import Table

from saelens_scaffold.compare.memory import GB
from saelens_scaffold.compare.metrics import metric_name
from saelens_scaffold.evals.table import markdown

if TYPE_CHECKING:
    from saelens_scaffold.compare.experiment import Plan

_MATCHINGS = {
    "k": "at the same k for the sparse latents",
    "l0_total": "at the same l0_total (the scaffold's rank is paid for out of k)",
}


def comparison_text(results: Mapping[str, Any]) -> str:
    """A table for each way of matching: every comparison with its interval and verdict."""
    metrics = {metric["id"]: metric for metric in results["metrics"]}
    seeds = len(results["summary"]["seeds"])
    parts: list[str] = []
    for matching, said in _MATCHINGS.items():
        comparisons = [c for c in results["comparisons"] if c["matching"] == matching]
        if not comparisons:
            continue
        # nothing to show of these, for the same reason whatever the metric
        outside = [c for c in comparisons if c["verdict"] == "out of range"]
        found = [c for c in comparisons if c not in outside]
        table = Table(box=MARKDOWN)
        for title in ("SAE", "against", "metric"):
            table.add_column(title, no_wrap=True)
        for title in ("SAE", "against", "difference"):
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        before: tuple[str, str] | None = None
        for comparison in found:
            pair = (comparison["treatment"]["arm"], comparison["baseline"]["arm"])
            # said once, on the first of its lines
            names = pair if pair != before else ("", "")
            before = pair
            metric = metrics[comparison["metric"]]
            table.add_row(
                *map(escape, names),
                escape(metric_name(metric)),
                *_numbers(comparison, int(metric["digits"])),
                _verdict(comparison, seeds),
            )
        notes = dict.fromkeys(
            f"{c['treatment']['arm']}: nothing to compare with, {c['note']}\n"
            for c in outside
        )
        parts.append(
            f"{said[0].upper()}{said[1:]}, {seeds} seed{'s' * (seeds != 1)}:\n"
            f"{markdown(table) if found else ''}{''.join(notes)}"
        )
    return "\n".join(parts) or (
        "Nothing to compare: no SAE has a baseline in the grid, or no evaluation of both.\n"
    )


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


def _verdict(comparison: Mapping[str, Any], n_seeds: int) -> str:
    n_pairs = len(comparison["differences"])
    remarks = [
        *(["interpolated"] if comparison["interpolated"] else []),
        *([f"{n_pairs} of {n_seeds} seeds"] if n_pairs < n_seeds else []),
    ]
    return comparison["verdict"] + (f" ({', '.join(remarks)})" if remarks else "")


def _numbers(comparison: Mapping[str, Any], digits: int) -> list[str]:
    def shown(value: float | None, sign: str = "") -> str:
        # means over seeds of a count are no counts
        return "-" if value is None else f"{value:{sign}.{max(digits, 1)}f}"

    difference = shown(comparison["mean"], "+")
    if comparison["ci_low"] is not None:
        ends = (comparison["ci_low"], comparison["ci_high"])
        difference += f" [{', '.join(shown(end, '+') for end in ends)}]"
    return [
        shown(comparison["treatment_mean"]),
        shown(comparison["baseline_mean"]),
        difference,
    ]
