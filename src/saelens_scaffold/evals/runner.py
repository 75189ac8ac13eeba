"""Running evaluations: jobs on SAEs, results in the store, one table."""

import copy
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import sae_lens
import torch

from saelens_scaffold._util.errors import UserError, one_line
from saelens_scaffold._util.files import make_writable, workspace
from saelens_scaffold._util.interruption import raise_if_interrupted
from saelens_scaffold._util.progress import n_saes
from saelens_scaffold._util.tasks import Reporter, Task, TaskQueue, Workers
from saelens_scaffold._util.workers import connected
from saelens_scaffold.evals.base import Call, Evaluation, EvaluationError, Result
from saelens_scaffold.evals.jobs import Job, plan
from saelens_scaffold.evals.registry import evaluations_named
from saelens_scaffold.evals.saes import (
    SelectedSAE,
    SelectedSAEs,
    common_model_class,
    resolve_saes,
    select_saes,
)
from saelens_scaffold.evals.store import config_of
from saelens_scaffold.evals.table import Outcome, judged_views, results_table
from saelens_scaffold.evals.tokens import other_tokens


def run(
    job: Job,
    selected_saes: SelectedSAEs,
    force_rerun: bool = False,
    together: bool = False,
) -> Outcome:
    """
    Run one evaluation on the SAEs without a current result; an error is part of the outcome.

    Args:
        job: The evaluation.
        selected_saes: (release, sae_id) or (name, SAE object) pairs. They are not changed.
        force_rerun: Whether to measure SAEs again that have a current result.
        together: Whether the results depend on each other: if one is missing, all are
            measured again, and they are kept once all are there.

    Raises:
        KeyboardInterrupt: Ctrl-C, also where a library made something else of it.
    """
    results: dict[str, Result] = {}
    error = None
    try:
        # Some of SAEBench's evaluations switch gradients off or on, and leave it so.
        with torch.enable_grad(), redirect_stdout(sys.stderr):
            saes = job.resolve(copy.deepcopy(selected_saes))
            for key, result in _results(job, saes, force_rerun, together):
                results[key] = result
    except Exception as caught:
        error = caught
    raise_if_interrupted()
    for result in results.values():
        if warning := job.implementation.warning(result):
            print(warning, file=sys.stderr)
    return Outcome(job.evaluation, results, error)


def run_eval(
    name: str,
    config: Any,
    selected_saes: SelectedSAEs,
    device: str = "cpu",
    output_path: str | os.PathLike[str] = "eval_results",
    force_rerun: bool = False,
    artifacts_path: str | os.PathLike[str] = "artifacts",
) -> dict[str, Result]:
    """
    Run one evaluation of this package, as SAEBench's `run_eval` functions do.

    Args:
        name: Name of the evaluation.
        config: Its configuration.
        selected_saes: (release, sae_id) or (name, SAE object) pairs.
        device: Where to compute.
        output_path: Folder for the results, one JSON file per SAE.
        force_rerun: Whether to measure SAEs again that have a current result.
        artifacts_path: Folder for stored activations, probes and texts.

    Returns:
        The results as dictionaries, by the names that SAEBench gives the SAEs.

    Raises:
        UserError: There is no such evaluation, or the configuration, an SAE, the model or
            the text cannot be used.
    """
    (evaluation,) = evaluations_named(name)
    paths = (Path(output_path), Path(artifacts_path))
    model_class = getattr(config, "model_class_name", None)
    if model_class is None:  # SAEBench's configurations have none
        saes = resolve_saes(copy.deepcopy(selected_saes), "cpu", "float32")
        model_class = common_model_class([sae.sae for sae in saes])
    job = Job(
        evaluation,
        evaluation.load(),
        config,
        device,
        *paths,
        model_class_name=model_class,
    )
    outcome = run(job, selected_saes, force_rerun)
    if outcome.error is not None:
        raise outcome.error
    return outcome.results


class Report(NamedTuple):
    """
    What `saelens-scaffold eval` has to say.

    Attributes:
        text: The table, and which form of the SAEs was judged.
        failures: One line for each evaluation that failed.
    """

    text: str
    failures: list[str]


def evaluate(
    names: str,
    settings: Sequence[str] = (),
    *,
    sae_path: Sequence[str] = (),
    sae_regex_pattern: str | None = None,
    sae_block_pattern: str | None = None,
    force_rerun: bool = False,
    debug: bool = False,
    device: str | None = None,
    ray: str | None = None,
    cpus_per_task: int | None = None,
    **options: Any,
) -> Report:
    """
    Evaluate SAEs: everything that `saelens-scaffold eval` does.

    Args:
        names: Names of evaluations, separated by commas.
        settings: Fields of configurations, as NAME.FIELD=VALUE.
        sae_path: Directories of SAEs.
        sae_regex_pattern: Regular expression of SAELens releases.
        sae_block_pattern: Regular expression of the ids in these releases.
        force_rerun: Whether to measure SAEs again that have a current result.
        debug: Whether to print the tracebacks of failures to the standard error.
        device: Where to compute; by default a GPU where there is one.
        ray: Address of a Ray cluster whose machines share the evaluations, or "local" for
            one on this machine; by default this process does it all.
        cpus_per_task: CPU cores, and threads, of each evaluation there.
        options: As for `plan`.

    Raises:
        UserError: Something is missing, or makes no sense; nothing has been run.
    """
    evaluations = _parse_settings(settings, evaluations_named(names))
    which = (sae_path, sae_regex_pattern, sae_block_pattern, options.get("model_name"))
    selected = select_saes(*which)
    with connected(ray, device, cpus_per_task) as workers:
        # this machine need not have the device of the others
        here = device if workers.device is None else "cpu"
        jobs = plan(evaluations, selected, device=here, **options)
        for job in jobs:
            saes = job.resolve(copy.deepcopy(selected))
            if force_rerun or len(job.current(saes)) < len(saes):
                job.check(saes)
                make_writable(job.output_path.parent)
        outcomes = _run_all(jobs, selected, which, workers, force_rerun, debug)
    saes = resolve_saes(copy.deepcopy(selected), "cpu", "float32")
    said = [
        *judged_views(outcomes),
        *other_tokens([job.evaluation for job in jobs], saes),
    ]
    text = "\n".join([results_table(saes, outcomes), *said])
    failures = [o for o in outcomes if o.error is not None]
    return Report(text, [f"{o.evaluation.name} failed: {reason(o)}" for o in failures])


def _run_all(
    jobs: Sequence[Job],
    selected: SelectedSAEs,
    which: tuple[Any, ...],
    workers: Workers,
    force_rerun: bool,
    debug: bool,
) -> list[Outcome]:
    """
    Run jobs, each a task.

    Args:
        jobs: The jobs.
        selected: The SAEs.
        which: Arguments of `select_saes`, with which other machines find them.
        workers: Who runs the jobs.
        force_rerun: As for `run`.
        debug: As for `evaluate`.
    """
    tasks: list[Task] = []
    for i, job in enumerate(jobs):
        if workers.device is None:
            select = partial(list, selected)
        else:
            job = replace(job, device=workers.device)
            select = partial(select_saes, *which)
        name = job.evaluation.name
        about = f"· {name} of {n_saes(len(selected))}"
        call = partial(_run_selected, job, select, force_rerun, debug)
        tasks.append(Task(i, about, name, call))
    outcomes: dict[int, Outcome] = {}
    with workers.sharing(jobs[0].output_path.parent):
        for done in workers.run(TaskQueue(tasks, "evaluation", workers)):
            i = done.task.key
            outcomes[i] = done.value or Outcome(jobs[i].evaluation, {}, done.error)
    return [outcomes[i] for i in range(len(jobs))]


def _run_selected(
    job: Job,
    select: Callable[[], SelectedSAEs],
    force_rerun: bool,
    debug: bool,
    _: Reporter,
) -> Outcome:
    """Run a job, perhaps in another process, which cannot be sent every error."""
    outcome = run(job, select(), force_rerun)
    error = outcome.error
    if error is not None:
        if debug:
            traceback.print_exception(error, file=sys.stderr)
        if not isinstance(error, UserError):
            outcome = outcome._replace(error=EvaluationError(reason(outcome)))
    return outcome


def reason(outcome: Outcome) -> str:
    """Why an evaluation failed, in one line."""
    error = outcome.error
    assert error is not None
    is_told = isinstance(error, (UserError, EvaluationError))
    return ("" if is_told else f"{type(error).__name__}: ") + one_line(error)


def _results(
    job: Job, saes: list[SelectedSAE], force_rerun: bool, together: bool
) -> Iterator[tuple[str, Result]]:
    """Every SAE's result, by its key: those that are current first."""
    keys = job.keys(saes)
    current = {} if force_rerun else job.current(saes)
    if together and len(current) < len(saes):
        current = {}
    yield from current.items()
    missing = [sae for sae in saes if sae.key not in current]
    if not missing:
        return
    if force_rerun:
        # not the folder itself, where another process may be writing
        for file in job.store_path.glob("[!.]*"):
            file.unlink(missing_ok=True)
    for sae in missing:
        why = job.store.why_stale(sae.file_name, keys[sae.key])
        if why is not None:
            print(f"{sae.label}: measuring again, {why}", file=sys.stderr)
    measured = _measure(job, missing, [sae for sae in saes if sae.key in current])
    for sae, result in list(measured) if together else measured:
        yield sae.key, job.store.keep(sae.file_name, keys[sae.key], result)


def _measure(
    job: Job, missing: list[SelectedSAE], companions: Sequence[SelectedSAE]
) -> Iterator[tuple[SelectedSAE, Result]]:
    """The complete results of SAEs, measured."""
    about_this_run = {
        "eval_id": str(uuid4()),
        # to SAEBench, the commit of whatever repository the user works in
        "sae_bench_commit_hash": "Unknown",
        "sae_lens_version": sae_lens.__version__,
    }
    output_class = job.implementation.output_class
    with _artifacts_in(job.artifacts_path) as artifacts:
        text = (job.dataset_split, job.text_column)
        where = (job.device, artifacts, job.store_path)
        model = (job.model_class_name, job.kept)
        call = Call(*where, *text, job.api_key, companions, *model)
        for sae, result in job.implementation.measure(job.config, missing, call):
            if output_class is not None:
                output = output_class(
                    **about_this_run,
                    eval_config=config_of(job.config, sae),
                    datetime_epoch_millis=int(datetime.now().timestamp() * 1000),
                    sae_lens_id=sae.sae_id,
                    sae_lens_release_id=sae.release,
                    sae_cfg_dict=sae.sae.cfg.to_dict(),
                    **result,
                )
                result = asdict(output)
            yield sae, result


@contextmanager
def _artifacts_in(folder: Path) -> Iterator[Path]:
    """An empty folder of one call's own, removed afterwards."""
    with ExitStack() as stack:
        artifacts = None
        while artifacts is None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                artifacts = stack.enter_context(workspace(folder / "call"))
            except (FileExistsError, FileNotFoundError):
                if folder.is_file() or folder.is_symlink():
                    raise
                # removed by another call that has ended
        yield artifacts
    with suppress(OSError):  # not empty: partial results, and other calls' folders
        folder.rmdir()


def _parse_settings(
    settings: Sequence[str], evaluations: Sequence[Evaluation]
) -> dict[str, dict[str, Any]]:
    """Values of fields, for each evaluation, from NAME.FIELD=VALUE."""
    parsed: dict[str, dict[str, Any]] = {named.name: {} for named in evaluations}
    for setting in settings:
        target, equals, text = setting.partition("=")
        name, dot, field = target.partition(".")
        if not (equals and dot):
            raise UserError(f"--set {setting}: write --set NAME.FIELD=VALUE")
        if name not in parsed:
            raise UserError(
                f"--set {setting}: {name!r} is none of the evaluations to run: "
                f"{', '.join(parsed)}"
            )
        try:
            parsed[name][field] = json.loads(text)
        except RecursionError as error:
            raise UserError(f"--set {target}: the value has too many levels") from error
        except ValueError:
            parsed[name][field] = text
    return parsed
