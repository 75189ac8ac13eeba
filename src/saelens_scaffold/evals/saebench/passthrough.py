"""SAEBench's own evaluations, called as they are.

Each call works in the empty folder of the call, so that SAEBench takes nothing from an
earlier one. In the end each SAE has a result, or there is an error that says why not.
"""

import copy
import gc
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_bench.evals.absorption.eval_config import AbsorptionEvalConfig
from sae_bench.evals.autointerp.eval_config import AutoInterpEvalConfig
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.mdl.eval_config import MDLEvalConfig
from sae_bench.evals.meta_structure.eval_config import MetaStructureEvalConfig
from sae_bench.evals.ravel.eval_config import RAVELEvalConfig
from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
from transformer_lens.loading_from_pretrained import get_official_model_name

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.base import Call, Implementation, Result
from saelens_scaffold.evals.language_model import known_model_name
from saelens_scaffold.evals.overlap import text_seen_in_training
from saelens_scaffold.evals.saebench.replacements import (
    Replacement,
    absorption_folders,
    mdl_globals,
    ravel_downloads,
    replaced,
)
from saelens_scaffold.evals.saebench.traces import listening, read_result
from saelens_scaffold.evals.selected_saes import CUSTOM_SAE_ID, SelectedSAE
from saelens_scaffold.evals.text_data import (
    EMBEDDED_DATASET_NAME,
    open_dataset,
    rows_with,
)

_RESULTS = "results"
"""Folder for SAEBench's results, in the folder of the call."""

_FORGET_CORPUS = Path("sae_bench/evals/unlearning/data/bio-forget-corpus.jsonl")
"""Where unlearning looks for the text to forget, which each user has to apply for."""

_UNLEARNING_MODELS = ("gemma-2-2b-it", "gemma-2-9b-it")
"""The models that SAEBench's unlearning has a prompt format for."""


class EvaluationError(Exception):
    """SAEBench has not evaluated all SAEs."""


@dataclass
class _Request:
    """
    A call of SAEBench.

    Attributes:
        main: SAEBench's module.
        config: The configuration, as SAEBench can use it.
        saes: What SAEBench calls `selected_saes`.
        call: Device, folder and API key.
    """

    main: Any
    config: Any
    saes: list[tuple[str, Any]]
    call: Call


def _run_eval(request: _Request) -> None:
    device = request.call.device
    request.main.run_eval(request.config, request.saes, device, output_path=_RESULTS)


@dataclass(frozen=True)
class _Passthrough:
    """
    One of SAEBench's evaluations.

    Attributes:
        package: Its package in `sae_bench.evals`.
        config_class: SAEBench's class of configurations.
        text_field: The field of the configuration that names a text, if it reads one.
        run: Calls SAEBench, in the folder of the call.
        prepare: Provides what SAEBench looks for in the working directory.
        replacements: What must be replaced in SAEBench.
        check_files: Raises `UserError` if SAEBench cannot use the model, or lacks a file.
    """

    package: str
    config_class: type[Any]
    text_field: str | None = None
    run: Callable[[_Request], None] = _run_eval
    prepare: Callable[[_Request], None] = lambda _: None
    replacements: Callable[[_Request], list[Replacement]] = lambda _: []
    check_files: Callable[[Any], None] = lambda _: None

    @property
    def implementation(self) -> Implementation:
        """The evaluation, with results as SAEBench writes them."""
        return Implementation(self.config_class, self.measure, check=self.check)

    def check(self, config: Any, saes: Sequence[SelectedSAE]) -> None:
        """
        See that SAEBench can evaluate the SAEs.

        Raises:
            UserError: It cannot.
        """
        self.check_files(config)
        name = getattr(config, "model_name", None)
        for sae in saes:
            trained_on = str(sae.sae.cfg.metadata.model_name)
            is_loaded_by_sae_bench = sae.sae_id != CUSTOM_SAE_ID
            if name and is_loaded_by_sae_bench and _official(name) != _official(trained_on):
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
        interruption = None
        with listening() as heard:
            try:
                self._run(request)
            except Exception as error:
                heard.errors.append(error)
            except BaseException as error:  # what is finished is kept
                interruption = error
        gc.collect()  # a HookedTransformer refers to itself
        unfinished: list[str] = []
        for sae in saes:
            result = read_result(call.artifacts / _RESULTS, sae.file_name)
            if result is None:
                unfinished.append(sae.label)
                continue
            # what the user named, in place of what SAEBench was told
            for field in ("model_name", self.text_field):
                if field in result["eval_config"]:
                    result["eval_config"][field] = getattr(config, field)
            yield sae, result
        if interruption is not None:
            raise interruption
        if unfinished:
            # The first error is the reason; later ones are often its consequences.
            reason = heard.errors[0] if heard.errors else None
            said = (
                f"SAEBench wrote no result, and said last: {heard.last_line}"
                if reason is None
                else f"{type(reason).__name__}: {reason}"
            )
            raise EvaluationError(f"{', '.join(unfinished)}: {said}") from reason

    def _request(
        self, config: Any, saes: list[SelectedSAE], call: Call
    ) -> _Request:
        config = copy.deepcopy(config)
        if self.text_field is not None:
            dataset = getattr(config, self.text_field)
            # SAEBench's outputs have no field for it, so that a warning is all there is
            text_seen_in_training(saes, dataset, call.dataset_split, call.text_column)
            setattr(config, self.text_field, _text_for_saelens(dataset, call))
        if hasattr(config, "model_name"):
            config.model_name = known_model_name(config.model_name)
        pairs: list[tuple[str, Any]] = []
        for sae in saes:
            is_object = sae.sae_id == CUSTOM_SAE_ID
            if is_object and hasattr(config, "model_name"):
                # core takes the model's name from the SAE, which has it in two places
                cfg = sae.sae.cfg
                cfg.metadata.model_name = cfg.model_name = config.model_name
            pairs.append((sae.release, sae.sae if is_object else sae.sae_id))
        main = importlib.import_module(f"sae_bench.evals.{self.package}.main")
        return _Request(main, config, pairs, call)

    def _run(self, request: _Request) -> None:
        self.prepare(request)
        with (
            _working_directory(request.call.artifacts),
            replaced(self.replacements(request)),
        ):
            Path(_RESULTS).mkdir()
            self.run(request)


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
        return model_name


def _text_for_saelens(dataset: str, call: Call) -> str:
    """
    A dataset that SAELens reads by name: the split "train" of a folder, column "text".

    Raises:
        UserError: It cannot be read, or is not local and would have to be changed.
    """
    split, column = call.dataset_split, call.text_column
    if dataset != EMBEDDED_DATASET_NAME and not Path(dataset).exists():
        if (split, column) != ("train", "text"):
            raise UserError(
                f"dataset {dataset!r}: of datasets on the Hub SAEBench reads the split "
                "'train' and the column 'text' only"
            )
        return dataset
    opened: Any = open_dataset(dataset, split)
    rows_with(opened, dataset, column)
    folder = call.artifacts.resolve() / "text"
    folder.mkdir()
    text = opened.select_columns([column]).rename_columns({column: "text"})
    text.to_parquet(folder / "train.parquet")
    return str(folder)


def _autointerp(request: _Request) -> None:
    call = request.call
    request.main.run_eval(
        request.config, request.saes, call.device, call.api_key, output_path=_RESULTS
    )


def _core(request: _Request) -> None:
    config = request.config
    request.main.multiple_evals(
        request.saes,
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
        output_folder=_RESULTS,
        verbose=config.verbose,
        dtype=config.llm_dtype,
        device=request.call.device,
    )


def _meta_structure(request: _Request) -> None:
    torch.manual_seed(request.config.random_seed)  # which only its command line does
    _run_eval(request)


def _absorption_replacements(request: _Request) -> list[Replacement]:
    return absorption_folders(request.main, request.call.artifacts.resolve())


def _mdl_replacements(request: _Request) -> list[Replacement]:
    return mdl_globals(request.main, request.config, request.call.device)


def _prepare_ravel(request: _Request) -> None:
    """
    Give RAVEL its prompts, and a local model under a relative path.

    RAVEL's prompts are downloaded once, to the folder that its configuration names; what
    it computes beside them is of this call. It reads the model with transformers, not
    TransformerLens, and makes folders of its name.
    """
    config, folder = request.config, request.call.artifacts
    prompts = Path(config.artifact_dir, "base").resolve()
    prompts.mkdir(parents=True, exist_ok=True)
    config.artifact_dir = "ravel-data"
    (folder / config.artifact_dir).mkdir()
    (folder / config.artifact_dir / "base").symlink_to(prompts)
    official = Path(_official(config.model_name))
    if official.is_dir():
        link = Path("models", config.model_name)
        (folder / link).parent.mkdir()
        (folder / link).symlink_to(official.resolve())
        config.model_name = str(link)


def _ravel_replacements(request: _Request) -> list[Replacement]:
    return ravel_downloads(request.main, request.config.model_name)


def _check_unlearning(config: Any) -> None:
    if config.model_name.rpartition("/")[2] not in _UNLEARNING_MODELS:
        raise UserError(
            f"model_name is {config.model_name!r}; SAEBench's unlearning has prompts for "
            f"{' and '.join(_UNLEARNING_MODELS)} only"
        )
    if not _FORGET_CORPUS.is_file():
        raise UserError(
            f"there is no {_FORGET_CORPUS}; SAEBench's evals/unlearning/README.md says "
            "where to apply for it"
        )


def _prepare_unlearning(request: _Request) -> None:
    link = request.call.artifacts / _FORGET_CORPUS
    link.parent.mkdir(parents=True)
    link.symlink_to(_FORGET_CORPUS.resolve())


ABSORPTION = _Passthrough(
    "absorption", AbsorptionEvalConfig, replacements=_absorption_replacements
).implementation
AUTOINTERP = _Passthrough(
    "autointerp", AutoInterpEvalConfig, "dataset_name", _autointerp
).implementation
CORE = _Passthrough("core", CoreEvalConfig, "dataset", _core).implementation
MDL = _Passthrough(
    "mdl", MDLEvalConfig, "dataset_name", replacements=_mdl_replacements
).implementation
META_STRUCTURE = _Passthrough(
    "meta_structure", MetaStructureEvalConfig, run=_meta_structure
).implementation
RAVEL = _Passthrough(
    "ravel",
    RAVELEvalConfig,
    prepare=_prepare_ravel,
    replacements=_ravel_replacements,
).implementation
SCR = _Passthrough("scr_and_tpp", ScrAndTppEvalConfig).implementation
UNLEARNING = _Passthrough(
    "unlearning",
    UnlearningEvalConfig,
    prepare=_prepare_unlearning,
    check_files=_check_unlearning,
).implementation
