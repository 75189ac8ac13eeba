"""JSON schemas of the results, as SAEBench generates its own.

`python -m saelens_scaffold.evals.json_schemas` writes each beside its output class. They are
committed, so that programs that read results can rely on them without importing anything.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path

from sae_bench.evals.base_eval_output import BaseEvalOutput
from sae_bench.evals.generate_json_schemas import generate_json_schema

from saelens_scaffold._util.files import new_file
from saelens_scaffold.evals.registry import EVALUATIONS


def output_classes() -> Iterator[tuple[type[BaseEvalOutput], Path]]:
    """The output class of every evaluation of this package, and the file of its schema."""
    for evaluation in EVALUATIONS.values():
        output_class = evaluation.load().output_class
        if output_class is not None:
            name = f"eval_output_schema_{evaluation.name}.json"
            yield output_class, Path(inspect.getfile(output_class)).with_name(name)


def main() -> None:
    """Write all schemas."""
    for output_class, path in output_classes():
        with new_file(path) as file:
            generate_json_schema(output_class, str(file))
        print(path)


if __name__ == "__main__":
    main()
