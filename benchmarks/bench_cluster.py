"""
Wall time of a comparison by two workers with a core each, against one with a core.

    python benchmarks/bench_cluster.py [FOLDER]

Runs both in turn, on a machine with two idle cores or more, and compares the results.
"""

import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray

from saelens_scaffold.compare import CompareConfig, compare

EXPERIMENT: dict[str, Any] = {
    "model_name": "py-neox",
    "hook_name": "blocks.2.hook_resid_post",
    "dataset_path": "python-stdlib",
    "sae": {"d_in": 256, "d_sae": 2048},
    "grid": {
        "architecture": ["batchtopk", "scaffold_batchtopk"],
        "k": [4, 12],
        "scaffold_rank": [8],
        "seed": [0, 1],
    },
    # as where memory holds no more: both then run the language model as often
    "saes_per_wave": 4,
    "training": {"training_tokens": 400_000, "context_size": 256, "lr": 1e-3},
    "evaluations": {"dense_latents": {"n_tokens": 100_000}},
    "evaluation_data": {"dataset": "python-stdlib"},
}


def seconds(n_workers: int, folder: Path) -> tuple[float, Any]:
    """Wall time of the experiment, workers' start included, and its SAEs in the results."""
    settings: Any = {"log_to_driver": False, "logging_level": logging.ERROR}
    ray.init("local", num_cpus=n_workers, include_dashboard=False, **settings)
    try:
        began = time.perf_counter()
        config = CompareConfig(**EXPERIMENT)
        found = compare(config, folder, "cpu", ray="local", cpus_per_task=1)
        return time.perf_counter() - began, found["saes"]
    finally:
        ray.shutdown()


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as path:
        found = {n: seconds(n, Path(path, str(n))) for n in (1, 2)}
    for n, (taken, _) in found.items():
        print(f"{n} worker{'s' if n > 1 else ''}: {taken:.0f} s")
    ratio = found[2][0] / found[1][0]
    same = "the same" if found[1][1] == found[2][1] else "DIFFERENT"
    print(f"ratio: {ratio:.2f}; results: {same}")


if __name__ == "__main__":
    main()
