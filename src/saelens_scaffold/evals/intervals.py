"""Bootstrap and Student intervals, and the fields of outputs that have them."""

import inspect
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple, TypeVar, get_args

import torch
from pydantic import Field

from saelens_scaffold.evals.base import UNBOUNDED, Bounds, within


class Interval(NamedTuple):
    """An estimate with the ends of its bootstrap interval."""

    estimate: float
    low: float
    high: float


class SequenceBootstrap:
    """
    A Poisson bootstrap over sequences (Chamandy et al. 2012, "Estimating uncertainty for
    massive data streams").

    Tokens of one sequence depend on each other, so whole sequences are resampled. Each
    replicate counts a sequence Poisson(1) times, drawn when the sequence is seen, so sums
    per replicate are all that is kept. The draws depend only on the seed and on the order
    of the sequences: replicates of two SAEs, or two interventions, that have seen the same
    sequences are paired, and so is any difference or ratio taken between them.

    Args:
        n_replicates: Number of replicates.
        seed: Of the draws.
    """

    def __init__(self, n_replicates: int, seed: int):
        self.n_replicates = n_replicates
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, n_sequences: int) -> torch.Tensor:
        """
        How often each replicate counts each of the next sequences.

        Returns:
            Shape (1 + n_replicates, n_sequences), float32. Row 0 is all ones: the sample
            itself, so that whatever is computed along the rows has its estimate first.
        """
        rates = torch.ones(self.n_replicates, n_sequences)
        counts = torch.poisson(rates, generator=self._generator)
        return torch.cat([torch.ones(1, n_sequences), counts])


class ReplicateSums(dict[str, torch.Tensor]):
    """
    Sums over tokens in the sample and in every bootstrap replicate, by name.

    Each has the shape (1 + n_replicates, n_columns), float64, on the CPU. The memory does
    not depend on the number of tokens.
    """

    def add(
        self,
        sequence: torch.Tensor,
        weights: torch.Tensor,
        **values: torch.Tensor,
    ) -> None:
        """
        Args:
            sequence: Index of each token's sequence in the batch, shape (n_tokens,).
            weights: Weight of each sequence in each replicate, as of `SequenceBootstrap`.
            values: What is summed, by name, shape (n_tokens, n_columns) or (n_tokens,).
        """
        double = weights.double()
        for name, value in values.items():
            columns = value.view(len(value), -1)
            # MPS has no float64
            kept = columns.cpu() if columns.device.type == "mps" else columns
            sums = kept.new_zeros(
                weights.shape[1], columns.shape[1], dtype=torch.float64
            )
            sums.index_add_(0, sequence.to(kept.device), kept.double())
            sums = double @ sums.cpu()
            self[name] = self[name] + sums if name in self else sums


def interval(statistics: torch.Tensor, confidence: float) -> Interval:
    """
    The percentile interval of a statistic that was computed for every replicate.

    Args:
        statistics: Shape (1 + n_replicates,), the sample's own first. NaN stands for a
            replicate without any sequence, which has no such statistic.
        confidence: As in 0.95.
    """
    statistics = statistics.double().cpu()
    replicates = statistics[1:][~statistics[1:].isnan()]
    if len(replicates) == 0:
        return Interval(float(statistics[0]), float("nan"), float("nan"))
    tail = (1 - confidence) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = replicates.quantile(ends).tolist()
    return Interval(float(statistics[0]), low, high)


def student_interval(
    values: list[float],
    confidence: float,
    least_spread: float = 0.0,
    bounds: Bounds = UNBOUNDED,
) -> Interval:
    """
    Mean of a few independent values (one a seed) with its Student-t interval.

    Args:
        values: At least one. Of a single value nothing can be said but the value, and
            the ends are NaN.
        confidence: As in 0.95.
        least_spread: What their standard deviation is known to be at least.
        bounds: The least and the largest value that there can be.
    """
    # imported here, since scipy takes its time to load
    from scipy import stats

    sample = torch.tensor(values, dtype=torch.float64)
    mean = float(sample.mean())
    if len(values) < 2:
        return Interval(mean, float("nan"), float("nan"))
    standard_error = max(float(sample.std()), least_spread) / len(values) ** 0.5
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * standard_error
    return Interval(mean, *within(bounds, mean - half, mean + half))


T = TypeVar("T")
Class = TypeVar("Class")

HAS_INTERVAL = "has a confidence interval"

Shown = Annotated[T, Field(json_schema_extra={"ui_default_display": True})]
"""A field that user interfaces show by default, as marked in SAEBench's schemas."""

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
    fields = (name, f"{name}_ci_low", f"{name}_ci_high")
    return dict(zip(fields, value, strict=True))


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
