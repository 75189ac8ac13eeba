"""What the sparse kernels save of the demo, and whether the training steps account for it.

Runs `saelens-scaffold demo` with dense code and with the kernels, in processes of their
own, taking turns, with a clock around SAELens's training step.

    python benchmarks/bench_demo.py
    python benchmarks/bench_demo.py --quick --rounds 3
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KERNELS = ("reference", "auto")

Seconds = dict[str, float]
"""Of all steps of the SAEs of an architecture and width, and of the whole "demo"."""


def measure(demo_args: list[str], report: Path) -> None:
    """In a process of its own: run the demo, and write what it took as JSON."""
    from sae_lens.training.sae_trainer import SAETrainer

    import saelens_scaffold_cli

    train_step = SAETrainer._train_step
    taken: Seconds = {}

    def timed(self: Any, sae: Any, sae_in: Any) -> Any:
        start = time.perf_counter()
        output = train_step(self, sae=sae, sae_in=sae_in)
        key = f"{sae.cfg.architecture()}, {sae.cfg.d_sae:,} latents"
        taken[key] = taken.get(key, 0.0) + time.perf_counter() - start
        return output

    SAETrainer._train_step = timed
    start = time.perf_counter()
    status = saelens_scaffold_cli.main(["demo", *demo_args])
    taken["demo"] = time.perf_counter() - start
    report.write_text(json.dumps(taken))
    sys.exit(status)


def run_demo(kernels: str, quick: bool) -> Seconds:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "seconds.json")
        demo_args = ["--output_path", str(Path(folder, "demo")), *["--quick"] * quick]
        subprocess.run(
            [sys.executable, __file__, "--report", str(report), *demo_args],
            env={**os.environ, "SAELENS_SCAFFOLD_KERNELS": kernels},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return json.loads(report.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the demo's own --quick")
    parser.add_argument("--rounds", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options, demo_args = parser.parse_known_args()
    if options.report:
        measure([*demo_args, *["--quick"] * options.quick], options.report)

    rounds: dict[str, list[Seconds]] = {kernels: [] for kernels in KERNELS}
    for number in range(options.rounds):
        for kernels in KERNELS[:: -1 if number % 2 else 1]:
            rounds[kernels].append(run_demo(kernels, options.quick))
    dense, sparse = (
        {key: statistics.median(r[key] for r in rounds[kernels]) for key in of_one}
        for kernels, of_one in ((k, rounds[k][0]) for k in KERNELS)
    )

    print("| training steps of | dense code, s | kernels, s | ratio |")
    print("|---|---|---|---|")
    saved = 0.0
    for key in sorted(dense, key=lambda key: (key == "demo", key)):
        name = f"**{key}, all of it**" if key == "demo" else key
        print(
            f"| {name} | {dense[key]:.1f} | {sparse[key]:.1f} | "
            f"{dense[key] / sparse[key]:.2f} |"
        )
        if key != "demo":
            saved += dense[key] - sparse[key]
    print(
        f"\nThe SAEs' steps saved {saved:.1f} s, which predicts "
        f"{dense['demo'] - saved:.1f} s for the demo; it took {sparse['demo']:.1f} s."
    )


if __name__ == "__main__":
    main()
