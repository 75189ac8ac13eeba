"""From options to jobs: everything that is asked for, found to make sense before it runs."""

import copy
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saelens_scaffold._util.configs import config_fields, make_config, validating
from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.untrusted import file_name
from saelens_scaffold.evals.base import Evaluation, Implementation, Result
from saelens_scaffold.evals.baselines import others_of
from saelens_scaffold.evals.data import check_text
from saelens_scaffold.evals.kept import Kept
from saelens_scaffold.evals.model import choose_device
from saelens_scaffold.evals.registry import evaluations_named
from saelens_scaffold.evals.saes import (
    SelectedSAE,
    SelectedSAEs,
    common_model_class,
    common_model_name,
    resolve_saes,
)
from saelens_scaffold.evals.store import Key, ResultStore, result_key
from saelens_scaffold.evals.tokens import (
    check_context_size,
    common_tokens,
    other_tokens,
    tokens_of,
)
from saelens_scaffold.models.datasets import EMBEDDED_DATASET_NAME
from saelens_scaffold.models.language_models import (
    ModelClass,
    check_model_name,
    with_hook_points,
)

_OF_LANGUAGE_MODELS = {
    "pythia-70m-deduped": (512, "float32"),
    "pythia-160m-deduped": (256, "float32"),
    **dict.fromkeys(("gemma-2-2b", "gemma-2-2b-it"), (32, "bfloat16")),
    **dict.fromkeys(("gemma-2-9b", "gemma-2-9b-it"), (32, "bfloat16")),
}
"""Batch sizes and dtypes of language models, as in SAEBench."""


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
        model_class_name: Class of the language model.
        kept: What the language model computes, for all jobs of a plan that have it.
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
    model_class_name: ModelClass = "HookedTransformer"
    kept: Kept = field(default_factory=Kept, compare=False)

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
        text: dict[str, Any] = {
            "dataset_split": self.dataset_split,
            "text_column": self.text_column,
        }
        if self.evaluation.data != "text" or hasattr(self.config, "text_column"):
            text = {}
        if self.model_class_name != "HookedTransformer":
            text["model_class_name"] = self.model_class_name
        keys: dict[str, Key] = {}
        for sae in saes:
            if self.evaluation.tokens == "as_trained":
                text["tokens"] = asdict(tokens_of(sae, self.config))
            name, others = self.evaluation.name, others_of(self.config, sae, saes)
            keys[sae.key] = result_key(name, self.config, sae, others, **text)
        return keys

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
                context_size = getattr(self.config, "context_size", None)
                check_text(dataset, split, column, context_size)
            if self.evaluation.tokens == "as_trained":
                common_tokens(saes, self.config)
            # asked for again once all is done, and raises where the metadata cannot be
            other_tokens([self.evaluation], saes)
            check_context_size(self.config, saes, self.model_class_name)
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
        api_key_file: File with the key of the OpenAI API.
        options: model_name, model_class_name, dataset, dataset_split, labelled_dataset,
            text_column, label_column, random_seeds, llm_batch_size, llm_dtype,
            sae_batch_size and baseline, as the flags of `saelens-scaffold eval`. None takes
            each evaluation's own default.

    Raises:
        UserError: Something is missing, or makes no sense.
    """
    options = {name: value for name, value in options.items() if value is not None}
    named = evaluations_named(",".join(evaluations))
    # in a copy, since an evaluation may ask for another dtype or view
    saes = resolve_saes(copy.deepcopy(selected_saes), "cpu", "float32")
    reads_text = any(evaluation.data == "text" for evaluation in named)
    _check_datasets(options, reads_text)
    api_key = _api_key(api_key_file) if "autointerp" in evaluations else None
    device = choose_device(device)
    model_class = options.pop("model_class_name", None) or common_model_class(
        [sae.sae for sae in saes]
    )
    used = {"dataset_split", "text_column"} if reads_text else set()
    text = (_dataset_split(options) or "train", options.get("text_column", "text"))
    jobs: list[Job] = []
    kept: defaultdict[tuple[str, ...], Kept] = defaultdict(Kept)
    for evaluation in named:
        implementation = evaluation.load()
        config_class = validating(implementation.config_class)
        offered = _offered(evaluation, config_class, options)
        used |= {option for option, _, _ in offered}
        values = {field: value for _, field, value in offered}
        values |= evaluations[evaluation.name]
        _check_fields(evaluation, config_class, values)
        _add_language_model(
            values, evaluation, config_class, selected_saes, model_class
        )
        _add_context_size(values, evaluation, config_class, saes)
        try:
            config = make_config(config_class, {**evaluation.defaults, **values})
        except UserError as error:
            raise UserError(f"{evaluation.name}: {error}") from error
        folder = Path(output_path, file_name(evaluation.name))
        where = (device, folder, Path(artifacts_path))
        of_job = (evaluation, implementation, config, *where, *text, api_key)
        of_config: ModelClass = getattr(config, "model_class_name", model_class)
        model = tuple(getattr(config, name, "") for name in ("model_name", "llm_dtype"))
        jobs.append(Job(*of_job, of_config, kept[(*model, of_config)]))
    unused = [name for name in options if name not in used | {"model_name"}]
    if api_key_file is not None and api_key is None:
        unused.append("api_key_file")
    if unused:
        raise UserError(f"{unused[0]} means nothing to {', '.join(evaluations)}")
    return jobs


def _offered(
    evaluation: Evaluation,
    config_class: type,
    options: Mapping[str, Any],
) -> list[tuple[str, str, Any]]:
    """Options that a configuration takes: name, the configuration's field, and value."""
    fields = config_fields(config_class)
    labelled = options.get("labelled_dataset")
    # most have the name of the field that they are for
    offered = [(name, name, options[name]) for name in options if name != "dataset"]
    batch_size = options.get("llm_batch_size")
    offered.append(("llm_batch_size", "batch_size_prompts", batch_size))  # core's name
    if "random_seeds" not in fields:
        first = options.get("random_seeds", [None])[0]
        offered.append(("random_seeds", "random_seed", first))
    if evaluation.data == "text":
        offered.append(("dataset", evaluation.data_field, options.get("dataset")))
        offered.append(("dataset_split", "dataset_split", _dataset_split(options)))
    if evaluation.data == "labelled":
        option = "dataset" if labelled is None else "labelled_dataset"
        names = [options[option]] if option in options else None
        offered.append((option, evaluation.data_field, names))
    # any text will do for the rest of the ablation, but topics need labels
    if labelled is None and options.get("dataset") == EMBEDDED_DATASET_NAME:
        labelled = EMBEDDED_DATASET_NAME
    if labelled is not None:
        offered.append(("labelled_dataset", "topic_dataset", labelled))
        for column in ("text_column", "label_column"):
            offered.append((column, f"topic_{column}", options.get(column)))
    return [of for of in offered if of[1] in fields and of[2] is not None]


def _check_fields(
    evaluation: Evaluation, config_class: type, values: Mapping[str, Any]
) -> None:
    known = config_fields(config_class)
    for name in values:
        if name not in known:
            raise UserError(
                f"{evaluation.name} has no field {name!r}; it has {', '.join(known)}"
            )


def _add_context_size(
    values: dict[str, Any],
    evaluation: Evaluation,
    config_class: type,
    saes: Sequence[SelectedSAE],
) -> None:
    """Take the SAEs' context size where a configuration, as of SAEBench's core, has its own."""
    if evaluation.tokens != "as_trained" or "context_size" in values:
        return
    if config_fields(config_class)["context_size"].default:
        values["context_size"] = common_tokens(saes).context_size


def _add_language_model(
    values: dict[str, Any],
    evaluation: Evaluation,
    config_class: type,
    selected_saes: SelectedSAEs,
    model_class: ModelClass,
) -> None:
    """
    Name the SAEs' language model and its class, and the batch size and dtype that SAEBench
    uses for it, where they were not given.

    Raises:
        UserError: The SAEs name no model, or several, or there is no such model.
    """
    fields = config_fields(config_class)
    if "model_name" not in fields:
        return
    values["model_name"] = values.get("model_name") or common_model_name(selected_saes)
    if "model_class_name" in fields:
        model_class = values.setdefault("model_class_name", model_class)
    else:
        model_class = with_hook_points(model_class)
    check_model_name(values["model_name"], model_class)
    short_name = values["model_name"].rpartition("/")[2]
    batch_size, dtype = _OF_LANGUAGE_MODELS.get(short_name, (None, None))
    batch_size = batch_size and max(1, batch_size // evaluation.batch_divisor)
    found = (("llm_batch_size", batch_size, 32), ("llm_dtype", dtype, "float32"))
    for name, of_model, fallback in found:
        if name in fields and values.get(name) is None:
            values[name] = of_model or fields[name].default or fallback


def _dataset_split(options: Mapping[str, Any]) -> str | None:
    """The split asked for; of the embedded text that which is not trained on."""
    is_embedded = options.get("dataset") == EMBEDDED_DATASET_NAME
    return options.get("dataset_split") or ("test" if is_embedded else None)


def _check_datasets(options: Mapping[str, Any], reads_text: bool) -> None:
    """See that text on this machine can be read."""
    for option in ("dataset", "labelled_dataset"):
        name = options.get(option, "")
        looks_local = Path(name).is_absolute() or name.startswith(".")
        if looks_local and not Path(name).exists():
            raise UserError(f"there is no dataset {name}")
    dataset = options.get("dataset")
    if dataset is not None and reads_text and Path(dataset).exists():
        split = _dataset_split(options) or "train"
        check_text(dataset, split, options.get("text_column", "text"))


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
