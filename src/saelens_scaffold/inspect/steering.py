"""Steering a language model along a direction, or without it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.models.language_models import HookPoint, LanguageModel


@contextmanager
def steering(
    model: LanguageModel,
    hook_name: str,
    direction: torch.Tensor,
    add: float = 0.0,
    *,
    remove: bool = False,
    mean: float = 0.0,
) -> Iterator[LanguageModel]:
    """
    Change a language model's activations along a direction, for as long as the block lasts.

    It holds for whatever runs the model, generation included: `model.generate`, or
    `model.model.generate` of a model of transformers.

        with steering(model, "blocks.2.hook_resid_post", direction, add=20):
            print(model.generate("def ", max_new_tokens=40, verbose=False))

    Args:
        model: The language model, of any of the three classes.
        hook_name: The hook point, as in an SAE's metadata.
        direction: Shape (d_in,); only its direction counts.
        add: What is added to the coordinate along it.
        remove: Whether the coordinate is first replaced by `mean`.
        mean: The coordinate without the direction: its mean, or 0 to project it out.

    Yields:
        The model.

    Raises:
        UserError: The model has no such hook point, or the direction is 0.
    """
    point = HookPoint(model, hook_name)
    point.check(model)
    norm = direction.float().norm()
    if direction.ndim != 1 or not 0 < norm < torch.inf:
        raise UserError(
            f"direction has shape {tuple(direction.shape)} and norm {norm:g}; it must be "
            "one vector that is not 0"
        )
    unit = direction.detach().float() / norm

    def change(x: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        along = unit.to(x)
        flat = x.flatten(2)  # heads, if there are any
        added = torch.full_like(flat[..., :1], add)
        if remove:
            added = added + mean - flat @ along[:, None]
        return (flat + added * along).view_as(x)

    with model.hooks(fwd_hooks=[(point.name, change)]):
        yield model
