"""SAEBench's probing evaluations, run once for each of several seeds."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import AfterValidator, Field, field_validator, model_validator
from sae_lens import SAEConfig, StandardSAE, StandardSAEConfig
from tqdm import tqdm

from saelens_scaffold._util.configs import documented
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals import labelled_data
from saelens_scaffold.evals.base import Bounds, Call, Implementation, Result
from saelens_scaffold.evals.eval_configs import ModelConfig
from saelens_scaffold.evals.intervals import student_interval
from saelens_scaffold.evals.saebench import read_result
from saelens_scaffold.evals.saebench.language_model import lent_language_model
from saelens_scaffold.evals.saebench.replacements import (
    judged_saes,
    quick_collections,
    rows_per_class,
)
from saelens_scaffold.evals.saes import SelectedSAE, result_file_name
from saelens_scaffold.evals.store import Key, ResultStore, result_key
from saelens_scaffold.evals.tokens import tokens_of
from saelens_scaffold.models.language_models import LanguageModel, known_model_name

_DEFAULT_SEED = 42  # SAEBench's

_STAND_IN = "stores-activations"
"""Name of SAEs whose results are not used, among SAEBench's results of a seed."""


def _distinct(values: list[int]) -> list[int]:
    if not values or len(set(values)) < len(values):
        raise ValueError("must name at least one, and none twice")
    return values


Distinct = AfterValidator(_distinct)
"""Constraint of a list of numbers."""

LatentCounts = Annotated[list[Literal[1, 2, 5, 10, 20, 50, 100]], Distinct]
"""Numbers of latents to probe that SAEBench's outputs have metrics for."""


@documented
class OverSeedsEvalConfig(ModelConfig):
    """
    Seeds and other text, in addition to SAEBench's configuration.

    `dataset_names` takes SAEBench's names of its datasets, and any other labelled text: a
    dataset on the Hub, a local directory or file (.parquet, .jsonl, .csv), or python-stdlib
    for the embedded text.
    """

    random_seeds: Annotated[list[Annotated[int, Field(ge=0)]], Distinct] = Field(
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
    max_classes: Annotated[int, Field(ge=2)] = labelled_data.MAX_CLASSES
    """Number of classes, the most frequent ones, of a dataset that SAEBench does not know."""

    @field_validator("sae_batch_size", "context_length", check_fields=False)
    @classmethod
    def ensure_positive(cls, value: int) -> int:
        if value < 1:
            raise ValueError("must be at least 1")
        return value

    @model_validator(mode="after")
    def ensure_first_seed(self) -> "OverSeedsEvalConfig":
        given = getattr(self, "random_seed", _DEFAULT_SEED)
        if self.random_seeds == [_DEFAULT_SEED]:
            self.random_seeds = [given]
        elif given not in (_DEFAULT_SEED, self.random_seeds[0]):
            seeds = self.random_seeds
            raise ValueError(f"random_seed is {given}, but random_seeds are {seeds}")
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
    trained_otherwise: str = ""
    """What the SAE was trained with that the probes do not do: they read whole texts, from
    BOS on."""
    metrics_over_seeds: dict[str, MetricOverSeeds] = Field(default_factory=dict)
    """Each metric's mean, interval and values over the seeds. The metrics above are the
    means."""


NamedSAEs = list[tuple[str, Any]]
"""(name, SAE) pairs, SAEBench's `selected_saes`."""


class SeedRun(NamedTuple):
    """
    What SAEBench is called with for one seed.

    Attributes:
        config: The configuration, with one seed.
        call: Device, and a folder for activations that all seeds share.
        texts: The texts that SAEBench does not know.
        model: The language model.
        folder: Folder for results and activations of this seed, removed afterwards.
    """

    config: Any
    call: Call
    texts: list[labelled_data.LabelledText]
    model: LanguageModel
    folder: Path


@dataclass(frozen=True)
class ProbingEvaluation:
    """
    One of SAEBench's probing evaluations.

    Attributes:
        name: Its name.
        knows: Whether a dataset is one of SAEBench's own.
        check_text: Raises `UserError` if the configuration does not go with a text that
            SAEBench does not know.
        run: Calls SAEBench with one seed for these SAEs.
        check_sae: Raises `UserError` if the configuration does not go with an SAE.
        bounds: The least and the largest possible value of its metrics.
        averaged: Fields of its output that are averaged over the seeds.
        probes_follow_activations: Whether the probes of the first SAE of a call are drawn
            after the text and the probes of the language model, from one stream of random
            numbers, and those of later SAEs are not.
        of_stand_in: Fields of the configuration for the SAE that stands in for the first.
    """

    name: str
    knows: Callable[[str], bool]
    check_text: Callable[[Any, labelled_data.LabelledText], None]
    run: Callable[[SeedRun, NamedSAEs], None]
    check_sae: Callable[[Any, SelectedSAE], None] = lambda *_: None
    bounds: Bounds = (0.0, 1.0)
    averaged: tuple[str, ...] = ("eval_result_metrics", "eval_result_details")
    probes_follow_activations: bool = True
    of_stand_in: Mapping[str, Any] = field(default_factory=dict)

    def implementation(self, config_class: type, output_class: type) -> Implementation:
        """The evaluation with its configuration and the class of its results."""
        return Implementation(config_class, self.measure, output_class, self.check)

    def check(self, config: Any, saes: Sequence[SelectedSAE]) -> None:
        """
        See that the configuration goes with the SAEs and with the text.

        Raises:
            UserError: It does not, or the text cannot be read.
        """
        self._checked_texts(config, saes)

    def measure(
        self, config: Any, saes: list[SelectedSAE], call: Call
    ) -> Iterator[tuple[SelectedSAE, Result]]:
        """Run SAEBench with each seed, and yield means and intervals of each SAE."""
        texts = self._checked_texts(config, saes)
        dtype = getattr(config, "llm_dtype", "float32")
        model = lent_language_model(config.model_name, dtype, saes, call)
        by_seed: list[dict[str, Any]] = []
        for seed in tqdm(config.random_seeds, desc="Seeds"):
            seeds = {"random_seed": seed, "random_seeds": [seed]}
            of_seed = replace(config, **seeds, confidence=0.95)
            run = SeedRun(of_seed, call, texts, model, call.artifacts / f"seed-{seed}")
            by_seed.append(self._measure_seed(run, saes))
        for sae in saes:
            yield sae, self._over_seeds(config, sae, [of[sae.key] for of in by_seed])

    def _checked_texts(
        self, config: Any, saes: Sequence[SelectedSAE]
    ) -> list[labelled_data.LabelledText]:
        """The texts that SAEBench does not know, if it can evaluate the SAEs on them."""
        for sae in saes:
            if sae.sae.cfg.reshape_activations == "hook_z":
                raise UserError(
                    f"SAE {sae.label!r} was trained at {sae.hook_name}; SAEBench's probes "
                    "read no activations with a dimension for heads"
                )
            self.check_sae(config, sae)
        if not config.dataset_names:
            raise UserError("dataset_names is empty; name at least one dataset")
        read = partial(
            labelled_data.read_labelled_text,
            text_column=config.text_column,
            label_column=config.label_column,
            subset=config.dataset_subset,
            max_classes=config.max_classes,
        )
        texts = [read(name) for name in config.dataset_names if not self.knows(name)]
        for text in texts:
            self.check_text(config, text)
        return texts

    def _measure_seed(self, run: SeedRun, saes: list[SelectedSAE]) -> dict[str, Any]:
        """SAEBench's results with one seed; those of an earlier call are not run again."""
        store = ResultStore(run.call.store_path)
        kept_as = {sae.key: self._kept_as(run.config, sae) for sae in saes}
        results = {key: store.find(*kept_as[key]) for key in kept_as}
        missing = [sae for sae in saes if results[sae.key] is None]
        if not missing:
            return results
        run.folder.mkdir()
        try:
            with torch.enable_grad(), judged_saes(missing), quick_collections():
                self._run(run, missing)
        finally:  # an interrupted call goes on with the SAEs that are missing
            for sae in missing:
                result = read_result(run.folder, result_file_name(sae.key))
                if result is not None:
                    result |= {of: self._unmarked(result[of]) for of in self.averaged}
                results[sae.key] = result
                if result is not None:
                    store.keep(*kept_as[sae.key], result)
            shutil.rmtree(run.folder)
        return results

    def _unmarked(self, value: Any) -> Any:
        """The same with None for what was not measured: NaN, or -1 for an accuracy."""
        if isinstance(value, dict):
            return {key: self._unmarked(of) for key, of in value.items()}
        if isinstance(value, list):
            return [self._unmarked(of) for of in value]
        is_mark = value != value or (value == -1 and self.bounds[0] == 0)
        return None if is_mark else value

    def _kept_as(self, config: Any, sae: SelectedSAE) -> tuple[str, Key]:
        """File name and key of an SAE's result with one seed."""
        # a name that SAEBench's tools do not take for a result's
        name = f"{Path(sae.file_name).stem}.seed-{config.random_seed}.partial"
        return name, result_key(self.name, config, sae, {}, hook_name=sae.hook_name)

    def _run(self, run: SeedRun, saes: list[SelectedSAE]) -> None:
        """
        Call SAEBench so that an SAE's result does not depend on the SAEs before it.

        Storing activations, and probing them, uses up random numbers that the first SAE's
        probes are drawn from as well. Left to the first SAE of each hook point, it would
        give this one other draws than those after it. So a stand-in does it first, which
        has hardly any latents.
        """
        model_name = known_model_name(run.config.model_name, run.call.model_class_name)
        run = run._replace(config=replace(run.config, model_name=model_name))
        if self.probes_follow_activations:
            of_hook = {sae.hook_name: sae.sae.cfg for sae in saes}
            named = enumerate(map(_stand_in, of_hook.values()))
            config = replace(run.config, **self.of_stand_in)
            stand_ins = [(f"{_STAND_IN}-{i}", sae) for i, sae in named]
            self.run(run._replace(config=config), stand_ins)
        self.run(run, [(sae.key, sae.sae) for sae in saes])

    def _over_seeds(self, config: Any, sae: SelectedSAE, raw: list[Any]) -> Result:
        metadata = sae.sae.cfg.metadata
        is_sparse = metadata.scaffold_view == "sparse"
        rank = int(metadata.scaffold_rank or 0) if is_sparse else sae.rank
        seeds = map(str, config.random_seeds)
        by_seed = [result["eval_result_metrics"] for result in raw]
        unstructured = [result["eval_result_unstructured"] for result in raw]
        return {
            **{name: _mean([result[name] for result in raw]) for name in self.averaged},
            "eval_result_unstructured": dict(zip(seeds, unstructured, strict=True)),
            "judged_view": "sparse" if is_sparse else "whole",
            "scaffold_rank": rank,
            "trained_otherwise": tokens_of(sae).beyond_whole_texts(),
            "metrics_over_seeds": _over_seeds(by_seed, config.confidence, self.bounds),
        }


def _stand_in(like: SAEConfig) -> StandardSAE:
    """An SAE of two latents, of the same activations, as SAEBench takes it."""
    own: Any = StandardSAEConfig(
        like.d_in, 2, dtype=like.dtype, device=like.device, metadata=like.metadata
    )
    for name in ("hook_name", "hook_layer"):
        setattr(own, name, getattr(like.metadata, name))
    return StandardSAE(own)


def _over_seeds(
    by_seed: list[Any], confidence: float, bounds: Bounds
) -> dict[str, MetricOverSeeds]:
    metrics: dict[str, MetricOverSeeds] = {}
    for category, of_first in by_seed[0].items():
        for name in of_first:
            values = [of_seed[category][name] for of_seed in by_seed]
            if None in values:
                continue
            _, low, high = student_interval(values, confidence, bounds=bounds)
            ends = (low, high) if len(values) > 1 else (None, None)
            metrics[name] = MetricOverSeeds(fmean(values), *ends, values)
    return metrics


def _mean(values: list[Any]) -> Any:
    """The mean of equal structures, number by number; None where one is missing."""
    first = None if None in values else values[0]
    if isinstance(first, dict):
        return {key: _mean([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [_mean(list(items)) for items in zip(*values, strict=True)]
    if isinstance(first, (int, float)) and len(values) > 1:
        return fmean(values)
    return first


def check_set_sizes(
    train_field: str, test_field: str, config: Any, text: labelled_data.LabelledText
) -> None:
    """
    See that a dataset has the rows that SAEBench will draw.

    Args:
        train_field: The configuration's field with the size of the training set.
        test_field: Its field with the size of the test set.
        config: The configuration.
        text: The dataset.

    Raises:
        UserError: A class has too few rows.
    """
    train, test = getattr(config, train_field), getattr(config, test_field)
    sizes = rows_per_class(train), rows_per_class(test)
    try:
        text.sample(*sizes, seed=0)
    except UserError as error:
        raise UserError(
            f"{train_field} {train}, {test_field} {test}: {error}"
        ) from error
