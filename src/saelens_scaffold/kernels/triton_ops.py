"""The operations of `torch_ops` in Triton, for CUDA.

Each takes one pass: `above` writes the few candidates while reading the pre-activations,
where PyTorch makes a mask, counts it and lists it; the others read the rows of a table that
the entries name, and write each result once, whatever its strides.

Triton launches on the current CUDA device, so each function selects that of its tensors.

With TRITON_INTERPRET=1 in the environment, Triton runs them on a CPU, slowly, as in the tests.
"""

import os

import torch
import triton
import triton.language as tl

from saelens_scaffold.kernels import torch_ops
from saelens_scaffold.kernels.torch_ops import block_elements

__all__ = ["INTERPRETED", "above", "block_elements", "entry_dots", "row_sums"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets kernels rather than compiling them."""

BLOCK = 1024


def above(
    values: torch.Tensor, cuts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `torch_ops.above`; in no particular order."""
    # A guess of the cut leaves few. If it leaves many, the cost hardly matters.
    capacity = max(BLOCK, values.numel() // 16)
    indices = torch.empty(capacity, dtype=torch.long, device=values.device)
    found = values.new_empty(capacity)
    count = torch.zeros(1, dtype=torch.int32, device=values.device)
    grid = (triton.cdiv(values.numel(), BLOCK),)
    with torch.cuda.device_of(values):
        _above[grid](
            values, cuts, indices, found, count, values.numel(), values.shape[1],
            capacity, BLOCK=BLOCK,  # type: ignore[arg-type]
        )  # fmt: skip
    n = int(count)
    if n > capacity:
        return torch_ops.above(values, cuts)
    # copies, for views of a few would keep it all until the last block is done
    return indices[:n].clone(), found[:n].clone()


@triton.jit
def _above(
    values, cuts, indices, found, count, n, n_columns, capacity, BLOCK: tl.constexpr
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    value = tl.load(values + index, mask=inside, other=0.0)
    cut = tl.load(cuts + index % n_columns, mask=inside, other=0.0)
    # not value > cut: NaN is above everything
    is_above = inside & ((value <= cut) == 0)
    of_block = is_above.to(tl.int32)
    start = tl.atomic_add(count, tl.sum(of_block, axis=0))
    place = start + tl.cumsum(of_block, axis=0) - 1
    writes = is_above & (place < capacity)
    tl.store(indices + place, index, mask=writes)
    tl.store(found + place, value, mask=writes)


def row_sums(
    offsets: torch.Tensor,
    columns: torch.Tensor,
    weights: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See `torch_ops.row_sums`."""
    n_rows, d = out.shape
    if n_rows == 0 or d == 0:
        return
    block = _block(d)
    columns, weights = columns.contiguous(), weights.contiguous()
    with torch.cuda.device_of(out):
        _row_sums[(n_rows, triton.cdiv(d, block))](
            offsets, columns, weights, table, out, d, *table.stride(), *out.stride(),
            SUM_TYPE=_sum_type(table.dtype), BLOCK=block,  # type: ignore[arg-type]
        )  # fmt: skip


@triton.jit
def _row_sums(
    offsets, columns, weights, table, out, d,
    table_row, table_column, out_row, out_column,
    SUM_TYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    # 64 bits, since a transposed gradient is strided by d_sae
    i = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = i < d
    total = tl.zeros((BLOCK,), dtype=SUM_TYPE)
    entry = tl.load(offsets + row)
    end = tl.load(offsets + row + 1)
    while entry < end:
        weight = tl.load(weights + entry).to(SUM_TYPE)
        start = table + tl.load(columns + entry) * table_row
        total += weight * tl.load(start + i * table_column, mask=inside, other=0.0).to(
            SUM_TYPE
        )
        entry += 1
    place = row * out_row + i * out_column
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


def entry_dots(
    offsets: torch.Tensor,  # noqa: ARG001
    rows: torch.Tensor,
    columns: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
) -> torch.Tensor:
    """See `torch_ops.entry_dots`."""
    dots = torch.empty(len(columns), dtype=right.dtype, device=right.device)
    if len(columns) == 0:
        return dots
    d = left.shape[1]
    rows, columns = rows.contiguous(), columns.contiguous()
    with torch.cuda.device_of(dots):
        _entry_dots[(len(columns),)](
            rows, columns, left, right, dots, d, *left.stride(), *right.stride(),
            SUM_TYPE=_sum_type(right.dtype), BLOCK=_block(d),  # type: ignore[arg-type]
        )  # fmt: skip
    return dots


@triton.jit
def _entry_dots(
    rows, columns, left, right, dots, d,
    left_row, left_column, right_row, right_column,
    SUM_TYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64)
    # neighbours have the same row, which then is in the cache
    left += tl.load(rows + entry) * left_row
    right += tl.load(columns + entry) * right_row
    total = tl.zeros((BLOCK,), dtype=SUM_TYPE)
    for start in range(0, d, BLOCK):
        i = (start + tl.arange(0, BLOCK)).to(tl.int64)
        inside = i < d
        a = tl.load(left + i * left_column, mask=inside, other=0.0).to(SUM_TYPE)
        b = tl.load(right + i * right_column, mask=inside, other=0.0).to(SUM_TYPE)
        total += a * b
    dot = tl.sum(total, axis=0)
    tl.store(dots + entry, dot.to(dots.dtype.element_ty))


def _block(d: int) -> int:
    return min(BLOCK, triton.next_power_of_2(d))


def _sum_type(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32
