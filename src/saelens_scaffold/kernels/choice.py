"""Choice of the kernels, by configuration, environment and device."""

import importlib.util
import os
import warnings
from functools import cache
from types import ModuleType
from typing import Literal, get_args

import torch

from saelens_scaffold.kernels import torch_ops

Kernels = Literal["auto", "reference", "torch", "triton"]
"""
- "auto": "triton" on CUDA, "torch" on a CPU; "reference" elsewhere, and where sparse
  kernels gain nothing
- "reference": SAELens's dense code
- "torch": sparse, in PyTorch's operations
- "triton": sparse, in Triton, on CUDA
"""

ENVIRONMENT_VARIABLE = "SAELENS_SCAFFOLD_KERNELS"
"""Environment variable that overrides configurations."""

OLDEST_CAPABILITY = (7, 0)
"""Oldest CUDA compute capability for which PyTorch uses Triton (V100)."""


def choose_kernels(
    asked: str, device: torch.device, worthwhile: bool
) -> ModuleType | None:
    """
    The module of operations for a device, or None for dense code.

    Args:
        asked: The configuration's `kernels`.
        device: Device of the weights.
        worthwhile: Whether "auto" should choose sparse kernels.

    Raises:
        ValueError: The kernels do not exist, or do not run on this device.
    """
    asked_by = "kernels"
    from_environment = os.environ.get(ENVIRONMENT_VARIABLE)
    if from_environment:
        asked, asked_by = from_environment, f"the environment's {ENVIRONMENT_VARIABLE}"
        if asked not in get_args(Kernels):
            raise ValueError(
                f"{asked_by} must be one of {', '.join(map(repr, get_args(Kernels)))}, "
                f"got {asked!r}."
            )
    if asked == "auto":
        asked = _automatic(device) if worthwhile else "reference"
    if asked == "reference":
        return None
    if asked == "torch":
        return torch_ops
    if not has_triton():
        raise ValueError(
            f"{asked_by}='triton' needs Triton, which comes with PyTorch's CUDA builds "
            "for Linux: install it (pip install triton), or use 'auto'."
        )
    from saelens_scaffold.kernels import triton_ops

    if device.type != "cuda" and not triton_ops.INTERPRETED:
        raise ValueError(
            f"{asked_by}='triton' needs an SAE on a CUDA device, got {str(device)!r}: use "
            "'auto'."
        )
    return triton_ops


def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def _automatic(device: torch.device) -> str:
    if device.type == "cpu":
        return "torch"
    if device.type != "cuda":
        return "reference"
    if not has_triton():
        _warn_of_no_triton("Triton is not installed (pip install triton)")
        return "torch"
    if torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        _warn_of_no_triton(f"Triton does not support {name}, which is too old for it")
        return "torch"
    return "triton"


@cache
def _warn_of_no_triton(why: str) -> None:
    warnings.warn(
        f"{why}, so scaffold SAEs use sparse kernels made of PyTorch's operations, which "
        "are slower on CUDA."
    )
