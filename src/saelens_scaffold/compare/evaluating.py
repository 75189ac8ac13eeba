"""Evaluating the SAEs of an experiment."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, replace
from glob import has_magic
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import SAEMetadata
from safetensors import SafetensorError
from safetensors.torch import load_file

from saelens_scaffold._util.configs import config_fields, validating
from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.progress import Progress, n_saes
from saelens_scaffold.compare.config import CompareConfig
from saelens_scaffold.compare.grid import Run, runner_config
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

    Raises:
        UserError: There is no such evaluation, field, dataset or model.
    """

    def __init__(
        self, config: CompareConfig, runs: Sequence[Run], device: str, output_path: Path
    ):
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
        unfinished = set().union(*self.missing)
        saes = [SelectedSAE(name, CUSTOM_SAE_ID, sae) for name, sae in self.stand_ins]
        for job in self.jobs:
            if job.evaluation.name in unfinished:
                job.check(saes)

    def evaluate(self) -> tuple[dict[str, dict[str, Any]], list[str], list[str]]:
        """
        Evaluate all SAEs, as far as they have no current results.

        Returns:
            Results of each SAE by evaluation, as far as there are any; a line for each SAE
            that diverged, and each evaluation of a group that failed; a line for each
            result that the user should not overlook.
        """
        results: dict[str, dict[str, Any]] = {run.name: {} for run in self.runs}
        diverged: list[str] = []
        failures: list[str] = []
        first = SelectedSAE("the SAEs", CUSTOM_SAE_ID, self.stand_ins[0][1])
        warnings = other_tokens([job.evaluation for job in self.jobs], [first])
        progress = _EvaluationProgress(self.missing)
        for i, group in enumerate(self.groups):
            usable = self._usable(group)
            names = [name for name, _ in usable]
            diverged += [run.name for run in group if run.name not in names]
            for job in self._jobs(names) if usable else []:
                evaluation = job.evaluation.name
                with progress.of(i, evaluation, group):
                    outcome = runner.run(job, usable, together=True)
                if outcome.error is not None:
                    failure = f"{evaluation} failed: {runner.reason(outcome)}"
                    failures.append(f"{failure} (repeat the command to try again)")
                    continue
                for name in names:
                    result = outcome.results[f"{name}_{CUSTOM_SAE_ID}"]
                    if warning := job.implementation.warning(result):
                        warnings.append(warning)
                    # plain JSON, which has no NaN
                    text = json.dumps(result, default=str)
                    results[name][evaluation] = json.loads(
                        text, parse_constant=lambda _: None
                    )
        if not failures:  # which may go on from what is stored there
            shutil.rmtree(self.artifacts_path, ignore_errors=True)
        reason = "its weights are not finite, since its training diverged"
        failures += [f"{name}: {reason}" for name in diverged]
        return results, failures, warnings

    def _usable(self, group: Sequence[Run]) -> list[tuple[str, SAE[Any]]]:
        """The SAEs of a group whose weights are finite."""
        directories = [self.saes_path / run.name for run in group]
        return load_saes([path for path in directories if _has_finite_weights(path)])

    def _unfinished(self, group: Sequence[Run]) -> list[str]:
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


class _EvaluationProgress:
    """
    Shows which evaluation is run, and how long it and the rest will take.

    Args:
        missing: Names of the evaluations to be run on each group.
    """

    def __init__(self, missing: Sequence[Sequence[str]]):
        self._missing = missing
        self._n_begun, self._n = 0, sum(map(len, missing))
        self._left = Counter(name for names in missing for name in names)
        self._progress = Progress()

    @contextmanager
    def of(self, i: int, name: str, group: Sequence[Run]) -> Iterator[None]:
        """An evaluation of group i."""
        if name not in self._missing[i]:
            yield
            return
        self._n_begun += 1
        about = f"{name} of {n_saes(len(group))} of seed {group[0].seed}"
        text = f"evaluation {self._n_begun} of {self._n} · {about}"
        text += f" at {group[0].hook_name}"
        left = self._progress.time_left(self._left)
        self._progress.show(f"{text} · {left} left" if left else text)
        self._progress.begin()
        yield
        self._progress.done(name, 1)
        self._left[name] -= 1


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
