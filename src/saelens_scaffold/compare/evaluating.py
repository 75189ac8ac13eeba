"""Evaluating the SAEs of an experiment."""

import json
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from glob import has_magic
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import SAEMetadata
from safetensors import SafetensorError
from safetensors.torch import load_file

from saelens_scaffold._util.configs import config_fields, validating
from saelens_scaffold._util.errors import UserError, one_line
from saelens_scaffold._util.progress import n_saes
from saelens_scaffold._util.provenance import hardware
from saelens_scaffold._util.tasks import Done, Reporter, Task, TaskQueue, Workers
from saelens_scaffold.compare.config import CompareConfig
from saelens_scaffold.compare.grid import Run, runner_config, weight_bytes
from saelens_scaffold.compare.training import is_trained
from saelens_scaffold.evals import runner
from saelens_scaffold.evals.eval_configs import TwinsEvalConfig
from saelens_scaffold.evals.jobs import Job, plan
from saelens_scaffold.evals.registry import evaluations_named
from saelens_scaffold.evals.saes import CUSTOM_SAE_ID, SelectedSAE, load_saes
from saelens_scaffold.evals.tokens import TOKEN_FIELDS, other_tokens

EVAL_RESULTS = "eval_results"
SAES = "saes"


class Evaluator:
    """
    Evaluates the SAEs of an experiment in groups: those of one seed at one hook point.

    The SAEs of a group share passes of the language model and SAEBench's random draws, so
    they are evaluated together. SAEs whose weights are not finite are left out.

    Args:
        config: The experiment.
        runs: Its SAEs.
        device: Where to evaluate.
        output_path: Folder of the experiment.
        elsewhere: Whether copies of this evaluator, in other processes, do the work.

    Raises:
        UserError: There is no such evaluation, field, dataset or model.
    """

    def __init__(
        self,
        config: CompareConfig,
        runs: Sequence[Run],
        device: str,
        output_path: Path,
        elsewhere: bool = False,
    ):
        self._copied = (config, runs, device, output_path)
        # this machine need not have the device of the others
        self.device = device = "cpu" if elsewhere else device
        groups: dict[tuple[int, str], list[Run]] = {}
        for run in runs:
            groups.setdefault((run.seed, run.hook_name), []).append(run)
        self.groups = [groups[key] for key in sorted(groups)]
        self.config = config
        self.runs = runs
        self.saes_path = output_path / SAES
        self.artifacts_path = output_path / "artifacts"
        self.stand_ins = [(run.name, _stand_in(run, config)) for run in runs]
        takes_seeds = any(
            {"random_seed", "random_seeds"}
            & set(config_fields(validating(evaluation.load().config_class)))
            for evaluation in evaluations_named(",".join(config.evaluations))
        )
        self.jobs = plan(
            {name: fields or {} for name, fields in config.evaluations.items()},
            self.stand_ins,
            output_path=output_path / EVAL_RESULTS,
            artifacts_path=self.artifacts_path,
            device=device,
            random_seeds=config.evaluation_seeds if takes_seeds else None,
            **asdict(config.evaluation_data),
        )
        # names of the evaluations to be run on each group
        self.missing = [[job.evaluation.name for job in self.jobs] for _ in self.groups]
        self._loaded: tuple[list[Run], list[tuple[str, SAE[Any]]]] = ([], [])

    def __reduce__(self) -> tuple[Any, ...]:
        return Evaluator, self._copied

    def check(self) -> None:
        """
        Check that everything exists that missing results need.

        Raises:
            UserError: Something does not, or does not go with an SAE.
        """
        path = str(self.artifacts_path.resolve())
        if has_magic(path):  # to the datasets library, a pattern
            raise UserError(f"--output_path must have none of [ * ?, but it is {path}")
        self.missing = [*map(self._unfinished, self.groups)]
        self._loaded = ([], [])  # room for the training
        unfinished = set().union(*self.missing)
        saes = [SelectedSAE(name, CUSTOM_SAE_ID, sae) for name, sae in self.stand_ins]
        for job in self.jobs:
            if job.evaluation.name in unfinished:
                job.check(saes)

    def evaluate(self, workers: Workers, failed: Mapping[str, str]) -> "Evaluated":
        """
        Evaluate all SAEs, as far as they have no current results.

        Args:
            workers: Who does it.
            failed: Why an SAE could not be trained, by its name.
        """
        results: dict[str, dict[str, Any]] = {run.name: {} for run in self.runs}
        measured: dict[tuple[int, str], Done] = {}
        tasks: list[Task] = []
        names = [job.evaluation.name for job in self.jobs]
        order = [(i, name) for i in range(len(self.groups)) for name in names]
        for i, name in order:
            call = partial(self.measure, i, name)
            group = self.groups[i]
            about = f"{name} of {n_saes(len(group))} of seed {group[0].seed}"
            about = f"· {about} at {group[0].hook_name}"
            # as they are stored, and as an evaluation changes them
            task = Task((i, name), about, name, call, n_bytes=2 * weight_bytes(group))
            if name in self.missing[i]:
                tasks.append(task)
            else:
                measured[task.key] = Done(task, call())
        queue = TaskQueue(tasks, "evaluation", workers)
        measured |= {done.task.key: done for done in workers.run(queue)}
        first = SelectedSAE("the SAEs", CUSTOM_SAE_ID, self.stand_ins[0][1])
        warnings = other_tokens([job.evaluation for job in self.jobs], [first])
        failures: list[str] = []
        unusable = dict(failed)
        places: list[str] = []
        for i, name in order:
            _, found, error = measured[i, name]
            failure = one_line(error) if error else found.failure
            if failure is not None:
                failure = f"{name} failed: {failure}"
                failures.append(f"{failure} (repeat the command to try again)")
            if found is None:
                continue
            places.append(found.hardware)
            warnings += found.warnings
            for sae in {run.name for run in self.groups[i]}.difference(found.names):
                unusable.setdefault(sae, _DIVERGED)
            for sae, result in found.results.items():
                results[sae][name] = result
        if not failures:  # which may go on from what is stored there
            shutil.rmtree(self.artifacts_path, ignore_errors=True)
        failures += [
            f"{run.name}: {unusable[run.name]}"
            for run in self.runs
            if run.name in unusable
        ]
        where = "; ".join(dict.fromkeys(places))
        return Evaluated(results, failures, warnings, where)

    def measure(self, i: int, name: str, report: Reporter | None = None) -> "Measured":
        """Run an evaluation on the SAEs of group i, unless they have current results."""
        usable = self._usable(self.groups[i])
        names = [sae for sae, _ in usable]
        found = Measured(names, {}, [], None, hardware(self.device))
        if not usable:
            return found
        (job,) = (job for job in self._jobs(names) if job.evaluation.name == name)
        outcome = runner.run(job, usable, together=True)
        if outcome.error is not None:
            return found._replace(failure=runner.reason(outcome))
        for sae in names:
            result = outcome.results[f"{sae}_{CUSTOM_SAE_ID}"]
            if warning := job.implementation.warning(result):
                found.warnings.append(warning)
            # plain JSON, which has no NaN
            text = json.dumps(result, default=str)
            found.results[sae] = json.loads(text, parse_constant=lambda _: None)
        return found

    def _usable(self, group: list[Run]) -> list[tuple[str, SAE[Any]]]:
        """The SAEs of a group that were trained, and whose weights are finite."""
        if self._loaded[0] != group:
            paths = [self.saes_path / run.name for run in group]
            usable = [p for p in paths if is_trained(p) and _has_finite_weights(p)]
            self._loaded = (group, load_saes(usable))
        return self._loaded[1]

    def _unfinished(self, group: list[Run]) -> list[str]:
        """Names of the evaluations of which a group lacks current results."""
        if not all(is_trained(self.saes_path / run.name) for run in group):
            return [job.evaluation.name for job in self.jobs]
        usable = self._usable(group)
        return [
            job.evaluation.name
            for job in self._jobs([name for name, _ in usable])
            if usable and len(job.current(job.resolve(deepcopy(usable)))) < len(usable)
        ]

    def _jobs(self, names: Sequence[str]) -> list[Job]:
        """The evaluations; those that compare twins with baselines of the same k."""
        runs = [run for run in self.runs if run.name in names]
        baselines = {
            run.name: rival.name
            for run in runs
            for rival in reversed(runs)  # the first counts
            if self.config.baselines.get(run.arm.architecture) == rival.arm.architecture
            and rival.scaffold_rank == 0
            and run.arm.agrees_with(rival.arm)
        }
        return [
            replace(job, config=replace(job.config, baseline=baselines or None))
            if isinstance(job.config, TwinsEvalConfig)
            else job
            for job in self.jobs
        ]


_DIVERGED = "its weights are not finite, since its training diverged"


class Measured(NamedTuple):
    """
    What became of an evaluation of a group.

    Attributes:
        names: Names of its SAEs, but for those that diverged.
        results: Results of each SAE.
        warnings: A line for each result that the user should not overlook.
        failure: Why there are none.
        hardware: Where it was done.
    """

    names: list[str]
    results: dict[str, Any]
    warnings: list[str]
    failure: str | None
    hardware: str


class Evaluated(NamedTuple):
    """
    What became of all evaluations.

    Attributes:
        results: Results of each SAE by evaluation, as far as there are any.
        failures: A line for each SAE that diverged or could not be trained, and each
            evaluation of a group that failed.
        warnings: A line for each result that the user should not overlook.
        hardware: Where it was done.
    """

    results: dict[str, dict[str, Any]]
    failures: list[str]
    warnings: list[str]
    hardware: str


def _stand_in(run: Run, config: CompareConfig) -> StandardSAE:
    """A small SAE in place of one that is not trained yet, with its metadata."""
    cfg = runner_config(config, [run])
    tokens = {name: getattr(cfg, name) for name in TOKEN_FIELDS}
    of_model = {name: getattr(cfg, name) for name in ("model_name", "model_class_name")}
    metadata = SAEMetadata(hook_name=run.hook_name, **of_model, **tokens)
    stand_in = StandardSAE(StandardSAEConfig(run.config.d_in, 1, metadata=metadata))
    stand_in.W_dec.data = torch.nn.functional.normalize(stand_in.W_dec.data)
    # single latents are judged without the scaffold
    stand_in.cfg.d_sae = run.config.d_sae - run.scaffold_rank
    return stand_in


def _has_finite_weights(directory: Path) -> bool:
    """
    Whether the weights of an SAE are finite; they are not if its training diverged.

    Raises:
        UserError: The file is damaged.
    """
    file = directory / SAE_WEIGHTS_FILENAME
    try:
        read = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged; remove it to train again") from error
    return all(
        # linear latents have the threshold minus infinity
        bool((weights.isfinite() | (weights.isneginf() & (name == "threshold"))).all())
        for name, weights in read.items()
    )
