"""A stream of activations that several processes compute together."""

import warnings
from collections import deque
from collections.abc import Generator, Iterator

import torch
from sae_lens import ActivationsStore
from sae_lens.training.activations_store import _get_input_token_device
from typing_extensions import override

from saelens_scaffold.training.processes import Processes


class SharedActivationsStore(ActivationsStore):
    """
    Store whose batches of the language model are computed by several processes in turn.

    Each process gets all activations, in the order in which one alone would. The first
    reads the text of a round, a batch for each process; then all run the language model
    at the same time, and send their activations to the others one after another, as they
    are needed.

    So up to W - 1 batches of text are read ahead. Before anything else looks at the
    text, or at the position in it, `put_back` undoes that.

    Attributes:
        processes: The processes, to be set before the first batch.
    """

    processes: Processes
    _round: "deque[tuple[int, torch.Tensor]] | None" = None
    _text: "_Text | None" = None

    def put_back(self) -> None:
        """Put back the text that was read ahead; all processes do so together."""
        self._round = None
        if self._text is not None:
            self.iterable_sequences = self._text  # type: ignore[assignment]
            self._text.put_back()
            self._text = None

    @override
    def _iterate_tokenized_sequences(self) -> "_Text":  # type: ignore[override]
        return _Text(self, super()._iterate_tokenized_sequences())

    @override
    def _iterate_filtered_activations(self) -> Generator[torch.Tensor, None, None]:
        while True:
            if not self._round:
                self._begin_round()
            assert self._round is not None
            rank, tokens = self._round.popleft()
            if self._text is not None:
                self._text.forget(len(tokens))
            if rank == self.processes.rank:
                activations = self._computed
            else:
                n_tokens = len(tokens) * self.training_context_size
                activations = torch.empty(n_tokens, self.d_in, device=self.device)
            activations = self.processes.send_from(rank, activations)
            if self.exclude_special_tokens is not None:
                of_activations = tokens[:, slice(*self.seqpos_slice)].flatten()
                excluded = torch.isin(of_activations, self.exclude_special_tokens)
                activations = activations[~excluded]
            yield activations

    def _begin_round(self) -> None:
        self.processes.raise_if_interrupted()
        is_first, rank = self.processes.is_first, self.processes.rank
        tokens = self.processes.first(self._read() if is_first else None)
        self._round = deque(enumerate(tokens.to(self.device)))
        if rank < len(tokens):
            mine = tokens[rank].to(_get_input_token_device(self.model))
            activations = self.get_activations(mine).to(self.device)
            self._computed = activations.reshape(-1, self.d_in)

    def _read(self) -> torch.Tensor:
        """
        Read the text of a round, to the end of the text at most.

        Returns:
            Tokens on the CPU, shape (n_batches, batch_size, context_size).
        """
        self._begin_text()
        batches: list[torch.Tensor] = []
        try:
            while len(batches) < self.processes.world_size:
                batches.append(self.get_batch_tokens(raise_at_epoch_end=True))
        except StopIteration:
            if not batches:  # as SAELens does, in its words
                warnings.warn(
                    "All samples in the training dataset have been exhausted, beginning "
                    "new epoch."
                )
                self._begin_text()
                batches.append(self.get_batch_tokens())
        return torch.stack(batches).cpu()

    def _begin_text(self) -> None:
        assert isinstance(self.iterable_sequences, _Text)
        self._text = self.iterable_sequences
        self._text.keep()


class _Text(Iterator[torch.Tensor]):
    """
    The sequences of tokens of one epoch, of which the last ones can be put back.

    Args:
        store: The store, which counts the rows of the data that it has read.
        sequences: The sequences.
    """

    def __init__(self, store: ActivationsStore, sequences: Iterator[torch.Tensor]):
        self._store, self._sequences = store, sequences
        # with the count of rows after each; the end counts the last row
        self._again: deque[tuple[torch.Tensor | None, int]] = deque()
        self._kept: deque[tuple[torch.Tensor | None, int]] | None = None
        self._n_rows = 0

    def __next__(self) -> torch.Tensor:
        if self._again:
            sequence, self._store.n_dataset_processed = self._again.popleft()
        else:
            sequence = next(self._sequences, None)
        if self._kept is not None:
            self._kept.append((sequence, self._store.n_dataset_processed))
        if sequence is None:
            raise StopIteration
        return sequence

    def keep(self) -> None:
        """Keep what is read from here on, to put it back."""
        self._kept, self._n_rows = deque(), self._store.n_dataset_processed

    def forget(self, n: int) -> None:
        """Forget the first sequences of what is kept."""
        assert self._kept is not None
        for _ in range(n):
            _, self._n_rows = self._kept.popleft()

    def put_back(self) -> None:
        """Put back what is kept, and with it the count of rows."""
        assert self._kept is not None
        self._again.extendleft(reversed(self._kept))
        self._kept, self._store.n_dataset_processed = None, self._n_rows
