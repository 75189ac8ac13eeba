"""Training the SAEs of an experiment in waves."""

import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from typing_extensions import override

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import new_file
from saelens_scaffold._util.provenance import hardware, versions
from saelens_scaffold.compare.config import CompareConfig
from saelens_scaffold.compare.grid import Run, runner_config
from saelens_scaffold.compare.waves import Wave, WaveFolder, halves, keep_waves
from saelens_scaffold.evals.text_data import EMBEDDED_DATASET_NAME, open_dataset
from saelens_scaffold.saes.pca import principal_subspace
from saelens_scaffold.training.runner import (
    RepeatableMultiSAETrainingRunner,
    initial_sae,
    last_checkpoint,
)

ESTIMATED_SCALES = ("expected_average_only_in", "covariance_whitening")
"""Values of `normalize_activations` for which SAELens reads text before it trains."""


class _WaveRunner(RepeatableMultiSAETrainingRunner):
    """
    Trains all waves of an experiment on the same activations, and initialises b_dec of
    plain SAEs at their mean, as scaffold SAEs do.

    Attributes:
        centred: Names of the SAEs whose b_dec starts at the mean.
        scales: Whether any SAE of the experiment estimates the scale of its activations:
            a wave without one reads as much text.
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
        runs: All its SAEs.
        device: Where to train.
        saes_path: Folder that gets a directory for each SAE.
        training_path: Folder of the waves.
    """

    config: CompareConfig
    runs: Sequence[Run]
    device: str
    saes_path: Path
    training_path: Path
    _model: Any = None
    _hook_names: Set[str] = frozenset()

    def train(self, waves: Sequence[Wave]) -> list[dict[str, Any]]:
        """
        Train waves, each from its last checkpoint if it has one; where memory runs out,
        a wave is split in halves.

        Returns:
            The facts of each wave.

        Raises:
            UserError: Memory does not suffice for a single SAE.
            KeyboardInterrupt: Ctrl-C. The last checkpoint stays.
        """
        waves = [*waves]
        number = 0
        while number < len(waves):
            wave = waves[number]
            keep_waves(self.training_path, waves)
            print(
                f"wave {number + 1} of {len(waves)}: {len(wave)} SAEs", file=sys.stderr
            )
            if self.train_wave(number, wave):
                number += 1
            elif len(wave) == 1:
                raise UserError(
                    f"there is not enough memory to train {wave[0].name}; make d_sae, "
                    "train_batch_size_tokens, n_batches_in_buffer or "
                    "store_batch_size_prompts smaller"
                )
            else:
                waves[number : number + 1] = halves(wave)
                print(
                    f"there is not enough memory to train {len(wave)} SAEs together; "
                    "they are trained in halves",
                    file=sys.stderr,
                )
        folders = [WaveFolder(self.training_path, number) for number in range(number)]
        return [json.loads(folder.about.read_text()) for folder in folders]

    def train_wave(self, number: int, wave: Wave) -> bool:
        """Train a wave unless it is trained; False if memory runs out."""
        folder = WaveFolder(self.training_path, number)
        if not folder.is_trained:
            started = time.monotonic()
            if not self._fits_memory(wave, folder):
                return False
            about = {
                "wave": number,
                "saes": [run.name for run in wave],
                # of the last call, if it took several
                "seconds": time.monotonic() - started,
                "hardware": hardware(self.device),
                "versions": versions(),
            }
            with new_file(folder.about) as file:
                file.write_text(json.dumps(about, indent=1))
        self.saes_path.mkdir(parents=True, exist_ok=True)
        for run in wave:
            trained, place = folder.saes / run.name, self.saes_path / run.name
            if trained.is_dir():
                shutil.copy(folder.saes / RUNNER_CFG_FILENAME, trained)
                shutil.rmtree(place, ignore_errors=True)  # an SAE that lost a file
                os.replace(trained, place)
        for leftover in (folder.saes, folder.checkpoints):
            shutil.rmtree(leftover, ignore_errors=True)
        return True

    def _fits_memory(self, wave: Wave, folder: WaveFolder) -> bool:
        """Run a training to its end; False if memory runs out."""
        fits = True
        try:
            self._runner(wave, folder).run()
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            fits = False
        # Runners are in reference cycles, which Python frees at some later time.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return fits

    def _runner(self, wave: Wave, folder: WaveFolder) -> _WaveRunner:
        cfg = runner_config(self.config, wave, self.device)
        cfg.output_path = str(folder.saes)
        # here and not in the constructor, which appends a random name
        cfg.checkpoint_path = str(folder.checkpoints)
        checkpoint = last_checkpoint(folder.checkpoints)
        if checkpoint is not None:
            cfg.resume_from_checkpoint = str(checkpoint)
            print(f"resuming from {checkpoint}", file=sys.stderr)
        hook_names = {run.hook_name for run in wave}
        runner = _WaveRunner(
            cfg,
            override_dataset=training_text(self.config),
            # a model may be loaded only up to its hook points
            override_model=self._model if hook_names == self._hook_names else None,
            override_saes={run.name: initial_sae(run.config, run.seed) for run in wave},
        )
        runner.calibrated = [run.name for run in wave if self._calibrates(run)]
        runner.centred = [run.name for run in wave if run.centre_b_dec]
        runner.scales = any(
            run.config.normalize_activations in ESTIMATED_SCALES for run in self.runs
        )
        self._model, self._hook_names = runner.model, hook_names
        for hook_name in hook_names - set(runner.model.hook_dict):
            raise UserError(f"{cfg.model_name} has no hook point {hook_name!r}")
        return runner

    def _calibrates(self, run: Run) -> bool:
        return (
            self.config.calibrate_thresholds
            and isinstance(run.config, BatchTopKTrainingSAEConfig)
            and getattr(run.config, "calibrate_threshold", True)
        )


def _is_out_of_memory(error: Exception) -> bool:
    # PyTorch's CPU allocator has no exception of its own.
    of_cpu = ("not enough memory", "can't allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error) for words in of_cpu
    )


def training_text(config: CompareConfig) -> Any:
    """
    Local text, opened as evaluations open it; None for SAELens to stream from the Hub.

    Raises:
        UserError: There is no such text.
    """
    name = config.dataset_path
    path = Path(name)
    looks_local = path.exists() or path.is_absolute() or name.startswith(".")
    if name == EMBEDDED_DATASET_NAME or looks_local:
        return open_dataset(name, "train")
    return None
