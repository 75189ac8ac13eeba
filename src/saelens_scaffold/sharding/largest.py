"""The n largest values over all processes, exactly, by counting.

Floating-point numbers are ordered as the integers of their bits are. The n-th largest is
found digit by digit, from the highest: each process counts its values at or above each
possible next digit, and the counts are summed. No value is sent.
"""

from typing import NamedTuple

import torch

from saelens_scaffold.sharding.shard import Shard

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Share(NamedTuple):
    """
    This process's share of the n largest values of each row.

    Attributes:
        n_here: Number of them that this process has, shape (n_rows,).
        cuts: The n-th largest value of each row, shape (n_rows,); NaN is the largest.
        n_found: Number of them over all processes, n unless there are fewer values, shape
            (n_rows,).
    """

    n_here: torch.Tensor
    cuts: torch.Tensor
    n_found: torch.Tensor


def share_of_largest(values: torch.Tensor, n: int, digit: int, shard: Shard) -> Share:
    """
    This process's share of the n largest values of each row over all processes.

    Of values that equal the n-th largest, those of the first processes are taken.

    Args:
        values: Shape (n_rows, n_columns); rows may differ in length between processes.
        n: Number of values, at least 1.
        digit: Bits that are found in one round, which sums 2**digit - 1 counts per row.
    """
    keys = _keys(values).sort(dim=1).values
    bits = 8 * values.element_size()
    cuts = keys.new_full((len(keys), 1), -(2 ** (bits - 1)))  # the least
    while bits > 0:
        # the highest digit may be a shorter one
        width = (bits - 1) % digit + 1
        bits -= width
        # wraps around where a sum of 64 bits does
        candidates = cuts + (torch.arange(1, 2**width, device=keys.device) << bits)
        at_least = shard.sum_(_n_at_least(keys, candidates))
        cuts += (at_least >= n).sum(dim=1, keepdim=True) << bits

    n_here, ties = _n_above(keys, cuts), _n_at_least(keys, cuts)
    ties -= n_here
    # how many there are above the cut, and at the cut in each process
    counts = keys.new_zeros(len(keys), 1 + shard.world_size)
    counts[:, :1], counts[:, 1 + shard.rank, None] = n_here, ties
    counts = shard.sum_(counts).cumsum(dim=1)
    taken_before = counts[:, shard.rank, None]
    n_here += (n - taken_before).clamp_min(0).minimum(ties)
    cut_values = _values(cuts[:, 0], values.dtype)
    return Share(n_here[:, 0], cut_values, counts[:, -1].clamp_max(n))


def n_counts(dtype: torch.dtype, digit: int, world_size: int) -> int:
    """Number of counts per row that `share_of_largest` sums, of 8 bytes each."""
    full, rest = divmod(8 * dtype.itemsize, digit)
    return full * (2**digit - 1) + 2**rest - 1 + 1 + world_size


def _keys(values: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the values, with NaN the largest."""
    bits = values.contiguous().view(_INTEGERS[values.element_size()])
    largest = torch.iinfo(bits.dtype).max
    keys = torch.where(bits < 0, bits ^ largest, bits)
    return torch.where(values.isnan(), largest, keys).long()


def _values(keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values of keys."""
    keys = keys.to(_INTEGERS[dtype.itemsize])
    return torch.where(keys < 0, keys ^ torch.iinfo(keys.dtype).max, keys).view(dtype)


def _n_at_least(keys: torch.Tensor, cuts: torch.Tensor) -> torch.Tensor:
    """Number of a row's keys, ascending, that are at or above each of its cuts."""
    return keys.shape[1] - torch.searchsorted(keys, cuts)


def _n_above(keys: torch.Tensor, cuts: torch.Tensor) -> torch.Tensor:
    return keys.shape[1] - torch.searchsorted(keys, cuts, right=True)
