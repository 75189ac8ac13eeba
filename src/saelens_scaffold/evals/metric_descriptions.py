"""Descriptions of an evaluation's metrics, from the fields of its output class."""

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import get_args

from pydantic.fields import FieldInfo

from saelens_scaffold.evals.base import Evaluation


def metric_descriptions(evaluation: Evaluation) -> dict[str, str]:
    """
    What an evaluation says its metrics are.

    Args:
        evaluation: An evaluation of this package, of SAEBench or of a plugin.

    Returns:
        The description of each field of `eval_result_metrics`, by its path there, as in
        "sparsity.l0"; none if the evaluation has no output class.
    """
    implementation = evaluation.load()
    outputs = [implementation.output_class]
    # SAEBench's evaluations have their output class in a module beside the configuration.
    config_module = implementation.config_class.__module__
    module = config_module.replace("eval_config", "eval_output")
    if outputs == [None] and module != config_module and find_spec(module):
        outputs = list(vars(import_module(module)).values())
    return {
        f"{category}.{metric}": field.description or field.title or metric
        for output in outputs
        for metrics in _classes_of(_fields(output).get("eval_result_metrics"))
        for category, of_category in _fields(metrics).items()
        for class_ in _classes_of(of_category)
        for metric, field in _fields(class_).items()
    }


def _classes_of(field: FieldInfo | None) -> Iterator[type]:
    """The pydantic dataclasses that a field can hold."""
    if field is not None:
        candidates = get_args(field.annotation) or (field.annotation,)
        yield from (c for c in candidates if isinstance(c, type) and _fields(c))


def _fields(of: object) -> dict[str, FieldInfo]:
    return vars(of).get("__pydantic_fields__", {}) if isinstance(of, type) else {}
