"""Published figures beside ours, with the definition of each."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.box import MARKDOWN
from rich.markup import escape
from rich.table import Table

from saelens_scaffold._util.tables import markdown
from saelens_scaffold.compare.config import CompareConfig, ReferenceFigure
from saelens_scaffold.compare.grid import Arm
from saelens_scaffold.evals.metric_descriptions import metric_descriptions
from saelens_scaffold.evals.registry import Metric, known_evaluations

_FORMATS = {None: ".3g", "ratio": "+.0%", "difference": "+.3f"}
_CHANGES = {
    None: "",
    "ratio": "; the change against the plain SAE of the same k and seed, as a share of its value",
    "difference": "; minus that of the plain SAE of the same k and seed",
}


def references(
    config: CompareConfig, saes: Sequence[Mapping[str, Any]], command: str
) -> list[dict[str, Any]]:
    """
    The published figures of an experiment beside ours.

    Args:
        config: The experiment.
        saes: Its SAEs, as in results.json.
        command: The command that measured them.

    Returns:
        For each figure its words, both definitions, how they relate (`mark`), and our
        values (`ours`): one entry for each kind of SAE, none if it was not measured.
    """
    return [
        {
            "what": figure.what,
            "value": figure.value,
            "source": figure.source,
            "definition": figure.definition,
            "metric": figure.metric,
            "our_definition": _our_definition(figure),
            "mark": _mark(figure),
            "ours": _ours(figure, config, saes),
            "command": command,
        }
        for figure in config.reference
    ]


def reference_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of the published figures beside ours, and under it their definitions."""
    table = Table(box=MARKDOWN)
    table.add_column("", justify="right", no_wrap=True)
    for title in ("figure", "published", "SAE", "ours", "definition"):
        table.add_column(title, no_wrap=True)
    notes: list[str] = []
    for number, row in enumerate(rows, start=1):
        marked = row["mark"].partition(":")[0]
        first = [str(number), *map(escape, (row["what"], row["value"])), marked]
        ours = row["ours"] or [{"arm": "", "shown": "not measured"}]
        for i, of_arm in enumerate(ours):
            n, what, value, mark = first if i == 0 else ("", "", "", "")
            arm, shown = escape(of_arm["arm"]), escape(of_arm["shown"])
            table.add_row(n, what, value, arm, shown, mark)
        notes += [
            f"{number}. {row['source']}: {row['definition']}",
            f"   ours: {_with_metric(row) if row['metric'] else 'none'}",
            f"   {row['mark']}",
        ]
    return (
        "Published figures beside ours (mean, and range over the SAEs of all seeds):\n"
        + markdown(table)
        + "\n"
        + "\n".join(notes)
        + "\n"
    )


def _with_metric(row: Mapping[str, Any]) -> str:
    described = row["our_definition"]
    return f"{described} ({row['metric']})" if described else row["metric"]


def _our_definition(figure: ReferenceFigure) -> str:
    """What our figure is, in the words of the evaluation that measures it."""
    if figure.metric is None:
        return ""
    name, _, path = figure.metric.partition(".")
    described = metric_descriptions(known_evaluations()[name]).get(path, "")
    return described + _CHANGES[figure.against_baseline]


def _mark(figure: ReferenceFigure) -> str:
    """How the two definitions relate, as far as the source says."""
    parts = {"differs": figure.differs, "not stated": figure.not_stated}
    said = [f"{state}: {reason}" for state, reason in parts.items() if reason]
    return "; ".join(said) or "same definition"


def _ours(
    figure: ReferenceFigure, config: CompareConfig, saes: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Our values, for each kind of SAE that the figure is about."""
    if figure.metric is None:
        return []
    by_arm: dict[str, list[float | None]] = {}
    for sae in saes:
        if not _is_about(figure, config, sae):
            continue
        found = by_arm.setdefault(sae["arm"], [])
        value = _value(figure.metric, sae)
        if figure.against_baseline is None:
            found += [] if value is None else [value]
            continue
        for other in saes:
            theirs = _value(figure.metric, other)
            if not _are_twins(config, sae, other) or value is None or theirs is None:
                continue
            if figure.against_baseline == "difference":
                found.append(value - theirs)
            else:
                found.append(value / theirs - 1 if theirs else None)
    return [
        _of_arm(arm, values, _FORMATS[figure.against_baseline])
        for arm, values in by_arm.items()
        if values
    ]


def _of_arm(arm: str, values: Sequence[float | None], form: str) -> dict[str, Any]:
    """Mean and range; None among the values stands for a baseline of 0."""
    there = [value for value in values if value is not None]
    left_out = len(values) - len(there)
    shown = f"{fmean(there):{form}}" if there else "-"
    if len(there) > 1:
        ends = f"{min(there):{form}} to {max(there):{form}}"
        shown += f" ({ends}, {len(there)} SAEs)"
    if left_out:
        shown += f"; {left_out} with a baseline of 0 left out"
    return {
        "arm": arm,
        "shown": shown,
        "mean": fmean(there) if there else None,
        "min": min(there, default=None),
        "max": max(there, default=None),
        "n_saes": len(there),
        "n_without_baseline": left_out,
    }


def _is_about(
    figure: ReferenceFigure, config: CompareConfig, sae: Mapping[str, Any]
) -> bool:
    if figure.architecture is not None:
        is_meant = sae["architecture"] == figure.architecture
    elif figure.against_baseline:
        is_meant = sae["architecture"] in config.baselines
    else:
        is_meant = True
    axes = {**sae["axes"], "seed": sae["seed"]}
    return is_meant and all(axes.get(a) == value for a, value in figure.where.items())


def _are_twins(
    config: CompareConfig, sae: Mapping[str, Any], other: Mapping[str, Any]
) -> bool:
    """Whether the other is the baseline of an SAE, of the same seed and axes."""
    return (
        other["architecture"] == config.baselines.get(sae["architecture"])
        and other["seed"] == sae["seed"]
        and Arm(sae["architecture"], sae["axes"]).agrees_with(
            Arm(other["architecture"], other["axes"])
        )
    )


def _value(metric: str, sae: Mapping[str, Any]) -> float | None:
    evaluation, _, path = metric.partition(".")
    found = sae["evaluations"].get(evaluation)
    return Metric("", path).value({"eval_result_metrics": found}) if found else None
