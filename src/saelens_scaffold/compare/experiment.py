"""An experiment from its configuration to its report; finished work is not repeated."""

import json
import shlex
import sys
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import make_writable, new_file
from saelens_scaffold._util.tasks import Workers
from saelens_scaffold._util.untrusted import read_json
from saelens_scaffold._util.workers import connected
from saelens_scaffold.compare import config as configs
from saelens_scaffold.compare.evaluating import SAES, Evaluator
from saelens_scaffold.compare.grid import (
    Run,
    check_training,
    runner_config,
    runs_of,
)
from saelens_scaffold.compare.metrics import metrics_of
from saelens_scaffold.compare.report.page import write_page
from saelens_scaffold.compare.results import collect, references, results_csv
from saelens_scaffold.compare.table import comparison_text, plan_text, reference_text
from saelens_scaffold.compare.training import (
    WaveTrainer,
    check_trained,
    is_trained,
    plan_waves,
)
from saelens_scaffold.evals.model import choose_device
from saelens_scaffold.training.cached_activations import check_data

CONFIG_FILENAME = "compare.yaml"
RESULTS_FILENAME = "results.json"


class EvaluationsFailed(UserError):
    """
    The training of an SAE diverged, or an evaluation failed; the report is of the others.

    Attributes:
        results: The content of results.json.
        text: What `run` would have returned to print.
    """

    exit_status = 1

    def __init__(self, failures: list[str], results: dict[str, Any], path: Path):
        super().__init__(f"{'; '.join(failures)}. The report in {path} is of the rest")
        self.results = results
        self.text = comparison_text(results)


@dataclass
class Plan:
    """
    An experiment that can be carried out.

    Attributes:
        waves: The SAEs to train, divided into those that are trained together.
        trainer: Trains the SAEs.
        evaluator: Evaluates the SAEs.
    """

    waves: list[list[Run]]
    trainer: WaveTrainer
    evaluator: Evaluator


def make_plan(
    config: configs.CompareConfig,
    output_path: str | Path,
    device: str | None = None,
    saes_per_wave: int | None = None,
    workers: Workers | None = None,
) -> Plan:
    """
    Check everything that an experiment needs, and divide its SAEs into waves.

    Args:
        config: The experiment.
        output_path: Its folder, which may hold finished work.
        device: Where it is run; by default a GPU where there is one.
        saes_per_wave: Most SAEs that are trained together; by default that of the
            configuration.
        workers: Who trains and evaluates; by default this process.

    Raises:
        UserError: Something does not exist or makes no sense, or the folder holds SAEs
            that were trained with another configuration.
    """
    output_path = Path(output_path)
    saes_path, training_path = output_path / SAES, output_path / "training"
    config_file = output_path / CONFIG_FILENAME
    has_begun = any(saes_path.glob("*")) or any(training_path.glob("wave-*"))
    if config_file.exists() and has_begun:
        # before anything else is said of the changed one
        configs.check_unchanged(config, config_file)
    workers = workers or Workers()
    device = workers.device or choose_device(device)
    runs = runs_of(config, device)
    check_training(config, runs)
    check_trained(config, runs, saes_path, training_path)
    per_wave = saes_per_wave or config.saes_per_wave
    waves = plan_waves(training_path, saes_path, runs, per_wave, workers.at_once)
    for wave in waves:
        if not all(is_trained(saes_path / run.name) for run in wave):
            check_data(runner_config(config, wave))
    elsewhere = workers.device is not None
    evaluator = Evaluator(config, runs, device, output_path, elsewhere)
    evaluator.check()
    trainer = WaveTrainer(config, runs, device, saes_path, training_path)
    return Plan(waves, trainer, evaluator)


def compare(
    config: configs.CompareConfig,
    output_path: str | Path,
    device: str | None = None,
    saes_per_wave: int | None = None,
    command: str | None = None,
    ray: str | None = None,
    cpus_per_task: int | None = None,
) -> dict[str, Any]:
    """
    Train the SAEs of an experiment, evaluate them, and compare them.

    The folder then holds the SAEs (`saes/`), SAEBench's result files (`eval_results/`),
    results.json, results.csv and report.html. A repeated call does only what is missing,
    and resumes a training from its last checkpoint, with the same results in the end.
    Whatever the configuration says beyond the training may change between calls.

    Args:
        config: The experiment.
        output_path: Folder for everything.
        device: Where to run; by default a GPU where there is one.
        saes_per_wave: Most SAEs that are trained together, whatever the configuration
            says; results do not depend on it.
        command: Command to state in the report; by default that of the process.
        ray: Address of a Ray cluster whose machines share the work, or "local" for one on
            this machine; by default this process does it all.
        cpus_per_task: CPU cores, and threads, of each training and evaluation there.

    Returns:
        The content of results.json.

    Raises:
        UserError: Something does not exist or makes no sense, the folder holds SAEs that
            were trained with another configuration, or another process is at work in it.
        EvaluationsFailed: The training of an SAE diverged, or an evaluation failed.
    """
    output_path = Path(output_path)
    with connected(ray, device, cpus_per_task) as workers:
        plan = make_plan(config, output_path, device, saes_per_wave, workers)
        metrics = metrics_of([job.evaluation for job in plan.evaluator.jobs])
        make_writable(output_path)
        with _alone(output_path), workers.sharing(output_path):
            configs.keep_config(config, output_path / CONFIG_FILENAME)
            training, failed = plan.trainer.train(plan.waves, workers)
            evaluated = plan.evaluator.evaluate(workers, failed)
            about = {"command": command or shlex.join(sys.argv), "training": training}
            about["hardware"] = evaluated.hardware
            runs = [run for run in plan.trainer.runs if run.name not in failed]
            found = evaluated.results
            results = collect(config, runs, metrics, found, output_path, **about)
            results["warnings"] = evaluated.warnings
            with new_file(output_path / RESULTS_FILENAME) as file:
                file.write_text(json.dumps(results, indent=1, allow_nan=False))
            with new_file(output_path / "results.csv") as file:
                file.write_text(results_csv(results), encoding="utf-8")
            write_page(results, output_path / "report.html")
    failures = evaluated.failures
    if failures:
        raise EvaluationsFailed(failures, results, output_path)
    return results


def _alone(output_path: Path) -> AbstractContextManager[Any]:
    """
    Keeps other processes out of the folder of an experiment.

    Raises:
        UserError: One is at work in it.
    """
    try:
        return FileLock(output_path / "training.lock").acquire(timeout=0)
    except Timeout as error:
        problem = f"another process is at work in {output_path}; wait for it"
        raise UserError(problem) from error


def run(
    config: str | Path,
    output_path: str | Path,
    *,
    plan: bool = False,
    reference: bool = False,
    saes_per_wave: int | None = None,
    device: str | None = None,
    command: str | None = None,
    ray: str | None = None,
    cpus_per_task: int | None = None,
) -> str:
    """
    Everything that `saelens-scaffold compare` does.

    Args:
        config: File with the experiment.
        output_path: Folder of the experiment.
        plan: Whether to check the experiment only, and to say what would be done.
        reference: Whether to show only the published figures beside earlier results.
        saes_per_wave: Most SAEs that are trained together.
        device: Where to run; by default a GPU where there is one.
        command: Command to state in the report.
        ray: Address of a Ray cluster, or "local".
        cpus_per_task: CPU cores of each training and evaluation there.

    Returns:
        The text to print.

    Raises:
        UserError: Something does not exist or makes no sense.
        EvaluationsFailed: The training of an SAE diverged, or an evaluation failed.
    """
    experiment = configs.read_config(config)
    if reference:
        return _reference_alone(experiment, Path(output_path))
    if plan:
        with connected(ray, device, cpus_per_task) as workers:
            planned = make_plan(experiment, output_path, device, saes_per_wave, workers)
        return plan_text(experiment, planned.trainer.runs, planned.waves)
    warnings.filterwarnings("ignore", message="All samples in the training dataset")
    results = compare(
        experiment, output_path, device, saes_per_wave, command, ray, cpus_per_task
    )
    written = "report.html, results.json, results.csv, saes/"
    return f"{comparison_text(results)}\nWritten to {output_path}: {written}."


def _reference_alone(config: configs.CompareConfig, output_path: Path) -> str:
    """The published figures that are named now, beside the results of an earlier call."""
    if not config.reference:
        raise UserError("the experiment names no published figures (`reference`)")
    file = output_path / RESULTS_FILENAME
    if not file.is_file():
        raise UserError(f"there are no results in {output_path} yet for --reference")
    configs.check_unchanged(config, output_path / CONFIG_FILENAME)
    results = read_json(file)
    command = results["provenance"]["command"]
    return reference_text(references(config, results["saes"], command))
