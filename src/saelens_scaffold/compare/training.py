"""Training the SAEs of an experiment: in waves, each on one pass of the language model."""

import gc
import json
import os
import platform
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
from pydantic import AfterValidator, ConfigDict, Field, create_model
from sae_lens import LoggingConfig, MultiSAETrainingRunnerConfig, TrainingSAE
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
)
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.util import str_to_dtype
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import get_pretrained_model_config
from typing_extensions import override

from saelens_scaffold.compare.config import TRAINING_FIELDS, CompareConfig
from saelens_scaffold.compare.grid import Run
from saelens_scaffold.evals.configs import make_config
from saelens_scaffold.evals.language_model import known_model_name
from saelens_scaffold.evals.text_data import EMBEDDED_DATASET_NAME, open_dataset
from saelens_scaffold.files import new_file
from saelens_scaffold.saes.pca import principal_subspace
from saelens_scaffold.training_runner import (
    RepeatableMultiSAETrainingRunner,
    initial_sae,
    last_checkpoint,
)
from saelens_scaffold.versions import versions

TRAINED_FILENAME = "trained.json"
"""Says that all SAEs of a wave are saved, and how many seconds it took."""
WAVE_FILENAME = "wave.json"
"""What is kept of a wave once its SAEs are in their places."""

ESTIMATED_SCALES = ("expected_average_only_in", "covariance_whitening")
"""Values of `normalize_activations` for which SAELens reads text before it trains."""

_DEFAULTS: dict[str, Any] = {
    # as many repeated steps as one loses without complaint, at little cost of dropped text
    "n_checkpoints": 9,
    # SAELens's 1,000 batches are gigabytes, and the mean norm of 100 is as good
    "n_batches_for_norm_estimate": 100,
}

# SAELens annotates types, and leaves it at that: what a number may be.
_ALLOWED: dict[str, Any] = {
    **dict.fromkeys(
        (
            "context_size",
            "eval_batch_size_prompts",
            "n_batches_in_buffer",
            "n_restart_cycles",
            "store_batch_size_prompts",
            "train_batch_size_tokens",
            "training_tokens",
        ),
        Field(ge=1),
    ),
    **dict.fromkeys(
        (
            "dead_feature_threshold",
            "dead_feature_window",
            "feature_sampling_window",
            "lr_decay_steps",
            "lr_end",
            "lr_warm_up_steps",
            "n_batches_for_norm_estimate",
            "n_checkpoints",
            "n_eval_batches",
        ),
        Field(ge=0),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Field(ge=0, lt=1)),
    "activations_mixing_fraction": Field(ge=0, le=1),
    "dtype": AfterValidator(lambda name: str_to_dtype(name) and name),
    "lr": Field(gt=0),
    # a tuple, which YAML does not have
    "seqpos_slice": Field(strict=False),
}
_TYPES = get_type_hints(MultiSAETrainingRunnerConfig)
_TRAINING_FIELDS: dict[str, Any] = {
    name: (Annotated[_TYPES[name], _ALLOWED.get(name, Field())], None)
    for name in TRAINING_FIELDS
}
_Training: Any = create_model(
    "Training",
    __config__=ConfigDict(
        strict=True, allow_inf_nan=False, extra="forbid", protected_namespaces=()
    ),
    **_TRAINING_FIELDS,
)


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
        runner.centred = [run.name for run in wave if run.centre_b_dec]
        runner.scales = self.scales
        self._model, self._hook_names = runner.model, hook_names
        for hook_name in hook_names - set(runner.model.hook_dict):
            raise _no_hook_point(self.config, hook_name, runner.model.hook_dict)
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


def check_training(config: CompareConfig, runs: Sequence[Run]) -> None:
    """
    See that every SAE can be trained, as far as that can be known without its text and
    without the language model's weights.

    Raises:
        ValueError: One cannot, and why.
    """
    for run in runs:
        cfg = runner_config(config, [run])
        try:
            # SAELens finds out what is wrong with a schedule when it makes a trainer
            sae = TrainingSAE.from_dict({**run.config.to_dict(), "device": "meta"})
            MultiSAETrainer(
                replace(cfg.to_sae_trainer_config(), device="meta", autocast=False),
                saes={run.name: sae},
                hook_names={run.name: run.hook_name},
                data_provider=iter(()),
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{run.arm.label}: {error}") from error
    cfg = runner_config(config, runs[:1])
    if cfg.model_class_name == "HookedTransformer":
        _check_hook_names(config, {run.hook_name for run in runs})


def _check_hook_names(config: CompareConfig, hook_names: Set[str]) -> None:
    """See that a HookedTransformer has hook points, without loading it."""
    layer = get_pretrained_model_config(known_model_name(config.model_name))
    # one layer, without weights, has the hook points that every layer has
    layer.n_layers, layer.init_weights, layer.tokenizer_name = 1, False, None
    layer.device = "meta"
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(layer, move_to_device=False)
    known = {name.removeprefix("blocks.0."): name for name in model.hook_dict}
    for hook_name in sorted(hook_names):
        if re.sub(r"^blocks\.\d+\.", "", hook_name) not in known:
            raise _no_hook_point(config, hook_name, model.hook_dict)


def _no_hook_point(
    config: CompareConfig, hook_name: str, known: Iterable[str]
) -> ValueError:
    """What to say of a hook point that the language model does not have."""
    examples = sorted(name for name in known if ".0." in name)[:8]
    return ValueError(
        f"{config.model_name} has no hook point {hook_name!r}; those of a layer are "
        f"called, for example, {', '.join(examples)}"
    )


def runner_config(
    config: CompareConfig, wave: Sequence[Run], device: str = "cpu"
) -> MultiSAETrainingRunnerConfig:
    """
    SAELens's configuration of a wave.

    Raises:
        ValueError: A field of `training` has a value that makes no sense.
    """
    training = {**_DEFAULTS, **config.training, **wave[0].training}
    try:
        checked = make_config(_Training, training)
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
            **checked.model_dump(exclude_unset=True),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"training: {error}") from error
    batch = cfg.train_batch_size_tokens
    if cfg.n_batches_in_buffer * cfg.context_size < batch:
        raise ValueError(
            f"training: train_batch_size_tokens is {batch}; the buffer has "
            f"n_batches_in_buffer * context_size = "
            f"{cfg.n_batches_in_buffer * cfg.context_size} tokens, and must have as many"
        )
    if cfg.training_tokens < batch:
        raise ValueError(
            f"training: training_tokens is {cfg.training_tokens}; it must be at least "
            f"train_batch_size_tokens, which is {batch}"
        )
    if cfg.lr_warm_up_steps + cfg.lr_decay_steps > cfg.total_training_steps:
        raise ValueError(
            f"training: lr_warm_up_steps is {cfg.lr_warm_up_steps} and lr_decay_steps "
            f"{cfg.lr_decay_steps}; training_tokens and train_batch_size_tokens make no "
            f"more than {cfg.total_training_steps} steps"
        )
    return cfg


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
