"""Fields of evaluation outputs that are shown by default, or have a confidence interval."""

import inspect
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar, get_args

import torch
from pydantic import Field
from sae_bench.evals.base_eval_output import DEFAULT_DISPLAY

from saelens_scaffold.evals.bootstrap import Interval, interval

T = TypeVar("T")
Class = TypeVar("Class")

HAS_INTERVAL = "has a confidence interval"

Shown = Annotated[T, Field(json_schema_extra=DEFAULT_DISPLAY)]
"""A field that user interfaces show by default."""

WithInterval = Annotated[T, HAS_INTERVAL]
"""A field NAME with the ends of its interval in NAME_ci_low and NAME_ci_high."""

OptionalEstimate = WithInterval[float | None]


def with_intervals(cls: type[Class]) -> type[Class]:
    """
    Add the ends of its interval after each field that is annotated `WithInterval`.

    They are floats, and optional where the field is. To be used below `@documented`.
    """
    annotations: dict[str, Any] = {}
    for name, annotation in inspect.get_annotations(cls).items():
        annotations[name] = annotation
        # To pydantic, a Field without a default is required; to dataclasses it is a
        # default, which lets it follow fields that are optional.
        default = vars(cls).get(name, ...)
        setattr(cls, name, Field(default=default))
        if HAS_INTERVAL in getattr(annotation, "__metadata__", ()):
            is_optional = type(None) in get_args(get_args(annotation)[0])
            for end, which in ("ci_low", "Lower"), ("ci_high", "Upper"):
                annotations[f"{name}_{end}"] = float | None if is_optional else float
                said = f"{which} end of the confidence interval of {name}"
                setattr(cls, f"{name}_{end}", Field(default=default, description=said))
    cls.__annotations__ = annotations
    return cls


def interval_fields(name: str, value: Interval) -> dict[str, Any]:
    """The values of a field and of the ends of its interval, by the fields' names."""
    return {
        name: value.estimate,
        f"{name}_ci_low": value.low,
        f"{name}_ci_high": value.high,
    }


def estimates(confidence: float, **statistics: torch.Tensor) -> dict[str, Any]:
    """
    Fields with percentile intervals.

    Args:
        confidence: As in 0.95.
        statistics: Statistics by name of the field, each computed for the sample and every
            bootstrap replicate, shape (1 + n_replicates,).
    """
    found: dict[str, Any] = {}
    for name, statistic in statistics.items():
        found |= interval_fields(name, interval(statistic, confidence))
    return found


def repeated(metrics: type, name: str, detail: object, figure: str) -> dict[str, Any]:
    """
    A headline metric that repeats a figure of a detail.

    Args:
        metrics: Output class with the metric, and with the ends of its interval or without.
        name: Name of the metric.
        detail: Object with the figure.
        figure: Name of the figure.

    Returns:
        The values of those fields that `metrics` has.
    """
    return {
        f"{name}{end}": getattr(detail, f"{figure}{end}")
        for end in ("", "_ci_low", "_ci_high")
        if f"{name}{end}" in vars(metrics)["__dataclass_fields__"]
    }


def headlines(
    metrics: type, details: Iterable[Any], figure: str, suffix: str = ""
) -> dict[str, Any]:
    """
    Headline metrics that repeat a figure of the intervention that they are named after.

    Args:
        metrics: Output class, with metrics FIGURE_INTERVENTION + SUFFIX.
        details: One for each intervention, with figures FIGURE + SUFFIX.
        figure: As in "ce_ratio".
        suffix: As in "_retrained".

    Returns:
        The values of those fields that `metrics` has.
    """
    found: dict[str, Any] = {}
    for detail in details:
        name = f"{figure}_{detail.intervention}{suffix}"
        found |= repeated(metrics, name, detail, f"{figure}{suffix}")
    return found
