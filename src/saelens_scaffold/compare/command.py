"""The command `saelens-scaffold compare`."""

import argparse
import shlex
import sys
import traceback
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from saelens_scaffold._util.interruption import interruptible
from saelens_scaffold._util.quiet import quiet
from saelens_scaffold.compare.config import ConfigChanged, read_config
from saelens_scaffold.compare.experiment import (
    EvaluationsFailed,
    compare,
    make_plan,
    references_so_far,
)
from saelens_scaffold.compare.pairs import pairs_text
from saelens_scaffold.compare.reference import reference_text
from saelens_scaffold.compare.table import comparison_text, plan_text
from saelens_scaffold.evals.command_line import BAD_INPUT, one_line


def run(options: argparse.Namespace) -> int:
    """
    Run the command.

    Args:
        options: What the command line's parser made of it.

    Returns:
        The exit status: 0, 1 if an SAE diverged or an evaluation failed, 2 if the input makes no sense,
        130 after an interruption.
    """
    quiet()
    warnings.filterwarnings("ignore", message="All samples in the training dataset")
    output_path = Path(options.output_path or f"{Path(options.config).stem}-output")
    try:
        config = read_config(options.config)
        if options.plan:
            with redirect_stdout(sys.stderr):
                plan = make_plan(config, output_path, options.device, options.memory_gb)
            print(plan_text(plan, options.tflops))
            print(pairs_text(config, plan.runs))
            return 0
        if options.reference:
            print(reference_text(references_so_far(config, output_path)), end="")
            return 0
        # what TransformerLens and SAEBench print goes to stderr
        with interruptible(), redirect_stdout(sys.stderr):
            results = compare(
                config,
                output_path,
                options.device,
                options.memory_gb,
                command=_command(options, output_path),
            )
    except ConfigChanged as error:
        print(f"saelens-scaffold compare: error: {error}", file=sys.stderr)
        return 2
    except BAD_INPUT as error:
        if options.debug:
            traceback.print_exc()
        print(f"saelens-scaffold compare: error: {one_line(error)}", file=sys.stderr)
        return 2
    except EvaluationsFailed as error:
        print(_results_text(error.results))
        for line in (*error.results["warnings"], *error.reasons):
            print(line, file=sys.stderr)
        again = "; repeat the command to try again what failed" * error.can_repeat
        print(f"The report in {output_path} is of the rest{again}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"\nsaelens-scaffold compare: interrupted. What is finished is in "
            f"{output_path}; repeat the command to go on.",
            file=sys.stderr,
        )
        return 130
    print(_results_text(results))
    for warning in results["warnings"]:
        print(warning, file=sys.stderr)
    print(f"Written to {output_path}: report.html, results.json, results.csv, saes/.")
    return 0


def _results_text(results: Mapping[str, Any]) -> str:
    """The comparisons, and the published figures beside ours where there are any."""
    reference = results["reference"]
    parts = [comparison_text(results), *([reference_text(reference)] * bool(reference))]
    return "\n".join(parts)


def _command(options: argparse.Namespace, output_path: Path) -> str:
    """The command line, with its defaults, as far as results depend on it."""
    flags = {
        "output_path": output_path,
        "device": options.device,
        "memory_gb": options.memory_gb,
    }
    words = ["saelens-scaffold", "compare", options.config]
    for flag, value in flags.items():
        if value is not None:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)
