"""Tensors that are computed on first use.

SAELens passes `feature_acts` and `hidden_pre`, of shape (N, d_sae), between methods, loggers
and hooks of a training step. The kernels need neither, so they pass tensors that compute
themselves when something needs their elements.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

_DESCRIPTIONS = {
    torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
    torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__,  # type: ignore[attr-defined]
    torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.__len__,
}
_OF_THE_BACKWARD_PASS = {torch.Tensor.retain_grad, torch.Tensor.register_hook}


class LazyTensor(torch.Tensor):
    """
    A tensor that is computed when an operation first needs its elements, and then kept.

    `make` may be differentiable: operations get the tensor with its gradients if these were
    enabled where the lazy tensor was created, as for any other tensor, whatever the mode at
    its first use. But the loss that was computed without the tensor does not go backward
    through it, so it has no gradient of that loss (`retain_grad`, `register_hook`).

    Args:
        make: Computes the tensor.
        shape: Its shape.
        like: A tensor with its dtype and device.
    """

    _make: Callable[[], torch.Tensor]
    _made: torch.Tensor | None
    _with_grad: bool

    @staticmethod
    def __new__(
        cls,
        make: Callable[[], torch.Tensor],
        shape: tuple[int, ...],
        like: torch.Tensor,
    ) -> "LazyTensor":
        tensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=like.dtype, device=like.device
        )
        tensor._make, tensor._made = make, None
        tensor._with_grad = torch.is_grad_enabled()
        return tensor

    def __init__(self, *_: Any):
        super().__init__()

    def made(self) -> torch.Tensor:
        """The tensor itself."""
        if self._made is None:
            with torch.inference_mode(False), torch.set_grad_enabled(self._with_grad):
                self._made = self._make()
        return self._made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in _OF_THE_BACKWARD_PASS:
            raise RuntimeError(
                f"{func.__name__} on a tensor that sparse kernels go backward without: it "
                "would see no gradient of the loss. Hook the point where the tensor is made "
                "(as in sae.add_hook('hook_sae_acts_post', ...)), or use "
                "kernels='reference'."
            )
        return func(*tree_map(_made, args), **tree_map(_made, kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # reached without a Python function on the way, as within a module's own hooks
        return func(*tree_map(_made, args), **tree_map(_made, kwargs or {}))


def _made(value: Any) -> Any:
    return value.made() if isinstance(value, LazyTensor) else value


class SparseActivations(LazyTensor):
    """
    The scaffold's coordinates and the few active latents, shape (n_tokens, d_sae).

    Firing counts, which SAELens's trainer takes of `feature_acts` in each step, need no
    dense tensor.

    Args:
        z: Coordinates, shape (n_tokens, r).
        active: Activations of the dictionary, shape (n_active,).
        tokens: Their tokens, shape (n_active,).
        latents: Their latents, counted from the dictionary's first, shape (n_active,).
        n_latents: Number of the dictionary's latents.
    """

    z: torch.Tensor
    active: torch.Tensor
    tokens: torch.Tensor
    latents: torch.Tensor
    n_latents: int

    @staticmethod
    def __new__(
        cls,
        z: torch.Tensor,
        active: torch.Tensor,
        tokens: torch.Tensor,
        latents: torch.Tensor,
        n_latents: int,
    ) -> "SparseActivations":
        def dense() -> torch.Tensor:
            dictionary = active.new_zeros(len(z), n_latents)
            dictionary = dictionary.index_put((tokens, latents), active)
            return torch.cat([z, dictionary], dim=1)

        shape = (len(z), z.shape[1] + n_latents)
        tensor: Any = LazyTensor.__new__(cls, dense, shape, active)
        tensor.z, tensor.active, tensor.n_latents = z, active, n_latents
        tensor.tokens, tensor.latents = tokens, latents
        return tensor

    def map(
        self, function: Callable[[torch.Tensor], torch.Tensor]
    ) -> "SparseActivations":
        """With a function, one that keeps 0, of each activation."""
        return SparseActivations(
            function(self.z),
            function(self.active),
            self.tokens,
            self.latents,
            self.n_latents,
        )

    def total(self, dim: int) -> torch.Tensor:
        """The sum over the tokens (dim 0) or over the latents (dim 1)."""
        if dim == 0:
            of_latents = self.active.new_zeros(self.n_latents)
            of_latents = of_latents.index_add(0, self.latents, self.active)
            return torch.cat([self.z.sum(0), of_latents])
        return self.z.sum(1).index_add(0, self.tokens, self.active)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if len(args) > 0 and isinstance(args[0], SparseActivations) and not kwargs:
            acts, *others = args
            if func in _KEEP_ZERO and not others:
                return acts.map(func)
            if (
                func is torch.Tensor.sum
                and len(others) == 1
                and others[0] in (-2, -1, 0, 1)
                and acts.active.is_floating_point()
            ):
                return acts.total(others[0] % 2)
        return super().__torch_function__(func, types, args, kwargs)


_KEEP_ZERO = {torch.Tensor.bool, torch.Tensor.float, torch.Tensor.detach}
