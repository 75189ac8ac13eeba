"""Adam in one pass over the weights, for SAEs that are trained in sparse kernels.

Once the products are sparse, much of a training step is the optimizer, which SAELens's trainer
makes as PyTorch's defaults have it: on a CPU, a dozen passes over the weights. PyTorch's
fused Adam is the same in one pass, and is chosen by a flag that Adam reads in each step.
"""

from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from saelens_scaffold.saes import ScaffoldBatchTopKTrainingSAE

_SAES: "WeakSet[ScaffoldBatchTopKTrainingSAE]" = WeakSet()


@torch.compiler.disable()
def fuse_adam_of(sae: "ScaffoldBatchTopKTrainingSAE") -> None:
    """
    Let the Adam that trains an SAE's weights be PyTorch's fused one.

    Not where `fused` or `foreach` was chosen for it, nor if it is any other optimizer.
    """
    _watch_optimizers()
    _SAES.add(sae)


@cache
def _watch_optimizers() -> None:
    # PyTorch calls it before each step of every optimizer
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        if group.get("fused") is None and group.get("foreach") is None:
            parameters = group["params"]
            ours = any(p is sae.W_dec for sae in _SAES for p in parameters)
            if ours and all(_can_be_fused(p, optimizer) for p in parameters):
                group["fused"] = True


def _can_be_fused(p: torch.Tensor, optimizer: torch.optim.Optimizer) -> bool:
    step = optimizer.state[p].get("step") if p in optimizer.state else None
    return (
        p.device.type in ("cpu", "cuda")
        and p.dtype in (torch.float32, torch.float64)
        # that of a run that was resumed may be on the CPU
        and (step is None or step.device == p.device)
    )
