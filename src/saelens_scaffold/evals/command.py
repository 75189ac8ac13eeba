"""`saelens-scaffold eval`: several evaluations of several SAEs, and one table."""

import argparse
import copy
import sys
import traceback
from contextlib import redirect_stdout

import torch

from saelens_scaffold._util.interruption import interruptible, raise_if_interrupted
from saelens_scaffold._util.quiet import ignore_model_kwargs
from saelens_scaffold.evals.command_line import BAD_INPUT, one_line, select_saes
from saelens_scaffold.evals.plan import Job, make_plan, typed_options
from saelens_scaffold.evals.selected_saes import SelectedSAEs
from saelens_scaffold.evals.table import FAILED, Outcome, judged_views, results_table


def run(options: argparse.Namespace) -> int:
    """
    Run the command.

    Args:
        options: What the command line's parser made of it.

    Returns:
        The exit status: 0, 1 if an evaluation failed, 2 if nothing was run because the
        command line makes no sense, 130 after an interruption.
    """
    ignore_model_kwargs()
    try:
        plan = make_plan(typed_options(options), select_saes(options))
    except BAD_INPUT as error:
        print(f"saelens-scaffold eval: error: {one_line(error)}", file=sys.stderr)
        return 2
    try:
        with interruptible():
            outcomes = [run_job(job, plan.selected_saes) for job in plan.jobs]
    except KeyboardInterrupt:
        print(
            f"\nsaelens-scaffold eval: interrupted. What is finished is in "
            f"{options.output_folder}; repeat the command to go on.",
            file=sys.stderr,
        )
        return 130

    print(results_table(plan.saes, outcomes))
    print(*judged_views(outcomes), sep="\n")

    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        if options.debug:
            traceback.print_exception(outcome.error, file=sys.stderr)
        print(f"{outcome.evaluation.name} {FAILED}: {reason(outcome)}", file=sys.stderr)
    return 1 if failed else 0


def run_job(job: Job, selected_saes: SelectedSAEs) -> Outcome:
    """
    Run one evaluation; an error is part of its outcome.

    Raises:
        KeyboardInterrupt: Ctrl-C, also where a library made something else of it.
    """
    evaluation = job.evaluation
    print(f"{evaluation.name}: {len(selected_saes)} SAEs", file=sys.stderr)
    try:
        # Some of SAEBench's evaluations switch gradients off or on, and leave it so.
        with torch.enable_grad(), redirect_stdout(sys.stderr):
            # Each has SAEs of its own: it may change their device, dtype and form.
            results = evaluation.run(
                job.config, copy.deepcopy(selected_saes), job.settings
            )
    except Exception as error:
        raise_if_interrupted()
        return Outcome(evaluation, getattr(error, "results", {}), error)
    raise_if_interrupted()
    return Outcome(evaluation, results, None)


def reason(outcome: Outcome) -> str:
    """Why an evaluation failed, in one line."""
    error = outcome.error
    assert error is not None
    # an error with results tells the SAEs and the reason itself
    kind = "" if hasattr(error, "results") else f"{type(error).__name__}: "
    return kind + one_line(error)
