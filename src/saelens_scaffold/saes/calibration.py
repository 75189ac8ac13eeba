"""The threshold of the inference form, at which k sparse latents fire per token.

SAELens's BatchTopK SAEs keep a running average of each batch's smallest active value, and
save it as the JumpReLU threshold. It starts at 0 and moves by `topk_threshold_lr` a step, so
after a few hundred steps it is still too low, and the saved SAE fires far more than k
latents. Here the threshold is computed from the final weights, on a sample of all the
training activations, since the last ones may come from a few texts. benchmarks/README.md
compares the estimators.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from safetensors.torch import load_file, save_file

from saelens_scaffold.kernels.selection import TopSelection
from saelens_scaffold.saes.facts import scaffold_rank, tokens_at_once

N_SAMPLED_TOKENS = 8192
"""Number of tokens that a threshold is calibrated on: up to twice this, if there are."""


class ActivationSample:
    """
    Every n-th token of a training, with n doubled whenever the sample grows too large.

    It draws no random numbers, so it does not change the training.

    Args:
        n_tokens: Size of the sample; it is halved when it exceeds twice this.
    """

    def __init__(self, n_tokens: int = N_SAMPLED_TOKENS):
        self._n_tokens = n_tokens
        self.clear()

    @torch.no_grad()
    def add(self, x: torch.Tensor) -> None:
        """
        Sample a batch of the training.

        Args:
            x: Activations, shape (n_tokens, ...).
        """
        # a copy: a view would keep the store's buffer alive
        chosen = x[-self._n_seen % self._step :: self._step].detach().clone()
        self._n_seen += len(x)
        if len(chosen) > 0:
            self._kept.append(chosen)
            self._n_kept += len(chosen)
        while self._n_kept > 2 * self._n_tokens:
            self._kept = [torch.cat(self._kept)[::2].clone()]
            self._n_kept = len(self._kept[0])
            self._step *= 2

    def clear(self) -> None:
        """Start over with an empty sample."""
        self._kept: list[torch.Tensor] = []
        self._n_kept, self._n_seen, self._step = 0, 0, 1

    def state(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The sample and its counters, for `load_state`."""
        counts = torch.tensor([self._n_seen, self._step])
        return torch.cat(self._kept), counts

    def load_state(self, sample: torch.Tensor, counts: torch.Tensor) -> None:
        """Continue from a `state`."""
        self._kept, self._n_kept = [sample], len(sample)
        self._n_seen, self._step = counts.tolist()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._kept)

    def __len__(self) -> int:
        return self._n_kept


class SampledBatches(Iterator[dict[str, torch.Tensor]]):
    """
    A data provider for `MultiSAETrainer` that samples its batches.

    Args:
        batches: The data provider: dictionaries of activations by hook point.

    Attributes:
        samples: Sample of each hook point.
    """

    def __init__(self, batches: Iterator[dict[str, torch.Tensor]]):
        self._batches = batches
        self.samples: dict[str, ActivationSample] = {}

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = next(self._batches)
        for hook_name, x in batch.items():
            self.samples.setdefault(hook_name, ActivationSample()).add(x)
        return batch

    def save(self, path: Path) -> None:
        """Write the samples as safetensors."""
        tensors: dict[str, torch.Tensor] = {}
        for hook_name, sample in self.samples.items():
            tensors[hook_name], tensors[f"{hook_name}.counts"] = sample.state()
        save_file(tensors, path)

    def load(self, path: Path, device: str) -> None:
        """Continue from a file that `save` wrote."""
        tensors = load_file(path, device=device)
        for hook_name in tensors:
            if f"{hook_name}.counts" in tensors:
                sample = self.samples.setdefault(hook_name, ActivationSample())
                sample.load_state(tensors[hook_name], tensors[f"{hook_name}.counts"])


@torch.no_grad()
def calibrate_threshold(
    sae: BatchTopKTrainingSAE, activations: ActivationSample
) -> None:
    """
    Set an SAE's threshold so that k sparse latents fire per token.

    Args:
        sae: A BatchTopK or Matryoshka BatchTopK SAE, plain or with a scaffold.
        activations: At the scale that the SAE takes now. If empty, the threshold stays,
            and the SAE's metadata say so.
    """
    if len(activations) > 0:
        sae.topk_threshold.fill_(calibrated_threshold(sae, activations))
    record_calibration(sae, len(activations))


def record_calibration(sae: BatchTopKTrainingSAE, n_tokens: int) -> None:
    """Write k and the estimator of the threshold into an SAE's metadata."""
    metadata: Any = sae.cfg.metadata
    metadata.k = float(sae.cfg.k)
    metadata.threshold_calibration = {
        "estimator": "training_activations" if n_tokens else "running_average",
        "n_tokens": n_tokens,
    }


@torch.no_grad()
def calibrated_threshold(
    sae: BatchTopKTrainingSAE, activations: Iterable[torch.Tensor]
) -> float:
    """
    The threshold that on average k sparse latents per token exceed.

    Args:
        sae: A BatchTopK or Matryoshka BatchTopK SAE, plain or with a scaffold.
        activations: Batches of shape (n_tokens, ...), at the scale that the SAE takes.
    """
    # at once: a long training is sampled in thousands of batches of few tokens
    tokens = torch.cat([*activations])
    blocks = tokens.split(tokens_at_once(sae))
    own, sae.activation_fn = sae.activation_fn, torch.nn.Identity()  # selects nothing
    try:
        encoded = (sae.encode_with_hidden_pre(x.to(sae.W_enc))[1] for x in blocks)
        of_dictionary = (h[..., scaffold_rank(sae) :] for h in encoded)
        selection = getattr(sae, "selection", None)
        return threshold_at_l0(sae.cfg.k, of_dictionary, len(tokens), selection)
    finally:
        sae.activation_fn = own


@torch.no_grad()
def threshold_at_l0(
    l0: float,
    pre_activations: Iterable[torch.Tensor],
    n_tokens: int,
    selection: TopSelection | None = None,
) -> float:
    """
    The threshold that on average l0 latents per token exceed.

    It is exact for these pre-activations: the midpoint between the last active one and the
    first inactive one. 0 if fewer are positive.

    Args:
        l0: Active latents per token.
        pre_activations: In batches, of any shape.
        n_tokens: Number of tokens.
        selection: Knows where the other latents are, if these are not all.
    """
    n_active = round(l0 * n_tokens)
    largest = torch.empty(0)
    cut = 0.0
    for above in pre_activations:
        largest = torch.cat([largest.to(above), above[above > cut]])
        # seldom, since it takes longer than to collect them
        if len(largest) > 2 * n_active:
            largest = largest.topk(n_active + 1).values
            cut = float(largest[-1])
    cut_of = (selection or TopSelection()).cut
    first_inactive = cut_of(largest, n_active + 1)
    last_active = cut_of(largest, max(n_active, 1))
    return (last_active + first_inactive) / 2 if first_inactive > 0 else 0.0
