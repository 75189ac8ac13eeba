"""Tasks on the machines of a Ray cluster."""

import io
import logging
import os
import re
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import ray
from ray import exceptions
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm
from typing_extensions import override

from saelens_scaffold._util.errors import UserError, one_line
from saelens_scaffold._util.files import make_writable, workspace
from saelens_scaffold._util.interruption import hold_interruptions
from saelens_scaffold._util.provenance import versions
from saelens_scaffold._util.tasks import Done, Reporter, Task, TaskQueue, Workers

LOCAL = "local"
"""Ray's address of a cluster that is started on this machine."""

MAX_RETRIES = 10
"""Times that another worker takes up the task of one that died."""

_SECONDS_BETWEEN_REPORTS = 2.0
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_CONNECT = 10.0
_SECONDS_TO_STOP = 10.0
_OBJECT_STORE_BYTES = 100 << 20  # tasks hand over results, and no tensors


class TaskFailedError(RuntimeError):
    """A task raised an error that the user cannot mend, or its workers died."""


@contextmanager
def connected(
    address: str, device: str | None, cpus_per_task: int | None
) -> Iterator["Cluster"]:
    """
    A cluster, which ends with the block if it is started here.

    Args:
        address: As `ray.init` takes it. A cluster that this process is connected to
            already is used as it is.
        device: As for `Cluster`.
        cpus_per_task: As for `Cluster`.

    Raises:
        UserError: There is no such cluster, or it has no such machines.
    """
    is_ours = not ray.is_initialized()
    if is_ours:
        _connect(address)
    try:
        cluster = Cluster(device, cpus_per_task)
        try:
            yield cluster
        finally:
            cluster.stop()
    finally:
        if is_ours:
            ray.shutdown()


def _connect(address: str) -> None:
    """
    Raises:
        UserError: There is no such cluster.
    """
    # Ray tells its makers otherwise
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # a wave that memory does not hold is halved, not tried for ever
    os.environ.setdefault("RAY_task_oom_retries", "0")
    settings: dict[str, Any] = {}
    if address == LOCAL:
        settings["include_dashboard"] = False
        settings["object_store_memory"] = _OBJECT_STORE_BYTES
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address not in (LOCAL, "auto"):
            # Ray tries for minutes
            at = urlsplit(address if "://" in address else f"//{address}")
            where = (at.hostname or "", at.port or 0)
            socket.create_connection(where, _SECONDS_TO_CONNECT).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **settings)
    except (OSError, RuntimeError, ValueError) as error:
        problem = f"--ray {address}: no Ray cluster there, or one with a token, which "
        problem += f"RAY_AUTH_MODE=token sends: {one_line(error):.500}"
        raise UserError(problem) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's ends the process at once


class _Setting(NamedTuple):
    """What tasks share with the process that started them."""

    folder: Path
    marker: Path
    working_directory: str
    warning_filters: list[Any]
    log_levels: dict[str, int]


class Cluster(Workers):
    """
    Workers on the machines of the Ray cluster that this process is connected to.

    A task whose worker dies is begun again by another. Workers show nothing: what they
    write to stdout or stderr is shown here, a line that several write once.

    Args:
        device: "cpu" or "cuda"; by default GPUs if the cluster has some.
        cpus_per_task: CPU cores, and threads, of a task; by default $OMP_NUM_THREADS, else
            one, or where there are GPUs, each GPU's share of its machine's.

    Raises:
        UserError: No machine is large enough.
    """

    def __init__(self, device: str | None = None, cpus_per_task: int | None = None):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        with_gpus = [node for node in nodes if node.get("GPU")]
        self.device = device or ("cuda" if with_gpus else "cpu")
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"--device {device}: with --ray it must be cpu or cuda")
        self._n_gpus = int(self.device == "cuda")
        if self._n_gpus and not with_gpus:
            raise UserError("--device cuda: the cluster has no GPU")
        nodes = with_gpus if self._n_gpus else nodes
        self._n_cpus = cpus_per_task or _default_cpus(nodes, bool(self._n_gpus))
        usable = [node for node in nodes if self._n_tasks(node)]
        self.at_once = sum(map(self._n_tasks, usable))
        if not usable:
            most = max(int(node.get("CPU", 0)) for node in nodes)
            problem = f"--cpus_per_task {self._n_cpus}: no machine of the cluster has"
            raise UserError(f"{problem} so many cores; the largest has {most}")
        # a task that needs more gets a machine of its own
        self._most_bytes = min(int(node.get("memory", 0)) for node in usable)
        self._messages = Queue(actor_options={"num_cpus": 0, "max_restarts": -1})
        self._running: dict[Any, Task] = {}
        self._said: set[str] = set()
        self._setting: _Setting

    def _n_tasks(self, node: dict[str, float]) -> int:
        """Number of tasks that a machine does at once."""
        by_cpus = int(node.get("CPU", 0)) // self._n_cpus
        return min(by_cpus, int(node.get("GPU", 0))) if self._n_gpus else by_cpus

    @override
    @contextmanager
    def sharing(self, folder: Path) -> Iterator[None]:
        """
        Where tasks read and write a folder.

        Raises:
            UserError: A machine does not see it, or has other versions of packages, or it
                cannot be written.
        """
        make_writable(folder)
        with workspace(folder / "cluster") as marker:
            self._setting = _Setting(
                folder.resolve(),
                marker.resolve(),
                os.getcwd(),
                [*warnings.filters],
                {
                    name: logging.getLogger(name).level
                    for name in ("sae_lens", "transformer_lens")
                },
            )
            self._check_machines()
            yield

    def _check_machines(self) -> None:
        here = versions()
        found = {}
        for node in ray.nodes():
            if node["Alive"] and self._n_tasks(node["Resources"]):
                at = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                task = Task("", "", "check", _versions)
                name = node["NodeManagerHostname"]
                more = {"scheduling_strategy": at, "num_cpus": 0, "num_gpus": 0}
                found[name] = self._submit(task, **more)
        for name, ref in found.items():
            there, error = self._outcome(ref)
            if error is not None:
                raise error
            for package in here:
                if there.get(package) != here[package]:
                    raise UserError(
                        f"{name} has {package} {there.get(package)}, and this machine "
                        f"{here[package]}; install the same on all"
                    )

    @override
    def run(self, queue: TaskQueue) -> Iterator[Done]:
        try:
            while queue.waiting or self._running:
                while queue.waiting:
                    task = queue.waiting.popleft()
                    self._running[self._submit(task)] = task
                refs = [*self._running]
                ended, _ = ray.wait(refs, timeout=_SECONDS_BETWEEN_LOOKS)
                self._hear(queue)
                for ref in ended:
                    task = self._running.pop(ref)
                    queue.end(task)
                    yield Done(task, *self._outcome(ref))
        except KeyboardInterrupt:
            hold_interruptions()  # one more would leave workers behind
            raise
        finally:
            queue.close()
            self._cancel()

    def _cancel(self) -> None:
        """End what is running, as Ctrl-C would; what does not end soon is killed."""
        refs, self._running = [*self._running], {}
        with suppress(exceptions.RayError):
            for ref in refs:
                ray.cancel(ref)
            if refs:
                ray.wait(refs, num_returns=len(refs), timeout=_SECONDS_TO_STOP)
            for ref in refs:
                ray.cancel(ref, force=True)

    def stop(self) -> None:
        """End all that runs."""
        self._cancel()
        with suppress(exceptions.RayError):
            self._messages.shutdown()

    def _submit(self, task: Task, **more: Any) -> Any:
        environment = {"OMP_NUM_THREADS": str(self._n_cpus), "TQDM_DISABLE": "1"}
        if self._n_gpus:  # as in one process
            environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        options: dict[str, Any] = {
            "name": f"{task.kind} {task.key}",  # also of the process
            "num_cpus": self._n_cpus,
            "num_gpus": self._n_gpus,
            "memory": min(task.n_bytes, self._most_bytes) or None,
            "max_retries": MAX_RETRIES,
            "runtime_env": {"env_vars": environment},
            **more,
        }
        # a process that has looked for GPUs finds no others later, and keeps their memory
        work = ray.remote(max_calls=self._n_gpus)(_work).options(**options)
        about = (id(task), task.amount)
        return work.remote(task.call, about, self._setting, self._messages)

    def _outcome(self, ref: Any) -> tuple[Any, Exception | None]:
        """What a task returned, and what it raised."""
        try:
            value, error = ray.get(ref)
        except exceptions.OutOfMemoryError as lost:
            return None, MemoryError(one_line(lost))
        except exceptions.RayError as lost:
            return None, TaskFailedError(f"Ray: {one_line(lost):.500}")
        if error is None or isinstance(error, UserError):
            return value, error
        text, trace = error
        self._say(trace)
        return None, TaskFailedError(text)

    def _hear(self, queue: TaskQueue) -> None:
        """Show what workers say."""
        with suppress(exceptions.RayError):
            found = self._messages.get_nowait_batch(self._messages.size())
            tasks = {id(task): task for task in self._running.values()}
            for key, what, *about in found:
                if what == "line":
                    self._say(*about)
                elif task := tasks.get(key):
                    getattr(queue, what)(task, *about)

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            tqdm.write(line, file=sys.stderr)


def _default_cpus(nodes: list[dict[str, float]], has_gpus: bool) -> int:
    """Cores of a task on these machines."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads):
        return int(threads)
    if not has_gpus:
        return 1
    return max(1, min(int(node.get("CPU", 1) // node["GPU"]) for node in nodes))


def _versions(_: Reporter) -> dict[str, str]:
    return versions()


class _Lines(io.TextIOBase):
    """A text stream, of which each line is sent, but not progress bars."""

    def __init__(self, send: Callable[[str], None]):
        self._send, self._text = send, ""

    @override
    def write(self, text: str, /) -> int:
        *lines, self._text = (self._text + text).split("\n")
        for line in lines:
            line = line.rpartition("\r")[2]
            if line.strip() and not re.search(r"\d%\|", line):
                self._send(line)
        return len(text)


def _work(
    call: Callable[[Reporter], Any],
    about: tuple[int, int],
    setting: _Setting,
    messages: Any,
) -> tuple[Any, Any]:
    """Do a task in a worker; return its value, and its error as far as it can be sent."""
    if not setting.marker.is_dir():
        where = f"{socket.gethostname()} does not see {setting.folder}"
        return None, UserError(
            f"{where}; --output_path must be a folder of all machines"
        )
    with suppress(OSError):  # relative paths are of there
        os.chdir(setting.working_directory)
    warnings.filters[:] = setting.warning_filters  # type: ignore[index]
    for name, level in setting.log_levels.items():
        logging.getLogger(name).setLevel(level)

    key, amount = about

    sent: list[Any] = []

    def tell(what: str, *said: Any) -> None:
        with suppress(Exception):  # a display is not worth a task
            # not waited for: a task that waits gives its cores to others
            sent[:] = [messages.actor.put_nowait.remote((key, what, *said))]

    tell("begin")
    report = Reporter(
        lambda at, amount, seconds, _: tell("advance", at, amount, seconds),
        _SECONDS_BETWEEN_REPORTS,
    )
    lines = _Lines(partial(tell, "line"))
    with redirect_stdout(lines), redirect_stderr(lines):
        try:
            value = call(report)
            report.end(amount)
        except UserError as error:
            return None, UserError(one_line(error))
        except Exception as error:
            text = f"{type(error).__name__}: {one_line(error)}"
            return None, (text, traceback.format_exc())
        finally:
            # before this process may end
            ray.wait(sent, timeout=_SECONDS_TO_CONNECT)
    return value, None
