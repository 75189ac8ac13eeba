"""An experiment from its configuration to its report; what is finished is not done again."""

import itertools
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from saelens_scaffold.compare.config import CompareConfig, keep_config
from saelens_scaffold.compare.evaluating import Evaluator
from saelens_scaffold.compare.grid import Run, runs_of
from saelens_scaffold.compare.memory import Estimate, available_memory, estimate
from saelens_scaffold.compare.metrics import metrics_of
from saelens_scaffold.compare.report import write_page
from saelens_scaffold.compare.results import collect, results_csv
from saelens_scaffold.compare.training import WAVE_FILENAME, WaveTrainer, training_text
from saelens_scaffold.evals.command import reason
from saelens_scaffold.evals.command_line import choose_device
from saelens_scaffold.evals.table import Outcome
from saelens_scaffold.files import new_file

CONFIG_FILENAME = "compare.yaml"
WAVES_FILENAME = "waves.json"


class EvaluationsFailed(RuntimeError):
    """
    Evaluations have failed; everything else is finished and kept.

    Attributes:
        reasons: One line for each of them.
    """

    def __init__(self, outcomes: Sequence[Outcome]):
        self.reasons = [
            f"{outcome.evaluation.name} failed: {reason(outcome)}"
            for outcome in outcomes
        ]
        super().__init__("; ".join(self.reasons))


@dataclass
class Plan:
    """
    What an experiment will do, found to make sense.

    Attributes:
        runs: Its SAEs.
        estimate: What training them is expected to need.
        available: Bytes that training may use.
        waves: The SAEs, split into what is trained together.
    """

    runs: list[Run]
    estimate: Estimate
    available: int
    waves: list[list[Run]]


def make_plan(
    config: CompareConfig,
    device: str | None = None,
    memory_gb: float | None = None,
) -> Plan:
    """
    Find everything that an experiment needs, and split its SAEs into waves.

    Args:
        config: The experiment.
        device: Where it will be run; by default a GPU where there is one.
        memory_gb: Memory that training may use, in 10^9 bytes; by default most of what
            is free on the device.

    Raises:
        ValueError: Something makes no sense, or not even one SAE fits into memory.
        FileNotFoundError: A file is missing.
    """
    device = choose_device(device)
    runs = runs_of(config, device)
    estimated = estimate(config, runs)
    training_text(config)
    metrics_of(Evaluator(config, device, Path(), Path()).evaluations)
    available = (
        available_memory(device) if memory_gb is None else int(memory_gb * 10**9)
    )
    return Plan(runs, estimated, available, estimated.waves(runs, available))


def compare(
    config: CompareConfig,
    output_path: str | Path,
    device: str | None = None,
    memory_gb: float | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """
    Train the SAEs of an experiment, evaluate them, and compare them.

    In the folder are afterwards the SAEs (`saes/`), SAEBench's result files
    (`eval_results/`), results.json, results.csv and report.html. What an earlier, broken
    call finished there is not done again, and a training goes on from its last
    checkpoint, with the same results in the end.

    Args:
        config: The experiment.
        output_path: Folder for everything.
        device: Where to run; by default a GPU where there is one.
        memory_gb: Memory that training may use, in 10^9 bytes; by default most of what
            is free. It decides how many SAEs are trained at once, not what comes out.
        command: What to state as the command that made it; by default that of the process.

    Returns:
        What is written as results.json.

    Raises:
        ValueError: Something makes no sense; the folder holds an experiment with another
            configuration, or another process is at work in it.
        FileNotFoundError: A file is missing.
        EvaluationsFailed: Some evaluation failed. The report is of the others.
    """
    output_path = Path(output_path)
    device = choose_device(device)
    plan = make_plan(config, device, memory_gb)
    evaluator = Evaluator(
        config, device, output_path / "saes", output_path / "eval_results"
    )
    evaluator.check(plan.runs[0])
    keep_config(config, output_path / CONFIG_FILENAME)
    with _alone_in(output_path):
        return _compare(config, plan, evaluator, output_path, command)


def _compare(
    config: CompareConfig,
    plan: Plan,
    evaluator: Evaluator,
    output_path: Path,
    command: str | None,
) -> dict[str, Any]:
    saes_path = evaluator.saes_path
    training_path = output_path / "training"
    waves = _kept_waves(plan, training_path)
    estimated = ("expected_average_only_in", "covariance_whitening")
    scales = any(r.config.normalize_activations in estimated for r in plan.runs)
    trainer = WaveTrainer(config, evaluator.device, saes_path, training_path, scales)
    for number, wave in enumerate(waves):
        print(f"wave {number + 1} of {len(waves)}: {len(wave)} SAEs", file=sys.stderr)
        trainer.train(number, wave)

    outcomes: list[Outcome] = []
    for group in groups(plan.runs):
        print(
            f"evaluating {len(group)} SAEs of seed {group[0].seed} at "
            f"{group[0].hook_name}",
            file=sys.stderr,
        )
        outcomes += evaluator.evaluate(group)

    results = collect(
        config,
        plan.runs,
        metrics_of(evaluator.evaluations),
        _result_files(evaluator, plan.runs),
        saes_path,
        [_read(training_path / f"wave-{n}" / WAVE_FILENAME) for n in range(len(waves))],
        command or shlex.join(sys.argv),
    )
    with new_file(output_path / "results.json") as file:
        file.write_text(json.dumps(results, indent=1, allow_nan=False))
    with new_file(output_path / "results.csv") as file:
        file.write_text(results_csv(results), encoding="utf-8")
    write_page(results, output_path / "report.html")
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        raise EvaluationsFailed(failed)
    return results


def groups(runs: Sequence[Run]) -> list[list[Run]]:
    """SAEs that are evaluated together: those of one seed at one hook point."""
    key = lambda run: (run.seed, run.hook_name)
    return [[*group] for _, group in itertools.groupby(sorted(runs, key=key), key)]


@contextmanager
def _alone_in(output_path: Path) -> Iterator[None]:
    """
    Raises:
        ValueError: Another process is at work in this folder.
    """
    try:
        with FileLock(output_path / "training.lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(
            f"another process is at work in {output_path}; wait for it, or choose "
            "another --output_path"
        ) from error


def _kept_waves(plan: Plan, training_path: Path) -> list[list[Run]]:
    """The waves as they were begun: checkpoints are of whole waves."""
    file = training_path / WAVES_FILENAME
    if not file.is_file():
        training_path.mkdir(parents=True, exist_ok=True)
        names = [[run.name for run in wave] for wave in plan.waves]
        with new_file(file) as temporary:
            temporary.write_text(json.dumps(names, indent=1))
        return plan.waves
    by_name = {run.name: run for run in plan.runs}
    return [[by_name[name] for name in wave] for wave in _read(file)]


def _result_files(
    evaluator: Evaluator, runs: Sequence[Run]
) -> dict[str, dict[str, Path]]:
    """The results that there are, by SAE and evaluation."""
    return {
        run.name: {
            name: file
            for name in evaluator.config.evaluations
            if (file := evaluator.result_file(name, run)).is_file()
        }
        for run in runs
    }


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
