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
from saelens_scaffold.compare.training import (
    ESTIMATED_SCALES,
    WAVE_FILENAME,
    WaveTrainer,
    training_text,
)
from saelens_scaffold.evals.command import reason
from saelens_scaffold.evals.command_line import choose_device
from saelens_scaffold.evals.table import Outcome
from saelens_scaffold.files import new_file

CONFIG_FILENAME = "compare.yaml"
TRAINING = "training"
WAVES_FILENAME = "waves.json"


class EvaluationsFailed(RuntimeError):
    """
    Evaluations have failed; everything else is finished and kept.

    Attributes:
        reasons: One line for each of them.
        results: What `compare` would have returned.
    """

    def __init__(self, outcomes: Sequence[Outcome], results: dict[str, Any]):
        self.results = results
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
    begun: Sequence[Sequence[str]] = (),
) -> Plan:
    """
    Find everything that an experiment needs, and split its SAEs into waves.

    Args:
        config: The experiment.
        device: Where it will be run; by default a GPU where there is one.
        memory_gb: Memory that training may use, in 10^9 bytes; by default most of what
            is free on the device.
        begun: Waves that stay as they are, by the names of their SAEs: a checkpoint is
            one of a whole wave.

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
    by_name = {run.name: run for run in runs}
    waves = [[by_name.pop(name) for name in wave] for wave in begun]
    waves += estimated.waves([*by_name.values()], available)
    return Plan(runs, estimated, available, waves)


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
    config_file = output_path / CONFIG_FILENAME
    if config_file.exists():  # before anything else is said of the changed one
        keep_config(config, config_file)
    begun = _begun_waves(output_path / TRAINING)
    plan = make_plan(config, device, memory_gb, begun)
    evaluator = Evaluator(
        config, device, output_path / "saes", output_path / "eval_results"
    )
    evaluator.check(plan.runs[0])
    keep_config(config, config_file)
    with _alone_in(output_path):
        training = _train(config, plan, device, output_path)
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
            evaluator.saes_path,
            training,
            device,
            command or shlex.join(sys.argv),
        )
        with new_file(output_path / "results.json") as file:
            file.write_text(json.dumps(results, indent=1, allow_nan=False))
        with new_file(output_path / "results.csv") as file:
            file.write_text(results_csv(results), encoding="utf-8")
        write_page(results, output_path / "report.html")
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        raise EvaluationsFailed(failed, results)
    return results


def _train(
    config: CompareConfig, plan: Plan, device: str, output_path: Path
) -> list[dict[str, Any]]:
    """Train what is not trained yet; returns what is known of each wave."""
    training_path = output_path / TRAINING
    training_path.mkdir(parents=True, exist_ok=True)
    with new_file(training_path / WAVES_FILENAME) as file:
        names = [[run.name for run in wave] for wave in plan.waves]
        file.write_text(json.dumps(names, indent=1))
    scales = any(r.config.normalize_activations in ESTIMATED_SCALES for r in plan.runs)
    trainer = WaveTrainer(config, device, output_path / "saes", training_path, scales)
    for number, wave in enumerate(plan.waves):
        print(
            f"wave {number + 1} of {len(plan.waves)}: {len(wave)} SAEs", file=sys.stderr
        )
        trainer.train(number, wave)
    return [
        _read(training_path / f"wave-{number}" / WAVE_FILENAME)
        for number in range(len(plan.waves))
    ]


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


def _begun_waves(training_path: Path) -> list[list[str]]:
    """Names of the SAEs of each wave that was begun; they are trained in order."""
    file = training_path / WAVES_FILENAME
    waves: list[list[str]] = _read(file) if file.is_file() else []
    begun = [
        (training_path / f"wave-{number}").exists() for number in range(len(waves))
    ]
    return waves[: sum(begun)]


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
