"""One SAE trained by several processes, as torchrun starts them."""

import json
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
import torch
from datasets import Dataset
from sae_lens import ActivationsStore
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import seeded_train
from forked import Forked
from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.interruption import interruptible
from saelens_scaffold.models import load_embedded_model
from saelens_scaffold.training.command import _parse
from saelens_scaffold.training.processes import Processes
from saelens_scaffold.training.sharded_runner import check_sharded
from saelens_scaffold.training.shared_activations import SharedActivationsStore
from saelens_scaffold_cli import main
from test_cli import training_options

SCRIPT = Path(__file__).with_name("seeded_train.py")


def options(folder: Path, **changes: object) -> list[str]:
    """Of a training of 16 steps, with dead latents, on text of the standard library."""
    return training_options(
        folder,
        **{
            "dataset_path": "python-stdlib",
            "d_sae": 300,
            "normalize_activations": "expected_average_only_in",
            "n_batches_for_norm_estimate": 3,
            "dead_feature_window": 4,
            "exclude_special_tokens": True,
            "lr": 1e-3,
            "n_checkpoints": 3,
            **changes,
        },
    )


def forked(
    n: int, args: list[str], cwd: Path, max_restarts: int = 0, **environment: str
) -> Forked:
    """What torchrun starts, but that the processes are forks of one."""
    setting: Any = {"cwd": cwd, "environment": environment}
    return Forked(_launch, n, args, max_restarts, **setting)


def _launch(n: int, args: list[str], max_restarts: int) -> None:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        run_id=str(uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        start_method="fork",
    )
    try:
        elastic_launch(config, seeded_train.train)(*args)
    except ChildFailedError as error:
        sys.exit(str(error))


def lines_of(said: str) -> list[str]:
    return re.findall("^saelens-scaffold train: .*", said, re.MULTILINE)


def train_here(
    monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: object
) -> None:
    """Train in this process alone."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", sys.argv)
    torch.manual_seed(0)
    assert main(["train", *options(folder, **changes)]) == 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "sae_weights.safetensors")


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "trainer_state.pt")


def assert_same_sae(found: Path, expected: Path) -> None:
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-4, atol=1e-5)
    cfgs = [json.loads((each / "cfg.json").read_text()) for each in (found, expected)]
    measured = [cfg["metadata"].pop("measured") for cfg in cfgs]
    assert cfgs[0] == cfgs[1]
    assert measured[0]["text"] == measured[1]["text"]
    for name in ("n_tokens", "l0_sparse", "explained_variance"):
        assert measured[0][name] == pytest.approx(measured[1][name], rel=1e-2), name


# with evaluations of the whole SAE, which read text
LOGGED = {
    "log_to_wandb": True,
    "wandb_log_frequency": 4,
    "eval_every_n_wandb_logs": 1,
    "n_eval_batches": 1,
    "eval_batch_size_prompts": 2,
}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which two processes have trained an SAE."""
    folder = tmp_path_factory.mktemp("of_two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(SCRIPT), *options(folder, **LOGGED)]
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = done.stdout
    assert (folder / "sae" / "cfg.json").exists(), said
    # of one process only
    assert len([*folder.glob("wandb/offline-run-*")]) == 1
    assert len(re.findall("sae: l0_sparse .*held out", said)) == 1
    assert len(re.findall("Estimating norm.*100%", said)) <= 1
    return folder


def test_two_processes_train_what_one_trains(
    of_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_here(monkeypatch, tmp_path, **LOGGED)
    assert_same_sae(of_two / "sae", tmp_path / "sae")
    mine, theirs = (
        sorted(folder.glob("checkpoints/*/*"), key=lambda each: int(each.name))
        for folder in (of_two, tmp_path)
    )
    assert [each.name for each in mine] == [each.name for each in theirs]
    assert len(mine) == 3
    for found, expected in zip(mine, theirs, strict=True):
        assert {each.name for each in found.iterdir()} == {
            each.name for each in expected.iterdir()
        }
        torch.testing.assert_close(
            weights(found), weights(expected), rtol=1e-4, atol=1e-5
        )
        found_state, expected_state = state(found), state(expected)
        assert found_state.keys() == expected_state.keys()
        adams = [each.pop("optimizer") for each in (found_state, expected_state)]
        assert adams[0]["param_groups"] == adams[1]["param_groups"]
        torch.testing.assert_close(
            adams[0]["state"], adams[1]["state"], rtol=1e-3, atol=1e-6
        )
        for name, value in expected_state.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(found_state[name], value)
            else:
                assert found_state[name] == value, name
        stores = [
            load_file(each / "activations_store_state.safetensors")
            for each in (found, expected)
        ]
        assert stores[0] == stores[1]


def test_any_number_of_processes_goes_on(
    of_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint,) = of_two.glob("checkpoints/*/2304")
    changes = {"resume_from_checkpoint": checkpoint, "n_checkpoints": 0}
    of_four = tmp_path / "of_four"
    of_four.mkdir()
    process = forked(4, options(of_four, **changes), of_four)
    assert process.wait() == 0, process.stderr
    assert (of_four / "sae" / "cfg.json").exists()
    train_here(monkeypatch, tmp_path, **changes)
    assert_same_sae(of_four / "sae", tmp_path / "sae")
    assert state(checkpoint)["n_training_samples"] == 2304


def test_a_process_that_is_killed_ends_all_and_auto_goes_on(tmp_path: Path) -> None:
    args = options(tmp_path, resume_from_checkpoint="auto", training_tokens=8192)
    args.remove("--n_checkpoints=3")
    end = f"1:19:{signal.SIGKILL}"
    process = forked(2, args, tmp_path, max_restarts=1, END=end)
    assert process.wait() == 0, process.stderr
    said = process.stderr
    (line,) = lines_of(said)
    ended = "saelens-scaffold train: interrupted. Another process of the training has ended."
    assert line.startswith(f"{ended} To go on from checkpoints/"), said
    assert line.endswith("/4608, repeat the command")
    # the second attempt, which left nothing
    assert (tmp_path / "sae" / "cfg.json").exists(), said
    assert "| 4608/8192" in said
    assert not (tmp_path / "checkpoints").exists()


def test_ctrl_c_leaves_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = forked(2, options(tmp_path, training_tokens=10**8), tmp_path)
    # the progress bar at step 100
    process.wait_until(lambda: "100|" in process.stderr)
    process.send_signal(signal.SIGINT)
    assert process.wait() != 0
    (line,) = lines_of(process.stderr)
    found = re.search(r"interrupted. To go on, .* --resume_from_checkpoint (\S+)", line)
    assert found is not None, line
    checkpoint = tmp_path / found[1]
    n_samples = state(checkpoint)["n_training_samples"]
    assert n_samples >= 100 * 256
    train_here(
        monkeypatch,
        tmp_path,
        resume_from_checkpoint=checkpoint,
        training_tokens=n_samples + 256,
    )


def test_what_cannot_be_sharded_is_said_once(tmp_path: Path) -> None:
    process = forked(2, options(tmp_path, kernels="reference"), tmp_path)
    assert process.wait() == 1
    said = process.stderr
    (line,) = lines_of(said)
    assert line.startswith("saelens-scaffold train: error: kernels is 'reference'")
    assert re.findall(r"exitcode +: (-?\d+)", said).count("2") >= 1
    # of our own; torchrun's begin with where they are from
    assert not re.search("^Traceback", said, re.MULTILINE)
    assert "Loading weights" not in said


def _wait_in_vain() -> None:
    Processes.patience = 0.1
    with interruptible():
        Processes()


def test_a_process_that_waits_for_one_that_has_ended_ends() -> None:
    group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    process = Forked(_wait_in_vain, environment={**group, "MASTER_PORT": "0"})

    def is_waiting() -> bool:
        """Where PyTorch listens for the other process, and none of Python runs."""
        found = (
            each for each in psutil.net_connections("tcp") if each.pid == process.pid
        )
        return any(each.status == psutil.CONN_LISTEN for each in found)

    process.wait_until(is_waiting)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130, process.stderr
    said = "saelens-scaffold train: interrupted. Another process of the training has ended."
    assert lines_of(process.stderr) == [said]


class OneOf:
    """Stands for this process among several, whose activations are all zero."""

    is_first, rank, world_size = True, 0, 3

    def first(self, value: Any) -> Any:
        return value

    def send_from(self, _: int, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def raise_if_interrupted(self) -> None:
        pass

    def device(self, field: str, device: str) -> str:
        return device


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kernels", "reference"),
        ("compile_sae", "True"),
        ("prefetch_llm_batches", "True"),
        ("from_pretrained_path", "somewhere"),
        ("k", "150"),
    ],
)
def test_what_cannot_be_sharded(field: str, value: str, tmp_path: Path) -> None:
    cfg = _parse(options(tmp_path, **{field: value}))
    with pytest.raises(UserError, match=f"^{field} "):
        check_sharded(cfg, OneOf())  # type: ignore[arg-type]


@pytest.mark.parametrize("n_read", [*range(1, 8)])
def test_text_that_was_read_ahead_is_put_back(n_read: int) -> None:
    rows = Dataset.from_dict({"tokens": [[i] * 16 for i in range(11)]})
    model, made = load_embedded_model(), []
    for store_class in (ActivationsStore, SharedActivationsStore):
        store = store_class(
            model,
            rows.to_iterable_dataset(),
            streaming=True,
            hook_name="blocks.0.hook_resid_pre",
            hook_head_index=None,
            context_size=16,
            d_in=256,
            n_batches_in_buffer=16,
            total_training_tokens=1024,
            store_batch_size_prompts=2,
            train_batch_size_tokens=16,
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
        )
        store.processes = OneOf()  # type: ignore[attr-defined]
        made.append(store)
    alone, shared = made
    first = [store.iterable_sequences for store in made]
    with pytest.warns(UserWarning) if n_read > 5 else nullcontext():
        for batches in (store._iterate_filtered_activations() for store in made):
            for _ in range(n_read):
                next(batches)
    for again in range(3):
        shared.put_back()
        assert shared.state_dict() == alone.state_dict()
        # to the end of the epoch, and no further
        is_first = [s.iterable_sequences is f for s, f in zip(made, first, strict=True)]
        assert is_first[0] == is_first[1]
        for _ in range(again):
            tokens = [store.get_batch_tokens() for store in made]
            assert torch.equal(*tokens)
            assert shared.state_dict() == alone.state_dict()
        for store in made:
            next(store._iterate_filtered_activations())
