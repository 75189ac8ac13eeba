"""`saelens-scaffold eval`: several evaluations of several SAEs, and one table."""

import argparse
import copy
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saelens_scaffold.evals.command_line import (
    BAD_INPUT,
    choose_device,
    one_line,
    select_saes,
)
from saelens_scaffold.evals.configs import (
    config_fields,
    language_model_values,
    make_config,
)
from saelens_scaffold.evals.language_model import common_setting
from saelens_scaffold.evals.registry import (
    Evaluation,
    Metric,
    RunSettings,
    evaluations_named,
)
from saelens_scaffold.evals.selected_saes import (
    SelectedSAE,
    SelectedSAEs,
    resolve_saes,
)
from saelens_scaffold.evals.text_data import (
    EMBEDDED_DATASET_NAME,
    open_dataset,
    rows_with,
)

FAILED = "failed"

# Flags that are fields of configurations under the same name.
_FIELDS = (
    "dataset_split",
    "text_column",
    "label_column",
    "random_seeds",
    "llm_batch_size",
    "llm_dtype",
    "sae_batch_size",
    "baseline",
)


class Job(NamedTuple):
    """One evaluation of all SAEs."""

    evaluation: Evaluation
    config: Any
    settings: RunSettings


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


@dataclass
class Plan:
    """Everything that a command line asks for, found to make sense."""

    selected_saes: SelectedSAEs
    saes: list[SelectedSAE]
    jobs: list[Job]


def run(options: argparse.Namespace) -> int:
    """
    Run the command.

    Args:
        options: What the command line's parser made of it.

    Returns:
        The exit status: 0, 1 if an evaluation failed, 2 if nothing was run because the
        command line makes no sense, 130 after an interruption.
    """
    # true of many SAEs, which SAEBench and this package give no heed to
    warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty")
    try:
        plan = make_plan(options)
    except BAD_INPUT as error:
        print(f"saelens-scaffold eval: error: {one_line(error)}", file=sys.stderr)
        return 2
    try:
        outcomes = [_run_job(job, plan.selected_saes) for job in plan.jobs]
    except KeyboardInterrupt:
        print(
            f"\nsaelens-scaffold eval: interrupted. What is finished is in "
            f"{options.output_folder}; repeat the command to go on.",
            file=sys.stderr,
        )
        return 130

    print(_markdown(make_table(plan.saes, outcomes)))
    print(*_judged(outcomes), sep="\n")

    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        if options.debug:
            traceback.print_exception(outcome.error, file=sys.stderr)
        print(
            f"{outcome.evaluation.name} {FAILED}: {_reason(outcome)}", file=sys.stderr
        )
    return 1 if failed else 0


def make_plan(options: argparse.Namespace) -> Plan:
    """
    Find everything that is named, before anything is run.

    Raises:
        ValueError: Something makes no sense.
        FileNotFoundError: A file is missing.
    """
    evaluations = evaluations_named(options.names)
    settings = _parse_settings(options.settings, evaluations)
    selected_saes = select_saes(options)
    # in a copy, since an evaluation may ask for another dtype or view
    saes = resolve_saes(copy.deepcopy(selected_saes), "cpu", "float32")
    _check_dataset(options, evaluations)
    api_key = _api_key(options) if "autointerp" in settings else None
    device = choose_device(options.device)
    used: set[str] = set()
    jobs: list[Job] = []
    for evaluation in evaluations:
        values = _values(evaluation, options, saes, used) | settings[evaluation.name]
        config_class = evaluation.config_class()
        values = language_model_values(
            config_class, values, selected_saes, evaluation.batch_divisor
        )
        try:
            config = make_config(config_class, values)
        except ValueError as error:
            raise ValueError(f"{evaluation.name}: {error}") from error
        run_settings = RunSettings(
            device=device,
            output_path=Path(options.output_folder, evaluation.name),
            artifacts_path=Path(options.artifacts_path),
            force_rerun=options.force_rerun,
            clean_up_activations=options.clean_up_activations,
            save_activations=options.save_activations,
            dataset_split=_dataset_split(options) or "train",
            text_column=options.text_column or "text",
            api_key=api_key,
        )
        jobs.append(Job(evaluation, config, run_settings))
    _check_used(options, used, evaluations)
    return Plan(selected_saes, saes, jobs)


def make_table(saes: Sequence[SelectedSAE], outcomes: Sequence[Outcome]) -> Table:
    """The headline metrics: SAEs as rows, with the intervals where there are any."""
    table = Table(box=MARKDOWN)
    table.add_column("SAE", no_wrap=True)
    columns: list[Callable[[SelectedSAE], str]] = []
    for outcome in outcomes:
        name = outcome.evaluation.name
        metrics = [
            metric
            for metric in outcome.evaluation.metrics
            # that no SAE has a value for it is nothing to show, but a failure is
            if not outcome.results
            or any(_value(r, metric.path) is not None for r in outcome.results.values())
        ]
        for i, metric in enumerate(metrics or [Metric("done", "")]):
            # the name stands before the first of its columns, which makes many narrower
            title = f"{name}: {metric.title}" if i == 0 else metric.title
            table.add_column(escape(title), justify="right", no_wrap=True)
            columns.append(_column(outcome, metric))
    for sae in saes:
        table.add_row(escape(sae.label), *(cell(sae) for cell in columns))
    return table


def _markdown(table: Table) -> str:
    # as wide as the table, also where the output goes into a file
    console = Console(width=10_000, highlight=False)
    with console.capture() as capture:
        console.print(table)
    lines = (line.rstrip() for line in capture.get().splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def _column(outcome: Outcome, metric: Metric) -> Callable[[SelectedSAE], str]:
    def cell(sae: SelectedSAE) -> str:
        result = outcome.results.get(sae.key)
        if result is None:
            return FAILED
        return escape(_cell(result, metric)) if metric.path else "yes"

    return cell


def _cell(result: dict[str, Any], metric: Metric) -> str:
    value = _value(result, metric.path)
    if value is None:
        return "-"
    shown = f"{value:.{metric.digits}f}"
    ends = [_end(result, metric.path, end) for end in ("ci_low", "ci_high")]
    known = [end for end in ends if end is not None and not math.isnan(end)]
    if len(known) < len(ends):
        return shown
    return f"{shown} [{', '.join(f'{end:.{metric.digits}f}' for end in known)}]"


def _end(result: dict[str, Any], path: str, end: str) -> float | None:
    """An end of a metric's interval: beside it, or with what is said over seeds."""
    over_seeds = result.get("metrics_over_seeds", {}).get(path.rpartition(".")[2], {})
    return over_seeds.get(end, _value(result, f"{path}_{end}"))


def _value(result: dict[str, Any], path: str) -> float | None:
    value: Any = result.get("eval_result_metrics", {})
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _judged(outcomes: Sequence[Outcome]) -> list[str]:
    names: dict[str, list[str]] = {}
    for outcome in outcomes:
        names.setdefault(outcome.evaluation.view, []).append(outcome.evaluation.name)
    said = {
        "whole": "judged the whole SAE",
        "sparse": "judged the sparse dictionary alone (`sparse_sae()` of scaffold SAEs)",
    }
    return [f"{', '.join(names[view])}: {said[view]}" for view in said if view in names]


def _reason(outcome: Outcome) -> str:
    error = outcome.error
    assert error is not None
    # an error with results tells the SAEs and the reason itself
    kind = "" if hasattr(error, "results") else f"{type(error).__name__}: "
    return kind + one_line(error)


def _run_job(job: Job, selected_saes: SelectedSAEs) -> Outcome:
    evaluation = job.evaluation
    print(f"{evaluation.name}: {len(selected_saes)} SAEs", file=sys.stderr)
    try:
        # Some of SAEBench's evaluations switch gradients off or on, and leave it so.
        with torch.enable_grad(), redirect_stdout(sys.stderr):
            # Each has SAEs of its own: it may change their device, dtype and form.
            results = evaluation.run(
                job.config, copy.deepcopy(selected_saes), job.settings
            )
    except Exception as error:
        return Outcome(evaluation, getattr(error, "results", {}), error)
    return Outcome(evaluation, results, None)


# ---- from flags to configurations


def _values(
    evaluation: Evaluation,
    options: argparse.Namespace,
    saes: Sequence[SelectedSAE],
    used: set[str],
) -> dict[str, Any]:
    """The fields of a configuration that flags give; adds the flags to those used."""
    fields = config_fields(evaluation.config_class())
    values = dict(evaluation.defaults)

    def take(flag: str, field: str, value: Any) -> None:
        if value is not None and field in fields:
            values[field] = value
            used.add(flag)

    for flag in _FIELDS:
        take(flag, flag, getattr(options, flag))
    take("model_name", "model_name", options.model_name)
    if options.random_seeds and "random_seeds" not in fields:
        take("random_seeds", "random_seed", options.random_seeds[0])
    take("llm_batch_size", "batch_size_prompts", options.llm_batch_size)  # core's name
    if evaluation.data == "text":
        take("dataset", evaluation.data_field, options.dataset)
        used |= {"dataset_split", "text_column"}
        if "dataset_split" in fields and (split := _dataset_split(options)):
            values["dataset_split"] = split
    if evaluation.data == "labelled":
        flag = "dataset" if options.labelled_dataset is None else "labelled_dataset"
        dataset = getattr(options, flag)
        take(flag, evaluation.data_field, None if dataset is None else [dataset])
    if "topic_dataset" in fields:
        # any text will do for the rest of it, but topics need labels
        embedded = options.dataset == EMBEDDED_DATASET_NAME
        labelled = options.labelled_dataset or (options.dataset if embedded else None)
        take("labelled_dataset", "topic_dataset", labelled)
        if labelled is not None:
            take("text_column", "topic_text_column", options.text_column)
            take("label_column", "topic_label_column", options.label_column)
    if evaluation.name == "core":
        values["context_size"] = common_setting(saes, "context_size", 128)
    if evaluation.name == "autointerp":
        used.add("api_key_file")
    return values


def _dataset_split(options: argparse.Namespace) -> str | None:
    """The split asked for; of the embedded text that which is not trained on."""
    embedded = options.dataset == EMBEDDED_DATASET_NAME
    return options.dataset_split or ("test" if embedded else None)


def _check_used(
    options: argparse.Namespace, used: set[str], evaluations: Sequence[Evaluation]
) -> None:
    """A flag that changes nothing is a mistake, and not one to find out afterwards."""
    flags = (*_FIELDS, "dataset", "labelled_dataset", "api_key_file")
    unused = [f for f in flags if getattr(options, f) is not None and f not in used]
    if unused:
        names = ", ".join(evaluation.name for evaluation in evaluations)
        raise ValueError(f"--{unused[0]} means nothing to {names}")


def _check_dataset(
    options: argparse.Namespace, evaluations: Sequence[Evaluation]
) -> None:
    """See that a text that is on this machine can be read."""
    for name in {options.dataset, options.labelled_dataset} - {None}:
        path = Path(name)
        looks_local = path.is_absolute() or name.startswith(".")
        if looks_local and not path.exists():
            raise FileNotFoundError(f"there is no dataset {name}")
    is_read = any(evaluation.data == "text" for evaluation in evaluations)
    if is_read and options.dataset is not None and Path(options.dataset).exists():
        split = _dataset_split(options) or "train"
        rows = open_dataset(options.dataset, split)
        rows_with(rows, options.dataset, options.text_column or "text")


def _api_key(options: argparse.Namespace) -> str:
    if options.api_key_file is not None:
        return Path(options.api_key_file).read_text(encoding="utf-8").strip()
    key = os.environ.get("OPENAI_API_KEY", "")
    if not key:
        raise ValueError(
            "autointerp asks a model of OpenAI; give --api_key_file FILE, or set "
            "OPENAI_API_KEY"
        )
    return key


def _parse_settings(
    settings: Sequence[str], evaluations: Sequence[Evaluation]
) -> dict[str, dict[str, Any]]:
    """
    Values of fields, for each evaluation, from NAME.FIELD=VALUE.

    Raises:
        ValueError: One is not of that form, or there is no such evaluation or field.
    """
    parsed: dict[str, dict[str, Any]] = {
        evaluation.name: {} for evaluation in evaluations
    }
    fields = {e.name: list(config_fields(e.config_class())) for e in evaluations}
    for setting in settings:
        target, equals, text = setting.partition("=")
        name, dot, field = target.partition(".")
        if not (equals and dot):
            raise ValueError(f"--set {setting}: write --set NAME.FIELD=VALUE")
        if name not in parsed:
            raise ValueError(
                f"--set {setting}: {name!r} is none of the evaluations to run: "
                f"{', '.join(parsed)}"
            )
        if field not in fields[name]:
            raise ValueError(
                f"--set {setting}: {name} has no field {field!r}; it has "
                f"{', '.join(fields[name])}"
            )
        try:
            parsed[name][field] = json.loads(text)
        except ValueError:
            parsed[name][field] = text
    return parsed
