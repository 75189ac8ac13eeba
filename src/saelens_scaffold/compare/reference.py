"""Published figures beside ours, with the definition of each."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from saelens_scaffold.compare.config import CompareConfig, ReferenceFigure
from saelens_scaffold.compare.grid import Arm
from saelens_scaffold.evals.base import Metric
from saelens_scaffold.evals.metric_descriptions import metric_descriptions
from saelens_scaffold.evals.registry import known_evaluations

SAE = Mapping[str, Any]
"""An SAE of results.json."""

_FORMATS = {None: ".3g", "ratio": "+.0%", "difference": "+.3f"}
_CHANGES = {
    None: "",
    "ratio": "; the change against the plain SAE of the same k and seed, as a share of its value",
    "difference": "; minus that of the plain SAE of the same k and seed",
}


def references(
    config: CompareConfig, saes: Sequence[SAE], command: str
) -> list[dict[str, Any]]:
    """
    The published figures of an experiment beside ours.

    Args:
        config: The experiment.
        saes: Its SAEs, as in results.json.
        command: The command that measured them.

    Returns:
        For each figure its words, both definitions, their relation (`mark`), and our
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


def _our_definition(figure: ReferenceFigure) -> str:
    """Definition of our figure, in the words of its evaluation."""
    if figure.metric is None:
        return ""
    name, _, path = figure.metric.partition(".")
    described = metric_descriptions(known_evaluations()[name]).get(path, "")
    return described + _CHANGES[figure.against_baseline]


def _mark(figure: ReferenceFigure) -> str:
    """Relation of the two definitions, as far as the source states its own."""
    parts = {"differs": figure.differs, "not stated": figure.not_stated}
    said = [f"{state}: {reason}" for state, reason in parts.items() if reason]
    return "; ".join(said) or "same definition"


def _ours(
    figure: ReferenceFigure, config: CompareConfig, saes: Sequence[SAE]
) -> list[dict[str, Any]]:
    """Our values, for each kind of SAE that the figure is about."""
    by_arm: dict[str, list[float | None]] = {}
    for sae in saes:
        if _is_about(figure, config, sae):
            by_arm.setdefault(sae["arm"], []).extend(_values(figure, config, sae, saes))
    form = _FORMATS[figure.against_baseline]
    return [_of_arm(arm, values, form) for arm, values in by_arm.items() if values]


def _is_about(figure: ReferenceFigure, config: CompareConfig, sae: SAE) -> bool:
    about = {**sae["axes"], "seed": sae["seed"]}
    has_meaning = (
        figure.against_baseline is None or sae["architecture"] in config.baselines
    )
    is_meant = figure.architecture in (None, sae["architecture"])
    return has_meaning and is_meant and figure.where.items() <= about.items()


def _values(
    figure: ReferenceFigure, config: CompareConfig, sae: SAE, saes: Sequence[SAE]
) -> list[float | None]:
    """An SAE's values, one for each baseline; None where a ratio's baseline is 0."""
    value = _value(figure, sae)
    if value is None or figure.against_baseline is None:
        return [] if value is None else [value]
    twins = [_value(figure, other) for other in saes if _are_twins(config, sae, other)]
    known = [theirs for theirs in twins if theirs is not None]
    if figure.against_baseline == "difference":
        return [value - theirs for theirs in known]
    return [value / theirs - 1 if theirs else None for theirs in known]


def _value(figure: ReferenceFigure, sae: SAE) -> float | None:
    evaluation, _, path = (figure.metric or "").partition(".")
    found = sae["evaluations"].get(evaluation) or {}
    return Metric("", path).value({"eval_result_metrics": found})


def _are_twins(config: CompareConfig, sae: SAE, other: SAE) -> bool:
    """Whether the other is the baseline of an SAE, of the same seed and axes."""
    return (
        other["architecture"] == config.baselines.get(sae["architecture"])
        and other["seed"] == sae["seed"]
        and Arm(sae["architecture"], sae["axes"]).agrees_with(
            Arm(other["architecture"], other["axes"])
        )
    )


def _of_arm(arm: str, values: Sequence[float | None], form: str) -> dict[str, Any]:
    """Mean and range of an arm's values."""
    known = [value for value in values if value is not None]
    left_out = len(values) - len(known)
    mean = fmean(known) if known else None
    shown = "-" if mean is None else f"{mean:{form}}"
    if len(known) > 1:
        ends = f"{min(known):{form}} to {max(known):{form}}"
        shown += f" ({ends}, {len(known)} SAEs)"
    if left_out:
        shown += f"; {left_out} with a baseline of 0 left out"
    return {
        "arm": arm,
        "shown": shown,
        "mean": mean,
        "min": min(known, default=None),
        "max": max(known, default=None),
        "n_saes": len(known),
        "n_without_baseline": left_out,
    }
