"""Checkpoints of a training by several processes, in the form in which one writes them.

The first process gathers the whole SAE and the trainer's state, and SAELens's trainer
writes and reads them there. So a training can go on with any number of processes.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer

from saelens_scaffold.sharding import state
from saelens_scaffold.sharding.sae import whole_sae
from saelens_scaffold.sharding.trainer import ShardedSAETrainer
from saelens_scaffold.training.processes import Processes

Trainer = SAETrainer[Any, Any]

_OF_LATENTS = ("act_freq_scores", "n_forward_passes_since_fired")
_OF_ALL = (
    *("n_training_samples", "n_training_steps", "n_frac_active_samples"),
    *("started_fine_tuning", "activation_scaler"),
)


def whole_trainer(trainer: ShardedSAETrainer) -> Trainer | None:
    """
    A trainer of the whole SAE, on the CPU of the first process; None on the others.

    Args:
        trainer: This process's.
    """
    shard, sae = trainer.sae.shard, whole_sae(trainer.sae)
    parts = shard.gather(_flat(_state_of_latents(trainer)))
    if sae is None or parts is None:
        return None
    whole, latents = _trainer_of(sae, trainer), _latents_of_parts(trainer)
    names = [name for name, _ in sae.named_parameters()]
    _load(whole, state.put([_nested(part) for part in parts], latents, names))
    _load_state_of_all(whole, _state_of_all(trainer))
    return whole


def load_checkpoint(
    trainer: ShardedSAETrainer,
    checkpoint: Path,
    sae: TrainingSAE[Any] | None,
    processes: Processes,
) -> None:
    """
    Load this process's part of a trainer's state; the weights are loaded already.

    Args:
        trainer: This process's, which has not begun.
        checkpoint: The checkpoint, which the first process reads.
        sae: The whole SAE; None on other processes than the first.
        processes: The processes.
    """
    parts, of_all = None, None
    if sae is not None:
        whole = _trainer_of(sae, trainer)
        whole.load_trainer_state(checkpoint)
        names = [name for name, _ in sae.named_parameters()]
        found = _state_of_latents(whole)
        latents = _latents_of_parts(trainer)
        parts = (_flat(state.take(found, part, names)) for part in latents)
        of_all = _state_of_all(whole)
    _load(trainer, _nested(trainer.sae.shard.scatter(parts)))
    _load_state_of_all(trainer, processes.first(of_all))


def _trainer_of(sae: TrainingSAE[Any], trainer: Trainer) -> Trainer:
    cfg = replace(trainer.cfg, device="cpu", autocast=False)
    save = trainer.save_checkpoint_fn
    return SAETrainer(cfg, sae, data_provider=iter(()), save_checkpoint_fn=save)


def _latents_of_parts(trainer: ShardedSAETrainer) -> list[torch.Tensor]:
    shard, cfg = trainer.sae.shard, trainer.sae.whole_cfg
    return [
        shard.latents(cfg.d_sae, cfg.scaffold_rank, part)
        for part in range(shard.world_size)
    ]


# ---- what a trainer's state consists of, as SAELens's `save_trainer_state` has it


def _state_of_latents(trainer: Trainer) -> dict[Any, Any]:
    """State with an axis of latents; the optimizer's by the number of the parameter."""
    of_weights = trainer.optimizer.state_dict()["state"]
    return {**of_weights, **{name: getattr(trainer, name) for name in _OF_LATENTS}}


def _load(trainer: Trainer, of_latents: dict[Any, Any]) -> None:
    for name in _OF_LATENTS:
        setattr(trainer, name, of_latents.pop(name).to(trainer.cfg.device))
    found = {**trainer.optimizer.state_dict(), "state": of_latents}
    trainer.optimizer.load_state_dict(found)


def _state_of_all(trainer: Trainer) -> dict[str, Any]:
    """State that is the same in all processes."""
    schedulers = trainer.coefficient_schedulers.items()
    return {
        "param_groups": trainer.optimizer.state_dict()["param_groups"],
        "lr_scheduler": trainer.lr_scheduler.state_dict(),
        "coefficient_schedulers": {
            name: each.state_dict() for name, each in schedulers
        },
        "values": {name: getattr(trainer, name) for name in _OF_ALL},
    }


def _load_state_of_all(trainer: Trainer, of_all: dict[str, Any]) -> None:
    groups = {"param_groups": of_all["param_groups"]}
    trainer.optimizer.load_state_dict({**trainer.optimizer.state_dict(), **groups})
    trainer.lr_scheduler.load_state_dict(of_all["lr_scheduler"])
    for name, found in of_all["coefficient_schedulers"].items():
        trainer.coefficient_schedulers[name].load_state_dict(found)
    for name, value in of_all["values"].items():
        setattr(trainer, name, value)


def _flat(nested: dict[Any, Any]) -> dict[Any, torch.Tensor]:
    flat = {}
    for name, value in nested.items():
        of_name = value.items() if isinstance(value, dict) else [(None, value)]
        flat.update({(name, key): tensor for key, tensor in of_name})
    return flat


def _nested(flat: dict[Any, torch.Tensor]) -> dict[Any, Any]:
    nested: dict[Any, Any] = {}
    for (name, key), tensor in flat.items():
        if key is None:
            nested[name] = tensor
        else:
            nested.setdefault(name, {})[key] = tensor
    return nested
