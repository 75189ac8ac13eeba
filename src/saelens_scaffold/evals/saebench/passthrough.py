"""SAEBench's own evaluations, called as they are.

Each call works in the empty folder of the call, so that SAEBench takes nothing from an
earlier one. In the end each SAE has a result, or there is an error that says why not.
"""

import copy
import gc
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from transformer_lens.loading_from_pretrained import get_official_model_name

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals import data as text_data
from saelens_scaffold.evals.base import Call, EvaluationError, Implementation, Result
from saelens_scaffold.evals.data import text_seen_in_training
from saelens_scaffold.evals.saebench import read_result, replacements
from saelens_scaffold.evals.saebench.language_model import lent_language_model
from saelens_scaffold.evals.saes import CUSTOM_SAE_ID, SelectedSAE
from saelens_scaffold.evals.tokens import common_tokens
from saelens_scaffold.models.language_models import (
    known_model_name,
    transformers_name,
)
from saelens_scaffold.training.pretokenized import token_column

_RESULTS = Path("results")
"""Folder for SAEBench's results, in the folder of the call."""

_FORGET_CORPUS = "sae_bench/evals/unlearning/data/bio-forget-corpus.jsonl"
"""Where unlearning looks for the text to forget, which each user has to apply for."""


@dataclass
class _Request:
    """
    A call of SAEBench.

    Attributes:
        main: SAEBench's module.
        config: The configuration, as SAEBench can use it.
        saes: What SAEBench calls `selected_saes`.
        selected: The same SAEs.
        call: Device, folder and API key.
        called_in: The working directory of the user.
    """

    main: Any
    config: Any
    saes: list[tuple[str, Any]]
    selected: Sequence[SelectedSAE]
    call: Call
    called_in: Path

    def run(self, *args: Any) -> None:
        """Call SAEBench with the arguments that most of its evaluations have, and more."""
        device, results = self.call.device, str(_RESULTS)
        self.main.run_eval(self.config, self.saes, device, *args, output_path=results)


@dataclass(frozen=True)
class _Passthrough:
    """
    One of SAEBench's evaluations.

    Attributes:
        package: Its package in `sae_bench.evals`.
        run: Calls SAEBench; the working directory is the folder of the call.
        text_field: The field of the configuration that names a text, if it reads one.
        reads_tokens: Whether that may have rows of tokens instead, as SAELens reads them.
        models: Names of the only language models that SAEBench has prompts for; none if it
            takes any.
    """

    package: str
    run: Callable[[_Request], None] = _Request.run
    text_field: str | None = None
    reads_tokens: bool = False
    models: tuple[str, ...] = ()

    def check(self, config: Any, saes: Sequence[SelectedSAE]) -> None:
        """
        See that SAEBench has prompts for the model, and SAEs of releases were trained on it.

        Raises:
            UserError: It has none, or one was not.
        """
        name: Any = getattr(config, "model_name", None)
        if self.models and Path(name).name not in self.models:
            raise UserError(
                f"SAEBench has prompts for {' and '.join(self.models)} only, not for {name}"
            )
        for sae in saes:
            trained_on = str(sae.sae.cfg.metadata.model_name)
            if sae.sae_id == CUSTOM_SAE_ID or name is None:
                continue
            if _official(name) != _official(trained_on):
                raise UserError(
                    f"SAE {sae.label!r} was trained on {trained_on}, not on {name}"
                )

    def measure(
        self, config: Any, saes: list[SelectedSAE], call: Call
    ) -> Iterator[tuple[SelectedSAE, Result]]:
        """
        Run SAEBench, and yield what it has written.

        Raises:
            UserError: SAEs, model or text cannot be used.
            EvaluationError: An SAE has no result in the end; those that have one have been
                yielded.
        """
        self.check(config, saes)
        request = self._request(config, saes, call)
        # SAEBench loads a HookedTransformer itself
        lent: AbstractContextManager[None] = nullcontext()
        if call.model_class_name != "HookedTransformer" and hasattr(
            request.main, "HookedTransformer"
        ):
            dtype = getattr(config, "llm_dtype", None) or config.dtype
            model = lent_language_model(config.model_name, dtype, saes, call)
            if self.models:  # which a local copy is not called
                model.cfg.model_name = Path(config.model_name).name
            lent = replacements.lent_model(request.main, model)
        errors = _LoggedErrors()
        unfinished: list[str] = []
        try:
            with (
                _working_directory(call.artifacts),
                errors.of("sae_bench"),
                replacements.judged_saes(saes),
                replacements.nan_stays(),
                replacements.quick_collections(),
                lent,
            ):
                _RESULTS.mkdir()
                with replacements.local_tokens():
                    self.run(request)
        finally:  # an interruption leaves what is finished
            gc.collect()  # a HookedTransformer refers to itself
            for sae in saes:
                result = read_result(call.artifacts / _RESULTS, sae.file_name)
                if result is None:
                    unfinished.append(sae.label)
                    continue
                told = result["eval_config"]
                for name in {"model_name", self.text_field} & set(told):
                    told[name] = getattr(config, name)  # what the user named
                yield sae, result
        if unfinished:
            # later errors are often consequences of the first
            error = next(iter(errors.found), None)
            reason = "SAEBench wrote no result, and logged no error"
            if error is not None:
                reason = f"{type(error).__name__}: {error}"
            raise EvaluationError(f"{', '.join(unfinished)}: {reason}") from error

    def _request(self, config: Any, saes: list[SelectedSAE], call: Call) -> _Request:
        config = copy.deepcopy(config)
        if self.text_field is not None:
            dataset = getattr(config, self.text_field)
            # SAEBench's outputs have no field for it, so that a warning is all there is
            text_seen_in_training(saes, dataset, call.dataset_split, call.text_column)
            text = _text_for_saelens(dataset, call, self.reads_tokens)
            setattr(config, self.text_field, text)
        has_model = hasattr(config, "model_name")
        if has_model:
            config.model_name = known_model_name(
                config.model_name, call.model_class_name
            )
        pairs: list[tuple[str, Any]] = []
        for sae in saes:
            is_object = sae.sae_id == CUSTOM_SAE_ID
            if has_model:
                # core takes the model's name from the SAE, which has it in two places
                cfg = sae.sae.cfg
                cfg.metadata.model_name = cfg.model_name = config.model_name
            pairs.append((sae.release, sae.sae if is_object else sae.sae_id))
        main = importlib.import_module(f"sae_bench.evals.{self.package}.main")
        return _Request(main, config, pairs, saes, call, Path.cwd())


class _LoggedErrors(logging.Handler):
    """Errors that SAEBench logs or raises."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        # core logs from within its `except`
        self.found.append(sys.exc_info()[1] or RuntimeError(record.getMessage()))

    @contextmanager
    def of(self, logger_name: str) -> Iterator[None]:
        """Collect the errors of a logger, and what is raised."""
        logger = logging.getLogger(logger_name)
        logger.addHandler(self)
        try:
            yield
        except Exception as error:
            self.found.append(error)
        finally:
            logger.removeHandler(self)


@contextmanager
def _working_directory(folder: Path) -> Iterator[None]:
    """Work in a folder: SAEBench writes to, and reads from, relative paths."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _official(model_name: str) -> str:
    try:
        return get_official_model_name(known_model_name(model_name))
    except ValueError:
        return transformers_name(model_name)


def _text_for_saelens(dataset: str, call: Call, reads_tokens: bool) -> str:
    """
    A dataset that SAELens reads by name: the split "train" of a folder, column "text", or
    that of its tokens.

    Raises:
        UserError: It cannot be read, or is not local and would have to be changed.
    """
    split, column = call.dataset_split, call.text_column
    if dataset != text_data.EMBEDDED_DATASET_NAME and not Path(dataset).exists():
        if (split, column) != ("train", "text"):
            raise UserError(
                f"dataset {dataset!r}: of datasets on the Hub SAEBench reads the split "
                "'train' and the column 'text' only"
            )
        return dataset
    opened: Any = text_data.open_dataset(dataset, split)
    tokens = token_column(opened, dataset)
    if tokens is None:
        text_data.rows_with(opened, dataset, column)
    elif not reads_tokens:
        raise UserError(f"dataset {dataset!r} has tokens; text is needed here")
    folder = call.artifacts.resolve() / "text"
    folder.mkdir()
    text = opened.select_columns([tokens or column])
    text = text.rename_columns({tokens or column: tokens or "text"})
    text.to_parquet(folder / "train.parquet")
    return str(folder)


def _absorption(request: _Request) -> None:
    main, seed = request.main, request.config.random_seed
    with replacements.absorption_experiments(main, Path.cwd(), seed):
        request.run()


def _autointerp(request: _Request) -> None:
    request.run(request.call.api_key)


def _core(request: _Request) -> None:
    config = request.config
    tokens = common_tokens(request.selected, config)
    of_config = {
        name: getattr(config, name)
        for name in (
            "n_eval_reconstruction_batches",
            "n_eval_sparsity_variance_batches",
            "exclude_special_tokens_from_reconstruction",
            "dataset",
            "context_size",
            "verbose",
        )
    }
    main, call = request.main, request.call
    shared = replacements.core_runs(main, call.kept)
    with replacements.core_tokens(main, tokens), shared:
        main.multiple_evals(
            request.saes,
            **of_config,
            eval_batch_size_prompts=config.batch_size_prompts,
            # SAEBench cannot store a result without the two
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            output_folder=str(_RESULTS),
            dtype=config.llm_dtype,
            device=call.device,
        )


def _mdl(request: _Request) -> None:
    main, config = request.main, request.config
    with replacements.mdl_config(main, config), replacements.TensorsStay():
        request.run()


def _meta_structure(request: _Request) -> None:
    torch.manual_seed(request.config.random_seed)  # which only its command line does
    request.run()


def _ravel(request: _Request) -> None:
    """
    RAVEL's prompts are downloaded once, to the folder that its configuration names; what
    it computes beside them is of this call. It reads the model with transformers, not
    TransformerLens, and makes folders of its name, so that a local one has a short path.
    """
    config = request.config
    prompts = request.called_in / config.artifact_dir / "base"
    config.artifact_dir = "ravel-data"
    _link(Path(config.artifact_dir, "base"), prompts)
    prompts.mkdir(parents=True, exist_ok=True)
    directory = Path(_official(config.model_name))
    if directory.is_dir():
        config.model_name = f"models/{config.model_name}"
        _link(Path(config.model_name), directory.resolve())
    with replacements.ravel_libraries(request.main, config.model_name):
        request.run()


def _unlearning(request: _Request) -> None:
    _link(Path(_FORGET_CORPUS), request.called_in / _FORGET_CORPUS)
    request.run()


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True)
    link.symlink_to(target)


def _implementation(
    package: str,
    config_class: str,
    run: Callable[[_Request], None] = _Request.run,
    text_field: str | None = None,
    reads_tokens: bool = False,
    models: tuple[str, ...] = (),
) -> Implementation:
    evaluation = _Passthrough(package, run, text_field, reads_tokens, models)
    config = resolve_name(f"sae_bench.evals.{package}.eval_config:{config_class}")
    return Implementation(config, evaluation.measure, check=evaluation.check)


ABSORPTION = _implementation("absorption", "AbsorptionEvalConfig", _absorption)
AUTOINTERP = _implementation(
    "autointerp", "AutoInterpEvalConfig", _autointerp, "dataset_name"
)
CORE = _implementation("core", "CoreEvalConfig", _core, "dataset", reads_tokens=True)
MDL = _implementation("mdl", "MDLEvalConfig", _mdl, "dataset_name", reads_tokens=True)
META_STRUCTURE = _implementation(
    "meta_structure", "MetaStructureEvalConfig", _meta_structure
)
RAVEL = _implementation("ravel", "RAVELEvalConfig", _ravel)
SCR = _implementation("scr_and_tpp", "ScrAndTppEvalConfig")
UNLEARNING = _implementation(
    "unlearning",
    "UnlearningEvalConfig",
    _unlearning,
    models=("gemma-2-2b-it", "gemma-2-9b-it"),
)
