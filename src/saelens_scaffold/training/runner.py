"""SAELens's training runners, with checkpoints to resume from after an interruption."""

import json
import logging
import shutil
import weakref
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from sae_lens import SAE, LanguageModelSAETrainingRunner
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.mixing_buffer import multi_hook_concat_split_iter
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.prefetch import PrefetchingIterator
from tqdm.auto import tqdm
from typing_extensions import override

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import new_file
from saelens_scaffold._util.interruption import raise_if_interrupted
from saelens_scaffold.saes import ScaffoldBatchTopKTrainingSAE
from saelens_scaffold.saes.calibration import SampledBatches, calibrate_threshold
from saelens_scaffold.training.measurement import (
    Measurement,
    NotMeasuredError,
    l0_warning,
    measure,
)

logger = logging.getLogger(__name__)

SAMPLE_FILENAME = "activation_sample.safetensors"
"""What was sampled of the activations, for thresholds to be calibrated on."""
STREAM_FILENAME = "activation_stream.json"
"""Where in the activations' stream a checkpoint was made. Written last, so that a
checkpoint that has it is whole."""


class ResumableTrainingRunner(LanguageModelSAETrainingRunner):
    """
    `LanguageModelSAETrainingRunner` that loses nothing to Ctrl-C or SIGTERM, and measures
    what it has saved.

    SAELens (6.54) saves the state of the activations store when it is interrupted, into
    a directory that does not exist, and neither the weights nor the optimizer. This
    runner saves a whole checkpoint first, from which `resume_from_checkpoint` goes on.

    What SAELens counts in training is not what the saved SAE does: weights still change,
    and BatchTopK selects where a threshold will. So the saved SAE is loaded, and measured
    on the text that follows what training has read, on the tokens that the trainer would
    take. `metadata.measured` in its cfg.json says what was found
    (`saelens_scaffold.training.measurement.Measurement`), or, with `n_tokens` 0, why nothing was
    measured.

    Attributes:
        n_measured_tokens: How many tokens to measure on.
        interruption_checkpoint: Where the checkpoint of an interrupted run is; None
            before an interruption, or if `cfg.checkpoint_path` is None.
        measurement: What was measured of the SAE in `cfg.output_path`, if anything.
        not_measured: Why nothing was measured.
    """

    n_measured_tokens: int = 16_384
    interruption_checkpoint: Path | None = None
    measurement: Measurement | None = None
    not_measured: str | None = None
    _data_provider: Any = None
    _first_epoch: Any = None

    @override
    def run(self) -> Any:
        # the store makes another iterator whenever it starts the text over
        self._first_epoch = getattr(self.activations_store, "iterable_sequences", None)
        return super().run()

    @override
    def run_trainer_with_interruption_handling(self, trainer: Any) -> Any:
        self._data_provider = trainer.data_provider
        fit = trainer.fit

        def fit_or_save() -> Any:
            try:
                return fit()
            except (KeyboardInterrupt, InterruptedException):
                if self.cfg.checkpoint_path is not None:
                    name = str(trainer.n_training_samples)
                    trainer.save_checkpoint(checkpoint_name=name)
                    self.interruption_checkpoint = Path(self.cfg.checkpoint_path) / name
                raise

        trainer.fit = fit_or_save
        return super().run_trainer_with_interruption_handling(trainer)

    @override
    def save_final_sae(
        self,
        sae: TrainingSAE[Any],
        output_path: str,
        log_feature_sparsity: torch.Tensor | None = None,
    ) -> None:
        # first, so that nothing which happens while measuring costs the training
        super().save_final_sae(sae, output_path, log_feature_sparsity)
        try:
            self._measure_saved(output_path)
        except (KeyboardInterrupt, InterruptedException):
            self.not_measured = "the measuring was interrupted"
        except NotMeasuredError as error:
            self.not_measured = str(error)
        cfg_path = Path(output_path) / SAE_CFG_FILENAME
        cfg = json.loads(cfg_path.read_text())
        cfg["metadata"]["measured"] = (
            self.measurement.to_metadata()
            if self.measurement is not None
            else {"n_tokens": 0, "reason": self.not_measured}
        )
        with new_file(cfg_path) as file:
            file.write_text(json.dumps(cfg))

    def _measure_saved(self, output_path: str) -> None:
        sae = SAE.load_from_disk(output_path, device=self.cfg.device)
        if sae.cfg.reshape_activations == "hook_z":
            sae.turn_off_forward_pass_hook_z_reshaping()
        provider = self._data_provider
        # which would read from the store at the same time
        prefetching = isinstance(provider, PrefetchingIterator)
        with provider.paused() if prefetching else nullcontext():
            self.measurement = measure(
                sae, self._unread_activations(), self.n_measured_tokens, self._text()
            )
        warning = l0_warning(
            output_path,
            self.measurement.l0_sparse,
            self.measurement.n_tokens,
            sae.cfg.metadata,
        )
        if warning is not None:
            logger.warning(warning)

    def _text(self) -> str:
        """What the tokens are that are measured on."""
        text = "held out: what follows in the training text"
        if self.cfg.from_pretrained_path is not None:
            text = (
                "what follows in the training text, which the SAE that this training "
                "started from may have read"
            )
        if self.activations_store.exclude_special_tokens is None:
            text += "; special tokens count, as in training"
        return text

    def _unread_activations(self) -> Iterator[torch.Tensor]:
        """
        What comes after all that training has read, until the text ends.

        Raises:
            NotMeasuredError: Where that is cannot be known.
        """
        store = self.activations_store
        if self._first_epoch is None:
            raise NotMeasuredError(
                "cached activations do not tell which of them were read"
            )
        while store.iterable_sequences is self._first_epoch:
            try:
                yield store.get_filtered_llm_batch(raise_on_epoch_end=True)
            except StopIteration:
                return


class RepeatableMultiSAETrainingRunner(MultiSAETrainingRunner):
    """
    `MultiSAETrainingRunner` whose resumed runs end where unbroken ones do.

    A checkpoint of SAELens holds the SAEs and their optimizers, but neither the shuffled
    activations that wait in the buffer, which may be gigabytes, nor the random state. So
    a run that is resumed goes on with other activations than it would have seen.

    Here each checkpoint (`n_checkpoints`) is a fresh start of the buffer, and of the
    random numbers, in every run, broken or not; what waited in the buffer is dropped. A
    resumed run skips the text that was read before, without the language model, and from
    there sees what the unbroken run sees. An interruption saves nothing more: at most
    the steps since the last checkpoint are repeated. Older checkpoints are removed.

    `cfg.seed` seeds the shuffling. `cfg.prefetch_llm_batches` must be off: what has been
    fetched ahead of a checkpoint would be lost.

    Attributes:
        calibrated: Names of the BatchTopK SAEs, plain or with a scaffold, whose threshold
            is calibrated at the end of training, on the same activations. By default
            scaffold SAEs with `calibrate_threshold`.
    """

    calibrated: Collection[str] | None = None
    _stream: "ActivationStream"
    _batches: SampledBatches
    _resume_from: str | None = None

    @override
    def run(self) -> dict[str, TrainingSAE[Any]]:
        if self.cfg.prefetch_llm_batches:
            raise UserError(
                "prefetch_llm_batches must be False for runs that can be repeated, got "
                f"{self.cfg.prefetch_llm_batches!r}."
            )
        # SAELens would wind its own store forward, to a place that is not the exact one.
        self._resume_from, self.cfg.resume_from_checkpoint = (
            self.cfg.resume_from_checkpoint,
            None,
        )
        return super().run()

    @override
    def _run_with_interruption_handling(
        self, trainer: MultiSAETrainer
    ) -> dict[str, TrainingSAE[Any]]:
        self._stream = ActivationStream(self.activations_store, self.cfg.seed)
        self._batches = SampledBatches(self._stream)
        trainer.data_provider = self._batches
        calibrated = self._calibrate_here()
        trainer._update_pbar = _ProgressOfMany(trainer)
        if self._resume_from is None:
            self._stream.begin()
            self.before_first_step(trainer)
        else:
            self._load_checkpoint(trainer, Path(self._resume_from))
        saes = trainer.fit()
        for name in calibrated:
            sample = self._batches.samples[self.cfg.hook_names_per_sae[name]]
            calibrate_threshold(saes[name], sample)  # type: ignore[arg-type]
        return saes

    def _calibrate_here(self) -> Collection[str]:
        """Which SAEs to calibrate, instead of each by itself: they saw the same."""
        calibrated = self.calibrated
        scaffolds = {
            name: sae
            for name, sae in self.saes.items()
            if isinstance(sae, ScaffoldBatchTopKTrainingSAE)
        }
        if calibrated is None:
            calibrated = [name for name, sae in scaffolds.items() if sae.calibrates]
        for sae in scaffolds.values():
            sae.calibrates = False
        return calibrated

    def before_first_step(self, trainer: MultiSAETrainer) -> None:
        """Called once in a training, not again when it is resumed; for subclasses."""

    def _load_checkpoint(self, trainer: MultiSAETrainer, checkpoint: Path) -> None:
        trainer.load_checkpoint(checkpoint)
        # SAELens saves within a step, before it is counted, and takes checkpoints for
        # due again that were made before.
        steps = trainer.n_training_samples // self.cfg.train_batch_size_tokens
        for each in (trainer, *trainer.trainers.values()):
            each.n_training_steps = steps
        trainer.checkpoint_thresholds = [
            threshold
            for threshold in trainer.checkpoint_thresholds
            if threshold >= trainer.n_training_samples
        ]
        device = self.cfg.act_store_device or self.cfg.device
        self._batches.load(checkpoint / SAMPLE_FILENAME, device)
        state = json.loads((checkpoint / STREAM_FILENAME).read_text())
        self._stream.begin(**state)

    @override
    def _save_runner_checkpoint_files(self, checkpoint_path: Path | None) -> None:
        if checkpoint_path is None:
            return
        super()._save_runner_checkpoint_files(checkpoint_path)
        self._batches.save(checkpoint_path / SAMPLE_FILENAME)
        state = self._stream.begin_anew()
        with new_file(checkpoint_path / STREAM_FILENAME) as file:
            file.write_text(json.dumps(state))
        for other in checkpoint_path.parent.iterdir():
            if other != checkpoint_path:
                shutil.rmtree(other, ignore_errors=True)


def last_checkpoint(checkpoint_path: Path) -> Path | None:
    """The last whole checkpoint that a `RepeatableMultiSAETrainingRunner` left, if any."""
    whole = [
        file.parent
        for file in checkpoint_path.glob(f"*/{STREAM_FILENAME}")
        # SAELens's final checkpoint has a name, and nothing follows it
        if file.parent.name.isdecimal()
    ]
    return max(whole, key=lambda path: int(path.name), default=None)


def initial_sae(cfg: TrainingSAEConfig, seed: int) -> TrainingSAE[Any]:
    """An untrained SAE; those of the same seed and shape start with the same numbers."""
    torch.manual_seed(seed)
    return TrainingSAE.from_dict(cfg.to_dict())


class ActivationStream(Iterator[dict[str, torch.Tensor]]):
    """
    A store's shuffled activations, which can be begun anew at any known place.

    Args:
        store: The store, made by `from_config_multi_hook`, from which nothing was drawn.
        seed: Of the shuffling.
    """

    def __init__(self, store: ActivationsStore, seed: int):
        self._store = store
        self._seed = seed
        self._llm_batches = store._iterate_filtered_multi_hook_activations()
        self._n_llm_batches = 0
        self._n_begun = 0

    def __next__(self) -> dict[str, torch.Tensor]:
        raise_if_interrupted()
        # by random numbers of its own: what an SAE draws in a step must not change what
        # the others see
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random_state)
            batch = next(self._mixed)
            self._random_state = torch.get_rng_state()
        return batch

    def begin(self, n_llm_batches: int = 0, n_begun: int = 0) -> None:
        """
        Begin at a place that `begin_anew` told.

        Args:
            n_llm_batches: Batches of the language model to skip. Their text is read and
                tokenized; the model does not run on it.
            n_begun: How often the stream was begun before.
        """
        if n_llm_batches:
            # instead of the method, without running the language model
            with patch.object(self._store, "get_multi_hook_activations", lambda _: {}):
                for _ in tqdm(range(n_llm_batches), desc="Skipping text read before"):
                    next(self._llm_batches)
        self._n_llm_batches, self._n_begun = n_llm_batches, n_begun
        self._begin_here()

    def begin_anew(self) -> dict[str, int]:
        """
        Drop what waits in the buffer, and begin with the text that comes next.

        Returns:
            The place, as arguments of `begin`.
        """
        self._n_begun += 1
        self._begin_here()
        return {"n_llm_batches": self._n_llm_batches, "n_begun": self._n_begun}

    def _begin_here(self) -> None:
        # far apart, so that runs with neighbouring seeds share no random numbers
        torch.manual_seed(self._seed + 1_000_003 * self._n_begun)
        self._random_state = torch.get_rng_state()
        store = self._store
        assert store._hook_names is not None
        self._mixed = multi_hook_concat_split_iter(
            buffer_size=store.n_batches_in_buffer * store.training_context_size,
            batch_size=store.train_batch_size_tokens,
            activations_loader=self._counted(),
            hook_names=list(store._hook_names),
            mix_fraction=store.activations_mixing_fraction,
        )

    def _counted(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            batch = next(self._llm_batches)
            self._n_llm_batches += 1
            yield batch


class _ProgressOfMany:
    """The progress bar of many SAEs: SAELens writes the name and loss of each into it."""

    def __init__(self, trainer: MultiSAETrainer):
        # else the trainer, which holds this, would not be freed with its optimizers
        self._trainer = weakref.proxy(trainer)

    def __call__(
        self, step_outputs: dict[str, Any], pbar: Any, update_interval: int = 10
    ) -> None:
        if pbar.n == 0 and self._trainer.n_training_samples:
            pbar.set_description(f"Training {len(step_outputs)} SAEs")
            pbar.initial = pbar.n = self._trainer.n_training_samples
        if self._trainer.n_training_steps % update_interval == 0:
            losses = [output.loss.item() for output in step_outputs.values()]
            pbar.set_postfix(mean_loss=f"{sum(losses) / len(losses):.4g}")
        pbar.update(self._trainer.n_training_samples - pbar.n)
