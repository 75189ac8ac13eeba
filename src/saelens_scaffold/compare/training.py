"""Training the SAEs of an experiment: in waves, each on one pass of the language model."""

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sae_lens import LoggingConfig, MultiSAETrainingRunnerConfig
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from typing_extensions import override

from saelens_scaffold.compare.config import CompareConfig
from saelens_scaffold.compare.grid import Run, initial_sae
from saelens_scaffold.evals.language_model import known_model_name
from saelens_scaffold.evals.text_data import EMBEDDED_DATASET_NAME, open_dataset
from saelens_scaffold.files import new_file
from saelens_scaffold.saes.pca import principal_subspace
from saelens_scaffold.training_runner import (
    RepeatableMultiSAETrainingRunner,
    last_checkpoint,
)

WAVE_FILENAME = "wave.json"
"""What is kept of a wave once its SAEs are in their places."""

_DEFAULTS: dict[str, Any] = {
    # as many repeated steps as one loses without complaint, at little cost of dropped text
    "n_checkpoints": 9,
    "save_final_checkpoint": False,
}


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

    def train(self, number: int, wave: Sequence[Run]) -> None:
        """
        Train a wave, from its last checkpoint if there is one, unless it is finished.

        Raises:
            KeyboardInterrupt: Ctrl-C. The last checkpoint stays.
        """
        directory = self.training_path / f"wave-{number}"
        if (directory / WAVE_FILENAME).is_file():
            return
        output, checkpoints = directory / "saes", directory / "checkpoints"
        seconds = None  # unknown if an earlier call trained them and was cut off here
        if not (output / RUNNER_CFG_FILENAME).is_file():  # written last
            started = time.monotonic()
            self._run(wave, output, last_checkpoint(checkpoints), checkpoints)
            seconds = time.monotonic() - started
        self.saes_path.mkdir(parents=True, exist_ok=True)
        for run in wave:
            trained = output / run.name
            if trained.is_dir():
                shutil.copy(output / RUNNER_CFG_FILENAME, trained)
                os.replace(trained, self.saes_path / run.name)
        with new_file(directory / WAVE_FILENAME) as file:
            file.write_text(
                json.dumps(
                    {
                        "wave": number,
                        "saes": [run.name for run in wave],
                        "seconds": seconds,
                        "versions": versions(),
                    },
                    indent=1,
                )
            )
        shutil.rmtree(output)
        shutil.rmtree(checkpoints, ignore_errors=True)

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
        runner = _WaveRunner(
            cfg,
            override_dataset=training_text(self.config),
            override_model=self._model,
            override_saes={run.name: initial_sae(run) for run in wave},
        )
        runner.centred = [run.name for run in wave if run.centre_b_dec]
        runner.scales = self.scales
        self._model = runner.model
        runner.run()


def runner_config(
    config: CompareConfig, wave: Sequence[Run], device: str
) -> MultiSAETrainingRunnerConfig:
    """
    SAELens's configuration of a wave.

    Raises:
        ValueError: A field of `training` has a value that makes no sense.
    """
    training: dict[str, Any] = {
        **_DEFAULTS,
        **config.training,
        **wave[0].training,
    }
    if "seqpos_slice" in training:
        training["seqpos_slice"] = tuple(training["seqpos_slice"])
    try:
        cfg = MultiSAETrainingRunnerConfig(
            saes={run.name: run.config for run in wave},
            hook_names={run.name: run.hook_name for run in wave},
            model_name=known_model_name(config.model_name),
            dataset_path=config.dataset_path,
            device=device,
            seed=config.data_seed,
            checkpoint_path=None,
            output_path=None,
            logger=LoggingConfig(log_to_wandb=False),
            **training,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"training: {error}") from error
    for name in ("training_tokens", "train_batch_size_tokens", "context_size"):
        value = getattr(cfg, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"training: {name} must be an int of at least 1, got {value!r}"
            )
    return cfg


def versions() -> dict[str, str]:
    """The packages that decide what comes out."""
    packages = (
        "saelens-scaffold",
        "sae-lens",
        "sae-bench",
        "transformer-lens",
        "torch",
    )
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        **{package: version(package) for package in packages},
    }


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
