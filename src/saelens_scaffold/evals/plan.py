"""What `saelens-scaffold eval` is asked to do, found to make sense before it is done."""

import argparse
import copy
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from saelens_scaffold.evals.command_line import choose_device, select_saes
from saelens_scaffold.evals.configs import (
    config_fields,
    language_model_values,
    make_config,
)
from saelens_scaffold.evals.language_model import common_setting
from saelens_scaffold.evals.registry import (
    Evaluation,
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


@dataclass
class Plan:
    """Everything that a command line asks for, found to make sense."""

    selected_saes: SelectedSAEs
    saes: list[SelectedSAE]
    jobs: list[Job]


def make_plan(
    options: argparse.Namespace, selected_saes: SelectedSAEs | None = None
) -> Plan:
    """
    Find everything that is named, before anything is run.

    Args:
        options: What the command line's parser made of it.
        selected_saes: (name, SAE object) pairs instead of those that it names.

    Raises:
        ValueError: Something makes no sense.
        FileNotFoundError: A file is missing.
    """
    evaluations = evaluations_named(options.names)
    settings = _parse_settings(options.settings, evaluations)
    if selected_saes is None:
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
