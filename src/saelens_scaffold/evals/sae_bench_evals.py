"""SAEBench's own evaluations: called as they are, and their results checked.

SAEBench's `run_eval` functions differ in their arguments, take results of other SAEs for
these if the names are the same, and core logs an error and goes on. Here they look alike:
each SAE has a result of its own in the end, or there is an error that says why not.
"""

import copy
import gc
import importlib
import io
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformer_lens.loading_from_pretrained import get_official_model_name

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import new_directory
from saelens_scaffold.evals.configs import config_fields
from saelens_scaffold.evals.language_model import known_model_name
from saelens_scaffold.evals.overlap import text_seen_in_training
from saelens_scaffold.evals.registry import Evaluation, RunSettings
from saelens_scaffold.evals.run import check_result
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
from saelens_scaffold.models import EMBEDDED_MODEL_NAME, embedded_model_path

# What core's result says of these is not what it was told.
_NOT_STORED = ("verbose",)


class EvaluationError(Exception):
    """
    SAEBench has not evaluated all SAEs.

    Attributes:
        results: Those that there are, as `run_eval` would return them.
    """

    def __init__(self, message: str, results: dict[str, dict[str, Any]]):
        super().__init__(message)
        self.results = results


def run_eval(
    evaluation: Evaluation,
    config: Any,
    selected_saes: SelectedSAEs,
    settings: RunSettings,
) -> dict[str, dict[str, Any]]:
    """
    Run an evaluation of SAEBench on the SAEs that have no result yet.

    Args:
        evaluation: Which one.
        config: Its configuration. Its model may be a local directory, and so may its text.
        selected_saes: (release, sae_id) or (name, SAE object) pairs. The objects are
            changed: device, dtype and the model's name.
        settings: What else it needs to know.

    Returns:
        The results, those that were there already included.

    Raises:
        EvaluationError: An SAE has no result in the end.
        UserError: There is a result of another configuration or of other weights, and
            force_rerun is False; or SAEs, model or text are not to be found.
    """
    dtype = getattr(config, "llm_dtype", None) or getattr(config, "dtype", "float32")
    saes = resolve_saes(selected_saes, settings.device, dtype, evaluation.view)
    text = getattr(config, evaluation.data_field, None)
    config = _for_sae_bench(evaluation, config, settings)
    for sae in saes:
        _set_model_name(sae, getattr(config, "model_name", None))

    before = {sae.key: _written(sae, settings) for sae in saes}
    missing = [sae for sae in saes if settings.force_rerun or before[sae.key] is None]
    results = {
        sae.key: _read(sae, config, settings) for sae in saes if sae not in missing
    }
    if not missing:
        return results

    if evaluation.data == "text" and text is not None:
        # SAEBench's outputs have no field for it, so that a warning is all there is
        text_seen_in_training(
            missing, text, settings.dataset_split, settings.text_column
        )
    settings.output_path.mkdir(parents=True, exist_ok=True)
    pairs = [
        (sae.release, sae.sae if sae.sae_id == "custom_sae" else sae.sae_id)
        for sae in missing
    ]
    with _listening() as heard:
        try:
            _CALLS[evaluation.name](config, pairs, settings)
        except Exception as error:
            heard.errors.append(error)
    gc.collect()

    finished = [sae for sae in missing if _written(sae, settings) != before[sae.key]]
    for sae in finished:
        results[sae.key] = _read(sae, config, settings)
    unfinished = [sae.label for sae in missing if sae not in finished]
    if unfinished:
        # The first error is the reason; those after it are often its consequences.
        reason = heard.errors[0] if heard.errors else None
        said = (
            f"SAEBench wrote no result, and said last: {heard.last_line or 'nothing'}"
            if reason is None
            else f"{type(reason).__name__}: {reason}"
        )
        raise EvaluationError(f"{', '.join(unfinished)}: {said}", results) from reason
    return {sae.key: results[sae.key] for sae in saes}


def _written(sae: SelectedSAE, settings: RunSettings) -> int | None:
    """When an SAE's result was written; None if it has none."""
    try:
        return sae.result_path(settings.output_path).stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _read(sae: SelectedSAE, config: Any, settings: RunSettings) -> dict[str, Any]:
    file = sae.result_path(settings.output_path)
    return check_result(file, config, sae, ignore=_NOT_STORED)


# ---- the configuration as SAEBench can use it


def _for_sae_bench(evaluation: Evaluation, config: Any, settings: RunSettings) -> Any:
    config = copy.deepcopy(config)
    if "model_name" in config_fields(type(config)):
        if evaluation.name == "ravel":
            config.model_name = _name_for_transformers(config.model_name, settings)
        else:
            config.model_name = known_model_name(config.model_name)
    if evaluation.data == "text":
        dataset = getattr(config, evaluation.data_field)
        setattr(config, evaluation.data_field, _text_for_saelens(dataset, settings))
    return config


def _set_model_name(sae: SelectedSAE, model_name: str | None) -> None:
    """
    Have an SAE name the model that was asked for: core takes it from there.

    Raises:
        UserError: It is loaded by SAEBench, by its release, and was trained on another.
    """
    if model_name is None:
        return
    trained_on = str(sae.sae.cfg.metadata.model_name)
    if sae.sae_id == "custom_sae":
        # SAEBench keeps it in both places
        sae.sae.cfg.metadata.model_name = sae.sae.cfg.model_name = model_name
    elif _official(trained_on) != _official(model_name):
        raise UserError(
            f"SAE {sae.label!r} was trained on {trained_on}, not on {model_name}"
        )


def _official(model_name: str) -> str:
    try:
        return get_official_model_name(model_name)
    except ValueError:
        return model_name


def _name_for_transformers(model_name: str, settings: RunSettings) -> str:
    """
    A name that transformers can load: RAVEL does not use TransformerLens.

    RAVEL makes folders of the name below its own, so a local model has a link there, and
    no absolute path.
    """
    # RAVEL looks names up in this table, which has two, and replaces its config's.
    table: dict[str, str] = _main("ravel").LLM_NAME_MAP
    directory = (
        embedded_model_path()
        if model_name == EMBEDDED_MODEL_NAME
        else Path(model_name).resolve()
    )
    if model_name not in table and directory.is_dir():
        link = settings.artifacts_path / "ravel" / "models" / directory.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink():
            link.unlink()
        link.symlink_to(directory, target_is_directory=True)
        model_name = os.path.relpath(link)
    name = table.get(model_name, model_name)
    table[name] = name
    return name


def _text_for_saelens(dataset: str, settings: RunSettings) -> str:
    """
    A dataset that SAELens reads by name: the split "train" of a folder, column "text".

    Raises:
        UserError: It cannot be read, or is not local and would have to be changed.
    """
    is_local = dataset == EMBEDDED_DATASET_NAME or Path(dataset).exists()
    if not is_local and not dataset.startswith((".", "/")):
        if (settings.dataset_split, settings.text_column) != ("train", "text"):
            raise UserError(
                f"dataset {dataset!r}: of datasets on the Hub SAEBench reads the split "
                "'train' and the column 'text' only"
            )
        return dataset
    split, column = settings.dataset_split, settings.text_column
    opened: Any = open_dataset(dataset, split)
    rows_with(opened, dataset, column)
    # The name tells the text, so that a result is known to be of this text.
    name = f"{Path(dataset).stem}-{split}-{column}-{opened._fingerprint}"
    folder = settings.artifacts_path / "text" / name
    if not folder.exists():
        with new_directory(folder) as temporary:
            text = opened.select_columns([column]).rename_columns({column: "text"})
            text.to_parquet(temporary / "train.parquet")
    return str(folder)


# ---- the calls


def _main(package: str) -> Any:
    return importlib.import_module(f"sae_bench.evals.{package}.main")


def _absorption(config: Any, saes: list[Any], settings: RunSettings) -> None:
    # force_rerun, as its stored probing results tell SAEs apart by their names alone
    _main("absorption").run_eval(
        config, saes, settings.device, str(settings.output_path), force_rerun=True
    )


def _autointerp(config: Any, saes: list[Any], settings: RunSettings) -> None:
    # It stores a text's tokens under a name that does not say which text.
    text = config.dataset_name.strip("./").replace("/", "_")
    _main("autointerp").run_eval(
        config,
        saes,
        settings.device,
        settings.api_key,
        str(settings.output_path),
        settings.force_rerun,
        artifacts_path=str(settings.artifacts_path / "autointerp" / text),
    )


def _core(config: Any, saes: list[Any], settings: RunSettings) -> None:
    _main("core").multiple_evals(
        saes,
        n_eval_reconstruction_batches=config.n_eval_reconstruction_batches,
        n_eval_sparsity_variance_batches=config.n_eval_sparsity_variance_batches,
        eval_batch_size_prompts=config.batch_size_prompts,
        # SAEBench cannot store a result without the two
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=(
            config.exclude_special_tokens_from_reconstruction
        ),
        dataset=config.dataset,
        context_size=config.context_size,
        output_folder=str(settings.output_path),
        verbose=config.verbose,
        dtype=config.llm_dtype,
        device=settings.device,
        force_rerun=settings.force_rerun,
    )


def _mdl(config: Any, saes: list[Any], settings: RunSettings) -> None:
    mdl = _main("mdl")
    # Its functions read a global variable that only its command line sets.
    mdl.config = config
    mdl.run_eval(
        config, saes, settings.device, str(settings.output_path), settings.force_rerun
    )


def _meta_structure(config: Any, saes: list[Any], settings: RunSettings) -> None:
    # which only its command line does
    torch.manual_seed(config.random_seed)
    _main("meta_structure").run_eval(
        config, saes, settings.device, str(settings.output_path), settings.force_rerun
    )


def _ravel(config: Any, saes: list[Any], settings: RunSettings) -> None:
    _main("ravel").run_eval(
        config,
        saes,
        settings.device,
        str(settings.output_path),
        settings.force_rerun,
        artifacts_path=str(settings.artifacts_path),
    )


def _scr(config: Any, saes: list[Any], settings: RunSettings) -> None:
    # It adds its name to the folder itself.
    _main("scr_and_tpp").run_eval(
        config,
        saes,
        settings.device,
        str(settings.output_path.parent),
        settings.force_rerun,
        settings.clean_up_activations,
        settings.save_activations,
        artifacts_path=str(settings.artifacts_path),
    )


def _unlearning(config: Any, saes: list[Any], settings: RunSettings) -> None:
    # Its stored sparsities and metrics tell SAEs apart by their names alone.
    artifacts = settings.artifacts_path / "unlearning" / config.model_name
    for name, sae in saes:
        sae_id = sae if isinstance(sae, str) else "custom_sae"
        shutil.rmtree(artifacts / f"{name}_{sae_id}", ignore_errors=True)
    _main("unlearning").run_eval(
        config,
        saes,
        settings.device,
        str(settings.output_path),
        settings.force_rerun,
        settings.clean_up_activations,
        str(settings.artifacts_path),
    )


_CALLS: dict[str, Callable[[Any, list[Any], RunSettings], None]] = {
    "absorption": _absorption,
    "autointerp": _autointerp,
    "core": _core,
    "mdl": _mdl,
    "meta_structure": _meta_structure,
    "ravel": _ravel,
    "scr": _scr,
    "unlearning": _unlearning,
}


# ---- what SAEBench says of what went wrong


@dataclass
class _Heard:
    """
    Attributes:
        errors: Those that were logged or raised.
        last_line: The last one that was printed.
    """

    errors: list[BaseException] = field(default_factory=list)
    last_line: str = ""


class _LoggedErrors(logging.Handler):
    def __init__(self, heard: _Heard):
        super().__init__(logging.ERROR)
        self.heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        # core logs from within its `except`
        error = sys.exc_info()[1] or RuntimeError(record.getMessage())
        self.heard.errors.append(error)


class _PrintedLines(io.TextIOBase):
    def __init__(self, heard: _Heard):
        self.heard = heard

    def write(self, text: str) -> int:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if lines:
            self.heard.last_line = lines[-1]
        return sys.stderr.write(text)


@contextmanager
def _listening() -> Iterator[_Heard]:
    """Keep the standard output for the table: what SAEBench prints goes to stderr."""
    heard = _Heard()
    handler = _LoggedErrors(heard)
    logger = logging.getLogger("sae_bench")
    logger.addHandler(handler)
    try:
        with redirect_stdout(_PrintedLines(heard)):
            yield heard
    finally:
        logger.removeHandler(handler)
