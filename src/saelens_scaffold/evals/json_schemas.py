"""The JSON schemas of the results, as SAEBench generates its own.

`python -m saelens_scaffold.evals.json_schemas` writes each beside its `eval_output.py`,
where they are committed: what reads results can rely on them without importing anything.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

from sae_bench.evals.base_eval_output import BaseEvalOutput
from sae_bench.evals.generate_json_schemas import generate_json_schema

from saelens_scaffold import evals
from saelens_scaffold._util.files import new_file
from saelens_scaffold.evals.configs import config_fields


def output_classes() -> Iterator[tuple[type[BaseEvalOutput], Path]]:
    """The output class of every evaluation of this package, and where its schema belongs."""
    for package in pkgutil.iter_modules(evals.__path__, f"{evals.__name__}."):
        if not package.ispkg:
            continue
        try:
            module = importlib.import_module(f"{package.name}.eval_output")
        except ModuleNotFoundError as error:
            if error.name != f"{package.name}.eval_output":
                raise
            continue  # a package that is no evaluation
        for output_class in vars(module).values():
            if (
                isinstance(output_class, type)
                and issubclass(output_class, BaseEvalOutput)
                and output_class.__module__ == module.__name__
            ):
                eval_type_id = config_fields(output_class)["eval_type_id"].default
                name = f"eval_output_schema_{eval_type_id}.json"
                assert module.__file__ is not None
                yield output_class, Path(module.__file__).with_name(name)


def main() -> None:
    """Write all schemas."""
    for output_class, path in output_classes():
        with new_file(path) as file:
            generate_json_schema(output_class, str(file))
        print(path)


if __name__ == "__main__":
    main()
