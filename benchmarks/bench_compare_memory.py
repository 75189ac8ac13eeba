"""How well `saelens-scaffold compare` estimates the memory that training takes.

Trains 1 SAE and then several in processes of their own, on the embedded model, and compares
the peak of each process with the estimate, by which `compare` splits SAEs into waves.

    python benchmarks/bench_compare_memory.py
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def experiment(
    options: argparse.Namespace, architecture: str, n_saes: int
) -> dict[str, Any]:
    return {
        "model_name": "py-neox",
        "hook_name": "blocks.0.hook_resid_post",
        "dataset_path": "python-stdlib",
        "sae": {"d_in": 256, "d_sae": options.d_sae, "k": 16},
        "grid": {"architecture": [architecture], "seed": [*range(n_saes)]},
        "training": {
            "training_tokens": 4 * options.batch_size,
            "train_batch_size_tokens": options.batch_size,
            "context_size": 64,
            "store_batch_size_prompts": 16,
            "n_batches_in_buffer": 64,
            "n_checkpoints": 0,
        },
        "evaluations": {"dense_latents": None},
        "evaluation_data": {"dataset": "python-stdlib"},
    }


def measure(content: dict[str, Any]) -> None:
    """In a process of its own: print estimate and peak, each in bytes."""
    from saelens_scaffold.compare import CompareConfig
    from saelens_scaffold.compare.experiment import make_plan
    from saelens_scaffold.compare.training import WaveTrainer
    from saelens_scaffold.evals.language_model import load_language_model

    config = CompareConfig(**content)
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(config, folder, device="cpu")
        (wave,) = plan.waves
        load_language_model("py-neox", "cpu")  # what importing and loading take once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        trainer = WaveTrainer(
            config, "cpu", Path(folder, "saes"), Path(folder, "training"), scales=False
        )
        trainer.train(0, wave)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    estimated = plan.estimate.shared + sum(plan.estimate.per_sae.values())
    print(json.dumps([estimated, peak]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d_sae", type=int, default=8192)
    parser.add_argument("--batch_size", type=int, default=2048)
    parser.add_argument("--n_saes", type=int, nargs="+", default=[1, 4])
    parser.add_argument(
        "--architectures",
        nargs="+",
        default=["batchtopk", "scaffold_batchtopk"],
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(json.loads(options.measure))
        return
    print("| architecture | SAEs | estimated | measured | ratio |")
    print("|---|---:|---:|---:|---:|")
    for architecture in options.architectures:
        for n_saes in options.n_saes:
            content = experiment(options, architecture, n_saes)
            done = subprocess.run(
                [sys.executable, __file__, "--measure", json.dumps(content)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            estimated, peak = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {architecture} | {n_saes} | {estimated / 1e9:.2f} GB | "
                f"{peak / 1e9:.2f} GB | {peak / estimated:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
