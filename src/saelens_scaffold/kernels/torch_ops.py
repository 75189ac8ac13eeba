"""The operations on sparse entries in PyTorch's own, for any device.

An embedding bag, the weighted sum of a few rows of a table, is all there is to a product
with a sparse matrix, and PyTorch has it as hand-written code: on a CPU it takes a hundredth of
what a gather and an `index_add_` take.
"""

import torch
import torch.nn.functional as F

BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
"""How many pre-activations are made at a time: few enough for a CPU's cache, many enough
to keep a GPU busy."""


def block_elements(device: torch.device) -> int:
    return BLOCK_ELEMENTS.get(device.type, 2**24)


def above(
    values: torch.Tensor, cuts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The values above their column's cut, and those that are NaN.

    Args:
        values: Contiguous, shape (n_rows, n_columns).
        cuts: Shape (n_columns,).

    Returns:
        Their flat indices and the values themselves, both of shape (n,).
    """
    # not values > cuts, for torch.topk takes NaN for the largest
    indices = (values <= cuts).logical_not_().view(-1).nonzero().view(-1)
    return indices, values.view(-1)[indices]


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
        offsets: Where each row's entries start, and the last ones end, shape (n_rows + 1,).
        columns: Shape (n_entries,).
        weights: Shape (n_entries,).
        table: Shape (n_columns, d).
        out: Shape (n_rows, d), of any strides.
    """
    n_rows, d = out.shape
    table, weights = table.contiguous(), weights.to(table.dtype)
    # Through the cache, since `out` may be transposed. A GPU gains nothing from that, and
    # would have to be asked for the offsets.
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

    The entries of a dense product that a sparse matrix has: the gradient of `row_sums`
    for its weights.

    Args:
        offsets: Where each row's entries start, and the last ones end, shape (n_rows + 1,).
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
