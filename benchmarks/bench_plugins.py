"""What plugins cost a training step, chosen and not.

SAEs with and without each plugin are trained by SAELens's own trainer in one process,
alternating step by step on the same batches, after a warm-up; ratios are those of the
medians. What a step without plugins pays is one look-up, which is timed by itself.

    python benchmarks/bench_plugins.py
"""

import argparse
import platform
import timeit
from typing import Any

import numpy as np
import torch
from bench_train_step import seconds, trainer
from measure import add_sizes

from saelens_scaffold import (
    ScaffoldBatchTopKTrainingSAE,
    ScaffoldBatchTopKTrainingSAEConfig,
)

CHOICES: dict[str, dict[str, Any]] = {
    "none": {},
    "live_metrics": {"live_metrics": {}},
    "schedule": {"schedule": {"lr_factor": 0.5}},
    "orthonormal_decoder": {"orthonormal_decoder": {}},
    "decorrelation": {"decorrelation": {"coefficient": 0.1}},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sizes(parser)
    parser.add_argument("--steps", type=int, default=20)
    o = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, CPU, float32, d_in {o.d_in}, d_sae {o.d_sae}, "
        f"k {o.k:g}, rank {o.rank}, batch {o.batch_size}, {o.steps} paired steps"
    )
    saes = {
        name: ScaffoldBatchTopKTrainingSAE(
            ScaffoldBatchTopKTrainingSAEConfig(
                d_in=o.d_in,
                d_sae=o.d_sae,
                k=o.k,
                scaffold_rank=o.rank,
                scaffold_plugins=chosen,
            )
        )
        for name, chosen in CHOICES.items()
    }
    steps = {name: trainer(sae, o.batch_size, "cpu").step for name, sae in saes.items()}
    torch.manual_seed(0)
    basis = torch.randn(o.d_in, o.d_in) / o.d_in**0.5
    times: dict[str, list[float]] = {name: [] for name in steps}
    warm_up = 3
    for i in range(warm_up + o.steps):
        batch = torch.randn(o.batch_size, o.d_in) @ basis
        for name in sorted(steps, reverse=bool(i % 2)):
            times[name].append(seconds(steps[name], batch, "cpu"))
    medians = {name: float(np.median(t[warm_up:])) for name, t in times.items()}
    without = saes["none"]
    look_up = timeit.timeit(lambda: without.has_plugins, number=10_000)
    print(
        f"none: {1000 * medians['none']:.0f} ms, of which the look-up "
        f"{look_up / 10_000 * 1e9:.0f} ns"
    )
    for name, median in medians.items():
        if name != "none":
            ratio = median / medians["none"]
            print(f"{name}: {1000 * median:.0f} ms, {ratio:.3f} times")


if __name__ == "__main__":
    main()
