"""A stream of shuffled activations that can restart at any recorded position."""

from collections.abc import Iterator

import torch
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.mixing_buffer import multi_hook_concat_split_iter
from tqdm.auto import tqdm

from saelens_scaffold._util.interruption import raise_if_interrupted
from saelens_scaffold.training.cached_activations import CachedActivationsStore


class ActivationStream(Iterator[dict[str, torch.Tensor]]):
    """
    Shuffled activations of an `ActivationsStore`, with positions to restart from.

    Args:
        store: An unused store, made by `from_config_multi_hook`.
        seed: Seed of the shuffling.
    """

    def __init__(self, store: ActivationsStore, seed: int):
        self._store = store
        self._seed = seed
        self._llm_batches = store._iterate_filtered_multi_hook_activations()
        self._n_llm_batches = 0
        self._n_begun = 0

    def __next__(self) -> dict[str, torch.Tensor]:
        raise_if_interrupted()
        # A random state of its own: what one SAE draws in a step must not change what
        # the others see.
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random_state)
            batch = next(self._mixed)
            self._random_state = torch.get_rng_state()
        return batch

    def begin(self, n_llm_batches: int = 0, n_begun: int = 0) -> None:
        """
        Start at a position that `begin_anew` returned.

        Args:
            n_llm_batches: Batches of text to skip. They are tokenized; the language model
                does not run on them.
            n_begun: Number of earlier restarts.
        """
        if isinstance(self._store, CachedActivationsStore):
            self._store.skip_llm_batches(n_llm_batches)
        elif n_llm_batches:
            for _ in tqdm(range(n_llm_batches), desc="Skipping text read before"):
                # as SAELens reads: an incomplete batch at the end of the text is dropped
                try:
                    self._store.get_batch_tokens(raise_at_epoch_end=True)
                except StopIteration:
                    self._store.get_batch_tokens()
        self._n_llm_batches, self._n_begun = n_llm_batches, n_begun
        self._begin_here()

    def begin_anew(self) -> dict[str, int]:
        """
        Drop the contents of the buffer, and restart with the text that comes next.

        Returns:
            The position, as arguments of `begin`.
        """
        self._n_begun += 1
        self._begin_here()
        return {"n_llm_batches": self._n_llm_batches, "n_begun": self._n_begun}

    def _begin_here(self) -> None:
        # far apart, so that runs with neighbouring seeds share no random numbers
        torch.manual_seed(self._seed + 1_000_003 * self._n_begun)
        self._random_state = torch.get_rng_state()
        store = self._store
        assert store._hook_names is not None
        self._mixed = multi_hook_concat_split_iter(
            buffer_size=store.n_batches_in_buffer * store.training_context_size,
            batch_size=store.train_batch_size_tokens,
            activations_loader=self._counted(),
            hook_names=list(store._hook_names),
            mix_fraction=store.activations_mixing_fraction,
        )

    def _counted(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self._llm_batches:
            self._n_llm_batches += 1
            yield batch
