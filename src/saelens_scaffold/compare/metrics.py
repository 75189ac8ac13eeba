"""What SAEs are compared by: the evaluations' headline metrics, and those of plugins."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.bounds import UNBOUNDED, Bounds
from saelens_scaffold.evals.registry import Evaluation
from saelens_scaffold.plugins.manager import evaluation_plugins

Results = Mapping[str, Mapping[str, Any]]
"""An SAE's results, as SAEBench writes them, by the evaluations' names."""


class ComparisonMetric(NamedTuple):
    """
    A number by which SAEs are compared.

    Attributes:
        id: A name of its own, as in "dense_latents.sparsity.l0_sparse".
        title: What a table calls it.
        value: Its value for an SAE, of whose results it is given; None if there is none.
        digits: How many to show after the point; 0 for a count.
        better: Which direction is the better one, if either is.
        evaluation: The evaluation that it is read from, for metrics that only read one.
        interval: Its interval within that evaluation, if it has one.
        bounds: The least and the largest value that it can have.
        random: Id of the metric with its value for something random, if there is one.
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
        """Whether it is a whole number: intervals over seeds take that into account."""
        return self.digits == 0

    @property
    def is_sparsity(self) -> bool:
        """Whether it measures what SAEs are matched by, and not what comes of that."""
        return self.id.rpartition(".")[2] in ("l0", "l0_sparse", "l0_total")


def metric_name(metric: Mapping[str, Any]) -> str:
    """What a metric of results.json is called where all evaluations' stand together."""
    of = metric["evaluation"]
    return f"{of}: {metric['title']}" if of else metric["title"]


def metrics_of(evaluations: Sequence[Evaluation]) -> list[ComparisonMetric]:
    """
    The metrics of an experiment.

    Raises:
        UserError: Two have the same id.
    """
    metrics = [
        _headline(evaluation, metric)
        for evaluation in evaluations
        for metric in evaluation.metrics
        if metric.of_sae
    ]
    for offered in evaluation_plugins().hook.comparison_metrics():
        metrics += offered
    ids = [metric.id for metric in metrics]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise UserError(f"there are two comparison metrics {twice[0]!r}")
    return metrics


def _headline(evaluation: Evaluation, metric: Any) -> ComparisonMetric:
    name = evaluation.name

    def value(results: Results) -> float | None:
        return metric.value(results[name]) if name in results else None

    def interval(results: Results) -> tuple[float, float] | None:
        return metric.interval(results[name]) if name in results else None

    return ComparisonMetric(
        id=f"{name}.{metric.path}",
        title=metric.title,
        value=value,
        digits=metric.digits,
        better=metric.better,
        evaluation=name,
        interval=interval,
        bounds=metric.bounds,
        random=f"{name}.{metric.random}" if metric.random else None,
    )
