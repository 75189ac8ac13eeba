"""What evaluations are asked to do, found to make sense before it is done."""

import argparse
import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.command_line import choose_device
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

# Options that are fields of configurations under the same name.
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


@dataclass(frozen=True)
class Options:
    """
    What evaluations are told. Without a value, each takes its own default.

    Attributes:
        evaluations: Their names, each with fields of its configuration.
        api_key_file: File with the key of OpenAI.
        output_folder: Gets a folder for each evaluation.

    The others are as the flags of `saelens-scaffold eval`.
    """

    evaluations: Mapping[str, Mapping[str, Any]]
    model_name: str | None = None
    dataset: str | None = None
    dataset_split: str | None = None
    labelled_dataset: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    random_seeds: Sequence[int] | None = None
    llm_batch_size: int | None = None
    llm_dtype: str | None = None
    sae_batch_size: int | None = None
    baseline: str | None = None
    api_key_file: str | None = None
    device: str | None = None
    output_folder: str = "eval_results"
    artifacts_path: str = "artifacts"
    force_rerun: bool = False
    clean_up_activations: bool = False
    save_activations: bool = True


def typed_options(arguments: argparse.Namespace) -> Options:
    """
    What was typed after `saelens-scaffold eval`.

    Raises:
        UserError: There is no such evaluation, or --set is not of the form
            NAME.FIELD=VALUE.
    """
    names = {field.name for field in fields(Options)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    evaluations = evaluations_named(arguments.names)
    return Options(_parse_settings(arguments.settings, evaluations), **given)


class Job(NamedTuple):
    """One evaluation of all SAEs."""

    evaluation: Evaluation
    config: Any
    settings: RunSettings


@dataclass
class Plan:
    """Everything that is asked for, found to make sense."""

    selected_saes: SelectedSAEs
    saes: list[SelectedSAE]
    jobs: list[Job]


def make_plan(options: Options, selected_saes: SelectedSAEs) -> Plan:
    """
    Find everything that is named, before anything is run.

    Args:
        options: What to do.
        selected_saes: (release, sae_id) or (name, SAE object) pairs, as in SAEBench.

    Raises:
        UserError: Something makes no sense.
        UserError: A file is missing.
    """
    evaluations = evaluations_named(",".join(options.evaluations))
    for evaluation in evaluations:
        _check_fields(evaluation, options.evaluations[evaluation.name])
    # in a copy, since an evaluation may ask for another dtype or view
    saes = resolve_saes(copy.deepcopy(selected_saes), "cpu", "float32")
    _check_dataset(options, evaluations)
    api_key = _api_key(options) if "autointerp" in options.evaluations else None
    device = choose_device(options.device)
    used: set[str] = set()
    jobs: list[Job] = []
    for evaluation in evaluations:
        values = {
            **_values(evaluation, options, saes, used),
            **options.evaluations[evaluation.name],
        }
        config_class = evaluation.config_class()
        values = language_model_values(
            config_class, values, selected_saes, evaluation.batch_divisor
        )
        try:
            config = make_config(config_class, values)
        except ValueError as error:
            raise UserError(f"{evaluation.name}: {error}") from error
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
    options: Options,
    saes: Sequence[SelectedSAE],
    used: set[str],
) -> dict[str, Any]:
    """The fields of a configuration that options give; adds these to those used."""
    fields = config_fields(evaluation.config_class())
    values = dict(evaluation.defaults)

    def take(option: str, field: str, value: Any) -> None:
        if value is not None and field in fields:
            values[field] = value
            used.add(option)

    for option in _FIELDS:
        take(option, option, getattr(options, option))
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
        option = "dataset" if options.labelled_dataset is None else "labelled_dataset"
        dataset = getattr(options, option)
        take(option, evaluation.data_field, None if dataset is None else [dataset])
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


def _dataset_split(options: Options) -> str | None:
    """The split asked for; of the embedded text that which is not trained on."""
    embedded = options.dataset == EMBEDDED_DATASET_NAME
    return options.dataset_split or ("test" if embedded else None)


def _check_used(
    options: Options, used: set[str], evaluations: Sequence[Evaluation]
) -> None:
    """An option that changes nothing is a mistake, and not one to find out afterwards."""
    given = (*_FIELDS, "dataset", "labelled_dataset", "api_key_file")
    unused = [o for o in given if getattr(options, o) is not None and o not in used]
    if unused:
        names = ", ".join(evaluation.name for evaluation in evaluations)
        raise UserError(f"{unused[0]} means nothing to {names}")


def _check_dataset(options: Options, evaluations: Sequence[Evaluation]) -> None:
    """See that a text that is on this machine can be read."""
    for name in filter(None, (options.dataset, options.labelled_dataset)):
        path = Path(name)
        looks_local = path.is_absolute() or name.startswith(".")
        if looks_local and not path.exists():
            raise UserError(f"there is no dataset {name}")
    is_read = any(evaluation.data == "text" for evaluation in evaluations)
    if is_read and options.dataset is not None and Path(options.dataset).exists():
        split = _dataset_split(options) or "train"
        rows = open_dataset(options.dataset, split)
        rows_with(rows, options.dataset, options.text_column or "text")


def _api_key(options: Options) -> str:
    if options.api_key_file is not None:
        return Path(options.api_key_file).read_text(encoding="utf-8").strip()
    key = os.environ.get("OPENAI_API_KEY", "")
    if not key:
        raise UserError(
            "autointerp asks a model of OpenAI; set OPENAI_API_KEY, or give "
            "`saelens-scaffold eval` --api_key_file FILE"
        )
    return key


def _check_fields(evaluation: Evaluation, values: Mapping[str, Any]) -> None:
    known = list(config_fields(evaluation.config_class()))
    for field in values:
        if field not in known:
            raise UserError(
                f"{evaluation.name} has no field {field!r}; it has {', '.join(known)}"
            )


def _parse_settings(
    settings: Sequence[str], evaluations: Sequence[Evaluation]
) -> dict[str, dict[str, Any]]:
    """
    Values of fields, for each evaluation, from NAME.FIELD=VALUE.

    Raises:
        UserError: One is not of that form, or there is no such evaluation.
    """
    parsed: dict[str, dict[str, Any]] = {
        evaluation.name: {} for evaluation in evaluations
    }
    for setting in settings:
        target, equals, text = setting.partition("=")
        name, dot, field = target.partition(".")
        if not (equals and dot):
            raise UserError(f"--set {setting}: write --set NAME.FIELD=VALUE")
        if name not in parsed:
            raise UserError(
                f"--set {setting}: {name!r} is none of the evaluations to run: "
                f"{', '.join(parsed)}"
            )
        try:
            parsed[name][field] = json.loads(text)
        except ValueError:
            parsed[name][field] = text
    return parsed
