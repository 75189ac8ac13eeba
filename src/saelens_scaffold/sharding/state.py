"""Cutting weights and training state into the parts of a sharded dictionary, and joining them.

A state is a dictionary of tensors and other values, possibly nested: an SAE's weights, an
optimizer's state, a trainer's. What is of single latents is recognised by its name.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

LATENT_AXES = {
    "W_enc": 1,
    "b_enc": 0,
    "W_dec": 0,
    "act_freq_scores": 0,
    "n_forward_passes_since_fired": 0,
}
"""The axis of latents, by the name of a tensor. The rest is the same in all parts."""


def take(state: Any, latents: torch.Tensor, parameters: Sequence[str] = ()) -> Any:
    """
    A part of a whole state.

    Args:
        state: The whole.
        latents: The part's latents, ascending.
        parameters: Names of the parameters by which an optimizer's state counts them, as
            `[name for name, _ in sae.named_parameters()]`.
    """

    def cut(axis: int, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.index_select(axis, latents.to(tensor.device))

    return _map(cut, parameters, None, state)


def put(
    parts: Sequence[Any],
    latents: Sequence[torch.Tensor],
    parameters: Sequence[str] = (),
) -> Any:
    """
    The whole state of all its parts.

    What all parts have is the first's.

    Args:
        parts: The parts.
        latents: Latents of each part; together all of them.
        parameters: As in `take`.
    """
    d_sae = 1 + max(int(of_part[-1]) for of_part in latents)

    def join(axis: int, *tensors: torch.Tensor) -> torch.Tensor:
        shape = list(tensors[0].shape)
        shape[axis] = d_sae
        whole = tensors[0].new_empty(shape)
        # the first last
        for of_part, tensor in zip(reversed(latents), reversed(tensors), strict=True):
            whole.index_copy_(axis, of_part.to(whole.device), tensor.to(whole.device))
        return whole

    return _map(join, parameters, None, *parts)


def _map(
    function: Callable[..., torch.Tensor],
    parameters: Sequence[str],
    axis: int | None,
    *states: Any,
) -> Any:
    """With a function of the axis and the states' tensors in place of those of latents."""
    state = states[0]
    if isinstance(state, dict):
        return {
            key: _map(
                function,
                parameters,
                LATENT_AXES.get(_name(key, parameters), axis),
                *(each[key] for each in states),
            )
            for key in state
        }
    # Adam's count of steps has no axes
    if axis is not None and isinstance(state, torch.Tensor) and state.ndim > 0:
        return function(axis, *states)
    return state


def _name(key: Any, parameters: Sequence[str]) -> Any:
    return parameters[key] if isinstance(key, int) and key < len(parameters) else key
