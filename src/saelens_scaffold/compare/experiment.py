"""An experiment from its configuration to its report; what is finished is not done again."""

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import new_file
from saelens_scaffold.compare.config import (
    CompareConfig,
    check_unchanged,
    keep_config,
)
from saelens_scaffold.compare.evaluating import Evaluator
from saelens_scaffold.compare.grid import Run, runs_of
from saelens_scaffold.compare.memory import (
    Estimate,
    available_memory,
    check_positive,
    estimate,
)
from saelens_scaffold.compare.metrics import metrics_of
from saelens_scaffold.compare.reference import references
from saelens_scaffold.compare.report import write_page
from saelens_scaffold.compare.results import collect, results_csv
from saelens_scaffold.compare.runner_config import check_training
from saelens_scaffold.compare.training import (
    ESTIMATED_SCALES,
    WAVE_FILENAME,
    WaveTrainer,
    is_trained,
    training_text,
)
from saelens_scaffold.evals.command import reason
from saelens_scaffold.evals.command_line import choose_device
from saelens_scaffold.evals.dense_latents.main import l0_warning_of
from saelens_scaffold.evals.table import Outcome

CONFIG_FILENAME = "compare.yaml"
TRAINING = "training"
WAVES_FILENAME = "waves.json"
RESULTS_FILENAME = "results.json"


class EvaluationsFailed(RuntimeError):
    """
    SAEs have come to nothing, or evaluations have failed; everything else is finished and
    kept.

    Attributes:
        reasons: One line for each of them.
        can_repeat: Whether something is left to try again.
        results: What `compare` would have returned.
    """

    def __init__(
        self,
        diverged: Sequence[str],
        outcomes: Sequence[Outcome],
        results: dict[str, Any],
    ):
        self.results = results
        self.can_repeat = bool(outcomes)
        self.reasons = [
            *(
                f"{name}: its weights are not finite, since its training diverged; it "
                "was left out of the evaluations"
                for name in diverged
            ),
            *(f"{o.evaluation.name} failed: {reason(o)}" for o in outcomes),
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
        evaluator: Evaluates them.
    """

    runs: list[Run]
    estimate: Estimate
    available: int
    waves: list[list[Run]]
    evaluator: Evaluator


def make_plan(
    config: CompareConfig,
    output_path: str | Path,
    device: str | None = None,
    memory_gb: float | None = None,
) -> Plan:
    """
    Find everything that an experiment needs, and split its SAEs into waves.

    Args:
        config: The experiment.
        output_path: Its folder, of which what is finished is looked at.
        device: Where it will be run; by default a GPU where there is one.
        memory_gb: Memory that training may use, in 10^9 bytes; by default most of what
            is free on the device.

    Raises:
        UserError: Something makes no sense, not even one SAE fits into memory, or the
            folder holds SAEs that were trained with another configuration.
        UserError: A file is missing.
    """
    output_path = Path(output_path)
    config_file = output_path / CONFIG_FILENAME
    if config_file.exists() and _has_begun(output_path):
        # before anything else is said of the changed one
        check_unchanged(config, config_file)
    device = choose_device(device)
    if memory_gb is not None:
        check_positive("memory_gb", memory_gb)
    runs = runs_of(config, device)
    estimated = estimate(config, runs)
    check_training(config, runs)
    training_text(config)
    evaluator = Evaluator(
        config, runs, device, output_path / "saes", output_path / "eval_results"
    )
    metrics_of(evaluator.evaluations)
    evaluator.check()
    available = (
        available_memory(device) if memory_gb is None else int(memory_gb * 10**9)
    )
    waves, others = _begun(output_path, runs)
    waves += estimated.waves(others, available)
    return Plan(runs, estimated, available, waves, evaluator)


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
    checkpoint, with the same results in the end. What the configuration says beyond the
    training may have changed since then; evaluations that it changes are done again.

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
        UserError: Something makes no sense; the folder holds SAEs that were trained with
            another configuration, or another process is at work in it.
        UserError: A file is missing.
        EvaluationsFailed: An SAE has come to nothing, or an evaluation failed. The report
            is of the others.
    """
    output_path = Path(output_path)
    device = choose_device(device)
    plan = make_plan(config, output_path, device, memory_gb)
    output_path.mkdir(parents=True, exist_ok=True)
    with _alone_in(output_path):
        keep_config(config, output_path / CONFIG_FILENAME)
        training = _train(config, plan, device, output_path)
        outcomes: list[Outcome] = []
        for group in plan.evaluator.groups:
            print(
                f"evaluating {len(group)} SAEs of seed {group[0].seed} at "
                f"{group[0].hook_name}",
                file=sys.stderr,
            )
            outcomes += plan.evaluator.evaluate(group)
        results = collect(
            config,
            plan.runs,
            metrics_of(plan.evaluator.evaluations),
            _result_files(plan.evaluator),
            plan.evaluator.saes_path,
            training,
            device,
            command or shlex.join(sys.argv),
        )
        results["warnings"] = _l0_warnings(plan.evaluator)
        with new_file(output_path / RESULTS_FILENAME) as file:
            file.write_text(json.dumps(results, indent=1, allow_nan=False))
        with new_file(output_path / "results.csv") as file:
            file.write_text(results_csv(results), encoding="utf-8")
        write_page(results, output_path / "report.html")
        diverged = plan.evaluator.diverged()
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if diverged or failed:
        raise EvaluationsFailed(diverged, failed, results)
    return results


def references_so_far(
    config: CompareConfig, output_path: str | Path
) -> list[dict[str, Any]]:
    """
    The published figures of an experiment beside those of an earlier call of `compare`.

    Nothing is computed. The figures are those that the experiment names now.

    Args:
        config: The experiment.
        output_path: Its folder.

    Returns:
        What results.json has under "reference".

    Raises:
        UserError: The experiment names no figures, or its SAEs were trained with another
            configuration.
        UserError: There are no results yet.
    """
    output_path = Path(output_path)
    if not config.reference:
        raise UserError("the experiment names no published figures (`reference`)")
    if not (output_path / RESULTS_FILENAME).is_file():
        raise UserError(
            f"there are no results in {output_path} yet: run `saelens-scaffold compare` "
            "without --reference first, or name another --output_path"
        )
    check_unchanged(config, output_path / CONFIG_FILENAME)
    results = _read(output_path / RESULTS_FILENAME)
    return references(config, results["saes"], results["provenance"]["command"])


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


def _has_begun(output_path: Path) -> bool:
    """Whether anything was trained in a folder."""
    return any(output_path.glob("saes/*")) or any(
        output_path.glob(f"{TRAINING}/wave-*")
    )


def _begun(output_path: Path, runs: Sequence[Run]) -> tuple[list[list[Run]], list[Run]]:
    """
    The waves that were begun, which stay as they are since a checkpoint is one of a whole
    wave, and the SAEs that are in none of those and are not there.
    """
    training_path = output_path / TRAINING
    file = training_path / WAVES_FILENAME
    by_name = {run.name: run for run in runs}
    waves: list[list[Run]] = []
    in_training: set[str] = set()
    for number, names in enumerate(_read(file) if file.is_file() else []):
        directory = training_path / f"wave-{number}"
        if not directory.exists():  # they are trained in order
            break
        waves.append([by_name[name] for name in names])
        if not (directory / WAVE_FILENAME).is_file():
            in_training.update(names)
    others = [
        run
        for run in runs
        if run.name not in in_training
        and not is_trained(output_path / "saes" / run.name)
    ]
    return waves, others


@contextmanager
def _alone_in(output_path: Path) -> Iterator[None]:
    """
    Raises:
        UserError: Another process is at work in this folder.
    """
    try:
        with FileLock(output_path / "training.lock", timeout=0):
            yield
    except Timeout as error:
        raise UserError(
            f"another process is at work in {output_path}; wait for it, or choose "
            "another --output_path"
        ) from error


def _result_files(evaluator: Evaluator) -> dict[str, dict[str, Path]]:
    """The results that there are, by SAE and evaluation."""
    return {
        run.name: {
            name: file
            for name in evaluator.config.evaluations
            if (file := evaluator.result_file(name, run.name)).is_file()
        }
        for run in evaluator.runs
    }


def _l0_warnings(evaluator: Evaluator) -> list[str]:
    """A line for each SAE whose measured L0 is not the k that it was trained with."""
    counted = (
        files.get("dense_latents") for files in _result_files(evaluator).values()
    )
    said = (l0_warning_of(_read(file)) for file in counted if file is not None)
    return [warning for warning in said if warning is not None]


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
