"""The metrics of a comparison: headline metrics of its evaluations, and those of plugins."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from saelens_scaffold.evals.base import UNBOUNDED, Bounds, Evaluation, Metric
from saelens_scaffold.plugins.manager import leave_out, offered_by_plugins

Results = Mapping[str, Mapping[str, Any]]
"""Results of an SAE, as SAEBench writes them, by evaluation."""


class ComparisonMetric(NamedTuple):
    """
    A number by which SAEs are compared.

    Attributes:
        id: Unique id, as in "dense_latents.sparsity.l0_sparse".
        title: Row or axis title.
        value: Reads the value from the results of an SAE; None if there is none.
        digits: Digits after the point; 0 for a count.
        better: The better direction, if either is.
        evaluation: The evaluation that it is read from, if it is one.
        interval: Reads the interval within that evaluation, if there is one.
        bounds: The least and the largest possible value.
        random: Id of the same metric for a random subspace of equal rank.
    """

    id: str
    title: str
    value: Callable[[Results], float | None]
    digits: int = 3
    better: Literal["higher", "lower"] | None = None
    evaluation: str | None = None
    interval: Callable[[Results], tuple[float, float] | None] = lambda _: None
    bounds: Bounds = UNBOUNDED
    random: str | None = None

    @property
    def is_count(self) -> bool:
        """Whether it is a whole number, of which intervals over seeds take account."""
        return self.digits == 0

    @property
    def is_sparsity(self) -> bool:
        """Whether it is a number of active latents, by which SAEs are matched."""
        return self.id.rpartition(".")[2] in ("l0", "l0_sparse", "l0_total")


def metric_name(metric: Mapping[str, Any]) -> str:
    """Title of a metric of results.json among those of other evaluations."""
    evaluation = metric["evaluation"]
    return f"{evaluation}: {metric['title']}" if evaluation else metric["title"]


def metrics_of(evaluations: Sequence[Evaluation]) -> list[ComparisonMetric]:
    """
    The metrics of an experiment.

    A plugin's metric with the id of another is left out, with a warning.
    """
    metrics = [
        _headline(evaluation, metric)
        for evaluation in evaluations
        for metric in evaluation.metrics
        if metric.of_sae
    ]
    by_id = {metric.id: metric for metric in metrics}
    offers = offered_by_plugins("comparison_metrics", ComparisonMetric)
    for plugin, offered in offers.items():
        for metric in offered:
            if by_id.setdefault(metric.id, metric) is not metric:
                leave_out(plugin, f"there is already a metric {metric.id!r}")
    return [*by_id.values()]


def _headline(evaluation: Evaluation, metric: Metric) -> ComparisonMetric:
    name = evaluation.name
    return ComparisonMetric(
        id=f"{name}.{metric.path}",
        title=metric.title,
        value=lambda results: metric.value(results.get(name, {})),
        digits=metric.digits,
        better=metric.better,
        evaluation=name,
        interval=lambda results: metric.interval(results.get(name, {})),
        bounds=metric.bounds,
        random=f"{name}.{metric.random}" if metric.random else None,
    )
