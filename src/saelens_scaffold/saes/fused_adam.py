"""PyTorch's fused Adam for SAEs that are trained in sparse kernels.

With sparse products, the optimizer takes much of a training step. SAELens's trainer creates
Adam with PyTorch's defaults, which on a CPU is a dozen passes over the weights. Fused Adam
is the same in one pass, chosen by a flag that Adam reads in each step.
"""

from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from saelens_scaffold.saes import ScaffoldBatchTopKTrainingSAE as ScaffoldSAE

_SAES: "WeakSet[ScaffoldSAE]" = WeakSet()


@torch.compiler.disable()
def fuse_adam_of(sae: "ScaffoldSAE") -> None:
    """
    Make the Adam that trains an SAE's weights PyTorch's fused one.

    Other optimizers, and an Adam with `fused` or `foreach` set, stay as they are.
    """
    _watch_optimizers()
    _SAES.add(sae)


@cache
def _watch_optimizers() -> None:
    # called before each step of every optimizer
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
        # the step of a resumed run may be on the CPU
        and (step is None or step.device == p.device)
    )
