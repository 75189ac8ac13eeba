"""From options to jobs: everything that is asked for, found to make sense before it runs."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_bench.sae_bench_utils.activation_collection import (
    LLM_NAME_TO_BATCH_SIZE,
    LLM_NAME_TO_DTYPE,
)

from saelens_scaffold._util.configs import config_fields, make_config, validating
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.base import Evaluation, Implementation, Result
from saelens_scaffold.evals.language_model import (
    check_model_name,
    choose_device,
    common_setting,
)
from saelens_scaffold.evals.registry import evaluations_named
from saelens_scaffold.evals.selected_saes import (
    SelectedSAE,
    SelectedSAEs,
    common_model_name,
    resolve_saes,
)
from saelens_scaffold.evals.store import Key, ResultStore, result_key
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
class Job:
    """
    One evaluation, ready to run.

    Attributes:
        evaluation: The evaluation.
        implementation: Its code.
        config: Its configuration.
        device: Where to compute.
        output_path: Folder for its results.
        artifacts_path: Folder for stored activations, probes and texts.
        dataset_split: Split of the text, where the configuration does not have it.
        text_column: Its column, likewise.
        api_key: Key of the OpenAI API.
    """

    evaluation: Evaluation
    implementation: Implementation
    config: Any
    device: str
    output_path: Path
    artifacts_path: Path
    dataset_split: str = "train"
    text_column: str = "text"
    api_key: str | None = None

    @property
    def store_path(self) -> Path:
        """Folder for partial results."""
        return self.artifacts_path / self.evaluation.name

    @property
    def store(self) -> ResultStore:
        """Its results."""
        return ResultStore(self.output_path)

    def resolve(self, selected_saes: SelectedSAEs) -> list[SelectedSAE]:
        """The SAEs in the form, dtype and place in which they are judged."""
        config = self.config
        dtype = getattr(config, "llm_dtype", None) or getattr(config, "dtype", "")
        return resolve_saes(selected_saes, self.device, dtype, self.evaluation.view)

    def keys(self, saes: Sequence[SelectedSAE]) -> dict[str, Key]:
        """What the result of each SAE depends on, by the SAEs' keys."""
        text = None
        if self.evaluation.data == "text" and not hasattr(self.config, "text_column"):
            text = {
                "dataset_split": self.dataset_split,
                "text_column": self.text_column,
            }
        others = {sae.label: sae for sae in saes}
        name = self.evaluation.name
        return {
            sae.key: result_key(name, self.config, sae, others, text) for sae in saes
        }

    def current(self, saes: Sequence[SelectedSAE]) -> dict[str, Result]:
        """The current results, by the SAEs' keys."""
        keys = self.keys(saes)
        found = {sae.key: self.store.find(sae.file_name, keys[sae.key]) for sae in saes}
        return {key: result for key, result in found.items() if result is not None}

    def check(self, saes: Sequence[SelectedSAE]) -> None:
        """
        See that everything it reads exists, and goes with the SAEs.

        Raises:
            UserError: It does not.
        """
        try:
            if self.evaluation.data == "text":
                dataset = getattr(self.config, self.evaluation.data_field)
                split = getattr(self.config, "dataset_split", self.dataset_split)
                column = getattr(self.config, "text_column", self.text_column)
                rows_with(open_dataset(dataset, split), dataset, column)
            self.implementation.check(self.config, saes)
        except UserError as error:
            raise UserError(f"{self.evaluation.name}: {error}") from error


def plan(
    evaluations: Mapping[str, Mapping[str, Any]],
    selected_saes: SelectedSAEs,
    *,
    output_path: str | os.PathLike[str] = "eval_results",
    artifacts_path: str | os.PathLike[str] = "artifacts",
    device: str | None = None,
    labelled_dataset: str | None = None,
    api_key_file: str | None = None,
    **options: Any,
) -> list[Job]:
    """
    Find everything that is named, before anything is run.

    Args:
        evaluations: Names of evaluations, each with fields of its configuration.
        selected_saes: (release, sae_id) or (name, SAE object) pairs, as in SAEBench.
        output_path: Gets a folder for each evaluation.
        artifacts_path: Folder for stored activations, probes and texts.
        device: Where to compute; by default a GPU where there is one.
        labelled_dataset: Text with labels, for probing and topics.
        api_key_file: File with the key of the OpenAI API.
        options: model_name, dataset, dataset_split, text_column, label_column,
            random_seeds, llm_batch_size, llm_dtype, sae_batch_size and baseline, as the
            flags of `saelens-scaffold eval`. None takes each evaluation's own default.

    Raises:
        UserError: Something is missing, or makes no sense.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if labelled_dataset is not None:
        options["labelled_dataset"] = labelled_dataset
    named = evaluations_named(",".join(evaluations))
    # in a copy, since an evaluation may ask for another dtype or view
    saes = resolve_saes(copy.deepcopy(selected_saes), "cpu", "float32")
    _check_datasets(options, named)
    api_key = _api_key(api_key_file) if "autointerp" in evaluations else None
    device = choose_device(device)
    used = {
        "model_name",
        *(["dataset_split", "text_column"] if _reads_text(named) else []),
    }
    jobs: list[Job] = []
    for evaluation in named:
        implementation = evaluation.load()
        config = _config(evaluation, implementation, options, saes, used)
        config |= _known_fields(
            evaluation, implementation, evaluations[evaluation.name]
        )
        jobs.append(
            Job(
                evaluation,
                implementation,
                _make_config(evaluation, implementation, config, selected_saes),
                device,
                Path(output_path, evaluation.name),
                Path(artifacts_path),
                _dataset_split(options) or "train",
                options.get("text_column", "text"),
                api_key,
            )
        )
    unused = [name for name in options if name not in used]
    if api_key_file is not None and api_key is None:
        unused.append("api_key_file")
    if unused:
        names = ", ".join(evaluation.name for evaluation in named)
        raise UserError(f"{unused[0]} means nothing to {names}")
    return jobs


def _config(
    evaluation: Evaluation,
    implementation: Implementation,
    options: Mapping[str, Any],
    saes: Sequence[SelectedSAE],
    used: set[str],
) -> dict[str, Any]:
    """The fields of a configuration that options give; adds these to those used."""
    fields = config_fields(validating(implementation.config_class))
    values = dict(evaluation.defaults)

    def take(option: str, field: str, value: Any = None) -> None:
        value = options.get(option) if value is None else value
        if value is not None and field in fields:
            values[field] = value
            used.add(option)

    for option in (*_FIELDS, "model_name"):
        take(option, option)
    if "random_seeds" in options and "random_seeds" not in fields:
        take("random_seeds", "random_seed", options["random_seeds"][0])
    take("llm_batch_size", "batch_size_prompts")  # core's name
    if evaluation.data == "text":
        take("dataset", evaluation.data_field)
        if "dataset_split" in fields and (split := _dataset_split(options)):
            values["dataset_split"] = split
    if evaluation.data == "labelled":
        option = "labelled_dataset" if "labelled_dataset" in options else "dataset"
        if option in options:
            take(option, evaluation.data_field, [options[option]])
    if "topic_dataset" in fields:
        # any text will do for the rest of it, but topics need labels
        is_embedded = options.get("dataset") == EMBEDDED_DATASET_NAME
        labelled = options.get("labelled_dataset")
        labelled = labelled or (EMBEDDED_DATASET_NAME if is_embedded else None)
        take("labelled_dataset", "topic_dataset", labelled)
        if labelled is not None:
            take("text_column", "topic_text_column")
            take("label_column", "topic_label_column")
    # SAEBench's configurations do not know how the SAEs were trained
    if "context_size" in fields and fields["context_size"].default is not None:
        values["context_size"] = common_setting(saes, "context_size", 128)
    return values


def _known_fields(
    evaluation: Evaluation, implementation: Implementation, values: Mapping[str, Any]
) -> dict[str, Any]:
    known = list(config_fields(validating(implementation.config_class)))
    for field in values:
        if field not in known:
            raise UserError(
                f"{evaluation.name} has no field {field!r}; it has {', '.join(known)}"
            )
    return dict(values)


def _make_config(
    evaluation: Evaluation,
    implementation: Implementation,
    values: Mapping[str, Any],
    selected_saes: SelectedSAEs,
) -> Any:
    config_class = validating(implementation.config_class)
    values = _language_model_values(
        config_class, values, selected_saes, evaluation.batch_divisor
    )
    try:
        return make_config(config_class, values)
    except UserError as error:
        raise UserError(f"{evaluation.name}: {error}") from error


def _language_model_values(
    config_class: type,
    values: Mapping[str, Any],
    selected_saes: SelectedSAEs,
    batch_divisor: int = 1,
) -> dict[str, Any]:
    """
    What a user need not type of the language model: its name, batch size and dtype.

    Args:
        config_class: The configuration that needs them.
        values: What was typed.
        selected_saes: The SAEs, whose metadata name the model.
        batch_divisor: How much smaller the batches of this evaluation are than those that
            SAEBench names for the model.

    Returns:
        The values, with those that were missing. Batch size and dtype are those that
        SAEBench uses for the model, else the configuration's own defaults.

    Raises:
        UserError: The SAEs name no model, or several; TransformerLens does not know it.
        UserError: A local model lacks a file.
    """
    fields = config_fields(config_class)
    values = dict(values)
    if "model_name" not in fields:
        return values
    values["model_name"] = values.get("model_name") or common_model_name(selected_saes)
    check_model_name(values["model_name"])
    short_name = values["model_name"].rpartition("/")[2]
    batch_size = LLM_NAME_TO_BATCH_SIZE.get(short_name)
    defaults: dict[str, Any] = {
        "llm_batch_size": batch_size and max(1, batch_size // batch_divisor),
        "llm_dtype": LLM_NAME_TO_DTYPE.get(short_name),
    }
    fallbacks = {"llm_batch_size": 32, "llm_dtype": "float32"}
    for name, default in defaults.items():
        if name in fields and values.get(name) is None:
            values[name] = default or fields[name].default or fallbacks[name]
    return values


def _dataset_split(options: Mapping[str, Any]) -> str | None:
    """The split asked for; of the embedded text that which is not trained on."""
    is_embedded = options.get("dataset") == EMBEDDED_DATASET_NAME
    return options.get("dataset_split") or ("test" if is_embedded else None)


def _reads_text(evaluations: Sequence[Evaluation]) -> bool:
    return any(evaluation.data == "text" for evaluation in evaluations)


def _check_datasets(
    options: Mapping[str, Any], evaluations: Sequence[Evaluation]
) -> None:
    """See that text on this machine can be read."""
    for option in ("dataset", "labelled_dataset"):
        name = options.get(option, "")
        looks_local = Path(name).is_absolute() or name.startswith(".")
        if looks_local and not Path(name).exists():
            raise UserError(f"there is no dataset {name}")
    dataset = options.get("dataset")
    if dataset is not None and _reads_text(evaluations) and Path(dataset).exists():
        rows = open_dataset(dataset, _dataset_split(options) or "train")
        rows_with(rows, dataset, options.get("text_column", "text"))


def _api_key(file: str | None) -> str:
    if file is not None:
        try:
            return Path(file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UserError(f"--api_key_file {file}: {error.strerror}") from error
    key = os.environ.get("OPENAI_API_KEY", "")
    if not key:
        raise UserError(
            "autointerp asks a model of OpenAI; set OPENAI_API_KEY, or give "
            "`saelens-scaffold eval` --api_key_file FILE"
        )
    return key
