"""JSON schemas of the results, as SAEBench has them of its own, and descriptions of metrics.

`python -m saelens_scaffold.evals.json_schemas` writes each beside its output class. They are
committed, so that programs that read results can rely on them without importing anything.
"""

import inspect
import json
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from saelens_scaffold._util.files import new_file
from saelens_scaffold.evals.base import Evaluation
from saelens_scaffold.evals.registry import EVALUATIONS


def output_classes() -> Iterator[tuple[type[Any], Path]]:
    """The output class of every evaluation of this package, and the file of its schema."""
    for evaluation in EVALUATIONS.values():
        output_class = evaluation.load().output_class
        if output_class is not None:
            name = f"eval_output_schema_{evaluation.name}.json"
            yield output_class, Path(inspect.getfile(output_class)).with_name(name)


def json_schema(output_class: type[Any]) -> str:
    """The JSON schema of an output class."""
    return json.dumps(TypeAdapter(output_class).json_schema(), indent=2)


def main() -> None:
    """Write all schemas."""
    for output_class, path in output_classes():
        with new_file(path) as file:
            file.write_text(json_schema(output_class), encoding="utf-8")
        print(path)


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


if __name__ == "__main__":
    main()
