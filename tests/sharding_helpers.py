"""A pool of processes for the tests of sharded training, started once."""

import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from forked import forking
from helpers import activations, scaffold_config, scaffold_sae, trainer_for
from saelens_scaffold.kernels.lazy import SparseActivations
from saelens_scaffold.sharding.sae import ShardedBatchTopKTrainingSAE, shard_sae
from saelens_scaffold.sharding.shard import Shard
from saelens_scaffold.sharding.trainer import ShardedSAETrainer

N_TOKENS = 128


class Trained(NamedTuple):
    """
    A training, as seen from one process.

    Attributes:
        steps: Losses and running threshold of each step.
        selected: For each step, token · d_sae + latent of the process's active latents.
        weights: Of the saved training form, with the calibrated threshold, and of the saved
            inference form, after a normalisation is folded in; the first process's.
        bytes_sent: In each step.
        logged: Logged in each 20th step, and the final metadata.
    """

    steps: list[list[float]]
    selected: list[list[int]]
    weights: dict[str, Any]
    bytes_sent: list[int]
    logged: list[dict[str, float]]


def train_whole(n_steps: int, autocast: bool = False, **overrides: Any) -> Trained:
    """Train in one process with SAELens's trainer."""
    sae = scaffold_sae(**overrides)
    trainer = trainer_for(sae, n_steps, iter(()), N_TOKENS, autocast=autocast)
    return _train(trainer, n_steps, torch.arange(sae.cfg.d_sae), None)


def train_sharded(
    group: Any, n_steps: int, autocast: bool = False, **overrides: Any
) -> Trained:
    """Train this process's part of the same SAE."""
    shard = Shard(group)
    sae = part_of_sae(shard, **overrides)
    trainer = trainer_for(
        sae, n_steps, iter(()), N_TOKENS, ShardedSAETrainer, autocast=autocast
    )
    return _train(trainer, n_steps, sae.latents, shard)


def part_of_sae(shard: Shard, **overrides: Any) -> ShardedBatchTopKTrainingSAE:
    """A process's part of the SAE that `scaffold_sae` makes in one process."""
    whole = scaffold_sae(**overrides) if shard.is_first else None
    return shard_sae(whole, scaffold_config(**overrides), shard)


def _train(
    trainer: Any, n_steps: int, latents: torch.Tensor, shard: Shard | None
) -> Trained:
    sae = trainer.sae
    rank, d_sae = sae.cfg.scaffold_rank, getattr(sae, "whole_cfg", sae.cfg).d_sae
    steps, selected, bytes_sent, logged = [], [], [], []
    for step in range(n_steps):
        before = shard.bytes_sent if shard else 0
        batch = activations(N_TOKENS, sae.cfg.d_in, seed=step).to(sae.dtype)
        output = trainer.step(batch)
        trainer.n_training_steps += 1
        bytes_sent.append(shard.bytes_sent - before if shard else 0)
        losses = [output.loss, *output.losses.values()]
        steps.append([*(loss.item() for loss in losses), float(sae.topk_threshold)])
        acts = output.feature_acts
        assert isinstance(acts, SparseActivations)
        selected.append((acts.tokens * d_sae + latents[rank + acts.latents]).tolist())
        if step % 20 == 19:
            n_samples = trainer.n_training_samples
            logged.append(trainer.build_train_step_log_dict(output, n_samples))
    trainer.set_final_sae_metadata()
    metadata = sae.cfg.metadata
    logged.append({"l0": metadata.l0, "dead": metadata.num_dead_features})
    as_numpy: dict[str, Any] = {}
    for name in ("save_model", "save_inference_model"):
        with tempfile.TemporaryDirectory() as folder:
            path, _ = getattr(sae, name)(folder)
            if shard is None or shard.is_first:
                for key, weight in load_file(path).items():
                    as_numpy[f"{name}.{key}"] = weight.double().numpy()
        # and in the end as SAELens's trainer ends
        sae.fold_activation_norm_scaling_factor(1.7)
    for name, values in sae.log_histograms().items():
        as_numpy[name] = values if shard is None or shard.is_first else None
    return Trained(steps, selected, as_numpy, bytes_sent, logged)


class Pool:
    """Four processes, which call a function together, or the first two of them alone."""

    def __init__(self, pipes: list[Any]):
        self._pipes = pipes

    def __call__(
        self, world_size: int, function: Callable[..., Any], *args: Any, **named: Any
    ) -> list[Any]:
        """What `function(group, *args, **named)` returns in each of the processes."""
        pipes = self._pipes[:world_size]
        for pipe in pipes:
            pipe.send((world_size, function, args, named))
        results = [pipe.recv() for pipe in pipes]
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


@contextmanager
def pool() -> Iterator[Pool]:
    """Start the processes, and end them afterwards."""
    context = forking()
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(4):
            ours, theirs = context.Pipe()
            args = (rank, str(Path(folder) / "store"), theirs)
            processes.append(context.Process(target=_serve, args=args, daemon=True))
            processes[-1].start()
            pipes.append(ours)
        try:
            yield Pool(pipes)
        finally:
            for pipe in pipes:
                pipe.send(None)
            for process in processes:
                process.join(10)
                process.kill()


def _serve(rank: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=4
    )
    groups = {2: dist.new_group([0, 1]), 4: dist.group.WORLD}
    while (task := pipe.recv()) is not None:
        world_size, function, args, named = task
        try:
            pipe.send(function(groups[world_size], *args, **named))
        except Exception:
            pipe.send(RuntimeError(f"process {rank}: {traceback.format_exc()}"))
    dist.destroy_process_group()
