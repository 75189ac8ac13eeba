"""SAEBench's probing evaluations, run once for each of several seeds."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, NonNegativeInt, model_validator
from tqdm import tqdm
from transformer_lens import HookedTransformer

from saelens_scaffold._util.documented import documented
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.base import SHARE, Bounds, Call, Implementation, Result
from saelens_scaffold.evals.bootstrap import student_interval
from saelens_scaffold.evals.labelled_data import (
    MAX_CLASSES,
    LabelledText,
    read_labelled_text,
)
from saelens_scaffold.evals.language_model import (
    by_hook_point,
    known_model_name,
    load_language_model,
)
from saelens_scaffold.evals.model_config import ModelConfig
from saelens_scaffold.evals.saebench.replacements import rows_per_class
from saelens_scaffold.evals.saebench.traces import read_result
from saelens_scaffold.evals.selected_saes import SelectedSAE, result_file_name
from saelens_scaffold.evals.store import ResultStore, result_key

_DEFAULT_SEED = 42  # SAEBench's

_STAND_IN = "stores-activations"
"""Name of SAEs whose results are not used, among SAEBench's results of a seed."""


def _none_twice(values: list[int]) -> list[int]:
    if len(set(values)) < len(values):
        raise ValueError("must name none twice")
    return values


Distinct = [Field(min_length=1), AfterValidator(_none_twice)]
"""Constraints of a list of numbers: at least one, none twice."""

LatentCounts = Annotated[list[Literal[1, 2, 5, 10, 20, 50, 100]], *Distinct]
"""Numbers of latents to probe that SAEBench's outputs have metrics for."""


@documented
class OverSeedsEvalConfig(ModelConfig):
    """Seeds, and text of the user's own, in addition to SAEBench's configuration."""

    random_seeds: Annotated[list[NonNegativeInt], *Distinct] = Field(
        default_factory=lambda: [_DEFAULT_SEED]
    )
    """SAEBench's evaluation is run once with each of these seeds, which draw the rows of the
    dataset and the probes. random_seed is the first of them."""
    text_column: str = "text"
    """Column with the text, in datasets that SAEBench does not know."""
    label_column: str = "label"
    """Column with the class, in datasets that SAEBench does not know."""
    dataset_subset: str | None = None
    """Configuration of a dataset on the Hub that SAEBench does not know."""
    max_classes: Annotated[int, Field(ge=2)] = MAX_CLASSES
    """Number of classes, the most frequent ones, of a dataset that SAEBench does not know."""

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


@documented
class MetricOverSeeds:
    """A metric with its interval."""

    mean: float
    """Mean over the seeds."""
    ci_low: float | None
    """Lower end of the mean's Student-t interval; None for one seed."""
    ci_high: float | None
    """Upper end of the mean's Student-t interval; None for one seed."""
    values: list[float]
    """The metric with each of the seeds, in their order."""


@documented
class OverSeedsEvalOutput:
    """What results have in addition to SAEBench's."""

    judged_view: Literal["sparse", "whole"] = "whole"
    """sparse: the sparse dictionary of a scaffold SAE alone (`sparse_sae()`), so that its
    scaffold cannot win a probe for it. whole: the SAE itself."""
    scaffold_rank: int = 0
    """Rank of the SAE's scaffold, 0 for a plain SAE."""
    metrics_over_seeds: dict[str, MetricOverSeeds] = Field(default_factory=dict)
    """Each metric's mean, interval and values over the seeds. The metrics above are the
    means."""


@dataclass(frozen=True)
class SeedRun:
    """
    A call of SAEBench with one seed.

    Attributes:
        config: The configuration of all seeds.
        seed_config: That of this seed, of SAEBench's class.
        saes: (name, SAE) pairs, as for SAEBench.
        device: Where to compute.
        folder: Folder for results and activations of this seed, removed afterwards.
        shared: Folder for activations that all seeds of the call share.
        texts: The text that SAEBench does not know.
        model: The language model.
    """

    config: Any
    seed_config: Any
    saes: list[tuple[str, Any]]
    device: str
    folder: Path
    shared: Path
    texts: list[LabelledText]
    model: HookedTransformer


def _no_check(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class ProbingEvaluation:
    """
    One of SAEBench's probing evaluations.

    Attributes:
        name: Its name.
        sae_bench_config: SAEBench's class of configurations.
        run: Calls SAEBench with one seed.
        knows: Whether a dataset is one of SAEBench's own.
        check_text: Raises `UserError` if a text of the user's own is too short for the
            configuration.
        check_sae: Raises `UserError` if the configuration does not go with an SAE.
        bounds: The least and the largest possible value of its metrics.
        averaged: Fields of its output that are averaged over the seeds.
        probes_follow_activations: Whether the probes of the first SAE of a call are drawn
            after the text and the probes of the language model, from one stream of random
            numbers, and those of later SAEs are not.
    """

    name: str
    sae_bench_config: type[Any]
    run: Callable[[SeedRun], None]
    knows: Callable[[str], bool]
    check_text: Callable[[Any, LabelledText], None]
    check_sae: Callable[[Any, SelectedSAE], None] = _no_check
    bounds: Bounds = SHARE
    averaged: tuple[str, ...] = ("eval_result_metrics", "eval_result_details")
    probes_follow_activations: bool = True

    def implementation(
        self, config_class: type[Any], output_class: type[Any]
    ) -> Implementation:
        """The evaluation over seeds, with its configuration and output classes."""
        return Implementation(config_class, self.measure, output_class, self.check)

    def check(self, config: Any, saes: Sequence[SelectedSAE]) -> None:
        """
        See that the configuration goes with the SAEs and with the text.

        Raises:
            UserError: It does not, or the text cannot be read.
        """
        for sae in saes:
            if sae.sae.cfg.reshape_activations == "hook_z":
                raise UserError(
                    f"SAE {sae.label!r} was trained at {sae.hook_name}, whose activations "
                    "have a dimension for heads; SAEBench's probes read hook points "
                    "without one"
                )
            self.check_sae(config, sae)
        self.own_texts(config)

    def own_texts(self, config: Any) -> list[LabelledText]:
        """
        The texts that SAEBench does not know.

        Raises:
            UserError: No dataset is named, or a text cannot be read or used.
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
            if not self.knows(name)
        ]
        for text in texts:
            self.check_text(config, text)
        return texts

    def measure(
        self, config: Any, saes: list[SelectedSAE], call: Call
    ) -> Iterator[tuple[SelectedSAE, Result]]:
        """Run SAEBench with each seed, and yield means and intervals of each SAE."""
        self.check(config, saes)
        texts = self.own_texts(config)
        dtype = getattr(config, "llm_dtype", "float32")
        model = load_language_model(config.model_name, call.device, dtype)
        by_hook_point(model, saes)  # checks that they fit the model
        by_seed = [
            self._measure_seed(seed, config, saes, call, texts, model)
            for seed in tqdm(config.random_seeds, desc="Seeds")
        ]
        for sae in saes:
            yield sae, self._over_seeds(config, sae, [of[sae.key] for of in by_seed])

    def _measure_seed(
        self,
        seed: int,
        config: Any,
        saes: list[SelectedSAE],
        call: Call,
        texts: list[LabelledText],
        model: HookedTransformer,
    ) -> dict[str, Any]:
        """SAEBench's results with one seed; those of an earlier call are not run again."""
        store = ResultStore(call.store_path)
        of_seed = replace(
            config, random_seed=seed, random_seeds=[seed], confidence=0.95
        )
        files = {
            # not *.json, which SAEBench's tools would take for a result
            sae.key: f"{sae.file_name}.seed-{seed}.partial"
            for sae in saes
        }
        keys = {
            sae.key: result_key(self.name, of_seed, sae, {}, hook=sae.hook_name)
            for sae in saes
        }
        results = {key: store.find(files[key], keys[key]) for key in keys}
        missing = [sae for sae in saes if results[sae.key] is None]
        if not missing:
            return results
        with TemporaryDirectory(dir=call.artifacts) as folder, torch.enable_grad():
            run = SeedRun(
                config,
                self._seed_config(of_seed),
                [(_slashless(sae.key), sae.sae) for sae in missing],
                call.device,
                Path(folder),
                call.artifacts / "activations",
                texts,
                model,
            )
            try:
                self._run(run, missing)
            finally:  # an interrupted call goes on with the SAEs that are missing
                for sae in missing:
                    file = result_file_name(_slashless(sae.key))
                    result = read_result(run.folder, file)
                    if result is not None:
                        store.keep(files[sae.key], keys[sae.key], result)
                    results[sae.key] = result
        return results

    def _run(self, run: SeedRun, saes: list[SelectedSAE]) -> None:
        """
        Call SAEBench so that an SAE's result does not depend on the SAEs before it.

        Storing activations, and probing them, uses up random numbers that the first SAE's
        probes are drawn from as well. Left to the first SAE of each hook point, it would
        give this one other draws than those after it. So another SAE does it first.
        """
        if self.probes_follow_activations:
            first_of_hook = {sae.hook_name: sae.sae for sae in reversed(saes)}
            stand_ins = [
                (f"{_STAND_IN}-{i}", sae) for i, sae in enumerate(first_of_hook.values())
            ]
            self.run(replace(run, saes=stand_ins))
        self.run(run)

    def _seed_config(self, config: Any) -> Any:
        """A configuration of one seed, of SAEBench's class."""
        names = [field.name for field in fields(self.sae_bench_config)]
        values = {name: getattr(config, name) for name in names}
        values["model_name"] = known_model_name(config.model_name)
        return self.sae_bench_config(**values)

    def _over_seeds(self, config: Any, sae: SelectedSAE, raw: list[Any]) -> Result:
        metadata = sae.sae.cfg.metadata
        is_sparse = metadata.scaffold_view == "sparse"
        unstructured = [result["eval_result_unstructured"] for result in raw]
        return {
            **{name: _mean([result[name] for result in raw]) for name in self.averaged},
            "eval_result_unstructured": {
                str(seed): of_seed
                for seed, of_seed in zip(config.random_seeds, unstructured, strict=True)
            },
            "judged_view": "sparse" if is_sparse else "whole",
            "scaffold_rank": int(metadata.scaffold_rank or 0)
            if is_sparse
            else sae.rank,
            "metrics_over_seeds": _metrics_over_seeds(
                [result["eval_result_metrics"] for result in raw],
                config.confidence,
                self.bounds,
            ),
        }


def _slashless(key: str) -> str:
    """A key as SAEBench and sae-probes can make file names of it."""
    return key.replace("/", "_")


def _metrics_over_seeds(
    by_seed: list[Any], confidence: float, bounds: Bounds
) -> dict[str, MetricOverSeeds]:
    metrics: dict[str, MetricOverSeeds] = {}
    for category, of_first in by_seed[0].items():
        for name in (name for name, value in of_first.items() if value is not None):
            values = [float(of_seed[category][name]) for of_seed in by_seed]
            _, low, high = student_interval(values, confidence, bounds=bounds)
            ends = (low, high) if len(values) > 1 else (None, None)
            metrics[name] = MetricOverSeeds(fmean(values), *ends, values)
    return metrics


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


def check_set_sizes(
    text: LabelledText, config: Any, train_field: str, test_field: str
) -> None:
    """
    See that a dataset has the rows that SAEBench will draw.

    Args:
        text: The dataset.
        config: The configuration.
        train_field: Its field with the size of the training set.
        test_field: Its field with the size of the test set.

    Raises:
        UserError: A class has too few rows.
    """
    train, test = getattr(config, train_field), getattr(config, test_field)
    sizes = rows_per_class(train), rows_per_class(test)
    try:
        text.sample(*sizes, seed=0)
    except UserError as error:
        raise UserError(
            f"{train_field} {train} and {test_field} {test} take {sizes[0]} train rows and "
            f"{sizes[1]} test rows of each class: {error}"
        ) from error
