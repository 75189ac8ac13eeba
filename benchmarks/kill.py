"""Kill commands at random moments, repeat them, and see that nothing is lost or left behind.

    python benchmarks/kill.py OUT [--kills 60] [--commands train sharded eval compare ...]

Each trial has a folder of its own, which the command works in and which has its temporary
files. The command is ended there by

- a kill: SIGKILL, SIGTERM or SIGINT at a random moment;
- a full disk: the folder is a tmpfs of a random size, too small (this needs root); it grows
  before the command is repeated;
- another process, which runs the same command in the same folder at the same time.

`sharded` is a training by two processes, of which one gets the signal. As torchrun does, the
other is told to end, and killed after 30 seconds if it has not.

The command is then repeated, a training from its checkpoint if it has named one, and what is
there is compared with what an unbroken run has made: the same files and metrics, and the same
weights where the package's own runner trains. Nothing may have shown a traceback. `upload`
sends to a Hub on this machine, whose repository is compared.

All commands are small, and run in forks of this process, which has imported everything: a
moment is one of the command's work.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from hub_server import WRITE_TOKEN, HubServer  # noqa: E402

REPO = "user/saes"
HOOK = "blocks.0.hook_resid_post"
SAE = {"d_in": 256, "d_sae": 64, "k": 4, "scaffold_rank": 2}
TRAINING = {
    "context_size": 32,
    "training_tokens": 16_384,
    "train_batch_size_tokens": 256,
    "store_batch_size_prompts": 4,
    "n_batches_in_buffer": 32,
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
COMMANDS = ("train", "sharded", "eval", "compare", "demo", "upload")
REPEATABLE = ("compare", "demo")
"""What trains with a runner whose resumed runs equal unbroken ones."""
KINDS = ("kill", "full disk", "two at once")
REFUSED = "another process is at work"


def options(values: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def argv_of(command: str, inputs: Path) -> list[str]:
    """A small command, which writes into the folder `out` of its working directory."""
    if command in ("train", "sharded"):
        more = {"model_name": "py-neox", "dataset_path": str(inputs / "text")}
        more |= {"architecture": "scaffold_batchtopk", "hook_name": HOOK}
        more |= {"output_path": "out", "log_to_wandb": False, "device": "cpu"}
        if command == "sharded":
            more["resume_from_checkpoint"] = "auto"
        return ["train", *options({**TRAINING, **SAE, "streaming": False, **more})]
    if command == "eval":
        where = ["--sae_path", str(inputs / "sae"), "--output_path=out"]
        size = ["--set=dense_latents.n_tokens=2000", "--device=cpu"]
        return ["eval", "dense_latents", *where, "--dataset=python-stdlib", *size]
    if command == "compare":
        return ["compare", str(inputs / "compare.yaml"), "--output_path=out"]
    if command == "upload":
        return ["upload", str(inputs / "experiment"), "--repo_id", REPO]
    return ["demo", "--quick", "--output_path=out"]


def prepare(inputs: Path) -> None:
    """A text, an SAE, an experiment's configuration, and its finished run."""
    from saelens_scaffold.models import write_stdlib_dataset

    if inputs.exists():
        return
    making = inputs.with_name("making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    write_stdlib_dataset(making / "text", "train")
    experiment = {
        "model_name": "py-neox",
        "hook_name": HOOK,
        "dataset_path": "python-stdlib",
        "sae": {"d_in": 256, "d_sae": 64},
        "grid": {
            "architecture": ["batchtopk", "scaffold_batchtopk"],
            "k": [4],
            "scaffold_rank": [2],
        },
        "training": {**TRAINING, "n_checkpoints": 4},
        "evaluations": {"dense_latents": {"n_tokens": 2000, "n_bootstrap": 20}},
        "evaluation_data": {"dataset": "python-stdlib", "llm_batch_size": 4},
    }
    (making / "compare.yaml").write_text(yaml.safe_dump(experiment))
    for command, name in (("train", "sae"), ("compare", "experiment")):
        folder = making / command
        assert wait(start(argv_of(command, making), folder)) == 0, log_of(folder)
        (folder / "out").rename(making / name)
    making.rename(inputs)


def make_demo_small() -> None:
    """Make `demo --quick` train and evaluate on less."""
    demo: Any = import_module("saelens_scaffold.demo.main")
    language_model: Any = import_module("saelens_scaffold.demo.language_model")

    config = language_model.read_config(language_model.CONFIG_PATH)
    config.sae.update(d_sae=128, matryoshka_widths=[32, 64, 128])
    config.grid["b_dec_init"] = ["mean"]
    config.training.update(TRAINING, n_batches_for_norm_estimate=4)
    language_model.read_config = lambda _: config
    language_model.QUICK_EVALUATIONS["dense_latents"]["n_tokens"] = 1000
    language_model.QUICK_EVALUATIONS["scaffold_ablation"].update(
        n_tokens=256, n_fit_tokens=512
    )
    language_model.QUICK["training_tokens"] = TRAINING["training_tokens"] // 2
    settings = demo.planted_settings(quick=True)
    settings["training"]["training_samples"] = 10_240
    settings["sae"].update(d_sae=128, matryoshka_widths=[32, 64, 128])
    settings["eval_samples"] = 1024
    demo.planted_settings = lambda _: settings


def start(argv: Sequence[str], folder: Path, **environment: str) -> int:
    """The id of a process of its own that runs the command in the folder."""
    from saelens_scaffold_cli import main

    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    if pid := os.fork():
        return pid
    status = 1
    try:
        with log_of(folder).open("a", errors="replace") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        # which a shell makes its background processes ignore
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        tempfile.tempdir = str(folder / "tmp")
        os.environ.update(environment)
        status = main(argv)
    except SystemExit as exit:
        status = int(exit.code or 0)
    except KeyboardInterrupt:  # before the command could see to it
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def end(pids: Iterable[int], how: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, how)


def seconds_of(pid: int) -> float:
    """Time of a process on the processor, which no other work changes; inf at its end."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return float("inf") if fields[0] == "Z" else ticks / os.sysconf("SC_CLK_TCK")


def log_of(folder: Path) -> Path:
    """What the processes of a folder say; beside it, for it may be full."""
    return folder.with_name(f"{folder.name}.log")


@contextmanager
def disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of so many bytes at a folder."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class Trials:
    """
    Trials of one command.

    Args:
        command: Its name.
        out: Folder for all commands.
        hub: Where `upload` sends to.
    """

    def __init__(self, command: str, out: Path, hub: HubServer) -> None:
        self.command, self.hub = command, hub
        self.argv, self.folder = argv_of(command, out / "inputs"), out / command
        whole, before = self.folder / "unbroken", os.times()
        assert not any(self.wait(self.start(whole))), log_of(whole)
        spent = [now - then for now, then in zip(os.times(), before, strict=True)]
        self.seconds = sum(spent[2:4])  # of children, on the processor
        self.expected = self.what_is_there(whole)
        files = filter(Path.is_file, whole.rglob("*"))
        self.size = sum(file.stat().st_size for file in files)
        self.seconds /= 1 + (command == "sharded")
        if command == "upload":
            # it removes each SAE's files before it writes the next one's
            blobs = hub.repositories[REPO].files().values()
            self.size = sum(len(blob.content) for blob in blobs) // 4

    def start(self, folder: Path, *options: str) -> list[int]:
        """The ids of the processes that together run the command in the folder."""
        if self.command != "sharded":
            return [start([*self.argv, *options], folder)]
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        group |= {"WORLD_SIZE": "2"}
        return [start(self.argv, folder, RANK=rank, **group) for rank in "01"]

    def wait(self, pids: Sequence[int]) -> list[int]:
        """Their exit statuses; as torchrun, end all when one has failed."""
        if self.command != "sharded":
            return [*map(wait, pids)]
        ended: dict[int, int] = {}
        deadline = float("inf")
        while left := [pid for pid in pids if pid not in ended]:
            for pid in left:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            failed = any(ended.values())
            if failed and deadline == float("inf"):
                deadline = time.monotonic() + 30
                end(set(left) - {*ended}, signal.SIGTERM)
            if time.monotonic() > deadline:
                end(set(left) - {*ended}, signal.SIGKILL)
            time.sleep(0.05)
        return [ended[pid] for pid in pids]

    def what_is_there(self, folder: Path) -> dict[str, Any]:
        """Hashes of weights, metrics of results, by file; else that a file is there."""
        found: dict[str, Any] = {}
        for file in sorted(folder.rglob("*")):
            name = str(file.relative_to(folder))
            # a training of SAELens does not go on by itself: its checkpoint is the user's
            if "train" in self.argv and name.startswith("checkpoints"):
                continue
            found[name] = None
            if file.suffix == ".safetensors" and self.command in REPEATABLE:
                found[name] = sha256(file.read_bytes()).hexdigest()
            elif file.name.endswith("eval_results.json"):
                found[name] = json.loads(file.read_text())["eval_result_metrics"]
        repository = self.hub.repositories.get(REPO)
        if self.command == "upload" and repository is not None:
            files = repository.files().items()
            found |= {f"Hub: {path}": blob.oid for path, blob in files}
        return found

    def trial(self, kind: str, number: int) -> str:
        """What went wrong in a trial; an empty string where nothing did."""
        folder = self.folder / f"{kind.replace(' ', '-')}-{number}"
        self.hub.repositories.pop(REPO, None)
        if kind == "full disk":
            size = random.randrange(4096, self.size)
            with disk(folder, size):
                first = self.wait(self.start(folder))
                mount = ["mount", "-o", f"remount,size={1 << 30}", str(folder)]
                subprocess.run(mount, check=True)
                return self.problems(f"{kind} of {size:,} bytes", folder, first)
        groups = [self.start(folder) for _ in range(1 + (kind == KINDS[2]))]
        if kind == "kill":
            pids = groups[0]
            sent, after = SIGNALS[number % 3], random.uniform(0, self.seconds)
            hit = random.choice(pids)
            kind = f"{sent.name} after {after:.1f} of {self.seconds:.1f} s"
            kind += f" to process {pids.index(hit)}" * (len(pids) > 1)
            while seconds_of(hit) < after:
                time.sleep(0.01)
            os.kill(hit, sent)
        first = [status for pids in groups for status in self.wait(pids)]
        return self.problems(kind, folder, first)

    def problems(self, how: str, folder: Path, first: list[int]) -> str:
        said = log_of(folder).read_text(errors="replace")
        # Python restores the default handlers of signals when it is about to end
        allowed = {0, 130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT}
        allowed |= {1, 2} if "full" in how or REFUSED in said else set()
        named = r"(?:--resume_from_checkpoint|To go on from) ([^\s,]+)"
        checkpoint = re.findall(named, said)
        resumed = []
        if checkpoint and self.command == "train":
            resumed = [f"--resume_from_checkpoint={checkpoint[-1]}"]
        again = max(self.wait(self.start(folder, *resumed)))
        found = self.what_is_there(folder)
        wrong = [
            name
            for name in sorted({*found, *self.expected})
            if found.get(name, 0) != self.expected.get(name, 0)
        ]
        shown = "Traceback" in log_of(folder).read_text(errors="replace")
        print(f"{self.command}, {how}: {first}, again {again}", end="", file=sys.stderr)
        print(f", resumed from {checkpoint[-1:]}", file=sys.stderr)
        if again or wrong or shown or not allowed.issuperset(first):
            return f"{folder}: {how}: {first=} {again=} {wrong=} traceback={shown}"
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=60, help="of all commands")
    parser.add_argument("--others", type=int, default=2, help="of a kind and command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=COMMANDS)
    args = parser.parse_args()
    random.seed(args.seed)
    out = args.out.absolute()
    # before the libraries that read it are imported
    os.environ.update(
        OMP_NUM_THREADS="1",
        HF_HOME=str(out / "hf"),
        HF_TOKEN=WRITE_TOKEN,
        HF_HUB_DISABLE_XET="1",
    )
    with HubServer().running() as hub:
        os.environ["HF_ENDPOINT"] = hub.url
        import saelens_scaffold
        from saelens_scaffold.models.datasets import open_dataset

        for module in walk_packages(saelens_scaffold.__path__, "saelens_scaffold."):
            if "triton" not in module.name:
                import_module(module.name)
        for split in ("train", "test"):
            open_dataset("python-stdlib", split)  # which is then in memory
        make_demo_small()
        prepare(out / "inputs")
        problems = 0
        print("| command | kill | full disk | two at once |\n|---|---:|---:|---:|")
        for command in args.commands:
            trials, cells = Trials(command, out, hub), [command]
            for kind in KINDS:
                kills = args.kills // len(args.commands)
                count = kills if kind == "kill" else args.others
                wrong = [trials.trial(kind, number) for number in range(count)]
                for each in filter(None, wrong):
                    print(each, file=sys.stderr)
                problems += sum(map(bool, wrong))
                cells.append(f"{wrong.count('')} of {count}")
            print(f"| {' | '.join(cells)} |", flush=True)
    return min(problems, 1)


if __name__ == "__main__":
    sys.exit(main())
