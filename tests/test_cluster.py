"""A comparison whose waves and evaluations are done by the workers of a Ray cluster."""

import json
import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
import yaml

from forked import PATIENCE, Forked, main_of
from helpers import scaffold_sae
from saelens_scaffold._util import cluster as clusters
from saelens_scaffold._util.cluster import TaskFailedError
from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.tasks import Done, Reporter, Task, TaskQueue, Workers
from saelens_scaffold._util.workers import connected
from saelens_scaffold.compare import compare, experiment, read_config, training
from saelens_scaffold.compare.experiment import EvaluationsFailed
from saelens_scaffold.compare.grid import runs_of
from saelens_scaffold.compare.training import WaveFolder, plan_waves
from saelens_scaffold.demo.planted import planted_half, planted_settings
from saelens_scaffold_cli import main
from test_compare import SMALL, findings

EXPERIMENT: dict[str, Any] = {
    **SMALL,
    "grid": {
        "architecture": ["batchtopk", "scaffold_batchtopk"],
        "k": [4],
        "scaffold_rank": [2],
        "seed": [0, 1],
    },
    "training": {**SMALL["training"], "training_tokens": 80 * 256, "n_checkpoints": 8},
    "evaluations": {"dense_latents": {"n_tokens": 2000, "n_bootstrap": 20}},
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("cluster") / "experiment.yaml"
    file.write_text(yaml.safe_dump(EXPERIMENT))
    return file


@pytest.fixture(scope="module")
def of_one_process(file: Path) -> Path:
    """The experiment's folder, made by one process."""
    compare(read_config(file), file.with_name("one"))
    return file.with_name("one")


@pytest.fixture(scope="module")
def two_workers() -> Iterator[None]:
    """A cluster of two workers with a core each, which this process is connected to."""
    # workers find this module, of whose functions they are told
    paths = (str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
    settings: Any = {"log_to_driver": False, "logging_level": logging.ERROR}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        # processes take seconds to begin, and serve one test after the other
        keeping = {"idle_worker_killing_time_threshold_ms": 3_600_000}
        keeping |= {"num_workers_soft_limit": 8, "enable_worker_prestart": False}
        settings["_system_config"] = keeping
        ray.init("local", num_cpus=2, include_dashboard=False, **settings)
        yield
        ray.shutdown()


def assert_same(folder: Path, other: Path) -> None:
    """Whether the results are those of the other folder, to the last bit."""
    assert findings(folder) == findings(other)
    files = ["results.csv"]
    files += [str(f.relative_to(other)) for f in other.glob("saes/*/*.safetensors")]
    assert len(files) == 1 + 2 * 4
    for name in files:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    logged = [sorted((of / "training.csv").open()) for of in (folder, other)]
    assert logged[0] == logged[1]
    leftovers = [*folder.glob("**/.*"), *(folder / "training").glob("*/checkpoints")]
    assert not leftovers


def workers(of: int, task: str) -> list[psutil.Process]:
    """Processes started by another that do a task; Ray gives them its name."""
    found = []
    for process in psutil.Process(of).children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(f"ray::{task}"):
                found.append(process)
        except psutil.Error:
            pass
    return found


@contextmanager
def watching(check: Callable[[], bool]) -> Iterator[list[bool]]:
    """Meanwhile something is looked for, until it has been found."""
    found: list[bool] = []
    ended = threading.Event()

    def watch() -> None:
        while not (found or ended.is_set()):
            found.extend([True] * check())
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    yield found
    ended.set()
    thread.join()


def kill(task: str) -> bool:
    found = workers(os.getpid(), task)
    for process in found[:1]:
        process.kill()
    return bool(found)


def test_a_worker_killed_in_training_and_one_in_an_evaluation(
    file: Path,
    of_one_process: Path,
    two_workers: None,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    checkpoints = out / "training/wave-0/checkpoints"

    def has_checkpoint() -> bool:
        return any(checkpoints.glob("*/activation_stream.json"))

    with (
        watching(lambda: has_checkpoint() and kill("training 0")) as in_training,
        watching(lambda: kill("dense_latents")) as in_evaluation,
    ):
        compare(read_config(file), out, ray="local")
    assert in_training
    assert in_evaluation
    said = capfd.readouterr().err
    assert said.count(f"resuming from {checkpoints}") == 1
    assert "2 of 2 waves done" in said
    assert_same(out, of_one_process)
    assert len([*(out / "training").glob("wave-*")]) == 2


def _in_a_session(command: list[str]) -> int:
    """As a shell starts a command, whose processes get a terminal's signals with it."""
    os.setsid()
    return main_of(command)


def test_ctrl_c_and_the_same_again(
    file: Path, of_one_process: Path, two_workers: None, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["compare", str(file), "--output_path", str(out), "--ray"]
    started = Forked(_in_a_session, command)
    checkpoints = "training/wave-*/checkpoints/*/activation_stream.json"
    started.wait_until(lambda: any(out.glob(checkpoints)))
    started_by_ray = psutil.Process(started.pid).children(recursive=True)
    assert started_by_ray
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does
    status, said = started.wait(), started.stderr
    assert status == 130, said
    assert "repeat the command to go on" in said
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(started_by_ray, timeout=PATIENCE)
    assert not alive
    assert any(out.glob(checkpoints))
    assert main(command) == 0
    assert_same(out, of_one_process)


def _say_and_return(value: int, _: Reporter) -> int:
    print("a line of several")
    print("  3%|#    | 1/40", end="\r", file=sys.stderr)
    warnings.warn("a warning of several")
    return value


def _fail(error: Exception, _: Reporter) -> None:
    raise error


def _threads(_: Reporter) -> tuple[int, str]:
    return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


class _Says:
    """A call with an argument, which can be sent."""

    def __init__(self, function: Callable[..., Any], about: Any):
        self.function, self.about = function, about

    def __call__(self, report: Reporter) -> Any:
        return self.function(self.about, report)


def test_tasks_of_a_cluster(
    two_workers: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tasks = [Task(i, "", "says", _Says(_say_and_return, i)) for i in range(3)]
    tasks.append(Task("user", "", "fails", _Says(_fail, UserError("line\nbreak"))))
    tasks.append(Task("defect", "", "fails", _Says(_fail, KeyError("unknown"))))
    tasks.append(Task("threads", "", "counts", _threads))
    with connected("local", cpus_per_task=2) as cluster, cluster.sharing(tmp_path):
        assert cluster.at_once == 1
        queue = TaskQueue(tasks, "task", cluster)
        done = {of.task.key: of for of in cluster.run(queue)}
        assert [done[i].value for i in range(3)] == [0, 1, 2]
        assert isinstance(done["user"].error, UserError)
        assert str(done["user"].error) == "line break"
        assert isinstance(done["defect"].error, TaskFailedError)
        assert "KeyError: 'unknown'" in str(done["defect"].error)
        assert done["threads"].value == (2, "2")
        said = capfd.readouterr().err
        assert said.count("a line of several") == 1
        assert said.count("UserWarning: a warning of several") == 1
        assert "raise error" in said  # the traceback of the defect
        assert "3%" not in said
        assert "6 of 6 tasks done, 0 running" in said
    assert [*tmp_path.iterdir()] == []


def test_a_machine_that_does_not_see_the_folder(
    two_workers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "resolve", lambda _: Path("/not/there"))
    said = "does not see /not/there; --output_path must be a folder of all machines"
    with (
        connected("local") as cluster,
        pytest.raises(UserError, match=said),
        cluster.sharing(tmp_path),
    ):
        raise AssertionError("no task may begin")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"cpus_per_task": 3},
            "no machine of the cluster has so many .* largest has 2",
        ),
        ({"device": "cuda"}, "--device cuda: the cluster has no GPU"),
        ({"device": "cuda:1"}, "--device cuda:1: with --ray it must be cpu or cuda"),
    ],
)
def test_machines_that_a_cluster_does_not_have(
    options: dict[str, Any], said: str, two_workers: None
) -> None:
    with pytest.raises(UserError, match=said), connected("local", **options):
        pass


def test_cores_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    machines: Any = [{"CPU": 96, "GPU": 8}, {"CPU": 20, "GPU": 2}]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert clusters._default_cpus(machines, True) == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert clusters._default_cpus(machines, False) == 1
    assert clusters._default_cpus(machines, True) == 10


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:9", "Connection refused"),
        ("ray://127.0.0.1:9", "Connection refused"),
        ("127.0.0.1:port", "Port could not be cast"),
    ],
)
def test_no_cluster_there(
    address: str,
    reason: str,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert main(["compare", str(file), "--ray", address]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"--ray {address}: no Ray cluster there, .*{reason}", line)


def test_without_the_extra(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["compare", str(file), "--ray"]) == 2
    said = capsys.readouterr().err
    hint = "--ray needs Ray: pip install 'saelens-scaffold[cluster]'"
    assert said == f"saelens-scaffold compare: error: {hint}\n"
    assert main(["compare", str(file), "--cpus_per_task", "2"]) == 2
    assert "--cpus_per_task means nothing without --ray" in capsys.readouterr().err


class FailingOnce(Workers):
    """Two workers, of which one fails at a wave."""

    at_once = 2

    def __init__(self, error: Exception):
        self.error = error

    def run(self, queue: TaskQueue) -> Iterator[Done]:
        if queue.waiting[0].kind == "training":
            yield Done(queue.waiting.popleft(), None, self.error)
        yield from super().run(queue)


def connect_to(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "connected", lambda *_: nullcontext(workers))


def test_a_wave_that_fails_does_not_stop_the_others(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect_to(FailingOnce(TaskFailedError("it\nwas lost")), monkeypatch)
    with pytest.raises(EvaluationsFailed) as failed:
        compare(read_config(file), tmp_path / "out")
    lost = ("batchtopk-k_4-seed_0", "scaffold_batchtopk-k_4-scaffold_rank_2-seed_0")
    reason = "its training failed: it was lost"
    assert "; ".join(f"{name}: {reason}" for name in lost) in str(failed.value)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert {sae["seed"] for sae in results["saes"]} == {1}


def test_a_wave_whose_worker_ran_out_of_memory_is_halved(
    file: Path, of_one_process: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect_to(FailingOnce(MemoryError("the machine's is used up")), monkeypatch)
    compare(read_config(file), tmp_path / "out")
    waves = json.loads((tmp_path / "out/training/waves.json").read_text())
    assert [len(wave) for wave in waves] == [1, 2, 1]
    assert_same(tmp_path / "out", of_one_process)


def test_waves_keep_their_numbers(tmp_path: Path) -> None:
    runs = runs_of(read_config_of(EXPERIMENT, tmp_path))
    names = [run.name for run in runs]
    assert [len(wave) for wave in plan_waves(tmp_path, tmp_path, runs, at_once=2)] == [
        2,
        2,
    ]
    assert [len(w) for w in plan_waves(tmp_path, tmp_path, runs, 1, at_once=2)] == [
        1
    ] * 4
    # the last of three has begun, as where they are trained at once
    (tmp_path / "waves.json").write_text(json.dumps([names[:1], names[1:2], names[2:]]))
    checkpoint = WaveFolder(tmp_path, 2).checkpoints / "256"
    checkpoint.mkdir(parents=True)
    (checkpoint / "activation_stream.json").touch()
    waves = plan_waves(tmp_path, tmp_path, runs)
    assert [[run.name for run in wave] for wave in waves] == [names[:2], [], names[2:]]


def read_config_of(content: dict[str, Any], directory: Path) -> Any:
    file = directory / "experiment.yaml"
    file.write_text(yaml.safe_dump(content))
    return read_config(file)


def test_a_wave_whose_moments_a_gpu_cannot_hold_is_halved_before_its_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sae = scaffold_sae()
    weights = sum(4 * each.numel() for each in sae.parameters())
    free = 3 * 2 * weights  # of two SAEs
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free - 1000, 1 << 40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 4000)
    training._check_memory([sae] * 2, "cuda")
    training._check_memory([sae] * 3, "cpu")
    with pytest.raises(torch.OutOfMemoryError, match=f"needed, {free:,} are free"):
        training._check_memory([sae] * 3, "cuda")


def speak(folder: Path, report: Reporter) -> None:
    """Say much, and see that no other task does meanwhile."""
    folder.mkdir()  # fails if there is one
    for at in range(20):
        report(at)
        print(f"{folder}: {at}")
        time.sleep(0.05)
    folder.rmdir()


def test_tasks_keep_their_cores_while_they_report(
    two_workers: None, tmp_path: Path
) -> None:
    call = partial(speak, tmp_path / "at work")
    tasks = [Task(i, "", "speaking", call, 20) for i in range(3)]
    with connected("local", "cpu", 2) as cluster, cluster.sharing(tmp_path):
        assert cluster.at_once == 1
        done = [*cluster.run(TaskQueue(tasks, "task", cluster))]
    assert [each.error for each in done] == [None] * 3


def test_evaluations_of_eval(
    of_one_process: Path,
    two_workers: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saes = [str(path) for path in sorted((of_one_process / "saes").glob("*"))]
    settings = ["dense_latents.n_tokens=2000", "dark_matter.n_tokens=300"]
    settings += ["dark_matter.n_fit_tokens=400"]
    command = ["eval", "dense_latents,dark_matter", "--dataset", "python-stdlib"]
    command += ["--device", "cpu", "--sae_path", *saes]
    for setting in settings:
        command += ["--set", setting]
    found = []
    for more in [], ["--ray"]:
        out = tmp_path / f"out{len(more)}"
        assert main([*command, "--output_path", str(out), *more]) == 0
        results = [json.loads(f.read_text()) for f in sorted(out.glob("*/*.json"))]
        assert len(results) == 2 * len(saes)
        metrics = [result["eval_result_metrics"] for result in results]
        found.append((metrics, capsys.readouterr().out))
    assert found[0] == found[1]


def test_seeds_of_the_demo(two_workers: None, tmp_path: Path) -> None:
    settings = planted_settings(quick=True)
    settings["training"]["training_samples"] = 10 * settings["training"]["batch_size"]
    halves = [planted_half(settings, [0, 1], tmp_path / "one")]
    with connected("local", "cpu") as cluster, cluster.sharing(tmp_path):
        halves.append(planted_half(settings, [0, 1], tmp_path / "two", cluster))
    assert halves[0] == halves[1]
