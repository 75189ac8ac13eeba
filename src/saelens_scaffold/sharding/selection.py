"""Exact BatchTopK selection over the latents of all processes."""

from types import ModuleType

import torch
from typing_extensions import override

from saelens_scaffold.kernels.selection import Encoder, Selected, TopSelection
from saelens_scaffold.sharding.largest import share_of_largest
from saelens_scaffold.sharding.shard import Shard

BATCH_DIGIT = 11
"""Bits of the batch's cut that are found in one round: few rounds of 16 kB."""
TOKEN_DIGIT = 4
"""Bits of each token's cut that are found in one round: 120 bytes per token."""


class ShardedTopSelection(TopSelection):
    """
    `TopSelection` among the latents of all processes, of which each gets its own.

    All processes make the same guesses, and so take part in the same rounds of counting.
    """

    def __init__(self, shard: Shard):
        super().__init__()
        self._shard = shard

    @override
    def _largest(self, candidates: Selected, n: int) -> tuple[Selected, float]:
        values = candidates.values[None]
        n_here, cut, n_found = share_of_largest(values, n, BATCH_DIGIT, self._shard)
        selected, _ = super()._largest(candidates, int(n_here))
        return selected, float(cut) if n_found == n else 0.0

    @override
    def _safely_above(self, guess: float, encoder: Encoder) -> float:
        bound = torch.tensor(super()._safely_above(guess, encoder), dtype=torch.double)
        return float(self._shard.max_(bound))

    @override
    def of_each_token(
        self, encoder: Encoder, latents: torch.Tensor, k: int, ops: ModuleType
    ) -> Selected:
        k_here = min(k, len(latents))
        selected = super().of_each_token(encoder, latents, k_here, ops)
        if int(self._shard.sum_(torch.tensor(len(latents)))) <= k:
            return selected
        places, values = (t.view(len(encoder.x), k_here) for t in selected)
        n_here, *_ = share_of_largest(values, k, TOKEN_DIGIT, self._shard)
        order = values.argsort(dim=1, descending=True)
        is_mine = torch.arange(k_here, device=order.device) < n_here[:, None]
        at = is_mine.nonzero()[:, 0], order[is_mine]
        return Selected(places[at], values[at])
