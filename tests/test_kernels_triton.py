"""The Triton kernels, as far as a machine without a GPU can tell: interpreted, and compiled."""

import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from helpers import scaffold_sae, train
from saelens_scaffold.kernels import torch_ops
from test_kernels import (
    check_gradients,
    check_gradients_numerically,
    check_operations,
)

triton = pytest.importorskip("triton", reason="Triton is made for Linux alone")


def load(monkeypatch: pytest.MonkeyPatch, interpreted: bool) -> ModuleType:
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    from saelens_scaffold.kernels import triton_ops

    return importlib.reload(triton_ops)


@pytest.fixture
def triton_ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, with kernels that are interpreted."""
    yield load(monkeypatch, interpreted=True)
    load(monkeypatch, interpreted=False)


@pytest.mark.parametrize("n", [0, 1, 100])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_row_sums_and_entry_dots_are_products(
    n: int, transposed: bool, dtype: torch.dtype, triton_ops: ModuleType
):
    check_operations(triton_ops, n, transposed, dtype, d=70)


def test_rows_wider_than_a_block(triton_ops: ModuleType):
    check_operations(triton_ops, 5, False, torch.float64, d=triton_ops.BLOCK + 70)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.9])
def test_above(share: float, triton_ops: ModuleType):
    values = torch.rand(70, 90)
    values[3, 4] = torch.nan
    cuts = 1 - share + torch.rand(90) / 100
    indices, found = triton_ops.above(values, cuts)
    expected, expected_values = torch_ops.above(values, cuts)
    order = indices.argsort()
    assert torch.equal(indices[order], expected)
    assert torch.equal(found[order].nan_to_num(), expected_values.nan_to_num())


@pytest.mark.parametrize(("rank", "n_parts"), [(0, 1), (2, 3)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_gradients(
    rank: int,
    n_parts: int,
    dtype: torch.dtype,
    tolerance: float,
    triton_ops: ModuleType,
):
    check_gradients(triton_ops, rank, n_parts, True, dtype, tolerance)


def test_gradcheck(triton_ops: ModuleType):
    check_gradients_numerically(triton_ops, rank=2, n_parts=1, residual=True)


@pytest.mark.parametrize("architecture", ["scaffold_batchtopk", "scaffold_matryoshka"])
def test_training_is_that_of_the_reference(architecture: str, triton_ops: ModuleType):
    trained = [
        train(scaffold_sae(architecture, kernels=kernels), steps=4, batch_size=32)
        for kernels in ("triton", "reference")
    ]
    for name, value in trained[0].named_parameters():
        torch.testing.assert_close(
            value, trained[1].get_parameter(name), atol=1e-4, rtol=1e-4
        )


def test_the_kernels_compile_for_a_gpu(monkeypatch: pytest.MonkeyPatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    ops = load(monkeypatch, interpreted=False)
    pointers = {
        "values": "*bf16", "cuts": "*fp32", "found": "*bf16", "count": "*i32",
        "indices": "*i64", "offsets": "*i64", "columns": "*i64", "rows": "*i64",
        "weights": "*fp32", "table": "*fp32", "out": "*fp32",
        "left": "*fp32", "right": "*fp32", "dots": "*fp32",
    }  # fmt: skip
    constants: dict[str, Any] = {"BLOCK": 1024, "SUM_TYPE": triton.language.float32}
    for kernel in (ops._above, ops._row_sums, ops._entry_dots):
        names = list(inspect.signature(kernel.fn).parameters)
        source = ASTSource(
            kernel,
            {
                name: "constexpr" if name in constants else pointers.get(name, "i32")
                for name in names
            },
            {
                (i,): constants[name]
                for i, name in enumerate(names)
                if name in constants
            },
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert len(compiled.asm["ptx"]) > 1000
