"""Training the SAEs of an experiment: in waves, each on one pass of the language model."""

import gc
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
)
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from typing_extensions import override

from saelens_scaffold._util.files import new_file
from saelens_scaffold._util.provenance import versions
from saelens_scaffold.compare.config import CompareConfig
from saelens_scaffold.compare.grid import Run
from saelens_scaffold.compare.runner_config import no_hook_point, runner_config
from saelens_scaffold.evals.text_data import EMBEDDED_DATASET_NAME, open_dataset
from saelens_scaffold.saes.pca import principal_subspace
from saelens_scaffold.training.runner import (
    RepeatableMultiSAETrainingRunner,
    initial_sae,
    last_checkpoint,
)

TRAINED_FILENAME = "trained.json"
"""Says that all SAEs of a wave are saved, and how many seconds it took."""
WAVE_FILENAME = "wave.json"
"""What is kept of a wave once its SAEs are in their places."""

ESTIMATED_SCALES = ("expected_average_only_in", "covariance_whitening")
"""Values of `normalize_activations` for which SAELens reads text before it trains."""


class _WaveRunner(RepeatableMultiSAETrainingRunner):
    """
    Trains all waves of an experiment on the same activations, and starts b_dec of plain
    SAEs at their mean, where that of scaffold SAEs starts.

    Attributes:
        centred: Names of the SAEs whose b_dec starts at the mean.
        scales: Whether any SAE of the experiment has its activations scaled by an
            estimate: a wave without one reads as much text.
    """

    centred: Sequence[str] = ()
    scales: bool = False

    @override
    def before_first_step(self, trainer: MultiSAETrainer) -> None:
        # SAEs train on scaled activations; `fit` finds the scale known, and keeps it
        trainer._estimate_scaling_factors()
        scalers = [each.activation_scaler for each in trainer.trainers.values()]
        if self.scales and not any(s.scaling_factor or s.whitening for s in scalers):
            for _ in range(self.cfg.n_batches_for_norm_estimate):
                next(trainer.data_provider)
        first = next(trainer.data_provider)
        for name in self.centred:
            x = first[self.cfg.hook_names_per_sae[name]]
            scaled = trainer.trainers[name].activation_scaler.scale(x)
            sae: Any = self.saes[name]
            sae.b_dec.data.copy_(principal_subspace(scaled, rank=0).mean)


@dataclass
class WaveTrainer:
    """
    Trains waves of SAEs, and keeps what is finished.

    Attributes:
        config: The experiment.
        device: Where to train.
        saes_path: Folder that gets a directory for each SAE.
        training_path: Folder for checkpoints, and for what is known of each wave.
        scales: Whether any SAE of the experiment has its activations scaled by an
            estimate, which takes text: waves without one read as much.
    """

    config: CompareConfig
    device: str
    saes_path: Path
    training_path: Path
    scales: bool
    _model: Any = None
    _hook_names: Set[str] = frozenset()

    def train(self, number: int, wave: Sequence[Run]) -> None:
        """
        Train a wave, from its last checkpoint if there is one, unless it is finished.

        Raises:
            KeyboardInterrupt: Ctrl-C. The last checkpoint stays.
        """
        directory = self.training_path / f"wave-{number}"
        output, checkpoints = directory / "saes", directory / "checkpoints"
        trained = directory / TRAINED_FILENAME
        if not (directory / WAVE_FILENAME).is_file():
            if not trained.is_file():
                started = time.monotonic()
                self._run(wave, output, last_checkpoint(checkpoints), checkpoints)
                with new_file(trained) as file:
                    file.write_text(json.dumps(time.monotonic() - started))
            self.saes_path.mkdir(parents=True, exist_ok=True)
            for run in wave:
                if (output / run.name).is_dir():
                    shutil.copy(output / RUNNER_CFG_FILENAME, output / run.name)
                    # of one whose files were lost
                    shutil.rmtree(self.saes_path / run.name, ignore_errors=True)
                    os.replace(output / run.name, self.saes_path / run.name)
            about = {
                "wave": number,
                "saes": [run.name for run in wave],
                # of the last call, if it took several
                "seconds": json.loads(trained.read_text()),
                "hardware": hardware(self.device),
                "versions": versions(),
            }
            with new_file(directory / WAVE_FILENAME) as file:
                file.write_text(json.dumps(about, indent=1))
        for leftover in (output, checkpoints):
            shutil.rmtree(leftover, ignore_errors=True)
        trained.unlink(missing_ok=True)

    def _run(
        self,
        wave: Sequence[Run],
        output: Path,
        resume_from: Path | None,
        checkpoints: Path,
    ) -> None:
        cfg = runner_config(self.config, wave, self.device)
        cfg.output_path = str(output)
        # SAELens adds a random name, under which nobody would find it again
        cfg.checkpoint_path = str(checkpoints)
        if resume_from is not None:
            cfg.resume_from_checkpoint = str(resume_from)
            print(f"going on from {resume_from}", file=sys.stderr)
        hook_names = {run.hook_name for run in wave}
        runner = _WaveRunner(
            cfg,
            override_dataset=training_text(self.config),
            # loading may depend on the hook points
            override_model=self._model if hook_names == self._hook_names else None,
            override_saes={run.name: initial_sae(run.config, run.seed) for run in wave},
        )
        runner.calibrated = [
            run.name
            for run in wave
            if self.config.calibrate_thresholds
            and isinstance(run.config, BatchTopKTrainingSAEConfig)
            and getattr(run.config, "calibrate_threshold", True)
        ]
        runner.centred = [run.name for run in wave if run.centre_b_dec]
        runner.scales = self.scales
        self._model, self._hook_names = runner.model, hook_names
        for hook_name in hook_names - set(runner.model.hook_dict):
            raise no_hook_point(self.config, hook_name, runner.model.hook_dict)
        runner.run()
        # before the next wave's SAEs are made: cycles are freed when it suits Python
        del runner
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_trained(directory: Path) -> bool:
    """Whether a directory holds an SAE; its directory appears when it is whole."""
    names = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME)
    return all((directory / name).is_file() for name in names)


def hardware(device: str) -> str:
    """What a device is."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(torch.device(device))
    threads = torch.get_num_threads()
    return f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads"


def training_text(config: CompareConfig) -> Any:
    """
    Local text, opened as evaluations open it; None for SAELens to stream from the Hub.

    Raises:
        ValueError: There is no such text.
    """
    name = config.dataset_path
    path = Path(name)
    looks_local = path.exists() or path.is_absolute() or name.startswith(".")
    if name == EMBEDDED_DATASET_NAME or looks_local:
        return open_dataset(name, "train")
    return None
