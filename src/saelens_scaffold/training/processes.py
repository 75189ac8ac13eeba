"""The processes of one training, as torchrun starts them, and how they end together."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.interruption import hold_interruptions, is_interrupted
from saelens_scaffold.sharding.shard import Shard

# Others wait for the first process while it measures and writes files. One that has ended
# is noticed at once, by its closed connections.
_LONGEST_WAIT = timedelta(hours=6)

LOST = "Another process of the training has ended."


class Processes:
    """
    This process, and the others of the same training.

    Attributes:
        rank: This process's number.
        world_size: Number of processes.
        shard: This process's part of the dictionary, once connected.
        hint: How to go on if the training ends now.
        patience: Seconds in which a process that is told to end notices it, unless it
            waits for one that has ended. torchrun kills it after 30.
    """

    shard: Shard
    hint: Callable[[], str] = staticmethod(lambda: "")
    patience: float = 20.0
    _on_cpu: Any
    _device: torch.device

    def __init__(self) -> None:
        self.rank = int(os.environ["RANK"])
        self._store = None
        self._end_when_stuck()
        # torchrun's, which outlives the processes, and has what those before a restart said
        store, _, self.world_size = next(rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = PrefixStore(attempt, store)

    @classmethod
    def of_torchrun(cls) -> "Processes | None":
        """The processes that torchrun has started; None if this is the only one."""
        is_started = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
        return cls() if is_started else None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reads text, reports and saves."""
        return self.rank == 0

    def device(self, field: str, device: str) -> str:
        """
        This process's device of a kind.

        Args:
            field: The option.
            device: Its value, "cpu" or "cuda".

        Raises:
            UserError: It is another, or not there for each process of this machine.
        """
        if device not in ("cpu", "cuda"):
            raise UserError(
                f"{field} is {device!r}; for several processes it must be 'cpu' or 'cuda', "
                "each process's own"
            )
        local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        if device == "cpu":
            return device
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{field} is 'cuda'; process {local_rank} of this machine has no GPU, of "
                f"which there are {torch.cuda.device_count()}"
            )
        return f"cuda:{local_rank}"

    def connect(self, device: str) -> None:
        """Connect all processes, which train on this device and its like."""
        self._device = torch.device(device)
        backend = "gloo"
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            backend = "nccl"
        group: dict[str, Any] = {"rank": self.rank, "world_size": self.world_size}
        dist.init_process_group(backend, store=self._store, **group)
        # for waiting, which must not occupy a GPU
        self._on_cpu = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
        self.shard = Shard()

    def first(self, value: Any) -> Any:
        """The first process's value."""
        values = [value]
        dist.broadcast_object_list(values, group=self._on_cpu)
        return values[0]

    def all(self, value: Any) -> list[Any]:
        """The values of all processes."""
        values = [value] * self.world_size
        dist.all_gather_object(values, value, group=self._on_cpu)
        return values

    def send_from(self, rank: int, tensor: torch.Tensor) -> torch.Tensor:
        """One process's tensor; the others give one of its shape and type."""
        sent = tensor.to(self._device)
        dist.broadcast(sent, rank)
        return sent.to(tensor.device)

    def wait(self) -> None:
        """Wait for all processes, which may be long, and notice signals meanwhile."""
        waiting = dist.barrier(group=self._on_cpu, async_op=True)
        while not waiting.is_completed():
            time.sleep(0.1)
        waiting.wait()

    def raise_if_interrupted(self) -> None:
        """
        Raise the interruption that one of the processes remembers, on all of them.

        Raises:
            KeyboardInterrupt: There was one.
        """
        n_interrupted = torch.tensor(int(is_interrupted()))
        dist.all_reduce(n_interrupted, group=self._on_cpu)
        if n_interrupted:
            raise KeyboardInterrupt

    def share_random_state(self) -> None:
        """Go on with the first process's random numbers."""
        torch.set_rng_state(self.first(torch.get_rng_state()))

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """
        Speak with one voice: what the first process prints is seen, and one error.

        Raises:
            SystemExit: There was an error, and another process has said so.
        """
        try:
            with ExitStack() as stack:
                if not self.is_first:
                    nowhere = stack.enter_context(open(os.devnull, "w"))
                    stack.enter_context(redirect_stdout(nowhere))
                    stack.enter_context(redirect_stderr(nowhere))
                    logging.disable()
                    os.environ["WANDB_MODE"] = "disabled"
                yield
        except SystemExit:  # help, which the first process has printed
            raise
        except BaseException as error:
            hold_interruptions()  # of torchrun, which ends all when one has ended
            if not isinstance(error, KeyboardInterrupt) and _is_lost(error):
                error = KeyboardInterrupt(LOST)
            if not self._is_first_to_speak():
                of_interruption = 130 if isinstance(error, KeyboardInterrupt) else 1
                status = getattr(error, "exit_status", of_interruption)
                raise SystemExit(status) from None
            raise error
        if dist.is_initialized():
            dist.destroy_process_group()

    def _is_first_to_speak(self) -> bool:
        if self._store is None:
            return self.is_first
        try:
            return self._store.add("spoken", 1) == 1
        except RuntimeError:  # without torchrun it is the first process's, and gone
            return True

    def _end_when_stuck(self) -> None:
        """
        End this process on SIGTERM where it waits in PyTorch, in which no handler of
        Python runs, for a process that has ended.
        """
        signals, written_to = socket.socketpair()
        written_to.setblocking(False)
        signal.set_wakeup_fd(written_to.detach(), warn_on_full_buffer=False)

        def watch() -> None:
            while signals.recv(1) != bytes([signal.SIGTERM]):
                pass
            time.sleep(self.patience)
            if is_interrupted():
                return
            if self._is_first_to_speak():
                said = (
                    f"saelens-scaffold train: interrupted. {LOST} {self.hint()}".strip()
                )
                print(f"\n{said}", file=sys.__stderr__, flush=True)
            os._exit(130)

        threading.Thread(target=watch, daemon=True).start()


@contextmanager
def noticing_lost_processes() -> Iterator[None]:
    """
    Raises:
        KeyboardInterrupt: Another process has ended.
    """
    try:
        yield
    except (KeyboardInterrupt, RuntimeError) as error:
        # of torchrun, which ends all when one has ended
        hold_interruptions()
        if _is_lost(error):
            raise KeyboardInterrupt(LOST) from None
        raise


def _is_lost(error: BaseException | None) -> bool:
    """Whether an error comes from the end of another process."""
    while error is not None:
        of_group = isinstance(error, dist.DistError) or "gloo" in str(error)
        if isinstance(error, RuntimeError) and of_group:
            return True
        error = error.__context__
    return False
