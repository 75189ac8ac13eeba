"""What evaluations say of their metrics."""

import importlib
from collections.abc import Iterator
from typing import get_args

from pydantic.fields import FieldInfo

from saelens_scaffold.evals.configs import config_fields
from saelens_scaffold.evals.registry import Evaluation


def metric_descriptions(evaluation: Evaluation) -> dict[str, str]:
    """
    What an evaluation says its metrics are.

    Args:
        evaluation: An evaluation of this package, of SAEBench or of a plugin.

    Returns:
        The description of each field of `eval_result_metrics`, by its path there, as in
        "sparsity.l0"; none if the evaluation has no `eval_output` as SAEBench's have.
    """
    name = f"{evaluation.package}.eval_output"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return {}
    return {
        f"{category}.{metric}": field.description or field.title or metric
        for output in vars(module).values()
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
    if isinstance(of, type) and "__pydantic_fields__" in vars(of):
        return config_fields(of)
    return {}
