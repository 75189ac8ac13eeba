"""The table of `saelens-scaffold eval`, in Markdown."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.box import MARKDOWN
from rich.markup import escape
from rich.table import Table

from saelens_scaffold._util.tables import markdown
from saelens_scaffold.evals.base import Evaluation, Metric

if TYPE_CHECKING:
    from saelens_scaffold.evals.saes import SelectedSAE


class Outcome(NamedTuple):
    """
    What has come of a job.

    Attributes:
        evaluation: The evaluation.
        results: The SAEs' results, as far as there are any, under SAEBench's names.
        error: Why they are not all there.
    """

    evaluation: Evaluation
    results: dict[str, dict[str, Any]]
    error: Exception | None


def results_table(saes: Sequence["SelectedSAE"], outcomes: Sequence[Outcome]) -> str:
    """The headline metrics: SAEs as rows, with the intervals where there are any."""
    table = Table(box=MARKDOWN)
    table.add_column("SAE", no_wrap=True)
    columns: list[tuple[Outcome, Metric]] = []
    for outcome in outcomes:
        name = outcome.evaluation.name
        # which stand beside what they are to be compared with
        of_random = {metric.random for metric in outcome.evaluation.metrics}
        metrics = [
            metric
            for metric in outcome.evaluation.metrics
            if metric.path not in of_random
            # that no SAE has a value for it is nothing to show, but a failure is
            if not outcome.results
            or any(
                metric.value(result) is not None or metric.said_instead(result)
                for result in outcome.results.values()
            )
        ]
        for i, metric in enumerate(metrics or [Metric("done", "")]):
            # the name stands before the first of its columns, which makes many narrower
            title = f"{name}: {metric.title}" if i == 0 else metric.title
            table.add_column(escape(title), justify="right", no_wrap=True)
            columns.append((outcome, metric))
    for sae in saes:
        table.add_row(escape(sae.label), *(_cell(sae, *column) for column in columns))
    return markdown(table)


def _cell(sae: "SelectedSAE", outcome: Outcome, metric: Metric) -> str:
    result = outcome.results.get(sae.key)
    if result is None:
        return "failed"
    return escape(metric_cell(result, metric)) if metric.path else "yes"


def metric_cell(result: dict[str, Any], metric: Metric) -> str:
    """A metric as a table shows it: with its interval, where it has one, or why not."""
    value = metric.value(result)
    if value is None:
        return metric.said_instead(result) or "-"
    shown = f"{value:.{metric.digits}f}"
    ends = metric.interval(result)
    if ends is not None:
        shown += f" [{', '.join(f'{end:.{metric.digits}f}' for end in ends)}]"
    of_random = metric.of_random(result)
    if of_random is not None:
        shown += f" (random {of_random:.{metric.digits}f})"
    return shown


def judged_views(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each view of scaffold SAEs: which evaluations judged it."""
    names: dict[str, list[str]] = {}
    for outcome in outcomes:
        names.setdefault(outcome.evaluation.view, []).append(outcome.evaluation.name)
    said = {
        "whole": "judged the whole SAE",
        "sparse": "judged the sparse dictionary alone (`sparse_sae()` of scaffold SAEs)",
    }
    return [f"{', '.join(names[view])}: {said[view]}" for view in said if view in names]
