"""SAELens's training runners, with checkpoints that survive an interruption."""

import json
import logging
import math
import shutil
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
)
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.multi_sae_training_runner import (
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from typing_extensions import override

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import new_directory, new_file, workspace
from saelens_scaffold._util.interruption import (
    hold_interruptions,
    interruptible,
    raise_if_interrupted,
    release_interruptions,
)
from saelens_scaffold._util.untrusted import read_json
from saelens_scaffold.kernels.choice import Kernels
from saelens_scaffold.models.fused import fused
from saelens_scaffold.saes import ScaffoldBatchTopKTrainingSAE
from saelens_scaffold.saes.calibration import SampledBatches, calibrate_threshold
from saelens_scaffold.saes.facts import l0_warning
from saelens_scaffold.saes.plain_on_kernels import on_kernels
from saelens_scaffold.training import fine_tuning
from saelens_scaffold.training.activation_stream import ActivationStream
from saelens_scaffold.training.cached_activations import (
    CachedActivationsStore,
    without_language_model,
)
from saelens_scaffold.training.measurement import Measurement, NotMeasuredError, measure
from saelens_scaffold.training.metrics_log import MetricsLog

logger = logging.getLogger(__name__)

SAMPLE_FILENAME = "activation_sample.safetensors"
"""Sample of the activations on which thresholds are calibrated."""
STREAM_FILENAME = "activation_stream.json"
"""Position in the stream of activations. Written last, so it marks a complete
checkpoint."""


_STEPS_PER_CHECK = 10
"""Steps between looks at losses and weights, for which a GPU has to be waited for."""


class DivergedError(UserError):
    """A loss, or a weight, is not finite."""


class ResumableTrainingRunner(LanguageModelSAETrainingRunner):
    """
    `LanguageModelSAETrainingRunner` that survives Ctrl-C and SIGTERM, and measures the
    SAE that it saves.

    On an interruption, SAELens (6.54) saves the state of the activations store into a
    directory that does not exist, and neither weights nor optimizer. This runner saves a
    complete checkpoint, from which `resume_from_checkpoint` continues. Checkpoints appear
    whole or not at all.

    SAELens's training statistics do not describe the saved SAE: the weights still change,
    and BatchTopK selects where the saved SAE has a threshold. So the runner loads the
    saved SAE and measures it on the text that follows what training has read, on the
    tokens that the trainer would use. `metadata.measured` in its cfg.json holds the
    `Measurement`, or `n_tokens` 0 and the reason why there is none.

    Training stops where the loss or a weight is not finite, before it is saved.

    A scaffold SAE can start from what `cfg.from_pretrained_path` holds: a saved scaffold
    SAE, a checkpoint, or an SAE without a scaffold, which gets one first. SAELens would
    train whatever is there.

    Raises:
        UserError: The training cannot start from that SAE.

    Attributes:
        checkpoints_until_saved: Whether only the last checkpoint that a training can go
            on from is kept, and none once the SAE has been saved.
        n_measured_tokens: Number of tokens to measure on.
        last_checkpoint: The last complete checkpoint of this run, if there is one.
        interruption_checkpoint: Checkpoint of an interrupted run; None before an
            interruption, or if `cfg.checkpoint_path` is None.
        measurement: Measurement of the SAE in `cfg.output_path`, if any.
        not_measured: Why there is no measurement.
    """

    n_measured_tokens: int = 16_384
    checkpoints_until_saved: bool = False
    last_checkpoint: Path | None = None
    interruption_checkpoint: Path | None = None
    measurement: Measurement | None = None
    not_measured: str | None = None
    _data_provider: Any = None
    _n_sparsity_tokens: int | None = None
    _first_epoch: Any = None
    _unchecked_losses: list[torch.Tensor]
    _pretrained: SAE[Any] | None = None
    _superseded: set[Any]

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        override_dataset: Any = None,
        override_model: Any = None,
        override_sae: TrainingSAE[Any] | None = None,
    ):
        if override_sae is None and fine_tuning.is_fine_tuning(cfg):
            if cfg.resume_from_checkpoint is None:
                override_sae, self._pretrained = fine_tuning.begin(cfg)
            else:
                override_sae = TrainingSAE.from_dict(cfg.get_training_sae_cfg_dict())
        self._superseded = set()
        super().__init__(cfg, override_dataset, override_model, override_sae)

    @override
    def run(self) -> Any:
        # the store replaces this iterator whenever it starts the text over
        if not self.cfg.use_cached_activations:
            store = self.activations_store
            self._first_epoch = getattr(store, "iterable_sequences", None)
        with interruptible(), fused(self.model):
            return super().run()

    @override
    def run_trainer_with_interruption_handling(self, trainer: Any) -> Any:
        self._data_provider = trainer.data_provider
        self._unchecked_losses = []
        # those that are behind a resumed run would be saved again, one after each step
        due, done = trainer.checkpoint_thresholds, trainer.n_training_samples
        trainer.checkpoint_thresholds = [at for at in due if at >= done]
        trainer.step = partial(self._checked_step, trainer, trainer.step)
        save = trainer.save_checkpoint
        trainer.save_checkpoint = partial(self._save_finite, trainer, save)
        if self._pretrained is not None:
            fine_tuning.start(trainer, self._pretrained)
            self._pretrained = None
        try:
            sae = trainer.fit()
            self._check_finite(trainer)
            self._n_sparsity_tokens = trainer.n_frac_active_samples
            return sae
        except (KeyboardInterrupt, InterruptedException):
            hold_interruptions()  # one more would cost the checkpoint
            if self.cfg.checkpoint_path is not None:
                trainer.save_checkpoint(checkpoint_name=str(trainer.n_training_samples))
                self.interruption_checkpoint = self.last_checkpoint
            raise

    def _checked_step(
        self, trainer: Any, step: Callable[..., Any], batch: torch.Tensor
    ) -> Any:
        self._raise_if_interrupted()  # where a library has dropped it
        output = step(batch)
        self._unchecked_losses.append(output.loss.detach())
        if len(self._unchecked_losses) >= _STEPS_PER_CHECK:
            self._check_finite(trainer)
        return output

    def _raise_if_interrupted(self) -> None:
        raise_if_interrupted()

    def _save_finite(
        self, trainer: Any, save: Callable[..., Any], checkpoint_name: str
    ) -> None:
        self._check_finite(trainer)
        logger = trainer.cfg.logger
        if self.checkpoints_until_saved:  # what is removed again is not uploaded
            trainer.cfg.logger = replace(logger, log_to_wandb=False)
        try:
            self._save_complete(save, checkpoint_name)
        finally:
            trainer.cfg.logger = logger
        if self.cfg.checkpoint_path is None:
            return
        checkpoint = Path(self.cfg.checkpoint_path) / checkpoint_name
        before, self.last_checkpoint = self.last_checkpoint, checkpoint
        if self.checkpoints_until_saved:
            self._superseded |= {before} - {None, checkpoint}
            if checkpoint_name.isdecimal():  # no training goes on from the final one
                self._remove_superseded()

    def _save_complete(self, save: Callable[..., Any], checkpoint_name: str) -> None:
        """Save a checkpoint, which is there whole or not at all."""
        if self.cfg.checkpoint_path is None:
            save(checkpoint_name)  # to Weights & Biases
            return
        checkpoint = Path(self.cfg.checkpoint_path) / checkpoint_name
        with new_directory(checkpoint, replace=True) as folder:
            save(checkpoint_name, base_path=folder.parent)

    def _remove_superseded(self) -> None:
        for checkpoint in self._superseded:
            shutil.rmtree(checkpoint, ignore_errors=True)
        self._superseded = set()

    def _check_finite(self, trainer: Any) -> None:
        found = self._not_finite(trainer)
        if not found:
            return
        kept = self.last_checkpoint or self.cfg.resume_from_checkpoint
        last = f"the last good checkpoint is {kept}" if kept else "nothing is saved"
        raise DivergedError(
            f"the training has diverged by step {trainer.n_training_steps + 1}: "
            f"{found[0]}; lower lr, which is {self.cfg.lr:g}; {last}"
        )

    def _not_finite(self, trainer: Any) -> list[str]:
        """What is not finite among the losses since the last look, and the weights."""
        losses, self._unchecked_losses = self._unchecked_losses, []
        values = torch.stack(losses).tolist() if losses else []
        named = trainer.sae.named_parameters()
        return [
            *(f"the loss is {loss}" for loss in values if not math.isfinite(loss)),
            *(f"{name} is not finite" for name, w in named if not w.isfinite().all()),
        ]

    @override
    def save_final_sae(
        self,
        sae: TrainingSAE[Any],
        output_path: str,
        log_feature_sparsity: torch.Tensor | None = None,
    ) -> None:
        # first, so that no failure while measuring costs the training
        hold_interruptions()
        target = Path(output_path)
        target.mkdir(parents=True, exist_ok=True)
        with workspace(target / "sae") as folder:
            super().save_final_sae(sae, str(folder), log_feature_sparsity)
            # in its place is a whole SAE, or none
            (target / SAE_CFG_FILENAME).unlink(missing_ok=True)
            for file in sorted(folder.iterdir(), key=_cfg_last):
                file.replace(target / file.name)
        try:
            release_interruptions()
            self._measure_saved(output_path)
        except (KeyboardInterrupt, InterruptedException):
            self.not_measured = "the measuring was interrupted"
        except NotMeasuredError as error:
            self.not_measured = str(error)
        cfg_path = Path(output_path) / SAE_CFG_FILENAME
        cfg = read_json(cfg_path)
        measured: dict[str, Any] = {"n_tokens": 0, "reason": self.not_measured}
        if self.measurement is not None:
            measured = self.measurement.to_metadata()
        cfg["metadata"]["measured"] = measured
        cfg["metadata"]["n_sparsity_tokens"] = self._n_sparsity_tokens
        with new_file(cfg_path) as file:
            file.write_text(json.dumps(cfg))
        if self.checkpoints_until_saved and self.last_checkpoint is not None:
            self._superseded |= {self.last_checkpoint}
            self._remove_superseded()
            with suppress(OSError):  # not empty: checkpoints of other runs
                for folder in (*self.last_checkpoint.parents,)[:2]:
                    folder.rmdir()
            self.last_checkpoint = None

    def _measure_saved(self, output_path: str) -> None:
        sae = SAE.load_from_disk(output_path, device=self.cfg.device)
        if sae.cfg.reshape_activations == "hook_z":
            sae.turn_off_forward_pass_hook_z_reshaping()
        # a prefetching provider would read from the store at the same time
        with getattr(self._data_provider, "paused", nullcontext)():
            found = self.measurement = measure(
                sae, self._unread_activations(), self.n_measured_tokens, self._text()
            )
        l0, n_tokens = found.l0_sparse, found.n_tokens
        if warning := l0_warning(output_path, l0, n_tokens, sae.cfg.metadata):
            logger.warning(warning)

    def _text(self) -> str:
        """Description of the text that the SAE is measured on."""
        text = "what follows in the training text"
        if self.cfg.from_pretrained_path is None:
            text = f"held out: {text}"
        else:
            text += ", which the SAE that this training started from may have read"
        if self.activations_store.exclude_special_tokens is None:
            text += "; special tokens count, as in training"
        return text

    def _unread_activations(self) -> Iterator[torch.Tensor]:
        """
        Activations of the text after all that training has read, to the end of the text.

        Raises:
            NotMeasuredError: The position in the text is unknown.
        """
        store = self.activations_store
        if self._first_epoch is None:
            raise NotMeasuredError("cached activations do not tell which were read")
        while store.iterable_sequences is self._first_epoch:
            try:
                yield store.get_filtered_llm_batch(raise_on_epoch_end=True)
            except StopIteration:
                return


class RepeatableMultiSAETrainingRunner(MultiSAETrainingRunner):
    """
    `MultiSAETrainingRunner` whose resumed runs give the same SAEs as unbroken ones.

    A checkpoint of SAELens holds SAEs and optimizers, but neither the shuffled
    activations in the buffer, which may be gigabytes, nor the random state: a resumed run
    sees other activations than an unbroken one.

    Here the buffer and the random numbers restart at each checkpoint (`n_checkpoints`) of
    every run, broken or not, and what is left in the buffer is dropped. A resumed run
    skips the text read before, without running the language model, and sees from there
    what the unbroken run sees. An interruption saves nothing more, so at most the steps
    since the last checkpoint are repeated. Older checkpoints are removed.

    `cfg` can be a `CachedMultiSAETrainingRunnerConfig`, which names cached activations.
    `cfg.seed` seeds the shuffling. `cfg.prefetch_llm_batches` must be off: batches fetched
    ahead of a checkpoint would be lost.

    Attributes:
        calibrated: Names of the BatchTopK SAEs, plain or scaffold, whose threshold is
            calibrated at the end of training, all on the same activations. By default
            the scaffold SAEs with `calibrate_threshold`.
        metrics_log: Where metrics are logged, if anywhere.
        on_step: Called after each step with the trainer and its progress bar.
    """

    calibrated: Collection[str] | None = None
    metrics_log: MetricsLog | None = None
    on_step: Callable[[MultiSAETrainer, Any], None] = lambda *_: None
    _stream: ActivationStream
    _batches: SampledBatches
    _resume_from: str | None = None

    def __init__(
        self,
        cfg: MultiSAETrainingRunnerConfig,
        override_dataset: Any = None,
        override_model: Any = None,
        override_saes: dict[str, TrainingSAE[Any]] | None = None,
    ):
        is_cached = getattr(cfg, "use_cached_activations", False)
        if is_cached:
            override_model = without_language_model(cfg)
        super().__init__(cfg, override_dataset, override_model, override_saes)
        if is_cached:
            self.activations_store = CachedActivationsStore(cfg, self.activations_store)  # type: ignore[arg-type]
            self.evaluator = None  # type: ignore[assignment] # it runs the language model

    @override
    def run(self) -> dict[str, TrainingSAE[Any]]:
        if self.cfg.prefetch_llm_batches:
            raise UserError(
                "prefetch_llm_batches must be False for runs that can be repeated"
            )
        # SAELens would wind its own store forward, to an inexact position.
        self._resume_from = self.cfg.resume_from_checkpoint
        self.cfg.resume_from_checkpoint = None
        with fused(self.model):
            return super().run()

    @override
    def _run_with_interruption_handling(
        self, trainer: MultiSAETrainer
    ) -> dict[str, TrainingSAE[Any]]:
        self._stream = ActivationStream(self.activations_store, self.cfg.seed)
        self._batches = SampledBatches(self._stream)
        trainer.data_provider = self._batches
        calibrated = self._calibrate_here()
        # a proxy, since a cycle of references would keep the optimizers alive
        trainer._update_pbar = partial(
            _update_progress, weakref.proxy(trainer), self.metrics_log, self.on_step
        )  # type: ignore
        if self._resume_from is None:
            self._stream.begin()
            self.before_first_step(trainer)
        else:
            self._load_checkpoint(trainer, Path(self._resume_from))
        if self.metrics_log is not None:
            # of an attempt that ended before its first checkpoint as well
            self.metrics_log.forget_after(trainer.n_training_steps, {*trainer.trainers})
        saes = trainer.fit()
        for name in calibrated:
            sample = self._batches.samples[self.cfg.hook_names_per_sae[name]]
            calibrate_threshold(saes[name], sample)  # type: ignore[arg-type]
        return saes

    def _calibrate_here(self) -> Collection[str]:
        """Names of the SAEs to calibrate on the shared sample instead of their own."""
        by_themselves = []
        for name, sae in self.saes.items():
            if isinstance(sae, ScaffoldBatchTopKTrainingSAE) and sae.calibrates:
                by_themselves.append(name)
                sae.calibrates = False
        return by_themselves if self.calibrated is None else self.calibrated

    def before_first_step(self, trainer: MultiSAETrainer) -> None:
        """Hook for subclasses, called once per training and not again on resuming."""

    def _load_checkpoint(self, trainer: MultiSAETrainer, checkpoint: Path) -> None:
        trainer.load_checkpoint(checkpoint)
        # SAELens saves within a step, before counting it, and repeats the checkpoints
        # that are behind a resumed run.
        n_samples = trainer.n_training_samples
        for each in (trainer, *trainer.trainers.values()):
            each.n_training_steps = n_samples // self.cfg.train_batch_size_tokens
        thresholds = trainer.checkpoint_thresholds
        trainer.checkpoint_thresholds = [at for at in thresholds if at >= n_samples]
        device = self.cfg.act_store_device or self.cfg.device
        self._batches.load(checkpoint / SAMPLE_FILENAME, device)
        self._stream.begin(**read_json(checkpoint / STREAM_FILENAME))

    @override
    def _save_runner_checkpoint_files(self, checkpoint_path: Path | None) -> None:
        super()._save_runner_checkpoint_files(checkpoint_path)
        if checkpoint_path is None:
            return
        self._batches.save(checkpoint_path / SAMPLE_FILENAME)
        with new_file(checkpoint_path / STREAM_FILENAME) as file:
            file.write_text(json.dumps(self._stream.begin_anew()))
        for other in checkpoint_path.parent.iterdir():
            if other != checkpoint_path:
                shutil.rmtree(other, ignore_errors=True)


def last_checkpoint(checkpoint_path: Path) -> Path | None:
    """The last complete checkpoint of a `RepeatableMultiSAETrainingRunner`, if any."""
    complete = (file.parent for file in checkpoint_path.glob(f"*/{STREAM_FILENAME}"))
    # SAELens's final checkpoint has a name, and nothing follows it
    numbered = (path for path in complete if path.name.isdecimal())
    return max(numbered, key=lambda path: int(path.name), default=None)


def _cfg_last(file: Path) -> tuple[bool, str]:
    return file.name == SAE_CFG_FILENAME, file.name


def initial_sae(
    cfg: TrainingSAEConfig, seed: int, kernels: Kernels = "auto"
) -> TrainingSAE[Any]:
    """
    An untrained SAE; equal seeds and shapes give equal initial weights.

    Args:
        cfg: Its configuration.
        seed: Seed of the weights.
        kernels: What a plain BatchTopK or Matryoshka SAE is trained in; a scaffold SAE has
            a field for that.
    """
    torch.manual_seed(seed)
    return on_kernels(TrainingSAE.from_dict(cfg.to_dict()), kernels)


def _update_progress(
    trainer: MultiSAETrainer,
    metrics_log: MetricsLog | None,
    on_step: Callable[[MultiSAETrainer, Any], None],
    outputs: Any,
    pbar: Any,
    *_: Any,
) -> None:
    """Show progress alone; SAELens adds the name and loss of each SAE, here too many."""
    if metrics_log is not None:
        metrics_log.add(trainer, outputs)
    on_step(trainer, pbar)
    pbar.update(trainer.n_training_samples - pbar.n)
