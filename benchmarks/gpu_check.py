"""What a GPU says of the kernels: right, fast, and how fast a whole training is. In 9 minutes.

    make gpu-wheels     # with network: what the GPU's machine lacks, into .gpu-wheels
    make gpu-check      # on a machine with a CUDA GPU, PyTorch >= 2.6, and nothing else

One JSON file has all results. A part that takes longer than its share of the time is cut, and
one that crashes is passed over: each result is written as soon as there is one.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from stand_ins import stand_in_for_missing

ROOT = Path(__file__).parents[1]
UNUSED = ("accelerate", "datasets", "matplotlib", "pandas", "plotly", "wandb")
"""Packages that what runs here imports and does not use."""
SPARE_SECONDS = 15
"""For a part to end by itself, after its time is up."""

Records = Iterator[dict[str, Any]]


def environment(o: argparse.Namespace) -> Records:
    import torch

    from saelens_scaffold._util.provenance import hardware, versions

    if o.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device; try --device cpu --quick")
    about: dict[str, Any] = {"versions": versions(), "device": hardware(o.device)}
    if o.device == "cuda":
        import triton

        about["versions"].update(triton=triton.__version__, cuda=torch.version.cuda)
        properties = torch.cuda.get_device_properties(0)
        about["capability"] = [properties.major, properties.minor]
        about["memory_mib"] = properties.total_memory / 2**20
        about["multiprocessors"] = properties.multi_processor_count
    yield about


def kernel_tests(o: argparse.Namespace) -> Records:
    """The tests of the kernels, which on CUDA compile them and compare with dense code."""
    import pytest

    class Outcomes:
        found = Counter[str]()
        failures: list[dict[str, str]] = []

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed or report.when == "call":
                self.found[report.outcome] += 1
            if report.failed:
                text = report.longreprtext[-2000:]
                self.failures.append({"test": report.nodeid, "says": text})

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                self.pytest_runtest_logreport(report)

    tests = ["tests/test_kernels_triton.py", "tests/test_kernels.py"]
    arguments = [*(str(ROOT / test) for test in tests), "-q", "-p", "no:cacheprovider"]
    if o.quick:
        arguments += ["-k", "places_of_any_strides or sorted_both_ways"]
    status = pytest.main(arguments, plugins=[Outcomes()])
    yield {
        "exit_status": int(status),
        "outcomes": dict(Outcomes.found),
        "failures": Outcomes.failures,
    }
    if status:
        raise AssertionError(f"{len(Outcomes.failures)} tests failed")


def profile(o: argparse.Namespace) -> Records:
    """Where a step's time goes, and what in it waits for the GPU."""
    import torch
    from bench_train_step import sae_configs, trainer
    from sae_lens import TrainingSAE

    sizes = _sizes(o, precision="bf16", k=80, d_in=2304, d_sae=65_536, batch_size=4096)
    on_gpu = o.device == "cuda"
    for name, cfg in sae_configs(sizes).items():
        if not name.startswith("Scaffold"):
            continue
        sae = TrainingSAE.from_dict(cfg.to_dict())
        of_sae = trainer(sae, sizes.batch_size, o.device, autocast=True)
        batch = torch.randn(sizes.batch_size, sizes.d_in, device=o.device)
        for _ in range(5):
            of_sae.step(batch)
        waits = _synchronisations(of_sae.step, batch) if on_gpu else {}
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] * on_gpu
        n_steps = 5
        start = time.perf_counter()
        with torch.profiler.profile(activities=activities) as of_steps:
            for _ in range(n_steps):
                of_sae.step(batch)
            if on_gpu:
                torch.cuda.synchronize()
        wall = time.perf_counter() - start
        by_time = sorted(
            of_steps.key_averages(),
            key=lambda e: (e.self_device_time_total, e.self_cpu_time_total),
            reverse=True,
        )
        yield {
            "sae": name,
            "synchronisations_of_a_step": waits,
            "wall_ms": 1000 * wall / n_steps,
            "device_ms": sum(e.self_device_time_total for e in by_time) / 1e3 / n_steps,
            "ops": [
                {
                    "name": event.key,
                    "calls": event.count / n_steps,
                    "device_ms": event.self_device_time_total / 1e3 / n_steps,
                    "cpu_ms": event.self_cpu_time_total / 1e3 / n_steps,
                }
                for event in by_time[:30]
            ],
        }


def _synchronisations(step: Callable[..., object], batch: Any) -> dict[str, int]:
    """How often each line of the code makes the CPU wait for the GPU."""
    import warnings

    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(Counter(f"{w.filename}:{w.lineno}" for w in caught))


def training(o: argparse.Namespace) -> Records:
    """Whole trainings on a language model of Gemma-2-2B's shape."""
    import bench_training

    precisions = ["bf16", "float32"] if o.device == "cuda" else ["float32"]
    for precision in precisions:
        sizes = _sizes(o, precision=precision, k=80, d_sae=65_536, batch_size=4096)
        sizes.model = "tiny" if o.quick else "gemma-2-2b"
        sizes.steps, sizes.buffer = (2, 2) if o.quick else (40, 16)
        for record in bench_training.run(sizes):
            yield {"precision": precision, **record}


def steps(o: argparse.Namespace) -> Records:
    """`bench_train_step.py --grid`."""
    import bench_train_step
    import torch

    for options in bench_train_step.grid(o.device):
        sizes = _sizes(o, **{**options, "families": [options["families"]]})
        sizes.steps = 2 if o.quick else 20
        try:
            yield {**options, **bench_train_step.run(sizes)[0]}
        except torch.cuda.OutOfMemoryError as error:
            yield {**options, "failed": str(error)}
        if o.device == "cuda":
            torch.cuda.empty_cache()
        if o.quick:
            return


def inference(o: argparse.Namespace) -> Records:
    import bench_inference

    sizes = _sizes(o, k=80, d_in=2304, d_sae=65_536, batch_size=4096)
    sizes.calls = 2 if o.quick else 20
    yield from bench_inference.run(sizes)


def loss_curves(o: argparse.Namespace) -> Records:
    import loss_curves

    yield from loss_curves.run(*((3, 64) if o.quick else (500, 512)), o.device)


class Part(NamedTuple):
    """
    Attributes:
        run: Gives the results, one by one.
        share: Of the time, in relation to the other parts.
    """

    run: Callable[[argparse.Namespace], Records]
    share: float


PARTS = {
    "environment": Part(environment, 0.5),
    "kernel_tests": Part(kernel_tests, 2.5),
    "profile": Part(profile, 1),
    "training": Part(training, 4),
    "steps": Part(steps, 6),
    "inference": Part(inference, 1),
    "loss_curves": Part(loss_curves, 3),
}
"""In the order of their importance."""


def _sizes(o: argparse.Namespace, **sizes: Any) -> argparse.Namespace:
    """Options of the benchmarks; tiny ones if `quick`."""
    if o.quick:
        sizes.update(d_in=32, d_sae=256, k=4, batch_size=64)
    rank = 2 if o.quick else 24
    return argparse.Namespace(**{"rank": rank, **sizes}, device=o.device)


def work(names: list[str], o: argparse.Namespace, results: Connection) -> None:
    """
    Run parts, one after the other, in a process of its own.

    After an error, which can leave CUDA unusable, the process ends.

    Args:
        names: Of the parts.
        o: Options.
        results: Gets (name, "begins" or "record" or "ends", content); answers the first
            with the seconds that the part has.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if o.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    stood_in = stand_in_for_missing(UNUSED)
    for name in names:
        results.send((name, "begins", None))
        end = time.monotonic() + results.recv()
        ending = "done"
        try:
            for record in PARTS[name].run(o):
                if name == "environment":
                    record["stand_ins"] = stood_in
                results.send((name, "record", _plain(record)))
                if time.monotonic() > end:
                    ending = "cut: its time was up"
                    break
        except Exception:
            results.send((name, "ends", f"failed: {traceback.format_exc()[-4000:]}"))
            return
        results.send((name, "ends", ending))


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, dict):
        return {key: _plain(of) for key, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(of) for of in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


class Report:
    """The results so far, in a file that is whole at any time."""

    def __init__(self, file: Path):
        self.file = file
        self.parts = {name: {"status": "not begun", "results": []} for name in PARTS}
        self.began = time.monotonic()
        self.content = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "parts": self.parts,
        }

    def add(self, name: str, **changes: Any) -> None:
        part: dict[str, Any] = self.parts[name]
        record = changes.pop("record", None)
        if record is not None:
            part["results"].append(record)
        part.update(changes)
        temporary = self.file.with_suffix(".new")
        temporary.write_text(json.dumps(self.content, indent=1, allow_nan=False))
        temporary.replace(self.file)
        if "status" in changes:
            seconds = time.monotonic() - self.began
            print(f"{seconds:4.0f} s {name}: {part['status']}", flush=True)


def run_parts(o: argparse.Namespace, report: Report) -> None:
    context = multiprocessing.get_context("spawn")
    names, end = list(o.parts), time.monotonic() + 60 * o.minutes
    while names and time.monotonic() < end:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(names, o, theirs), daemon=True)
        process.start()
        theirs.close()
        names = follow(ours, names, end, report)
        process.kill()
        process.join()


def follow(
    worker: Connection, names: list[str], end: float, report: Report
) -> list[str]:
    """
    Report what a worker finds, until it ends or has to be ended.

    Returns:
        The parts that are left.
    """
    until = end
    while names:
        name, *later = names
        if not worker.poll(max(0, until - time.monotonic())):
            report.add(name, status="cut: it did not come to an end")
            return later
        try:
            _, kind, content = worker.recv()
        except EOFError:
            report.add(name, status="failed: its process ended")
            return later
        if kind == "begins":
            shares = [PARTS[n].share for n in names]
            begun = time.monotonic()
            seconds = (end - begun) * shares[0] / sum(shares)
            until = min(end, begun + seconds + SPARE_SECONDS)
            worker.send(seconds)
            report.add(name, status="running", has_s=seconds)
        elif kind == "record":
            report.add(name, record=content)
        else:
            report.add(name, status=content, took_s=time.monotonic() - begun)
            if content.startswith("failed"):
                return [] if name == "environment" else later
            names, until = later, end
    return []


def unpack(wheels: Path, folder: Path) -> None:
    """Unpack wheels, so that what they hold can be imported from the folder."""
    this = f"cp{sys.version_info.major}{sys.version_info.minor}"
    for wheel in sorted(wheels.glob("*.whl")):
        python, abi, _ = wheel.stem.split("-")[-3:]
        if "py3" not in python.split(".") and this not in python and abi != "abi3":
            sys.exit(
                f"{wheel.name} is not for {this}: make gpu-wheels GPU_PYTHON="
                f"{sys.version_info.major}.{sys.version_info.minor}"
            )
        with zipfile.ZipFile(wheel) as content:
            content.extractall(folder)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--wheels", type=Path, default=ROOT / ".gpu-wheels")
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    o = parser.parse_args()
    report = Report(o.output)
    with tempfile.TemporaryDirectory() as folder:
        unpack(o.wheels, Path(folder))
        ours = (str(ROOT / name) for name in ("src", "benchmarks", "tests"))
        sys.path[:0] = [folder, *ours]
        run_parts(o, report)
    print(f"Written to {o.output}")
    statuses = [report.parts[name]["status"] for name in o.parts]
    return int(any(str(status).startswith("failed") for status in statuses))


if __name__ == "__main__":
    sys.exit(main())
