"""One process's part of a dictionary, and its communication with the others."""

from collections.abc import Iterable

import torch
import torch.distributed as dist

State = dict[str, torch.Tensor]


class Shard:
    """
    One of W parts of a dictionary.

    Part p has the latents p, p + W, p + 2W, ... of the dictionary, so that each prefix of
    it, as a Matryoshka level is, is spread evenly.

    The methods that communicate are called by all processes, in the same order. They take
    tensors on any device, with gloo as with nccl.

    Args:
        group: The processes, as in torch.distributed; None means all of them. Without
            `torch.distributed.init_process_group`, there is one process.

    Attributes:
        rank: This process's number p.
        world_size: Number of processes W.
        bytes_sent: Bytes of all tensors that this process has handed to collective
            operations. (What a network carries depends on their algorithm: a ring sends
            2 (W - 1) / W of a sum's bytes from each process.)
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._group = group
        self._is_alone = not dist.is_initialized()
        self.rank = 0 if self._is_alone else dist.get_rank(group)
        self.world_size = 1 if self._is_alone else dist.get_world_size(group)
        self.bytes_sent = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reports and saves."""
        return self.rank == 0

    def latents(
        self, d_sae: int, scaffold_rank: int, of: int | None = None
    ) -> torch.Tensor:
        """
        The latents of this part, or of another, ascending.

        Args:
            d_sae: Number of latents of the whole SAE, those of the scaffold included.
            scaffold_rank: Number of those of the scaffold, which every part has.
            of: Number of the part; None means this one.
        """
        part = self.rank if of is None else of
        dictionary = torch.arange(scaffold_rank + part, d_sae, self.world_size)
        return torch.cat([torch.arange(scaffold_rank), dictionary])

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        return self._reduce_(tensor, dist.ReduceOp.SUM)

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The maximum over all processes, in place."""
        return self._reduce_(tensor, dist.ReduceOp.MAX)

    def min_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The minimum over all processes, in place."""
        return self._reduce_(tensor, dist.ReduceOp.MIN)

    def broadcast_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first process's tensor, in place."""
        if self.world_size > 1:
            self._count(tensor)
            sent = self._sendable(tensor)
            dist.broadcast(sent, self._global(0), self._group)
            _copy(sent, tensor)
        return tensor

    def gather(self, state: State) -> list[State] | None:
        """The tensors of each process, on the CPU of the first; None on the others."""
        if not self.is_first:
            self._send(state, to=0)
            return None
        others = (self._receive(each) for each in range(1, self.world_size))
        return [{name: t.cpu() for name, t in state.items()}, *others]

    def scatter(self, states: Iterable[State] | None) -> State:
        """
        This process's tensors, on the CPU, from the first process.

        Args:
            states: Tensors of each process in turn; None on other processes than the first.
        """
        if states is None:
            return self._receive(0)
        states = iter(states)  # one at a time, for they may be large
        own = next(states)
        for to, state in enumerate(states, start=1):
            self._send(state, to)
        return own

    def _reduce_(
        self, tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType
    ) -> torch.Tensor:
        if self.world_size > 1:
            self._count(tensor)
            sent = self._sendable(tensor)
            dist.all_reduce(sent, operation, self._group)
            _copy(sent, tensor)
        return tensor

    def _send(self, state: State, to: int) -> None:
        kinds = [(name, t.shape, t.dtype) for name, t in state.items()]
        dist.send_object_list([kinds], self._global(to), self._group, self._device)
        for tensor in state.values():
            self._count(tensor)
            dist.send(self._sendable(tensor), self._global(to), self._group)

    def _receive(self, sender: int) -> State:
        kinds: list = [None]
        dist.recv_object_list(kinds, self._global(sender), self._group, self._device)
        state: State = {}
        for name, shape, dtype in kinds[0]:
            tensor = torch.empty(shape, dtype=dtype, device=self._device)
            dist.recv(tensor, self._global(sender), self._group)
            state[name] = tensor.cpu()
        return state

    @property
    def _device(self) -> torch.device:
        """Where nccl needs tensors to be, and gloo may have them."""
        on_gpu = dist.get_backend(self._group) == "nccl"
        return torch.device("cuda" if on_gpu else "cpu")

    def _sendable(self, tensor: torch.Tensor) -> torch.Tensor:
        # gloo takes tensors on a GPU, too, but not in all operations
        return tensor.detach().to(self._device).contiguous()

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self._group or dist.group.WORLD, rank)  # type: ignore[arg-type]

    def _count(self, tensor: torch.Tensor) -> None:
        self.bytes_sent += tensor.numel() * tensor.element_size()


def _copy(sent: torch.Tensor, tensor: torch.Tensor) -> None:
    if sent.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(sent)
