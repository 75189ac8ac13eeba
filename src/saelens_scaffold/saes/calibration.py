"""The threshold of the inference form: the one at which k sparse latents fire per token.

SAELens's BatchTopK SAEs keep a running average of each batch's smallest active value, and
save it as the JumpReLU threshold. It starts at 0 and moves by `topk_threshold_lr` a step,
so after a few hundred steps it is still too low, and the saved SAE fires far more than k
latents. Here the threshold is found from the activations trained on last, with the weights
as they are now. benchmarks/README.md compares the estimators.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from safetensors.torch import load_file, save_file

N_RECENT_TOKENS = 8192
"""Tokens that a threshold is calibrated on."""

# Pre-activations held at once.
_BLOCK_ELEMENTS = 2**24


class RecentActivations:
    """
    Copies of the activations that an SAE was trained on last.

    Copies, since batches are views of the store's buffer, which they would keep alive.

    Args:
        n_tokens: How many are kept at least, in whole batches; of a larger batch, so
            many.
    """

    def __init__(self, n_tokens: int = N_RECENT_TOKENS):
        self.n_tokens = n_tokens
        self._batches: deque[torch.Tensor] = deque()

    @torch.no_grad()
    def add(self, x: torch.Tensor) -> None:
        """
        Keep a batch, and let go of the oldest.

        Args:
            x: Activations, shape (n_tokens, ...).
        """
        self._batches.append(x[: self.n_tokens].detach().clone())
        while len(self) - len(self._batches[0]) >= self.n_tokens:
            self._batches.popleft()

    def clear(self) -> None:
        """Let go of all."""
        self._batches.clear()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._batches)

    def __len__(self) -> int:
        return sum(map(len, self._batches))


class RecentBatches(Iterator[dict[str, torch.Tensor]]):
    """
    A data provider of `MultiSAETrainer` that remembers what it gave last.

    Args:
        batches: The data provider: dictionaries of activations by hook point.
    """

    def __init__(self, batches: Iterator[dict[str, torch.Tensor]]):
        self._batches = batches
        self.recent: dict[str, RecentActivations] = {}

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = next(self._batches)
        for hook_name, x in batch.items():
            self.recent.setdefault(hook_name, RecentActivations()).add(x)
        return batch

    def save(self, path: Path) -> None:
        """Write what is remembered, as safetensors."""
        save_file(
            {name: torch.cat([*recent]) for name, recent in self.recent.items()}, path
        )

    def load(self, path: Path, batch_size: int) -> None:
        """Remember what `save` wrote, in batches of so many tokens."""
        for hook_name, x in load_file(path).items():
            self.recent[hook_name] = RecentActivations()
            for batch in x.split(batch_size):
                self.recent[hook_name].add(batch)


@torch.no_grad()
def calibrate_threshold(
    sae: BatchTopKTrainingSAE, activations: RecentActivations
) -> None:
    """
    Set an SAE's threshold to that at which k sparse latents fire per token.

    Args:
        sae: A BatchTopK or Matryoshka BatchTopK SAE, plain or with a scaffold.
        activations: In the units that the SAE takes now. Without any, the threshold
            stays as it is, and the SAE's metadata say so.
    """
    if len(activations) > 0:
        sae.topk_threshold.fill_(calibrated_threshold(sae, activations))
    record_calibration(sae, len(activations))


def record_calibration(sae: BatchTopKTrainingSAE, n_tokens: int) -> None:
    """Say in an SAE's metadata what k it was trained for, and where its threshold is from."""
    metadata: Any = sae.cfg.metadata
    metadata.k = float(sae.cfg.k)
    metadata.threshold_calibration = {
        "estimator": "recent_activations" if n_tokens else "running_average",
        "n_tokens": n_tokens,
    }


@torch.no_grad()
def calibrated_threshold(
    sae: BatchTopKTrainingSAE, activations: Iterable[torch.Tensor]
) -> float:
    """
    The threshold above which k sparse latents per token lie, on average.

    It is exact for the activations given: the middle between the last pre-activation
    that is active and the first that is not. 0 if fewer are positive.

    Args:
        sae: A BatchTopK or Matryoshka BatchTopK SAE, plain or with a scaffold.
        activations: Batches of shape (n_tokens, ...), in the units that the SAE takes.
    """
    rank = getattr(sae.cfg, "scaffold_rank", 0)
    batches = [*activations]
    n_active = round(sae.cfg.k * sum(map(len, batches)))
    n_tokens = max(1, _BLOCK_ELEMENTS // sae.cfg.d_sae)
    largest = sae.W_enc.new_empty(0)
    cut = 0.0
    for batch in batches:
        for x in batch.split(n_tokens):
            _, hidden_pre = sae.encode_with_hidden_pre(x.to(sae.W_enc))
            above = hidden_pre[..., rank:]
            largest = torch.cat([largest, above[above > cut]])
            if len(largest) > n_active:
                largest = largest.topk(n_active + 1).values
                cut = float(largest[-1])
    if len(largest) <= n_active:
        return 0.0
    return float(largest[-2:].double().mean())
