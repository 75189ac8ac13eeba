"""What evaluations keep, because it does not depend on the SAE."""

from collections.abc import Callable, Hashable
from typing import Any

import torch

MAX_BYTES = 2**30
"""How much of it is kept."""


class Kept:
    """
    Tensors that are computed once, as far as there is room for them.

    Args:
        max_bytes: How much is kept. The rest is computed again.
    """

    def __init__(self, max_bytes: int = MAX_BYTES):
        self._tensors: dict[Hashable, Any] = {}
        self.max_bytes = self._room = max_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, (self.max_bytes,)  # another process computes them again

    def __len__(self) -> int:
        return len(self._tensors)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What was made with this key, a tensor or several; made now if it is not there."""
        if key not in self._tensors:
            made = make()
            parts = [made] if isinstance(made, torch.Tensor) else made
            n_bytes = sum(part.numel() * part.element_size() for part in parts)
            if n_bytes > self._room:
                return made
            self._room -= n_bytes
            self._tensors[key] = made
        return self._tensors[key]
