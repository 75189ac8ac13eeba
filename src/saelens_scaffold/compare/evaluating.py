"""Evaluating the SAEs of an experiment, by the means of `saelens-scaffold eval`."""

import itertools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from glob import has_magic
from hashlib import sha256
from pathlib import Path

import torch
import yaml
from pydantic import TypeAdapter
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from safetensors import SafetensorError
from safetensors.torch import load

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import new_file
from saelens_scaffold.compare.config import CompareConfig
from saelens_scaffold.compare.grid import Run
from saelens_scaffold.compare.runner_config import runner_config
from saelens_scaffold.compare.training import is_trained
from saelens_scaffold.evals.command import run_job
from saelens_scaffold.evals.configs import config_fields
from saelens_scaffold.evals.plan import Job, Options, make_plan
from saelens_scaffold.evals.preflight import check_inputs
from saelens_scaffold.evals.registry import Evaluation, evaluations_named
from saelens_scaffold.evals.run import SPEED_ONLY
from saelens_scaffold.evals.scaffold_ablation import ScaffoldAblationEvalConfig
from saelens_scaffold.evals.selected_saes import (
    CUSTOM_SAE_ID,
    SelectedSAE,
    load_saes,
    result_path,
)
from saelens_scaffold.evals.table import Outcome


@dataclass
class Evaluator:
    """
    Evaluates groups of SAEs, and keeps what is finished.

    A group's results of an evaluation appear together, once all of them are there:
    SAEBench's random draws depend on what it has stored and on the order of the SAEs, so
    half a group that is finished later would have other numbers. With them it is written
    what they were made from: the evaluation's configuration and the SAEs' weights. If
    that changes, the group is evaluated again.

    SAEs whose weights are not finite are left out of their group.

    Attributes:
        config: The experiment.
        runs: Its SAEs.
        device: Where to evaluate.
        saes_path: Folder with the SAEs.
        results_path: Folder for the results, with a folder for each evaluation.
    """

    config: CompareConfig
    runs: Sequence[Run]
    device: str
    saes_path: Path
    results_path: Path

    @cached_property
    def jobs(self) -> list[Job]:
        """
        What is done with each group, found to make sense.

        Raises:
            UserError: There is no such evaluation, field, dataset or model.
            UserError: A file is missing.
        """
        return make_plan(
            self._options,
            [(run.name, _stand_in(run, self.config)) for run in self.runs],
        ).jobs

    @property
    def evaluations(self) -> list[Evaluation]:
        """Those that the experiment asks for."""
        return evaluations_named(",".join(self.config.evaluations))

    @property
    def groups(self) -> list[list[Run]]:
        """SAEs that are evaluated together: those of one seed at one hook point."""
        key = lambda run: (run.seed, run.hook_name)
        return [
            [*group] for _, group in itertools.groupby(sorted(self.runs, key=key), key)
        ]

    def check(self) -> None:
        """
        See that everything which is needed for what is not done yet is there.

        Raises:
            UserError: Something is not, or does not go with an SAE.
            UserError: A file is missing.
        """
        for job in self.jobs:
            undone = [
                SelectedSAE(run.name, CUSTOM_SAE_ID, _stand_in(run, self.config))
                for group in self.groups
                if not all(is_trained(self.saes_path / run.name) for run in group)
                or not self._is_done(job, group, self._usable(group))
                for run in group
            ]
            if undone:
                self._check_path(job)
                check_inputs(job, undone)

    def evaluate(self, group: Sequence[Run]) -> list[Outcome]:
        """
        Evaluate SAEs, as far as that is not done.

        Args:
            group: One of the groups. Its SAEs share passes of the language model, and
                what SAEBench stores.

        Returns:
            The outcomes of those evaluations that were run. One that fails leaves nothing.
        """
        usable = self._usable(group)
        missing = [
            self._with_baselines(job, group, usable)
            for job in self.jobs
            if not self._is_done(job, group, usable)
        ]
        if not missing or not usable:
            return []
        try:
            saes = load_saes([self.saes_path / name for name in usable])
        except ValueError as error:
            return [Outcome(job.evaluation, {}, error) for job in missing]
        outcomes: list[Outcome] = []
        for job in missing:
            name = job.evaluation.name
            # results of something else must not stay if this fails
            for file in (
                self._made_from_file(name, group),
                *(self.result_file(name, run.name) for run in group),
            ):
                file.unlink(missing_ok=True)
            unfinished = self.results_path / f".{name}"
            shutil.rmtree(unfinished, ignore_errors=True)
            settings = replace(
                job.settings,
                output_path=unfinished / "results",
                # its own, so that nothing depends on what was stored before
                artifacts_path=unfinished / "artifacts",
            )
            outcome = run_job(job._replace(settings=settings), saes)
            outcomes.append(outcome)
            if outcome.error is None:
                (self.results_path / name).mkdir(parents=True, exist_ok=True)
                for sae in usable:
                    file = self.result_file(name, sae)
                    os.replace(settings.output_path / file.name, file)
                with new_file(self._made_from_file(name, group)) as file:
                    file.write_text(_made_from(job, usable), encoding="utf-8")
            shutil.rmtree(unfinished, ignore_errors=True)
        return outcomes

    def diverged(self) -> list[str]:
        """Names of trained SAEs whose weights are not finite."""
        return [
            run.name
            for group in self.groups
            for usable in [self._usable(group)]
            for run in group
            if run.name not in usable
        ]

    def result_file(self, evaluation: str, name: str) -> Path:
        """Where an SAE's result is, once it is there."""
        return result_path(self.results_path / evaluation, name)

    def _check_path(self, job: Job) -> None:
        path = str(self.results_path.resolve())
        reads_copy = job.evaluation.is_sae_benchs and job.evaluation.data == "text"
        if reads_copy and has_magic(path):
            raise UserError(
                f"{job.evaluation.name} reads text in {path}, which the datasets library "
                "takes for a pattern; choose an --output_path without any of [ * ?"
            )

    def _usable(self, group: Sequence[Run]) -> dict[str, str]:
        """The SAEs that can be evaluated, by name, with digests of their weights."""
        read = {run.name: _weights_of(self.saes_path / run.name) for run in group}
        return {name: digest for name, (digest, is_finite) in read.items() if is_finite}

    def _is_done(
        self, job: Job, group: Sequence[Run], usable: Mapping[str, str]
    ) -> bool:
        name = job.evaluation.name
        job = self._with_baselines(job, group, usable)
        made_from = self._made_from_file(name, group)
        return (
            made_from.is_file()
            and made_from.read_text(encoding="utf-8") == _made_from(job, usable)
            and all(_is_json(self.result_file(name, sae)) for sae in usable)
        )

    def _with_baselines(
        self, job: Job, group: Sequence[Run], usable: Mapping[str, str]
    ) -> Job:
        """The scaffold ablation with each SAE's baseline of the same k in the group."""
        if not isinstance(job.config, ScaffoldAblationEvalConfig):
            return job
        plain = [run for run in group if run.name in usable and run.scaffold_rank == 0]
        baselines: dict[str, str] = {}
        for run in group:
            architecture = self.config.baselines.get(run.arm.architecture)
            for rival in plain:
                if (
                    run.name in usable
                    and rival.arm.architecture == architecture
                    and run.arm.agrees_with(rival.arm)
                ):
                    baselines.setdefault(run.name, rival.name)
        return job._replace(config=replace(job.config, baseline=baselines or None))

    def _made_from_file(self, evaluation: str, group: Sequence[Run]) -> Path:
        seed, hook_name = group[0].seed, group[0].hook_name
        # no .json, of which SAEBench's tools take every one for a result
        name = f"made_from-{hook_name}-seed_{seed}.yaml"
        return self.results_path / evaluation / name

    @property
    def _options(self) -> Options:
        """What `saelens-scaffold eval` would be told."""
        seeded = any(
            {"random_seed", "random_seeds"} & set(config_fields(e.config_class()))
            for e in self.evaluations
        )
        return Options(
            {name: fields or {} for name, fields in self.config.evaluations.items()},
            device=self.device,
            random_seeds=self.config.evaluation_seeds if seeded else None,
            **asdict(self.config.evaluation_data),
        )


def _stand_in(run: Run, config: CompareConfig) -> StandardSAE:
    """An SAE in place of one that is not there yet, of which all but the weights matter."""
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


def _weights_of(directory: Path) -> tuple[str, bool]:
    """A digest of an SAE's weights, and whether they are finite."""
    file = directory / SAE_WEIGHTS_FILENAME
    return _read_weights(file, file.stat().st_mtime_ns)


@cache
def _read_weights(file: Path, mtime_ns: int) -> tuple[str, bool]:  # noqa: ARG001
    content = file.read_bytes()
    try:
        read = load(content)
    except SafetensorError as error:
        raise UserError(
            f"{file} is damaged ({error}); remove {file.parent} to train this SAE again"
        ) from error
    is_finite = all(
        # minus infinity is the threshold of linear latents
        bool((weights.isfinite() | (weights.isneginf() & (name == "threshold"))).all())
        for name, weights in read.items()
    )
    return sha256(content).hexdigest(), is_finite


def _made_from(job: Job, usable: Mapping[str, str]) -> str:
    """All that results depend on, as text."""
    config = TypeAdapter(type(job.config)).dump_python(job.config, mode="json")
    return yaml.safe_dump(
        {
            "eval_config": {n: v for n, v in config.items() if n not in SPEED_ONLY},
            "dataset_split": job.settings.dataset_split,
            "text_column": job.settings.text_column,
            # in order, on which random draws depend
            "weights_sha256": [{name: digest} for name, digest in usable.items()],
        },
        allow_unicode=True,
    )


def _is_json(file: Path) -> bool:
    """Whether a file is there, and written to its end."""
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True
