"""Evaluating the SAEs of an experiment, by the means of `saelens-scaffold eval`."""

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

from saelens_scaffold.compare.config import CompareConfig
from saelens_scaffold.compare.grid import Run
from saelens_scaffold.compare.training import runner_config
from saelens_scaffold.evals.command import run_job
from saelens_scaffold.evals.configs import config_fields
from saelens_scaffold.evals.plan import make_plan
from saelens_scaffold.evals.registry import Evaluation, evaluations_named
from saelens_scaffold.evals.selected_saes import CUSTOM_SAE_ID, SelectedSAE
from saelens_scaffold.evals.table import Outcome
from saelens_scaffold_cli import parse_eval


@dataclass
class Evaluator:
    """
    Evaluates groups of SAEs, and keeps what is finished.

    A group's results of an evaluation appear together, once all of them are there:
    SAEBench's random draws depend on what it has stored and on the order of the SAEs, so
    half a group that is finished later would have other numbers.

    Attributes:
        config: The experiment.
        device: Where to evaluate.
        saes_path: Folder with the SAEs.
        results_path: Folder for the results, with a folder for each evaluation.
    """

    config: CompareConfig
    device: str
    saes_path: Path
    results_path: Path

    def check(self, run: Run) -> None:
        """
        See that everything which evaluations need is there, before any SAE is trained.

        Args:
            run: One of the SAEs.

        Raises:
            ValueError: There is no such evaluation, field, dataset or model.
            FileNotFoundError: A file is missing.
        """
        cfg = runner_config(self.config, [run], self.device)
        # it stands for the SAEs that are not there yet, of which the metadata matter
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
        make_plan(self._options([]), [(run.name, stand_in)])

    def evaluate(self, group: Sequence[Run]) -> list[Outcome]:
        """
        Evaluate SAEs, as far as that is not done.

        Args:
            group: SAEs of one seed at one hook point. They share passes of the language
                model, and what SAEBench stores.

        Returns:
            The outcomes of those evaluations that were run. One that fails leaves nothing.
        """
        missing = [e.name for e in self.evaluations if not self._is_done(e, group)]
        if not missing:
            return []
        try:
            plan = make_plan(self._options([self.saes_path / r.name for r in group]))
        except ValueError as error:  # an SAE that has come to nothing
            return [
                Outcome(e, {}, error) for e in self.evaluations if e.name in missing
            ]
        plan.saes.clear()  # copies, which take memory
        outcomes: list[Outcome] = []
        for job in plan.jobs:
            name = job.evaluation.name
            if name not in missing:
                continue
            unfinished = self.results_path / f".{name}"
            shutil.rmtree(unfinished, ignore_errors=True)
            settings = replace(
                job.settings,
                output_path=unfinished / "results",
                # its own, so that nothing depends on what was stored before
                artifacts_path=unfinished / "artifacts",
            )
            outcome = run_job(job._replace(settings=settings), plan.selected_saes)
            outcomes.append(outcome)
            if outcome.error is None:
                folder = self.results_path / name
                folder.mkdir(parents=True, exist_ok=True)
                for run in group:
                    file = self.result_file(name, run)
                    os.replace(settings.output_path / file.name, file)
            shutil.rmtree(unfinished, ignore_errors=True)
        return outcomes

    @property
    def evaluations(self) -> list[Evaluation]:
        """Those that the experiment asks for."""
        return evaluations_named(",".join(self.config.evaluations))

    def result_file(self, evaluation: str, run: Run) -> Path:
        """Where an SAE's result is, once it is there."""
        # of which only the name goes into the path
        sae = SelectedSAE(run.name, CUSTOM_SAE_ID, sae=None)  # type: ignore[arg-type]
        return sae.result_path(self.results_path / evaluation)

    def _is_done(self, evaluation: Evaluation, group: Sequence[Run]) -> bool:
        return all(self.result_file(evaluation.name, run).is_file() for run in group)

    def _options(self, sae_paths: Sequence[Path]) -> argparse.Namespace:
        """What `saelens-scaffold eval` would be told."""
        argv = [",".join(self.config.evaluations), "--device", self.device]
        if sae_paths:
            argv += ["--sae_path", *map(str, sae_paths)]
        for flag, value in asdict(self.config.evaluation_data).items():
            if value is not None:
                argv += [f"--{flag}", str(value)]
        if any(
            {"random_seed", "random_seeds"} & set(config_fields(e.config_class()))
            for e in self.evaluations
        ):
            argv += ["--random_seeds", *map(str, self.config.evaluation_seeds)]
        for name, fields in self.config.evaluations.items():
            for field, value in (fields or {}).items():
                argv += ["--set", f"{name}.{field}={json.dumps(value)}"]
        return parse_eval(argv)
