"""SAEBench's own evaluators, unmodified, run once for each of several seeds."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from pydantic import Field, TypeAdapter, field_validator, model_validator
from pydantic.dataclasses import dataclass
from tqdm import tqdm
from transformer_lens import HookedTransformer

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.bootstrap import student_interval
from saelens_scaffold.evals.bounds import SHARE, Bounds
from saelens_scaffold.evals.eval_configs import ModelConfig
from saelens_scaffold.evals.labelled_data import (
    MAX_CLASSES,
    LabelledText,
    is_known_to_sae_bench,
    read_labelled_text,
)
from saelens_scaffold.evals.language_model import (
    HookedModel,
    by_hook_point,
    known_model_name,
    load_language_model,
)
from saelens_scaffold.evals.run import SPEED_ONLY, Result, run_evaluation
from saelens_scaffold.evals.selected_saes import (
    SelectedSAE,
    SelectedSAEs,
    result_path,
)

logger = logging.getLogger(__name__)

_DEFAULT_SEED = 42  # SAEBench's

_STAND_IN = "stores-activations"
"""Name of the SAE whose result is not used, among SAEBench's results of a seed."""

DATASETS_DESCRIPTION = (
    "SAEBench's names of its datasets, or any other labelled text: a dataset on the Hub, a "
    "local directory or file (.parquet, .jsonl, .csv), or python-stdlib for the embedded text."
)


@dataclass
class OverSeedsEvalConfig(ModelConfig):
    """What is added to a configuration of SAEBench: seeds, and text of the user's own."""

    random_seeds: list[int] = Field(
        default_factory=lambda: [_DEFAULT_SEED],
        title="Random Seeds",
        description="SAEBench's evaluation is run once with each of these seeds: of the rows drawn from the dataset, and of the probes. random_seed is the first of them.",
    )
    text_column: str = Field(
        default="text",
        title="Text Column",
        description="Column with the text, in datasets that SAEBench does not know.",
    )
    label_column: str = Field(
        default="label",
        title="Label Column",
        description="Column with the class, in datasets that SAEBench does not know.",
    )
    dataset_subset: str | None = Field(
        default=None,
        title="Dataset Subset",
        description="Configuration of a dataset on the Hub that SAEBench does not know.",
    )
    max_classes: int = Field(
        default=MAX_CLASSES,
        title="Maximum Number of Classes",
        description="How many classes, the most frequent ones, are taken of a dataset that SAEBench does not know.",
    )

    @field_validator("random_seeds")
    @classmethod
    def ensure_seeds(cls, values: list[int]) -> list[int]:
        if not values or len(set(values)) < len(values) or min(values) < 0:
            raise ValueError("must name at least one seed, none twice, none below 0")
        return values

    @field_validator("sae_batch_size", "context_length", check_fields=False)
    @classmethod
    def ensure_positive(cls, value: int) -> int:
        if value < 1:
            raise ValueError("must be at least 1")
        return value

    @field_validator("max_classes")
    @classmethod
    def ensure_classes(cls, value: int) -> int:
        if value < 2:
            raise ValueError("must be at least 2")
        return value

    @model_validator(mode="after")
    def ensure_first_seed(self) -> "OverSeedsEvalConfig":
        given = getattr(self, "random_seed", _DEFAULT_SEED)
        if self.random_seeds == [_DEFAULT_SEED]:
            self.random_seeds = [given]
        elif given not in (_DEFAULT_SEED, self.random_seeds[0]):
            raise ValueError(
                f"random_seed is {given} and random_seeds {self.random_seeds}; give one "
                "of them, or the same seed first"
            )
        self.random_seed = self.random_seeds[0]
        return self


@dataclass
class MetricOverSeeds:
    """One metric, and how sure it is."""

    mean: float = Field(title="Mean", description="Mean over the seeds")
    ci_low: float | None = Field(
        title="Mean (low)",
        description="Lower end of the mean's Student-t interval; None for one seed",
    )
    ci_high: float | None = Field(
        title="Mean (high)",
        description="Upper end of the mean's Student-t interval; None for one seed",
    )
    values: list[float] = Field(
        title="Values", description="The metric with each of the seeds, in their order"
    )


@dataclass
class OverSeedsEvalOutput:
    """What is added to an output of SAEBench."""

    judged_view: Literal["sparse", "whole"] = Field(
        default="whole",
        title="Judged View",
        description="sparse: the sparse dictionary of a scaffold SAE alone (`sparse_sae()`), so that its scaffold cannot win a probe for it. whole: the SAE itself.",
    )
    scaffold_rank: int = Field(
        default=0,
        title="Scaffold Rank",
        description="Rank of the SAE's scaffold, 0 for a plain SAE",
    )
    metrics_over_seeds: dict[str, MetricOverSeeds] = Field(
        default_factory=dict,
        title="Metrics over Seeds",
        description="Each metric's mean, interval and values over the seeds. The metrics above are the means.",
    )


def check_counts(values: list[int], allowed: Sequence[int]) -> list[int]:
    """
    Raises:
        UserError: A number of latents has no metric in SAEBench's output, or is given
            twice, or there is none.
    """
    if not values or len(set(values)) < len(values) or not set(values) <= set(allowed):
        raise ValueError(f"must be among {', '.join(map(str, allowed))}, none twice")
    return values


class SeedRun(NamedTuple):
    """
    One call of SAEBench: one seed, one hook point.

    Attributes:
        config: The configuration of all seeds.
        seed_config: That of this seed, of SAEBench's class.
        selected_saes: (name, SAE object) pairs, as for SAEBench.
        device: Where to compute.
        results: Folder for SAEBench's results.
        activations: Folder for what SAEBench stores beside them.
        save_activations: As for SAEBench.
        force_rerun: Whether what was computed before must not be used.
        texts: The text that SAEBench does not know.
        model: The language model.
    """

    config: Any
    seed_config: Any
    selected_saes: list[tuple[str, Any]]
    device: str
    results: Path
    activations: Path
    save_activations: bool
    force_rerun: bool
    texts: list[LabelledText]
    model: HookedTransformer


class SaeBenchEvaluator(NamedTuple):
    """
    An evaluator of SAEBench.

    Attributes:
        eval_type_id: Its name in SAEBench.
        config_class: Its configuration's class in SAEBench.
        output_class: What its results over seeds are made into.
        check: Raises ValueError if a configuration does not go with a text of the user's
            own.
        run: Calls SAEBench.
        check_sae: Raises ValueError if a configuration does not go with an SAE.
        results_folder: Where SAEBench puts results, below the folder that it is given.
        extra_fields: Fields of its output that are averaged beside metrics and details.
        knows: Whether a dataset is one of SAEBench's own.
        bounds: Of its metrics: the least and the largest value that they can have.
        activations_depend_on_seed: Whether each seed reads other text, as those do that
            draw their rows, and then their probes, from one stream of random numbers.
    """

    eval_type_id: str
    config_class: type[Any]
    output_class: type[Any]
    check: Callable[[Any, LabelledText], None]
    run: Callable[[SeedRun], None]
    check_sae: Callable[[Any, SelectedSAE], None] | None = None
    results_folder: str = ""
    extra_fields: tuple[str, ...] = ()
    knows: Callable[[str], bool] = is_known_to_sae_bench
    bounds: Bounds = SHARE
    activations_depend_on_seed: bool = True


def run_over_seeds(
    evaluator: SaeBenchEvaluator,
    config: Any,
    selected_saes: SelectedSAEs,
    device: str,
    output_path: str,
    force_rerun: bool,
    clean_up_activations: bool,
    save_activations: bool,
    artifacts_path: str,
) -> dict[str, dict[str, Any]]:
    """
    Run an evaluator of SAEBench once with each seed, and write mean and interval.

    SAEBench's own results, one for each seed and SAE, stay below `artifacts_path`, in a
    folder named by a digest of all that they depend on. So an interrupted call goes on
    with the seeds that are missing.

    Args:
        evaluator: The evaluator.
        config: The configuration, an `OverSeedsEvalConfig`.
        selected_saes: (release, sae_id) or (name, SAE object) pairs.
        device: Where to compute.
        output_path: Folder for the results, one JSON file for each SAE.
        force_rerun: Whether to evaluate again what has a result.
        clean_up_activations: Whether to delete stored activations afterwards.
        save_activations: Whether to store the language model's activations, for the
            SAEs that follow in this call and in later ones.
        artifacts_path: Folder for them.

    Returns:
        The results as dictionaries, under the names that SAEBench gives them.

    Raises:
        UserError: The configuration, an SAE, the model or the text cannot be used, and
            why.
    """
    inside = Path(output_path).resolve()
    if inside in (
        Path(artifacts_path).resolve(),
        *Path(artifacts_path).resolve().parents,
    ):
        raise UserError(
            f"artifacts_path {artifacts_path!r} lies in output_path {output_path!r}, where "
            "SAEBench's tools would find the results of single seeds; choose another"
        )
    measure = partial(
        _measure,
        evaluator,
        artifacts=Path(artifacts_path) / evaluator.eval_type_id,
        force_rerun=force_rerun,
        clean_up_activations=clean_up_activations,
        save_activations=save_activations,
    )
    return run_evaluation(
        measure,
        evaluator.output_class,
        config,
        selected_saes,
        device,
        output_path,
        force_rerun,
        view="sparse",
    )


@contextmanager
def lent_model(model: HookedTransformer, module: ModuleType) -> Iterator[None]:
    """
    Let a module that loads a `HookedTransformer` have this one, for as long as this lasts:
    it is loaded, and seen to fit the SAEs, once for all seeds.
    """
    loader = SimpleNamespace(from_pretrained_no_processing=lambda *_, **__: model)
    with patch.object(module, "HookedTransformer", loader):
        yield


def _measure(
    evaluator: SaeBenchEvaluator,
    config: Any,
    saes: list[SelectedSAE],
    device: str,
    artifacts: Path,
    force_rerun: bool,
    clean_up_activations: bool,
    save_activations: bool,
) -> Iterator[tuple[SelectedSAE, Result]]:
    model_name = known_model_name(config.model_name)
    for sae in saes:
        if sae.sae.cfg.reshape_activations == "hook_z":
            raise UserError(
                f"SAE {sae.label!r} was trained at {sae.hook_name}, whose activations have "
                "a dimension for heads; SAEBench's probes read hook points without one"
            )
        if evaluator.check_sae is not None:
            evaluator.check_sae(config, sae)
    texts = read_texts(evaluator, config)
    model = load_language_model(
        config.model_name, device, getattr(config, "llm_dtype", "float32")
    )
    groups = by_hook_point(model, saes)
    raw: dict[str, list[Any]] = {sae.key: [] for sae in saes}
    for seed in tqdm(config.random_seeds, desc="Seeds"):
        for at, group in groups:
            of_all_seeds = artifacts / model_name / _digest(config, at, texts)
            of_seed = of_all_seeds / f"seed-{seed}"
            activations = (
                of_seed if evaluator.activations_depend_on_seed else of_all_seeds
            ) / "activations"
            seed_run = SeedRun(
                config,
                _seed_config(evaluator, config, seed, model_name),
                selected_saes=[],
                device=device,
                results=of_seed / "results",
                activations=activations,
                save_activations=save_activations,
                force_rerun=force_rerun,
                texts=texts,
                model=model,
            )
            results = _run_missing(evaluator, seed_run, group)
            for sae in group:
                raw[sae.key].append(results[sae.key])
            is_last = seed == config.random_seeds[-1]
            if clean_up_activations and (
                is_last or evaluator.activations_depend_on_seed
            ):
                shutil.rmtree(activations, ignore_errors=True)
    for sae in saes:
        yield sae, _over_seeds(evaluator, config, sae, raw[sae.key])


def read_texts(evaluator: SaeBenchEvaluator, config: Any) -> list[LabelledText]:
    """
    The text that SAEBench does not know.

    Raises:
        UserError: There is none, or it cannot be read or used.
    """
    if not config.dataset_names:
        raise UserError("dataset_names is empty; name at least one dataset")
    texts = [
        read_labelled_text(
            name,
            config.text_column,
            config.label_column,
            config.dataset_subset,
            max_classes=config.max_classes,
        )
        for name in config.dataset_names
        if not evaluator.knows(name)
    ]
    for text in texts:
        evaluator.check(config, text)
    return texts


def _seed_config(
    evaluator: SaeBenchEvaluator, config: Any, seed: int, model_name: str
) -> Any:
    """The configuration with one seed, of SAEBench's class."""
    names = [field.name for field in fields(evaluator.config_class)]
    values = {name: getattr(config, name) for name in names}
    return evaluator.config_class(
        **{**values, "random_seed": seed, "model_name": model_name}
    )


def _digest(
    config: Any,
    at: HookedModel,
    texts: list[LabelledText],
) -> str:
    """Of all that activations and results depend on but the SAE and the seed."""
    values = TypeAdapter(type(config)).dump_python(config, mode="json")
    for name in (*SPEED_ONLY, "random_seed", "random_seeds", "confidence"):
        values.pop(name, None)
    directory = Path(config.model_name)
    files = sorted(directory.iterdir()) if directory.is_dir() else []
    return _digest_of(
        version("sae-bench"),
        values,
        at.hook_name,
        os.fspath(directory.resolve()) if files else config.model_name,
        [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files],
        {text.name: text.digest() for text in texts},
    )


def _digest_of(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()[:16]


def _run_missing(
    evaluator: SaeBenchEvaluator, seed_run: SeedRun, saes: list[SelectedSAE]
) -> dict[str, Any]:
    """SAEBench's results of the SAEs; those that are there are read, not run."""
    names = {
        sae.key: f"{sae.label}-{_digest_of(sae.sae.cfg.to_dict())}".replace("/", "_")
        for sae in saes
    }
    folder = seed_run.results / evaluator.results_folder
    files = {key: result_path(folder, name) for key, name in names.items()}
    if seed_run.force_rerun:
        for file in files.values():
            file.unlink(missing_ok=True)
    missing = [sae for sae in saes if _read(files[sae.key]) is None]
    if missing:
        # TPP switches gradients off and sparse probing on, and both leave it at that
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            if evaluator.activations_depend_on_seed and seed_run.save_activations:
                _store_activations(evaluator, seed_run, missing[0])
            pairs = [(names[sae.key], sae.sae) for sae in missing]
            evaluator.run(seed_run._replace(selected_saes=pairs))
    return {key: json.loads(file.read_text("utf-8")) for key, file in files.items()}


def _store_activations(
    evaluator: SaeBenchEvaluator, seed_run: SeedRun, sae: SelectedSAE
) -> None:
    """
    Have SAEBench store activations, and train its own probes, before any SAE is judged.

    Both use up random numbers that the SAE's probes are drawn from as well. Left to the
    first SAE of a call, they would give it other draws than those after it, in each seed,
    and so a difference between equal SAEs.
    """
    stored = seed_run.activations / "stored"
    if stored.exists():
        return
    shutil.rmtree(seed_run.activations, ignore_errors=True)  # of an interrupted call
    evaluator.run(seed_run._replace(selected_saes=[(_STAND_IN, sae.sae)]))
    folder = seed_run.results / evaluator.results_folder
    result_path(folder, _STAND_IN).unlink()
    stored.touch()


def _read(file: Path) -> Any:
    """A result, or None if there is none. One that was not written to its end is removed."""
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError:
        file.unlink()
        return None


def _over_seeds(
    evaluator: SaeBenchEvaluator, config: Any, sae: SelectedSAE, raw: list[Any]
) -> Result:
    metadata = sae.sae.cfg.metadata
    metrics: dict[str, MetricOverSeeds] = {}
    for category in raw[0]["eval_result_metrics"]:
        by_seed = [result["eval_result_metrics"][category] for result in raw]
        for name, first in by_seed[0].items():
            if first is not None:
                values = [float(of_seed[name]) for of_seed in by_seed]
                _, low, high = student_interval(
                    values, config.confidence, bounds=evaluator.bounds
                )
                ends = (low, high) if len(values) > 1 else (None, None)
                metrics[name] = MetricOverSeeds(fmean(values), *ends, values)
    is_sparse = metadata.scaffold_view == "sparse"
    return {
        **{
            name: _mean([result[name] for result in raw])
            for name in (
                "eval_result_metrics",
                "eval_result_details",
                *evaluator.extra_fields,
            )
        },
        "eval_result_unstructured": {
            str(seed): result["eval_result_unstructured"]
            for seed, result in zip(config.random_seeds, raw, strict=True)
        },
        "judged_view": "sparse" if is_sparse else "whole",
        "scaffold_rank": int(metadata.scaffold_rank or 0) if is_sparse else sae.rank,
        "metrics_over_seeds": metrics,
    }


def _mean(values: list[Any]) -> Any:
    """The mean of equal structures, number by number."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _mean([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [_mean(list(items)) for items in zip(*values, strict=True)]
    if isinstance(first, (int, float)) and len(values) > 1:
        return fmean(values)
    return first
