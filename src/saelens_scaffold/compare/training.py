"""Training the SAEs of an experiment in waves."""

import gc
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens import TrainingSAE, constants
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from typing_extensions import override
from wandb.errors import UsageError

from saelens_scaffold._util.errors import UserError, loading, one_line, shown
from saelens_scaffold._util.files import new_file
from saelens_scaffold._util.progress import n_saes
from saelens_scaffold._util.provenance import hardware, versions
from saelens_scaffold._util.tasks import Reporter, Task, TaskQueue, Workers
from saelens_scaffold._util.untrusted import read_json
from saelens_scaffold.compare.config import (
    TRAINING_FIELDS,
    CompareConfig,
    ConfigChanged,
)
from saelens_scaffold.compare.grid import (
    Run,
    WaveConfig,
    estimates_scale,
    runner_config,
    weight_bytes,
)
from saelens_scaffold.saes.runner_config import read_runner_config
from saelens_scaffold.saes.scaffold_start import principal_subspace
from saelens_scaffold.training import runner
from saelens_scaffold.training.cached_activations import CachedActivationsStore
from saelens_scaffold.training.data import override_dataset
from saelens_scaffold.training.metrics_log import MetricsLog
from saelens_scaffold.training.model import override_model

Wave = list[Run]
"""SAEs that are trained together, on one pass of the language model."""

WAVES_FILENAME = "waves.json"


class WaveFolder:
    """
    Folder of a wave: its checkpoints, and its SAEs until they are moved to their places.

    Args:
        training_path: Folder of all waves.
        number: Number of the wave.
    """

    def __init__(self, training_path: Path, number: int):
        self.path = training_path / f"wave-{number}"
        self.saes = self.path / "saes"
        self.checkpoints = self.path / "checkpoints"
        # the facts of the wave, written when all its SAEs are trained
        self.about = self.path / "wave.json"


def plan_waves(
    training_path: Path,
    saes_path: Path,
    runs: Sequence[Run],
    saes_per_wave: int | None = None,
    at_once: int = 1,
) -> list[Wave]:
    """
    Divide the SAEs of an experiment into waves.

    A wave's number is its place. One without SAEs is no more.

    Args:
        training_path: Folder of the waves. Those that are trained stay, and so do those
            that have a checkpoint, since that is one of a whole wave.
        saes_path: Folder of the trained SAEs, which are left out of new waves.
        runs: The SAEs.
        saes_per_wave: Most SAEs of a wave; None for all that can share a runner.
        at_once: Number of waves that are trained at the same time, for which new ones
            are made small enough.
    """
    by_name = {run.name: run for run in runs}
    waves: list[Wave] = []
    busy: set[str] = set()
    for number, names in enumerate(_read_waves(training_path)):
        folder = WaveFolder(training_path, number)
        if folder.about.is_file():
            busy.update(name for name in names if (folder.saes / name).is_dir())
        elif runner.last_checkpoint(folder.checkpoints) and not (
            saes_per_wave and len(names) > saes_per_wave
        ):
            busy.update(names)
        else:
            names = []
        waves.append([by_name[name] for name in names])
    by_runner: dict[str, Wave] = {}
    for run in runs:
        if run.name not in busy and not is_trained(saes_path / run.name):
            settings = repr(sorted(run.training.items()))
            by_runner.setdefault(settings, []).append(run)
    share = math.ceil(sum(map(len, by_runner.values())) / at_once)
    new: list[Wave] = []
    for same in by_runner.values():
        size = min(saes_per_wave or share, share)
        new += [same[i : i + size] for i in range(0, len(same), size)]
    for number, wave in enumerate(waves):
        if new and not wave:
            waves[number] = new.pop(0)
    waves += new
    while waves and not waves[-1]:
        waves.pop()
    return waves


def check_trained(
    config: CompareConfig, runs: Sequence[Run], saes_path: Path, training_path: Path
) -> None:
    """
    Check that finished and half-finished SAEs are those that an experiment would train, by
    the runner's configuration beside each, whatever became of the experiment's own.

    Raises:
        ConfigChanged: One is not, or nothing says how it was trained.
    """
    names, scales = {run.name for run in runs}, estimates_scale(runs)
    folders = [saes_path]
    for number, wave in enumerate(_read_waves(training_path)):
        folder = WaveFolder(training_path, number)
        checkpoint = runner.last_checkpoint(folder.checkpoints)
        folders += [folder.saes, *([checkpoint] if checkpoint else [])]
        if checkpoint and not names.issuperset(wave):
            raise ConfigChanged(f"{checkpoint} is of other SAEs; {_CHOOSE}")
    for run in runs:
        wanted: dict[str, Any] = {}
        for folder in folders:
            directory = folder / run.name
            found = read_runner_config(directory)
            if not found and not is_trained(directory):
                continue
            wanted = wanted or _decisive(
                runner_config(config, [run], scales=scales).to_dict(), run.name
            )
            then = _decisive(found, run.name)
            for name in wanted:
                if name not in then:
                    how = f"nothing says with which {name}"
                elif then[name] != wanted[name]:
                    how = f"with {name} {shown(then[name])}, now {shown(wanted[name])}"
                else:
                    continue
                raise ConfigChanged(f"{directory} was trained {how}; {_CHOOSE}")


_CHOOSE = "choose another --output_path, or remove it"

_CACHE = {"use_cached_activations", "cached_activations_path"}
_DECISIVE = {"model_name", "dataset_path", "seed", "scales", *TRAINING_FIELDS} - _CACHE
_WHERE = {"sae.device", "sae.metadata", "llm_device", "act_store_device"}
_OF_EACH_SAE = ("hook_names", "hook_head_indices", "calibrate_thresholds", "b_dec_init")


def _decisive(runner_cfg: dict[str, Any], name: str) -> dict[str, Any]:
    """What a runner's configuration says of the training of one of its SAEs."""
    found = {each: runner_cfg[each] for each in sorted(_DECISIVE & {*runner_cfg})}
    for each in _OF_EACH_SAE:
        found[each] = (runner_cfg.get(each) or {}).get(name)
    found["use_cached_activations"] = bool(runner_cfg.get("use_cached_activations"))
    if cache := runner_cfg.get("cached_activations"):  # once read, it may be gone
        found["cached_activations"] = cache
    of_sae = (runner_cfg.get("saes") or {}).get(name) or {}
    found |= {f"sae.{each}": value for each, value in of_sae.items()}
    # tuples as the lists that a file has
    return {k: json.loads(json.dumps(v)) for k, v in found.items() if k not in _WHERE}


def keep_waves(training_path: Path, waves: Sequence[Wave]) -> None:
    """Write the division into waves, and drop checkpoints of waves that are no more."""
    now = [[run.name for run in wave] for wave in waves]
    for number, names in enumerate(_read_waves(training_path)):
        if now[number : number + 1] != [names]:
            shutil.rmtree(WaveFolder(training_path, number).path, ignore_errors=True)
    training_path.mkdir(parents=True, exist_ok=True)
    with new_file(training_path / WAVES_FILENAME) as file:
        file.write_text(json.dumps(now, indent=1))


def is_trained(directory: Path) -> bool:
    """Whether a directory holds a trained SAE."""
    names = (constants.SAE_CFG_FILENAME, constants.SAE_WEIGHTS_FILENAME)
    return all((directory / name).is_file() for name in names)


def _read_waves(training_path: Path) -> list[list[str]]:
    file = training_path / WAVES_FILENAME
    return read_json(file) if file.is_file() else []


class _WaveRunner(runner.RepeatableMultiSAETrainingRunner):
    """
    Trains all waves of an experiment on the same activations, and initialises b_dec of
    plain SAEs at their mean, as scaffold SAEs do.
    """

    cfg: WaveConfig

    @override
    def before_first_step(self, trainer: MultiSAETrainer) -> None:
        # SAEs train on scaled activations; `fit` finds the scale known, and keeps it
        trainer._estimate_scaling_factors()
        scalers = [each.activation_scaler for each in trainer.trainers.values()]
        if self.cfg.scales and not any(
            s.scaling_factor or s.whitening for s in scalers
        ):
            for _ in range(self.cfg.n_batches_for_norm_estimate):
                next(trainer.data_provider)
        first = next(trainer.data_provider)
        for name, b_dec_init in self.cfg.b_dec_init.items():
            if b_dec_init != "mean":
                continue
            x = first[self.cfg.hook_names_per_sae[name]]
            scaled = trainer.trainers[name].activation_scaler.scale(x)
            sae: Any = self.saes[name]
            mean, *_ = principal_subspace(scaled, rank=0)
            sae.b_dec.data.copy_(mean)


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

    def train(
        self, waves: Sequence[Wave], workers: Workers
    ) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """
        Train waves, each from its last checkpoint if it has one; where memory runs out,
        a wave is split in halves.

        Returns:
            The facts of each wave; why an SAE could not be trained, by its name.

        Raises:
            UserError: Memory does not suffice for a single SAE, or none could be trained.
            KeyboardInterrupt: Ctrl-C. The last checkpoint stays.
        """
        waves = [*waves]
        keep_waves(self.training_path, waves)
        folders = [WaveFolder(self.training_path, n) for n in range(len(waves))]
        for folder, wave in zip(folders, waves, strict=True):
            if folder.about.is_file():
                self._move(wave, folder)
        tasks = [
            self._task(number, wave)
            for number, (folder, wave) in enumerate(zip(folders, waves, strict=True))
            if wave and not folder.about.is_file()
        ]
        queue = TaskQueue(tasks, "wave", workers, "of training left")
        failed: dict[str, str] = {}
        errors: list[Exception] = []
        for task, has_trained, error in workers.run(queue):
            number, wave = task.key, waves[task.key]
            is_lost = isinstance(error, MemoryError) and len(wave) > 1
            if has_trained is False or is_lost:
                middle = (len(wave) + 1) // 2
                waves[number] = wave[:middle]
                waves.append(wave[middle:])
                keep_waves(self.training_path, waves)
                halves = (number, len(waves) - 1)
                queue.replace(task, *(self._task(n, waves[n]) for n in halves))
                _note(f"not enough memory to train {len(wave)} SAEs together: halving")
            elif error is not None:
                errors.append(error)
                reason = f"its training failed: {one_line(error)}"
                failed |= dict.fromkeys([run.name for run in wave], reason)
        if errors and len(failed) == len(self.runs):
            raise errors[0]
        folders = [WaveFolder(self.training_path, n) for n in range(len(waves))]
        about = [folder.about for folder in folders if folder.about.is_file()]
        return [*map(read_json, about)], failed

    def _task(self, number: int, wave: Wave) -> Task:
        cfg = runner_config(self.config, wave[:1])
        return Task(
            key=number,
            name=f"({n_saes(len(wave))})",
            kind="training",
            call=partial(self.train_wave, number, wave),
            amount=len(wave) * cfg.training_tokens,
            # weights, gradients and Adam's moments
            n_bytes=4 * weight_bytes(wave),
        )

    def train_wave(self, number: int, wave: Wave, report: Reporter) -> bool:
        """Train a wave; False if memory runs out."""
        folder = WaveFolder(self.training_path, number)
        started = time.monotonic()
        try:
            wave_runner = self._runner(wave, folder)
            wave_runner.on_step = lambda trainer, bar: report(
                len(wave) * trainer.n_training_samples, bar
            )
            wave_runner.run()
        except UsageError as error:
            raise UserError(
                f"{one_line(error)} (or leave wandb_project out)"
            ) from error
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if len(wave) > 1:
                return False
            raise UserError(
                f"there is not enough memory to train {wave[0].name}; make d_sae, "
                "train_batch_size_tokens, n_batches_in_buffer or "
                "store_batch_size_prompts smaller"
            ) from error
        finally:
            # runners are in reference cycles, which Python frees at some later time
            gc.collect()
            torch.cuda.empty_cache()
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
        self._move(wave, folder)
        return True

    def _move(self, wave: Wave, folder: WaveFolder) -> None:
        """Move the SAEs of a finished wave to their places."""
        self.saes_path.mkdir(parents=True, exist_ok=True)
        for run in wave:
            trained, place = folder.saes / run.name, self.saes_path / run.name
            if trained.is_dir():
                shutil.copy(folder.saes / constants.RUNNER_CFG_FILENAME, trained)
                shutil.rmtree(place, ignore_errors=True)  # an SAE that lost a file
                os.replace(trained, place)
        for leftover in (folder.saes, folder.checkpoints):
            shutil.rmtree(leftover, ignore_errors=True)

    def _runner(self, wave: Wave, folder: WaveFolder) -> _WaveRunner:
        cfg = runner_config(self.config, wave, self.device, estimates_scale(self.runs))
        cfg.output_path = str(folder.saes)
        # here and not in the constructor, which appends a random name
        cfg.checkpoint_path = str(folder.checkpoints)
        checkpoint = runner.last_checkpoint(folder.checkpoints)
        if checkpoint is not None:
            cfg.resume_from_checkpoint = str(checkpoint)
            _note(f"resuming from {checkpoint}")
        hook_names = {run.hook_name for run in wave}
        kernels = self.config.sae.get("kernels", "auto")
        saes = {r.name: runner.initial_sae(r.config, r.seed, kernels) for r in wave}
        # a model may be loaded only up to its hook points
        model = self._model if hook_names == self._hook_names else None
        if not (model or cfg.use_cached_activations):
            model = override_model(cfg)
        data: Any = {"override_dataset": override_dataset(cfg), "override_saes": saes}
        with loading(cfg.model_name):
            made = _WaveRunner(cfg, override_model=model, **data)
        made.calibrated = [*filter(cfg.calibrate_thresholds.get, cfg.saes)]
        if self.config.log_metrics:
            made.metrics_log = MetricsLog(self.training_path.with_name("training.csv"))
        self._model, self._hook_names = made.model, hook_names
        if isinstance(made.activations_store, CachedActivationsStore):
            n_tokens = made.activations_store.n_tokens
            if n_tokens < cfg.training_tokens:
                _note(
                    f"the cache has {n_tokens:,} tokens, of which some are read again"
                )
            return made
        _check_memory(saes.values(), self.device)
        for hook_name in hook_names - set(made.model.hook_dict):
            raise UserError(f"{cfg.model_name} has no hook point {hook_name!r}")
        return made


def _check_memory(saes: Iterable[TrainingSAE[Any]], device: str) -> None:
    """
    Check that a GPU has room for training, once the language model and the SAEs are there.

    Raises:
        OutOfMemoryError: It has not; without this check, the steps would find out.
    """
    if torch.device(device).type != "cuda":
        return
    parameters = [weights for sae in saes for weights in sae.parameters()]
    # gradients and Adam's two moments; activations come on top
    needed = 3 * sum(each.numel() * each.element_size() for each in parameters)
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed > free:
        raise torch.OutOfMemoryError(f"{needed:,} bytes are needed, {free:,} are free")


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _is_out_of_memory(error: Exception) -> bool:
    # PyTorch's CPU allocator has no exception of its own.
    of_cpu = re.search("not enough memory|can't allocate memory", str(error))
    return bool(of_cpu) or isinstance(error, (MemoryError, torch.OutOfMemoryError))
