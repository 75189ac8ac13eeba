"""What benchmarks measure with: paired times, peak memory, and what the machine can do."""

import argparse
import ctypes
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

Step = Callable[[torch.Tensor], object]


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the flags with the sizes of an SAE and of its batches."""
    parser.add_argument("--d_in", type=int, default=256)
    parser.add_argument("--d_sae", type=int, default=4096)
    parser.add_argument("--k", type=float, default=32)
    parser.add_argument("--rank", type=int, default=24)
    parser.add_argument("--batch_size", type=int, default=2048)


def seconds(step: Step, batch: torch.Tensor, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(batch)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired_seconds(
    steps: Mapping[str, Step],
    batches: Iterable[torch.Tensor],
    device: str,
    warm_up: int,
) -> dict[str, np.ndarray]:
    """Times of steps that take turns on the same batches, in changing order."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i, batch in enumerate(batches):
        names = list(steps)
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(seconds(steps[name], batch, device))
    return {name: np.array(of_step[warm_up:]) for name, of_step in times.items()}


def ratio_of_medians(
    numerator: np.ndarray, denominator: np.ndarray
) -> tuple[float, float, float]:
    """The ratio, and a 95 % interval by bootstrap over the pairs."""
    pairs = np.array([numerator, denominator])
    n = pairs.shape[1]
    resampled = np.random.default_rng(0).integers(n, size=(2000, n))
    medians = np.median(pairs[:, resampled], axis=-1)
    low, high = np.quantile(medians[0] / medians[1], [0.025, 0.975])
    return float(np.median(numerator) / np.median(denominator)), low, high


def bytes_of(tensors: Iterable[object]) -> int:
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def added_memory(step: Step, batch: torch.Tensor, device: str) -> int | None:
    """Bytes that a step adds at its peak; None where the system does not tell."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(batch)
        return torch.cuda.max_memory_allocated() - before
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    # what was freed, but is not given back yet, would be used again unseen
    ctypes.CDLL(None).malloc_trim(0)
    before = _kib(status, "VmRSS")
    clear.write_text("5")  # the peak from here on
    step(batch)
    return (_kib(status, "VmHWM") - before) * 1024


def _kib(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if field in line)
    return int(line.split()[1])


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether products of float32 are computed in TF32 on CUDA."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class Machine(NamedTuple):
    """
    What a device can do, measured.

    Attributes:
        bandwidth: Bytes a second that a copy reads and writes.
        rate: Operations a second in a product of square matrices.
    """

    bandwidth: float
    rate: float


@cache
def measure_machine(device: str, precision: str) -> Machine:
    """
    Args:
        device: "cuda" or "cpu".
        precision: "float32", "tf32" or "bf16".
    """
    n = 2**28 if device == "cuda" else 2**25
    source = torch.randn(n, device=device)
    target = torch.empty_like(source)
    copying = _fastest(lambda _: target.copy_(source), source, device)
    side = 8192 if device == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(side, side, device=device, dtype=dtype)
    product = torch.empty_like(a)
    with tf32(precision == "tf32"):
        multiplying = _fastest(lambda _: torch.mm(a, a, out=product), a, device)
    return Machine(2 * source.nbytes / copying, 2 * side**3 / multiplying)


def _fastest(step: Step, argument: torch.Tensor, device: str) -> float:
    return min(seconds(step, argument, device) for _ in range(8))


class Phase(NamedTuple):
    """
    A part of a computation that cannot overlap the others.

    Attributes:
        name: What it does.
        operations: Multiplications and additions.
        traffic: Bytes that have to be read from and written to memory.
    """

    name: str
    operations: float
    traffic: float

    def seconds(self, machine: Machine) -> float:
        return max(self.operations / machine.rate, self.traffic / machine.bandwidth)


def roofline(o: Any, n_levels: int) -> list[Phase]:
    """
    The least that a scaffold SAE's step has to do, in SAELens's trainer.

    Weights are counted as read from memory once in each phase that needs all of them,
    rows of them that an entry needs once in each phase, and what belongs to a token as
    staying in the cache.
    """
    n, d, f, r = o.batch_size, o.d_in, o.d_sae, o.rank
    weights = 4 * d * f  # bytes of W_enc, or of W_dec
    entries = n * o.k
    rows = 4 * d * min(f, entries)  # of them that are active
    return [
        Phase("encoder's product", 2 * n * d * f, weights),
        Phase("decoder's norms", 2 * d * f, weights),
        Phase("reconstructions", 2 * entries * d + 2 * n * d * n_levels, rows),
        Phase("gradient of activations", 2 * entries * d, rows),
        Phase("gradients of weights", 4 * entries * d, 2 * weights),
        Phase("rank-r products, b_dec", (4 * r + 2) * d * f, 3 * weights),
        Phase("SAELens's clipping", 4 * d * f, 2 * 3 * weights),
        Phase("Adam", 24 * d * f, 2 * 7 * weights),
    ]
