"""Operations on sparse entries in PyTorch, for any device.

A product with a sparse matrix is an embedding bag, a weighted sum of a few rows of a table,
for which PyTorch has hand-written code: on a CPU it takes a hundredth of the time of a
gather and an `index_add_`.
"""

import torch
import torch.nn.functional as F

BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
"""Pre-activations per block: few enough for a CPU's cache, many enough to keep a GPU
busy."""

_ALL_TRUE = 0x0101010101010101
"""Eight true values as a word."""


def block_elements(device: torch.device) -> int:
    return BLOCK_ELEMENTS.get(device.type, 2**24)


def above(
    values: torch.Tensor, cuts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Values above their column's cut, and NaNs.

    Args:
        values: Contiguous, shape (n_rows, n_columns).
        cuts: Shape (n_columns,).

    Returns:
        Their flat indices and the values themselves, both of shape (n,).
    """
    # not values > cuts, since torch.topk treats NaN as the largest
    n = values.numel()
    below = torch.ones(-(-n // 8) * 8, dtype=torch.bool, device=values.device)
    torch.le(values, cuts, out=below[:n].view_as(values))
    # Few are above, so that most words of eight bytes are all ones, and need no look at
    # each byte.
    words = below.view(torch.int64)
    found = (words != _ALL_TRUE).nonzero().view(-1)
    among = words.index_select(0, found).bitwise_xor_(_ALL_TRUE).view(torch.bool)
    places = among.nonzero().view(-1)
    indices = found.index_select(0, places >> 3).mul_(8).add_(places & 7)
    return indices, values.view(-1).index_select(0, indices)


def row_sums(
    offsets: torch.Tensor,
    columns: torch.Tensor,
    weights: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """
    out[i] = Σ weights[e] · table[columns[e]] over the entries e of row i.

    A product of a sparse matrix, in compressed rows, with a dense one.

    Args:
        offsets: Start of each row's entries, and the end of the last, shape (n_rows + 1,).
        columns: Shape (n_entries,).
        weights: Shape (n_entries,).
        table: Shape (n_columns, d).
        out: Shape (n_rows, d), with any strides.
    """
    n_rows, d = out.shape
    table, weights = table.contiguous(), weights.to(table.dtype)
    # In blocks that fit the cache, since `out` may be transposed. A GPU gains nothing from
    # that, and reading the offsets would synchronise it.
    rows_at_a_time = max(1, 2**19 // d if out.device.type == "cpu" else n_rows)
    starts = range(0, n_rows, rows_at_a_time)
    bounds = [0] if len(starts) < 2 else offsets[::rows_at_a_time].tolist()
    for start, first in zip(starts, bounds, strict=False):
        stop = min(start + rows_at_a_time, n_rows)
        last = len(columns) if stop == n_rows else bounds[stop // rows_at_a_time]
        out[start:stop] = F.embedding_bag(
            columns[first:last],
            table,
            offsets[start : stop + 1] - first,
            mode="sum",
            per_sample_weights=weights[first:last],
            include_last_offset=True,
        )


def entry_dots(
    offsets: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
) -> torch.Tensor:
    """
    left[rows[e]] · right[columns[e]] for each entry e.

    The entries of a dense product at the places of a sparse matrix: the gradient of
    `row_sums` with respect to its weights.

    Args:
        offsets: Start of each row's entries, and the end of the last, shape (n_rows + 1,).
        rows: Shape (n_entries,), ascending.
        columns: Shape (n_entries,).
        left: Shape (n_rows, d).
        right: Shape (n_columns, d).

    Returns:
        Shape (n_entries,).
    """
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left.to(right.dtype).contiguous(),
        right.contiguous(),
        columns,
        offsets[:-1],
        rows,
        0,  # "sum"
    )
