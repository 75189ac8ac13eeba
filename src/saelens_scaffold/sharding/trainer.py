"""SAELens's trainer for an SAE of which each process trains a part."""

from typing import Any

import torch
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from typing_extensions import override

from saelens_scaffold.sharding.sae import ShardedBatchTopKTrainingSAE
from saelens_scaffold.sharding.state import LATENT_AXES


class ShardedSAETrainer(SAETrainer[ShardedBatchTopKTrainingSAE, Any]):
    """
    `SAETrainer` for one process's part of an SAE.

    All processes run it on the same batches. The optimizer's state and the statistics of
    single latents are of the part, as its weights are. Losses, logs, metadata and
    `feature_sparsity` are of the whole SAE, and the gradients are clipped by its norm.
    """

    @override
    def _train_step(
        self, sae: ShardedBatchTopKTrainingSAE, sae_in: torch.Tensor
    ) -> TrainStepOutput:
        return super()._train_step(_ClippedAsOne(sae), sae_in)  # type: ignore[arg-type]

    @property
    @override
    def feature_sparsity(self) -> torch.Tensor:
        """Firing frequencies of the whole SAE, shape (d_sae,), on all processes."""
        return self.sae.of_all_latents(super().feature_sparsity)

    @override
    @torch.no_grad()
    def set_final_sae_metadata(self) -> None:
        super().set_final_sae_metadata()
        if self.n_frac_active_samples > 0:
            n_dead = int(self._totals(self.dead_neurons)[0])
            self.sae.cfg.metadata.num_dead_features = n_dead

    @override
    @torch.no_grad()
    def build_train_step_log_dict(
        self, output: TrainStepOutput, n_training_samples: int
    ) -> dict[str, Any]:
        log_dict = super().build_train_step_log_dict(output, n_training_samples)
        n_fired = output.feature_acts.bool().float().sum(0)
        l0, passes, n_dead = self._totals(
            n_fired / len(output.sae_in),
            self.n_forward_passes_since_fired / self.sae.whole_cfg.d_sae,
            self.dead_neurons,
        )
        log_dict["metrics/l0"] = l0
        log_dict["sparsity/mean_passes_since_fired"] = passes
        log_dict["sparsity/dead_features"] = n_dead
        return log_dict

    def _totals(self, *of_latents: torch.Tensor) -> list[float]:
        """Sums over all latents of the whole SAE of values of this part's latents."""
        # the scaffold's, which all have, once
        first = 0 if self.sae.shard.is_first else self.sae.cfg.scaffold_rank
        sums = [values[first:].double().sum() for values in of_latents]
        return self.sae.shard.sum_(torch.stack(sums)).tolist()


class _ClippedAsOne:
    """
    Stands for the SAE where SAELens's training step clips the gradients of its parameters.

    It clips them itself, by the norm over all processes, and gives SAELens none to clip.
    """

    def __init__(self, sae: ShardedBatchTopKTrainingSAE):
        self._sae = sae
        self.train = sae.train

    def parameters(self) -> list[torch.nn.Parameter]:
        parameters = list(self._sae.parameters())
        if self._sae.shard.world_size == 1:
            return parameters
        precise = torch.promote_types(self._sae.dtype, torch.float32)
        norm = self._gradient_norm().to(precise)
        torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        return []

    def _gradient_norm(self) -> torch.Tensor:
        squares = torch.zeros((), dtype=torch.double, device=self._sae.W_dec.device)
        for name, parameter in self._sae.named_parameters():
            grad, axis = parameter.grad, LATENT_AXES.get(name)
            if grad is None:
                continue
            if not self._sae.shard.is_first:
                # what all have counts once
                if axis is None:
                    continue
                rank = self._sae.cfg.scaffold_rank
                grad = grad.narrow(axis, rank, grad.shape[axis] - rank)
            squares += torch.linalg.vector_norm(grad, dtype=torch.double).square()
        return self._sae.shard.sum_(squares).sqrt()
