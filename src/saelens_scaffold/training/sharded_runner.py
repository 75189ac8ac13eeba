"""SAELens's training runner for one SAE that several processes train."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, TrainingSAE
from sae_lens.saes.sae import TrainingSAEConfig
from typing_extensions import override

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.interruption import hold_interruptions
from saelens_scaffold.kernels.choice import ENVIRONMENT_VARIABLE
from saelens_scaffold.plugins import manager as plugins
from saelens_scaffold.sharding.sae import check_shardable, shard_sae, whole_sae
from saelens_scaffold.sharding.trainer import ShardedSAETrainer
from saelens_scaffold.training.processes import Processes, noticing_lost_processes
from saelens_scaffold.training.runner import ResumableTrainingRunner
from saelens_scaffold.training.sharded_checkpoints import load_checkpoint, whole_trainer
from saelens_scaffold.training.shared_activations import SharedActivationsStore

RunnerConfig = LanguageModelSAERunnerConfig[Any]

_NOT_SHARDED = ("from_pretrained_path", "compile_sae", "prefetch_llm_batches")


def check_sharded(cfg: RunnerConfig, processes: Processes) -> None:
    """
    See that several processes can train an SAE, and give each its own device.

    Raises:
        UserError: They cannot, and why.
    """
    check_shardable(cfg.sae, processes.world_size)
    if os.environ.get(ENVIRONMENT_VARIABLE) == "reference":
        raise UserError(
            f"the environment's {ENVIRONMENT_VARIABLE} is 'reference'; several processes "
            "need sparse kernels"
        )
    for field in _NOT_SHARDED:
        if value := getattr(cfg, field):
            raise UserError(f"{field} is {value!r}; several processes cannot do that")
    for field in ("device", "llm_device", "act_store_device"):
        device = getattr(cfg, field)
        setattr(cfg, field, processes.device(field, device))


class ShardedTrainingRunner(ResumableTrainingRunner):
    """
    `ResumableTrainingRunner` for one SAE of which each process trains a part.

    All processes run it on the same configuration, each with its own device. Each runs the
    language model on its share of the text, and all see the batches that one process
    alone would see. The first process writes files, which are those of one process, and
    measures the SAE.

    An interruption of any process ends all after the same step, with a checkpoint. If a
    process ends unexpectedly, so do the others; the last checkpoint stays.

    Args:
        cfg: The configuration, which `check_sharded` has found good.
        processes: The processes, connected.
        override_dataset: As in SAELens's runner.
        override_model: As in SAELens's runner.
    """

    _trainer: ShardedSAETrainer

    def __init__(
        self,
        cfg: RunnerConfig,
        processes: Processes,
        override_dataset: Any = None,
        override_model: Any = None,
    ):
        self.processes = processes
        nothing: Any = torch.nn.Identity()  # in its place comes this process's part
        super().__init__(cfg, override_dataset, override_model, override_sae=nothing)
        if not cfg.use_cached_activations:
            store: Any = SharedActivationsStore.from_config(
                self.model, cfg, override_dataset
            )
            store.processes = processes
            self.activations_store = self.evaluator.activations_store = store
        # with the random numbers that it has in one process, and all further ones shared
        whole_cfg: Any = TrainingSAEConfig.from_dict(cfg.get_training_sae_cfg_dict())
        self._whole: Any = None
        if processes.is_first:
            self._whole = TrainingSAE.from_dict(whole_cfg.to_dict())
            if cfg.resume_from_checkpoint is not None:
                self._whole.load_weights_from_checkpoint(cfg.resume_from_checkpoint)
        processes.share_random_state()
        whole_cfg.device = cfg.device
        self.sae = shard_sae(self._whole, whole_cfg, processes.shard)

    @override
    def run(self) -> Any:
        # SAELens would load the whole trainer's state
        self._resume_from = self.cfg.resume_from_checkpoint
        self.cfg.resume_from_checkpoint = None
        with noticing_lost_processes():
            return super().run()

    @override
    def run_trainer_with_interruption_handling(self, trainer: Any) -> Any:
        hold_interruptions()  # from here on the processes agree on them
        self.cfg.resume_from_checkpoint = self._resume_from
        self._trainer = ShardedSAETrainer(
            trainer.cfg,
            self.sae,  # type: ignore[arg-type]
            trainer.data_provider,
            self._evaluate,
            trainer.save_checkpoint_fn,
        )
        if self._resume_from is not None:
            checkpoint = Path(self._resume_from)
            load_checkpoint(self._trainer, checkpoint, self._whole, self.processes)
            if self.processes.is_first:
                self.activations_store.load_from_checkpoint(checkpoint)
        self._whole = None
        return super().run_trainer_with_interruption_handling(self._trainer)

    @override
    def _raise_if_interrupted(self) -> None:
        self.processes.raise_if_interrupted()

    @override
    def _not_finite(self, trainer: Any) -> list[str]:
        return sum(self.processes.all(super()._not_finite(trainer)), [])

    @override
    def _save_complete(self, save: Callable[..., Any], checkpoint_name: str) -> None:
        self._put_back_text()
        whole = whole_trainer(self._trainer)
        if whole is not None:
            super()._save_complete(whole.save_checkpoint, checkpoint_name)
        self.processes.wait()

    def _evaluate(self, sae: Any, *args: Any) -> dict[str, Any]:
        """SAELens's metrics of the whole SAE, on the first process."""
        self._put_back_text()
        whole, metrics = whole_sae(sae), {}
        if whole is not None:
            metrics = self.evaluator(whole.to(self.cfg.device), *args)
        self.processes.share_random_state()
        return metrics

    @override
    def save_final_sae(
        self,
        sae: Any,
        output_path: str,
        log_feature_sparsity: torch.Tensor | None = None,
    ) -> None:
        self._put_back_text()
        plugins.end_training(sae)
        whole, log_feature_sparsity = whole_sae(sae), self._trainer.log_feature_sparsity
        if whole is not None:
            super().save_final_sae(whole, output_path, log_feature_sparsity)
        self.processes.wait()

    def _put_back_text(self) -> None:
        """Before anything but the training looks at the text."""
        if isinstance(self.activations_store, SharedActivationsStore):
            self.activations_store.put_back()
