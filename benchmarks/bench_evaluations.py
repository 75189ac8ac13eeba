"""What evaluations cost: more SAEs in one call, more interventions, more tokens.

    saelens-scaffold demo
    python benchmarks/bench_evaluations.py

- `dense_latents`: a call with 8 SAEs against a call with one, alternating in one process.
- `scaffold_ablation`: the time of the ablation pass, less that of the layers below the hook
  point, against the time inside the layers above it, of which each intervention needs one
  run. What is over 1 is SAEs, interventions, losses and the bootstrap.
- Peak memory of a process that evaluates on N tokens and of one that does on 4 N.
"""

import argparse
import copy
import multiprocessing
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sae_lens import SAE

import saelens_scaffold  # noqa: F401  (registers the architectures)
from saelens_scaffold.evals.dense_latents import DenseLatentsEvalConfig
from saelens_scaffold.evals.model import HookedModel
from saelens_scaffold.evals.runner import run_eval
from saelens_scaffold.evals.saes import load_saes
from saelens_scaffold.evals.scaffold_ablation import ScaffoldAblationEvalConfig
from saelens_scaffold.evals.scaffold_ablation import main as scaffold_ablation

TEXT: dict[str, Any] = {
    "model_name": "py-neox",
    "dataset": "python-stdlib",
    "dataset_split": "test",
}


def saes_of(directory: Path, count: int) -> list[tuple[str, SAE[Any]]]:
    """The SAEs of a folder, over and over, under names of their own."""
    saes = load_saes(sorted(p.parent for p in directory.glob("*/cfg.json")))
    return [
        (f"{i} {saes[i % len(saes)][0]}", copy.deepcopy(saes[i % len(saes)][1]))
        for i in range(count)
    ]


def evaluate(name: str, config: Any, saes: Any) -> float:
    """Seconds of a call."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run_eval(
            name,
            config,
            saes,
            output_path=Path(folder, "results"),
            artifacts_path=Path(folder, "artifacts"),
        )
        return time.perf_counter() - start


def bench_more_saes(directory: Path, n_tokens: int, repeats: int) -> None:
    config = DenseLatentsEvalConfig(**TEXT, n_tokens=n_tokens)
    eight = saes_of(directory, 8)
    evaluate("dense_latents", DenseLatentsEvalConfig(**TEXT, n_tokens=2000), eight)
    times: dict[int, list[float]] = {1: [], 8: []}
    for i in range(repeats):
        for count in (1, 8) if i % 2 else (8, 1):
            times[count].append(evaluate("dense_latents", config, eight[:count]))
    ratios = sorted(b / a for a, b in zip(times[1], times[8], strict=True))
    print(
        f"dense_latents, {n_tokens:,} tokens: one SAE {median(times[1]):.1f} s, 8 SAEs "
        f"{median(times[8]):.1f} s: {median(ratios):.2f} times as much "
        f"({repeats} pairs, {ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


def bench_more_interventions(directory: Path, n_tokens: int) -> None:
    spent = {"below": 0.0, "above": 0.0, "measure_losses": 0.0}
    calls = dict.fromkeys(spent, 0)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] += time.perf_counter() - start
            calls[name] += 1
            return result

        return wrapper

    def timed_ablation(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            # of the ablation pass only, not of what was fitted before it
            spent.update(below=0.0, above=0.0)
            calls.update(below=0, above=0)
            return timed("measure_losses", function)(*args, **kwargs)

        return wrapper

    HookedModel.below = timed("below", HookedModel.below)
    HookedModel.above = timed("above", HookedModel.above)
    scaffold_ablation.measure_losses = timed_ablation(scaffold_ablation.measure_losses)
    config = ScaffoldAblationEvalConfig(
        **TEXT,
        n_fit_tokens=n_tokens,
        n_tokens=n_tokens,
        topics=False,
        include_special_tokens=False,
    )
    saes = [s for s in saes_of(directory, 6) if "scaffold" in s[0]]
    evaluate("scaffold_ablation", config, saes)
    runs_per_batch = calls["above"] / calls["below"]
    print(
        f"scaffold_ablation, {len(saes)} SAEs, {n_tokens:,} tokens, {runs_per_batch:.0f} runs "
        f"of the layers above the hook point for a batch: {spent['measure_losses']:.1f} s, of which "
        f"{spent['below']:.1f} s below it and {spent['above']:.1f} s above it: an intervention "
        f"costs {(spent['measure_losses'] - spent['below']) / spent['above']:.2f} times the layers above"
    )


def _evaluate_and_measure(directory: Path, n_tokens: int, queue: Any) -> None:
    config = DenseLatentsEvalConfig(**TEXT, n_tokens=n_tokens)
    evaluate("dense_latents", config, saes_of(directory, 2))
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def bench_memory(directory: Path, n_tokens: int) -> None:
    peaks: list[float] = []
    for n in (n_tokens, 4 * n_tokens):
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(
            target=_evaluate_and_measure, args=(directory, n, queue)
        )
        process.start()
        peaks.append(queue.get())
        process.join()
    print(
        f"dense_latents, peak memory: {n_tokens:,} tokens {peaks[0]:,.0f} MiB, "
        f"{4 * n_tokens:,} tokens {peaks[1]:,.0f} MiB: {peaks[1] / peaks[0]:.2f} times as much"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--saes",
        type=Path,
        default=Path("demo-output/language_model/saes"),
        help="folder of SAEs of py-neox (default: what the demo wrote)",
    )
    parser.add_argument("--n_tokens", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=3)
    o = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, CPU, py-neox"
    )
    bench_more_saes(o.saes, o.n_tokens, o.repeats)
    bench_more_interventions(o.saes, o.n_tokens // 5)
    bench_memory(o.saes, o.n_tokens // 2)


if __name__ == "__main__":
    main()
