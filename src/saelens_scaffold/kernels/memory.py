"""Memory of gradients that the next training step uses again.

Trainers free the gradients after each step. What a CPU's system hands out in their place it
maps and clears page by page, which takes longer than to compute them; a GPU's allocator
keeps what was freed.
"""

from weakref import WeakValueDictionary

import torch


class GradientMemory:
    """
    Gives tensors for gradients, in memory that nothing else refers to any more.

    What somebody still holds (a gradient that is accumulated or logged, a view of it) is
    left alone.
    """

    KEPT = 2
    """The gradients of encoder and decoder."""

    def __init__(self) -> None:
        self._kept: list[torch.UntypedStorage] = []

    def empty_like(self, weights: torch.Tensor) -> torch.Tensor:
        """As `torch.empty_like`."""
        if weights.device.type != "cpu":
            return torch.empty_like(weights)
        free = self._free(weights.nbytes)
        if free is None:
            new = torch.empty_like(weights)
            self._kept = [*self._kept, new.untyped_storage()][-self.KEPT :]
            return new
        # whose strides are dense even if those of the weights are not
        like = torch.empty_like(weights, device="meta")
        return weights.new_empty(0).set_(free, 0, like.shape, like.stride())  # type: ignore[call-overload]

    def _free(self, nbytes: int) -> torch.UntypedStorage | None:
        for storage in self._kept:
            if storage.nbytes() == nbytes and _n_users(storage) == 1:
                return storage
        return None

    def __deepcopy__(self, _: object) -> "GradientMemory":
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return GradientMemory, ()


_BY_SIZE: "WeakValueDictionary[int, GradientMemory]" = WeakValueDictionary()


def gradient_memory(nbytes: int) -> GradientMemory:
    """The memory that SAEs whose weights have this size share, as long as there are any."""
    return _BY_SIZE.setdefault(nbytes, GradientMemory())


def _n_users(storage: torch.UntypedStorage) -> int:
    """Number of tensors and storages that refer to a storage's memory, itself included."""
    return torch._C._storage_Use_Count(storage._cdata)
