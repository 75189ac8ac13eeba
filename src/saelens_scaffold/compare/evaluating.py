"""Evaluating the SAEs of an experiment."""

import itertools
import json
import shutil
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from glob import has_magic
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from safetensors import SafetensorError
from safetensors.torch import load_file

from saelens_scaffold._util.configs import config_fields, validating
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.compare.config import CompareConfig
from saelens_scaffold.compare.grid import Run
from saelens_scaffold.compare.metrics import Results
from saelens_scaffold.compare.runner_config import runner_config
from saelens_scaffold.compare.waves import is_trained
from saelens_scaffold.evals.jobs import Job, plan
from saelens_scaffold.evals.registry import evaluations_named
from saelens_scaffold.evals.runner import reason
from saelens_scaffold.evals.runner import run as run_job
from saelens_scaffold.evals.selected_saes import CUSTOM_SAE_ID, SelectedSAE, load_saes

EVAL_RESULTS = "eval_results"
SAES = "saes"


@dataclass
class Evaluated:
    """
    Outcome of evaluating an experiment.

    Attributes:
        results: Results of each SAE, by evaluation. One that failed leaves none.
        diverged: Names of the SAEs whose weights are not finite.
        failures: A line for each evaluation of a group that failed.
        warnings: A line for each result that the user should not overlook.
    """

    results: dict[str, dict[str, Any]]
    diverged: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


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
        self.config = config
        self.runs = runs
        self.saes_path = output_path / SAES
        self.artifacts_path = output_path / "artifacts"
        self.jobs = plan(
            {name: fields or {} for name, fields in config.evaluations.items()},
            [(run.name, _stand_in(run, config)) for run in runs],
            output_path=output_path / EVAL_RESULTS,
            artifacts_path=self.artifacts_path,
            device=device,
            random_seeds=config.evaluation_seeds if _has_seeds(config) else None,
            **asdict(config.evaluation_data),
        )

    @property
    def groups(self) -> list[list[Run]]:
        """SAEs that are evaluated together."""

        def key(run: Run) -> tuple[int, str]:
            return run.seed, run.hook_name

        ordered = sorted(self.runs, key=key)
        return [[*group] for _, group in itertools.groupby(ordered, key)]

    def check(self) -> None:
        """
        Check that everything exists that missing results need.

        Raises:
            UserError: Something does not, or does not go with an SAE.
        """
        missing: list[list[SelectedSAE]] = [[] for _ in self.jobs]
        for group in self.groups:
            usable = None
            if all(is_trained(self.saes_path / run.name) for run in group):
                usable = self._usable(group)
            for job, saes in zip(self.jobs, missing, strict=True):
                if usable is None or not self._is_current(job, usable):
                    saes += [
                        SelectedSAE(
                            run.name, CUSTOM_SAE_ID, _stand_in(run, self.config)
                        )
                        for run in group
                    ]
        for job, saes in zip(self.jobs, missing, strict=True):
            if saes:
                self._check_path(job)
                job.check(saes)

    def evaluate(self) -> Evaluated:
        """Evaluate all SAEs, as far as they have no current results."""
        evaluated = Evaluated({run.name: {} for run in self.runs})
        for group in self.groups:
            print(
                f"evaluating {len(group)} SAEs of seed {group[0].seed} at "
                f"{group[0].hook_name}",
                file=sys.stderr,
            )
            usable = self._usable(group)
            names = [name for name, _ in usable]
            evaluated.diverged += [r.name for r in group if r.name not in names]
            for job in self.jobs if usable else []:
                job = self._with_baselines(job, names)
                outcome = run_job(job, usable, together=True)
                if outcome.error is not None:
                    failure = f"{job.evaluation.name} failed: {reason(outcome)}"
                    evaluated.failures.append(failure)
                    continue
                for name in names:
                    result = outcome.results[f"{name}_{CUSTOM_SAE_ID}"]
                    evaluated.results[name][job.evaluation.name] = _plain(result)
                    if warning := job.implementation.warning(result):
                        evaluated.warnings.append(warning)
        if not evaluated.failures:  # which may go on from what is stored there
            shutil.rmtree(self.artifacts_path, ignore_errors=True)
        return evaluated

    def _usable(self, group: Sequence[Run]) -> list[tuple[str, SAE[Any]]]:
        """The SAEs of a group whose weights are finite."""
        directories = [self.saes_path / run.name for run in group]
        return load_saes([path for path in directories if has_finite_weights(path)])

    def _is_current(self, job: Job, usable: Sequence[tuple[str, SAE[Any]]]) -> bool:
        """Whether all SAEs of a group have current results."""
        job = self._with_baselines(job, [name for name, _ in usable])
        return not usable or len(job.current(job.resolve(deepcopy(usable)))) == len(
            usable
        )

    def _with_baselines(self, job: Job, names: Sequence[str]) -> Job:
        """The scaffold ablation with each SAE's baseline of the same k in the group."""
        if job.evaluation.name != "scaffold_ablation":
            return job
        runs = [run for run in self.runs if run.name in names]
        baselines: dict[str, str] = {}
        for run in runs:
            architecture = self.config.baselines.get(run.arm.architecture)
            for rival in runs:
                if (
                    rival.arm.architecture == architecture
                    and rival.scaffold_rank == 0
                    and run.arm.agrees_with(rival.arm)
                ):
                    baselines.setdefault(run.name, rival.name)
        return replace(job, config=replace(job.config, baseline=baselines or None))

    def _check_path(self, job: Job) -> None:
        path = str(self.artifacts_path.resolve())
        # SAEBench's own evaluations yield complete results, and read a copy of the text
        is_sae_benchs = job.implementation.output_class is None
        if is_sae_benchs and job.evaluation.data == "text" and has_magic(path):
            raise UserError(
                f"{job.evaluation.name} reads text in {path}, which the datasets library "
                "takes for a pattern; choose an --output_path without any of [ * ?"
            )


def _has_seeds(config: CompareConfig) -> bool:
    """Whether an evaluation of the experiment takes a seed."""
    return any(
        {"random_seed", "random_seeds"}
        & set(config_fields(validating(evaluation.load().config_class)))
        for evaluation in evaluations_named(",".join(config.evaluations))
    )


def _stand_in(run: Run, config: CompareConfig) -> StandardSAE:
    """A small SAE in place of one that is not trained yet, with its metadata."""
    cfg = runner_config(config, [run])
    stand_in = StandardSAE(
        StandardSAEConfig(
            d_in=run.config.d_in,
            d_sae=1,
            metadata=SAEMetadata(
                model_name=cfg.model_name,
                hook_name=run.hook_name,
                context_size=cfg.context_size,
                prepend_bos=cfg.prepend_bos,
            ),
        )
    )
    stand_in.W_dec.data = torch.nn.functional.normalize(stand_in.W_dec.data)
    # single latents are judged without the scaffold
    stand_in.cfg.d_sae = run.config.d_sae - run.scaffold_rank
    return stand_in


def has_finite_weights(directory: Path) -> bool:
    """
    Whether the weights of an SAE are finite; they are not if its training diverged.

    Raises:
        UserError: The file is damaged.
    """
    file = directory / SAE_WEIGHTS_FILENAME
    try:
        read = load_file(file)
    except SafetensorError as error:
        raise UserError(
            f"{file} is damaged ({error}); remove {directory} to train this SAE again"
        ) from error
    return all(
        # linear latents have the threshold minus infinity
        bool((weights.isfinite() | (weights.isneginf() & (name == "threshold"))).all())
        for name, weights in read.items()
    )


def _plain(result: Results) -> dict[str, Any]:
    """A result in plain JSON values, None for NaN, which JSON does not have."""
    return json.loads(json.dumps(result, default=str), parse_constant=lambda _: None)
