"""
The Triton kernels: on a GPU where there is one, else as far as one can tell without:
interpreted, and compiled.
"""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from helpers import DEVICES, scaffold_sae, train
from saelens_scaffold.kernels import choice, torch_ops
from test_kernels import DTYPES, TOLERANCES, check_gradients, check_operations

pytest.importorskip("triton", reason="Triton is made for Linux alone")

from saelens_scaffold.kernels import triton_ops  # noqa: E402

DEVICE = DEVICES[-1]


@pytest.fixture
def on_device() -> Any:
    with torch.device(DEVICE):
        yield


def test_the_tests_run_interpreted_kernels_where_there_is_no_gpu():
    assert (DEVICE == "cpu") == triton_ops.INTERPRETED


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("n", [0, 1, 100])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_sums_and_entry_dots_are_products(
    n: int, transposed: bool, dtype: torch.dtype
):
    check_operations(triton_ops, n, transposed, dtype, d=70)


@pytest.mark.usefixtures("on_device")
def test_rows_wider_than_a_block():
    check_operations(triton_ops, 5, False, torch.float64, d=triton_ops.BLOCK + 70)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("share", [0.0, 0.01, 0.9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_above(share: float, dtype: torch.dtype):
    values = torch.rand(70, 90).to(dtype)
    values[3, 4] = torch.nan
    cuts = 1 - share + torch.rand(90) / 100
    indices, found = triton_ops.above(values, cuts)
    expected, expected_values = torch_ops.above(values, cuts)
    order = indices.argsort()
    assert torch.equal(indices[order], expected)
    assert torch.equal(found[order].nan_to_num(), expected_values.nan_to_num())


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(("rank", "n_parts"), [(0, 1), (2, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_gradients(rank: int, n_parts: int, dtype: torch.dtype, tolerance: float):
    check_gradients(triton_ops, rank, n_parts, True, dtype, tolerance)


@pytest.mark.usefixtures("on_device")
def test_kernels_are_launched_on_the_device_of_their_tensors(
    monkeypatch: pytest.MonkeyPatch,
):
    # Triton's launches are on the current device, which a second GPU is not
    was_initialized, entered = torch.cuda.is_initialized(), []

    class DeviceOf(torch.cuda.device_of):
        def __init__(self, tensor: torch.Tensor):
            self.tensor = tensor
            super().__init__(tensor)

        def __enter__(self) -> None:
            entered.append(self.tensor.data_ptr())
            super().__enter__()

    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    values, one = torch.rand(3, 4), torch.ones(1, dtype=torch.long)
    out = torch.empty(1, 4)
    triton_ops.above(values, torch.zeros(4))
    triton_ops.row_sums(torch.tensor([0, 1]), one, torch.ones(1), values, out)
    assert entered == [values.data_ptr(), out.data_ptr()]
    dots = triton_ops.entry_dots(torch.tensor([0, 1]), one - 1, one, out, values)
    assert entered[2:] == [dots.data_ptr()]
    assert torch.cuda.is_initialized() == was_initialized


@pytest.mark.usefixtures("on_device")
def test_places_of_any_strides():
    columns = torch.tensor([[1, 0], [2, 0]])[:, 0]
    weights = torch.tensor([[3.0, 0.0], [5.0, 0.0]])[:, 0]
    table, out, offsets = torch.rand(3, 4), torch.empty(1, 4), torch.tensor([0, 2])
    triton_ops.row_sums(offsets, columns, weights, table, out)
    torch.testing.assert_close(out[0], 3 * table[1] + 5 * table[2])
    dots = triton_ops.entry_dots(offsets, 0 * columns, columns, out, table)
    torch.testing.assert_close(dots, table[1:] @ out[0])


@pytest.mark.usefixtures("on_device")
def test_few_candidates_do_not_keep_the_room_for_many():
    indices, found = triton_ops.above(torch.rand(64, 2048), torch.full((2048,), 0.99))
    for kept in (indices, found):
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


@pytest.mark.parametrize("architecture", ["scaffold_batchtopk", "scaffold_matryoshka"])
def test_training_is_that_of_the_reference(architecture: str):
    trained = [
        train(
            scaffold_sae(architecture, kernels=kernels, device=DEVICE),
            steps=4,
            batch_size=32,
        )
        for kernels in ("triton", "reference")
    ]
    for name, value in trained[0].named_parameters():
        torch.testing.assert_close(
            value, trained[1].get_parameter(name), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("source", ["kernels", choice.ENVIRONMENT_VARIABLE])
def test_they_are_asked_for_on_a_cpu(source: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_ops, "INTERPRETED", False)
    monkeypatch.delenv(choice.ENVIRONMENT_VARIABLE, raising=False)
    if source != "kernels":
        monkeypatch.setenv(source, "triton")
    asked = "triton" if source == "kernels" else "auto"
    with pytest.raises(ValueError, match=f"{source}='triton' needs .* got 'cpu'"):
        choice.choose_kernels(asked, torch.device("cpu"), worthwhile=True)


COMPILE = """
import inspect, itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from saelens_scaffold.kernels import triton_ops

fixed = {"count": "*i32", "cuts": "*fp32", "indices": "*i64", "offsets": "*i64",
         "columns": "*i64", "rows": "*i64", "BLOCK": "constexpr", "SUM_TYPE": "constexpr"}
of_dtype = {"values", "found", "weights", "table", "out", "left", "right", "dots"}
kernels = (triton_ops._above, triton_ops._row_sums, triton_ops._entry_dots)
dtypes = ("fp16", "bf16", "fp32", "fp64")
for kernel, dtype, capability in itertools.product(kernels, dtypes, (80, 90)):
    sum_type = triton.language.float64 if dtype == "fp64" else triton.language.float32
    names = list(inspect.signature(kernel.fn).parameters)
    constants = {"BLOCK": 1024, "SUM_TYPE": sum_type}
    constants = {n: value for n, value in constants.items() if n in names}
    source = ASTSource(
        kernel,
        {n: f"*{dtype}" if n in of_dtype else fixed.get(n, "i32") for n in names},
        constants,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    print(kernel.fn.__name__, dtype, capability, len(compiled.asm["cubin"]))
"""


def test_the_kernels_compile_for_a_gpu():
    # in a process in which Triton compiles; it needs no GPU for that
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert {tuple(of) for *of, _ in lines} == {
        (kernel, dtype, capability)
        for kernel in ("_above", "_row_sums", "_entry_dots")
        for dtype in ("fp16", "bf16", "fp32", "fp64")
        for capability in ("80", "90")
    }
    assert all(int(size) > 1000 for *_, size in lines)
