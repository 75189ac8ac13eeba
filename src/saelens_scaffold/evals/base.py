"""What an evaluation is, as data: its name, the view it judges, and its metrics."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeGuard

from saelens_scaffold._util.errors import UserError

# Names and metrics can be asked for without PyTorch.
if TYPE_CHECKING:
    from saelens_scaffold.evals.kept import Kept
    from saelens_scaffold.evals.saes import SelectedSAE
    from saelens_scaffold.models.language_models import ModelClass

View = Literal["whole", "sparse"]
"""The form of a scaffold SAE that is judged: all of it, or its dictionary alone."""

Result = dict[str, Any]
"""The fields of an SAE's result that are the evaluation's own: `eval_result_metrics`,
`eval_result_details`, `eval_result_unstructured`, and what its output class adds."""

Bounds = tuple[float | None, float | None]
"""The least and the largest value of a metric; None where there is no bound."""

UNBOUNDED: Bounds = (None, None)


def within(bounds: Bounds, low: float, high: float) -> tuple[float, float]:
    """
    An interval cut off at a metric's bounds.

    The truth lies inside them, so the rest of the interval covers it as often as the whole;
    unlike an interval of the logit, it exists also where all values are 0 or 1.
    """
    least, largest = bounds
    if least is not None:
        low, high = max(low, least), max(high, least)
    if largest is not None:
        low, high = min(low, largest), min(high, largest)
    return low, high


class Metric(NamedTuple):
    """
    A column of a table.

    Attributes:
        title: Column header.
        path: Path in `eval_result_metrics`, as in "sparsity.l0". `PATH_ci_low` and
            `PATH_ci_high` are the ends of its interval, where it has one.
        digits: Digits after the point; 0 for a count.
        better: The better direction, if either is.
        bounds: The least and the largest possible value, at which intervals end.
        random: Path of the same metric for a random subspace of equal rank.
        note: Path of a text that explains a missing value.
        missing: A number that stands for a missing value.
        of_sae: Whether it describes the SAE, rather than the language model and the text
            alone or the number of ablated latents.
    """

    title: str
    path: str
    digits: int = 3
    better: Literal["higher", "lower"] | None = None
    bounds: Bounds = UNBOUNDED
    random: str | None = None
    note: str | None = None
    missing: float | None = None
    of_sae: bool = True

    def value(self, result: Mapping[str, Any]) -> float | None:
        """Its value in an SAE's result; None if there is none, or no finite number."""
        value = _at(self.path, result)
        return value if _is_finite(value) and value != self.missing else None

    def of_random(self, result: Mapping[str, Any]) -> float | None:
        """Its value for a random subspace; None if the result has none."""
        return Metric("", self.random).value(result) if self.random else None

    def said_instead(self, result: Mapping[str, Any]) -> str | None:
        """The note on a missing value; None if there is none."""
        said = _at(self.note, result) if self.note else None
        return said if isinstance(said, str) else None

    def interval(self, result: Mapping[str, Any]) -> tuple[float, float] | None:
        """Its interval: beside the value, or over seeds."""
        over_seeds = result.get("metrics_over_seeds", {})
        said = over_seeds.get(self.path.rpartition(".")[2], {})
        low, high = (
            said.get(end, Metric("", f"{self.path}_{end}").value(result))
            for end in ("ci_low", "ci_high")
        )
        return (low, high) if _is_finite(low) and _is_finite(high) else None


def _is_finite(value: Any) -> TypeGuard[float]:
    # math.isfinite does not take integers that are too large for a float
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def _at(path: str, result: Mapping[str, Any]) -> Any:
    value: Any = result.get("eval_result_metrics", {})
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


@dataclass(frozen=True)
class Call:
    """
    Circumstances of one call of an evaluation, beside its configuration.

    Attributes:
        device: Where to compute.
        artifacts: An empty folder of this call's own, removed afterwards.
        store_path: Folder for partial results that a later call may go on from.
        dataset_split: Split of the text, for SAEBench, whose configurations name none.
        text_column: Its column, likewise.
        api_key: Key of the OpenAI API.
        companions: SAEs of the call that are not measured, since they have results.
        model_class_name: Class of the language model, for SAEBench, whose configurations
            have none.
        kept: What the calls of one plan compute once.
    """

    device: str
    artifacts: Path
    store_path: Path
    dataset_split: str = "train"
    text_column: str = "text"
    api_key: str | None = None
    companions: Sequence["SelectedSAE"] = ()
    model_class_name: "ModelClass" = "HookedTransformer"
    kept: "Kept | None" = None

    def model_key(self, config: Any) -> tuple[str, ...]:
        """What tells a configuration's language model from others in `kept`."""
        return config.model_name, config.llm_dtype, self.model_class_name


class EvaluationError(RuntimeError):
    """SAEs without a result, and why, in one line."""


Measure = Callable[
    [Any, list["SelectedSAE"], Call], Iterator[tuple["SelectedSAE", Result]]
]
"""Measures SAEs with a configuration, and yields each result as soon as it is there."""


@dataclass(frozen=True)
class Implementation:
    """
    The code of an evaluation.

    Attributes:
        config_class: Pydantic dataclass of its configuration.
        measure: Measures SAEs.
        output_class: Pydantic dataclass of its results, an `EvalOutput` or SAEBench's; None
            if `measure` yields results that are complete already.
        check: Raises `UserError` before long work if the configuration does not go with
            the SAEs, or its text cannot be read.
        warning: A line on a result that the user should not overlook; None if all is well.
    """

    config_class: type[Any]
    measure: Measure
    output_class: type[Any] | None = None
    check: Callable[[Any, Sequence["SelectedSAE"]], None] = lambda *_: None
    warning: Callable[[Mapping[str, Any]], str | None] = lambda _: None


@dataclass(frozen=True)
class Evaluation:
    """
    An evaluation that can be run by name.

    Attributes:
        name: Its name on the command line, and of the folder with its results.
        view: The form of a scaffold SAE that it judges: "sparse" if it asks about single
            dictionary latents, "whole" if it needs the reconstruction.
        implementation: "MODULE:ATTRIBUTE" of its `Implementation`, imported on first use.
        metrics: Its headline metrics.
        data: The kind of dataset it reads, if any.
        tokens: Which tokens it takes: those that the SAEs were trained on, or those of
            whole texts, from BOS on, as SAEBench reads them. None if it reads no text.
        data_field: The configuration's field that names the dataset.
        defaults: Values that differ from the configuration's own defaults.
        batch_divisor: Factor by which its batches are smaller than those that SAEBench
            uses for the language model.
    """

    name: str
    view: View
    implementation: str
    metrics: tuple[Metric, ...] = ()
    data: Literal["text", "labelled", None] = None
    tokens: Literal["as_trained", "whole_texts", None] = None
    data_field: str = "dataset"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    batch_divisor: int = 1

    def load(self) -> Implementation:
        """
        Its code, imported.

        Raises:
            UserError: It needs SAEBench, which is not installed.
        """
        try:
            return resolve_name(self.implementation)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in ("sae_bench", "sae_probes"):
                raise
            install = 'pip install "saelens-scaffold[bench]"'
            raise UserError(f"{self.name} needs SAEBench: {install}") from error
