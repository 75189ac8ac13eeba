"""What a training step costs on a machine that is busy: alone, and beside a second training.

Each training is a process of its own with all cores, as when two commands run at once.
`GOMP_SPINCOUNT` is how long OpenMP's threads spin before they sleep; `saelens-scaffold` sets
it to 1000.

    python benchmarks/bench_busy.py
    python benchmarks/bench_busy.py --d_in 768 --d_sae 24576 --batch_size 1024 --seconds 20
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch
from bench_train_step import sae_configs, trainer
from measure import add_sizes, seconds
from sae_lens import TrainingSAE

KINDS = ["BatchTopK", "ScaffoldBatchTopK"]
WARM_UP = 3


def train(o: argparse.Namespace) -> None:
    """Train from a line on standard input on, and print the mean time of a step."""
    of_sae = trainer(
        TrainingSAE.from_dict(sae_configs(o)[o.kind].to_dict()), o.batch_size, "cpu"
    )
    for _ in range(WARM_UP):
        of_sae.step(torch.randn(o.batch_size, o.d_in))
    print("ready", flush=True)
    input()
    times: list[float] = []
    end = time.monotonic() + o.seconds
    while time.monotonic() < end:
        times.append(seconds(of_sae.step, torch.randn(o.batch_size, o.d_in), "cpu"))
    print(statistics.mean(times))


def side_by_side(n: int, kind: str, spin_count: str | None) -> list[float]:
    """Mean seconds of a step of each of n trainings that run at once."""
    environment = dict(os.environ)
    environment.pop("GOMP_SPINCOUNT", None)
    if spin_count is not None:
        environment["GOMP_SPINCOUNT"] = spin_count
    processes = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--kind", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(n)
    ]
    for process in processes:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("a training ended before it began")
    for process in processes:
        assert process.stdin is not None
        print(file=process.stdin, flush=True)
    return [float(process.communicate()[0]) for process in processes]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sizes(parser)
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.set_defaults(device="cpu", precision="float32")
    o = parser.parse_args()
    if o.kind is not None:
        train(o)
        return
    print(f"{torch.get_num_threads()} threads each; ms of a step")
    print(
        "| SAE | GOMP_SPINCOUNT | alone | two at once | ratio |\n|---|---|---|---|---|"
    )
    for kind in KINDS:
        for spin_count in (None, "1000"):
            (alone,) = side_by_side(1, kind, spin_count)
            both = side_by_side(2, kind, spin_count)
            print(
                f"| {kind} | {spin_count or 'not set'} | {1000 * alone:.0f} | "
                f"{1000 * both[0]:.0f}, {1000 * both[1]:.0f} | {max(both) / alone:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
