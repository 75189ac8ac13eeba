"""Kill commands at random moments, repeat them, and see that nothing is lost or left behind.

    python benchmarks/kill.py OUT [--kills 60] [--commands train eval compare demo]

Each trial runs a command in a folder of its own, ends it with SIGKILL, SIGTERM or SIGINT at
a random moment, runs it again to its end, and compares what is there with what an unbroken
run has made: the same files, and the same weights and metrics where the package's own runner
trains. Three further trials of `eval` run it twice at the same time, in the same folders.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

HOOK = "blocks.0.hook_resid_post"
SAE = {"d_in": 256, "d_sae": 64, "k": 4, "scaffold_rank": 2}
TRAINING = {
    "model_name": "py-neox",
    "dataset_path": "python-stdlib",
    "context_size": 32,
    "training_tokens": 65_536,
    "train_batch_size_tokens": 256,
    "store_batch_size_prompts": 4,
    "n_batches_in_buffer": 32,
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
REPEATABLE = ("compare", "demo")
"""What trains with a runner whose resumed runs equal unbroken ones."""


def options(values: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def argv_of(command: str, folder: Path) -> list[str]:
    """A small command, which writes into the folder `out` of its working directory."""
    if command == "train":
        text = {"dataset_path": str(folder / "text"), "streaming": False}
        more = {"architecture": "scaffold_batchtopk", "hook_name": HOOK}
        more |= {"output_path": "out", "log_to_wandb": False, "device": "cpu"}
        return ["train", *options({**TRAINING, **SAE, **text, **more})]
    if command == "eval":
        where = ["--sae_path", str(folder / "sae"), "--output_path=out"]
        size = ["--set=dense_latents.n_tokens=20000", "--device=cpu"]
        return ["eval", "dense_latents", *where, "--dataset=python-stdlib", *size]
    if command == "compare":
        return ["compare", str(folder / "compare.yaml"), "--output_path=out"]
    return ["demo", "--quick", "--output_path=out"]


def prepare(folder: Path) -> None:
    """Text, an SAE and an experiment."""
    from saelens_scaffold.models import write_stdlib_dataset

    if (folder / "compare.yaml").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_stdlib_dataset(folder / "text", "train")
    assert run(argv_of("train", folder), folder).wait() == 0, folder / "log"
    (folder / "out").rename(folder / "sae")
    training = {
        k: v for k, v in TRAINING.items() if k not in ("model_name", "dataset_path")
    }
    experiment = {
        "model_name": "py-neox",
        "hook_name": HOOK,
        "dataset_path": "python-stdlib",
        "sae": {"d_in": 256, "d_sae": 64},
        "grid": {
            "architecture": ["batchtopk", "scaffold_batchtopk"],
            "k": [4],
            "scaffold_rank": [2],
            "seed": [0, 1],
        },
        "training": {**training, "n_checkpoints": 4},
        "evaluations": {"dense_latents": {"n_tokens": 2000, "n_bootstrap": 20}},
        "evaluation_data": {"dataset": "python-stdlib", "llm_batch_size": 4},
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(experiment))


def run(argv: Sequence[str], cwd: Path) -> "subprocess.Popen[bytes]":
    """The command as a process of its own, which says everything to `log`."""
    code = f"import sys; from saelens_scaffold_cli import main; sys.exit(main({argv}))"
    cwd.mkdir(parents=True, exist_ok=True)
    with (cwd / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", code], cwd=cwd, stdout=log, stderr=log
        )


def what_is_there(folder: Path, repeatable: bool) -> dict[str, Any]:
    """Hashes of weights and metrics of results, by file; else that a file is there."""
    found: dict[str, Any] = {}
    for file in sorted(path for path in folder.rglob("*") if path.name != "log"):
        name = str(file.relative_to(folder))
        found[name] = None
        if file.suffix == ".safetensors" and repeatable:
            found[name] = sha256(file.read_bytes()).hexdigest()
        elif file.name.endswith("eval_results.json"):
            found[name] = json.loads(file.read_text())["eval_result_metrics"]
    return found


def trials(command: str, n_kills: int, out: Path) -> Iterator[str]:
    """What went wrong in each trial; an empty string where nothing did."""
    argv, repeatable = argv_of(command, out), command in REPEATABLE
    whole, began = out / command / "unbroken", time.monotonic()
    assert run(argv, whole).wait() == 0, whole / "log"
    seconds = time.monotonic() - began
    expected = what_is_there(whole, repeatable)
    for number in range(n_kills + (3 if command == "eval" else 0)):
        folder = out / command / str(number)
        if number < n_kills:
            process = run(argv, folder)
            time.sleep(random.uniform(0, seconds))
            process.send_signal(SIGNALS[number % len(SIGNALS)])
            process.wait()
            statuses = [run(argv, folder).wait()]
        else:
            statuses = [each.wait() for each in [run(argv, folder) for _ in range(2)]]
        found = what_is_there(folder, repeatable)
        # a training of SAELens does not go on by itself: its checkpoint is for the user
        left = {
            n for n in found if command != "train" or not n.startswith("checkpoints")
        }
        wrong = [n for n in left | set(expected) if found.get(n) != expected.get(n, 0)]
        traceback = "Traceback" in (folder / "log").read_text(errors="replace")
        failed = any(statuses) or wrong or traceback
        yield f"{folder}: {statuses=} {wrong=} {traceback=}" if failed else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    commands = ["train", "eval", "compare", "demo"]
    parser.add_argument("--commands", nargs="+", choices=commands, default=commands)
    args = parser.parse_args()
    random.seed(args.seed)
    out = args.out.absolute()
    prepare(out)
    problems = 0
    for command in args.commands:
        for wrong in trials(command, args.kills // len(args.commands), out):
            problems += bool(wrong)
            print(wrong or f"{command}: nothing lost, nothing left", flush=True)
    return min(problems, 1)


if __name__ == "__main__":
    sys.exit(main())
