"""How many SAEs fit into memory at once, and how long training them takes, estimated."""

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from sae_lens import MultiSAETrainingRunnerConfig, TrainingSAE
from sae_lens.util import str_to_dtype
from transformer_lens.HookedTransformer import DTYPE_FROM_STRING
from transformer_lens.loading_from_pretrained import get_pretrained_model_config

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.compare.config import CompareConfig
from saelens_scaffold.compare.grid import Run
from saelens_scaffold.compare.runner_config import runner_config
from saelens_scaffold.compare.training import ESTIMATED_SCALES
from saelens_scaffold.evals.configs import check_model_name
from saelens_scaffold.evals.language_model import known_model_name
from saelens_scaffold.saes.calibration import N_SAMPLED_TOKENS

GB = 1e9

# Weights, gradients, and Adam's two moments.
_COPIES_OF_WEIGHTS = 4
# Tensors of a batch's pre-activations' size that a training step of SAELens's dense
# BatchTopK holds at its peak; see benchmarks/README.md for how well this agrees.
_COPIES_OF_ACTIVATIONS = 6
# Of these, how many each SAE keeps until its next step: SAELens holds the outputs of all.
_KEPT_ACTIVATIONS = 2
# The store joins and shuffles its buffer, each of which makes a copy.
_COPIES_OF_BUFFER = 3
# Tensors of the residual stream's size that a forward pass of the language model holds,
# its MLP (4 times as wide) included.
_RESIDUAL_STREAMS = 16
# Of what is free: allocators and other programs need some of it.
_USABLE_SHARE = 0.9

# Products of a training step, forward and backward, through encoder and decoder.
_FLOPS_PER_WEIGHT = 6


@dataclass(frozen=True)
class Estimate:
    """
    What an experiment is expected to need.

    Attributes:
        per_sae: Bytes that each SAE needs, by name.
        shared: Bytes needed whatever the number of SAEs: the language model, the buffer
            of activations, and one training step.
        llm_flops: Operations of the language model for one pass over the training text.
        sae_flops: Operations that training each SAE takes, by name.
    """

    per_sae: dict[str, int]
    shared: int
    llm_flops: float
    sae_flops: dict[str, float]

    def waves(self, runs: Sequence[Run], available: int) -> list[list[Run]]:
        """
        Split SAEs into waves, of which each fits into memory.

        SAEs of a wave are trained on one pass of the language model, so all must have
        the same runner.

        Args:
            runs: The SAEs, in the order in which they shall be trained.
            available: Bytes there are.

        Raises:
            UserError: Not even one fits.
        """
        waves: list[list[Run]] = []
        for same in _with_same_runner(runs):
            wave: list[Run] = []
            left = 0
            for run in same:
                needed = self.per_sae[run.name]
                if needed > left:
                    left = available - self.shared
                    if needed > left:
                        raise UserError(
                            f"{run.name} needs about {(self.shared + needed) / GB:.1f} GB "
                            f"for training, and {available / GB:.1f} GB are there; make "
                            "d_sae, train_batch_size_tokens, n_batches_in_buffer or "
                            "store_batch_size_prompts smaller, or give --memory_gb"
                        )
                    wave = []
                    waves.append(wave)
                wave.append(run)
                left -= needed
        return waves

    def seconds(self, waves: Sequence[Sequence[Run]], tflops: float) -> float:
        """
        How long training takes on a device that attains so many TFLOP/s.

        Raises:
            UserError: It attains none.
        """
        check_positive("tflops", tflops)
        saes = sum(self.sae_flops[run.name] for wave in waves for run in wave)
        return (len(waves) * self.llm_flops + saes) / (tflops * 1e12)


def estimate(config: CompareConfig, runs: Sequence[Run]) -> Estimate:
    """
    Estimate what training the SAEs needs, from shapes alone: nothing is loaded.

    Raises:
        UserError: TransformerLens knows no such language model, or it has another
            dimension than the SAEs, or no such layer.
    """
    check_model_name(config.model_name)
    model: Any = get_pretrained_model_config(known_model_name(config.model_name))
    layer = max(_layer(run.hook_name) for run in runs)
    if layer >= model.n_layers:
        raise UserError(
            f"hook_name names layer {layer}; {config.model_name} has the layers 0 to "
            f"{model.n_layers - 1}"
        )
    for run in runs:
        reads_residual_stream = "hook_resid" in run.hook_name
        if reads_residual_stream and run.config.d_in != model.d_model:
            raise UserError(
                f"d_in is {run.config.d_in}; the residual stream of {config.model_name} "
                f"has {model.d_model} dimensions"
            )
    runners = {
        run.name: cfg
        for same in _with_same_runner(runs)
        for cfg in [runner_config(config, same)]
        for run in same
    }
    tokens = max(cfg.training_tokens for cfg in runners.values())
    hook_dims = sum({run.hook_name: run.config.d_in for run in runs}.values())
    scales = any(run.config.normalize_activations in ESTIMATED_SCALES for run in runs)
    pre_activations = {
        run.name: runners[run.name].train_batch_size_tokens
        * run.config.d_sae
        * _itemsize(run.config.dtype)
        for run in runs
    }

    def activations(cfg: MultiSAETrainingRunnerConfig) -> int:
        """Bytes of the activations that are waiting or being made."""
        values = _COPIES_OF_BUFFER * cfg.n_batches_in_buffer * cfg.context_size
        if scales:  # which SAELens keeps to estimate the scale of activations
            values += cfg.n_batches_for_norm_estimate * cfg.train_batch_size_tokens
        values += 2 * N_SAMPLED_TOKENS
        values *= hook_dims
        values += (
            _RESIDUAL_STREAMS
            * cfg.store_batch_size_prompts
            * cfg.context_size
            * model.d_model
        )
        return values * _itemsize(cfg.dtype)

    some_cfg = next(iter(runners.values()))  # the language model is the same for all
    # n_params counts the blocks only
    weights = model.n_params + 2 * model.d_vocab * model.d_model
    shared = (
        weights * _model_itemsize(some_cfg)
        + max(map(activations, runners.values()))
        + _COPIES_OF_ACTIVATIONS * max(pre_activations.values())
    )
    params = {run.name: _n_params(run) for run in runs}
    return Estimate(
        per_sae={
            run.name: _COPIES_OF_WEIGHTS
            * params[run.name]
            * _itemsize(run.config.dtype)
            + _KEPT_ACTIVATIONS * pre_activations[run.name]
            for run in runs
        },
        shared=int(shared),
        # blocks above the hook point are not run
        llm_flops=2.0 * model.n_params * (layer + 1) / model.n_layers * tokens,
        sae_flops={
            name: float(_FLOPS_PER_WEIGHT) * n * runners[name].training_tokens
            for name, n in params.items()
        },
    )


def available_memory(device: str) -> int:
    """Bytes that training may use on a device."""
    kind = torch.device(device).type
    if kind == "cuda":
        free, _ = torch.cuda.mem_get_info(torch.device(device))
    else:
        free = psutil.virtual_memory().available
    return int(_USABLE_SHARE * free)


def check_positive(name: str, value: float) -> None:
    """
    Raises:
        UserError: A number is not above 0, or not finite.
    """
    if not 0 < value < math.inf:
        raise UserError(f"{name} must be a number above 0, got {value!r}")


def _with_same_runner(runs: Sequence[Run]) -> list[list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(repr(sorted(run.training.items())), []).append(run)
    return [*groups.values()]


def _n_params(run: Run) -> int:
    cfg = {**copy.deepcopy(run.config).to_dict(), "device": "meta"}
    return sum(p.numel() for p in TrainingSAE.from_dict(cfg).parameters())


def _itemsize(dtype: str) -> int:
    return str_to_dtype(dtype).itemsize


def _model_itemsize(cfg: MultiSAETrainingRunnerConfig) -> int:
    dtype = (cfg.model_from_pretrained_kwargs or {}).get("dtype", "float32")
    if dtype not in DTYPE_FROM_STRING:
        raise UserError(
            f"training: model_from_pretrained_kwargs has the dtype {dtype!r}; allowed are "
            f"{', '.join(DTYPE_FROM_STRING)}"
        )
    return DTYPE_FROM_STRING[dtype].itemsize


def _layer(hook_name: str) -> int:
    found = re.fullmatch(r"blocks\.(\d+)\..+", hook_name)
    if found is None:
        raise UserError(
            f"hook_name is {hook_name!r}; it must be a hook point of a layer, as in "
            "blocks.12.hook_resid_post"
        )
    return int(found[1])
