"""Training from activations that SAELens's `CacheActivationsRunner` has written."""

import json
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from sae_lens import ActivationsStore, MultiSAETrainingRunnerConfig
from sae_lens.load_model import HookedProxyLM
from transformers import AutoTokenizer
from typing_extensions import override

from saelens_scaffold._util.errors import UserError, loading, one_line
from saelens_scaffold._util.untrusted import read_json
from saelens_scaffold.training.data import n_positions, tokenizer_name, training_data

TOKENS = "token_ids"
"""Column of a cache with the tokens, beside those of the hook points."""

RUNNER_CFG_FILENAME = "cache_activations_runner_cfg.json"
"""Configuration of `CacheActivationsRunner`, as it writes it on the Hub."""

_SAME = ("model_name", "model_class_name", "prepend_bos")
"""Fields of that configuration that a training must share."""


@dataclass
class CachedMultiSAETrainingRunnerConfig(MultiSAETrainingRunnerConfig):
    """
    SAELens's configuration, with the fields for cached activations that it has for the
    training of one SAE.

    Attributes:
        use_cached_activations: Whether activations are read from a cache, without the
            language model.
        cached_activations_path: Its folder.
    """

    use_cached_activations: bool = False
    cached_activations_path: str | None = None


def open_cache(path: str | None) -> datasets.Dataset:
    """
    Open the folder of a cache.

    Raises:
        UserError: There is none, or it is none.
    """
    field = f"cached_activations_path {str(path)!r}"
    if path is None:
        raise UserError(
            "use_cached_activations needs cached_activations_path, the folder that "
            "SAELens's CacheActivationsRunner wrote"
        )
    if not (path and Path(path).exists()):
        raise UserError(f"{field} does not exist")
    try:
        rows = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{field} is no folder that SAELens's CacheActivationsRunner wrote: "
            f"{one_line(error)}"
        ) from error
    if not isinstance(rows, datasets.Dataset):
        raise UserError(f"{field} is divided into splits; name the folder of one")
    return rows


def check_cache(cfg: Any, hook_name: str, d_in: int) -> None:
    """
    See that a cache has what an SAE of a runner's configuration reads.

    Raises:
        UserError: It has not.
    """
    path = cfg.cached_activations_path
    rows = open_cache(path)
    field = f"cached_activations_path {path!r}"
    if hook_name not in rows.column_names:
        found = ", ".join(name for name in rows.column_names if name != TOKENS)
        raise UserError(f"{field} has the activations of {found}, not of {hook_name}")
    shape = getattr(rows.features[hook_name], "shape", None)
    wanted = (n_positions(cfg), d_in)
    if shape is None or tuple(shape) != wanted:
        length, width = shape or ("?", "?")
        raise UserError(
            f"{field} has {length} positions of width {width} in a row; the training's "
            f"context has {wanted[0]} (context_size, seqpos_slice), and d_in is {d_in}"
        )
    if len(rows) < cfg.store_batch_size_prompts:
        raise UserError(
            f"{field} has {len(rows)} rows; store_batch_size_prompts is "
            f"{cfg.store_batch_size_prompts}, and must be no more"
        )
    if cfg.exclude_special_tokens and TOKENS not in rows.column_names:
        raise UserError(
            f"{field} has no tokens, so exclude_special_tokens can exclude none"
        )
    made = Path(path, RUNNER_CFG_FILENAME)
    made_with = read_json(made) if made.is_file() else {}
    for name in _SAME:
        if name in made_with and made_with[name] != getattr(cfg, name):
            raise UserError(
                f"{field} was made with {name} {made_with[name]!r}; the training's is "
                f"{getattr(cfg, name)!r}"
            )


def check_data(cfg: CachedMultiSAETrainingRunnerConfig) -> None:
    """
    See that the text or the cache of a training of several SAEs can be read.

    Raises:
        UserError: It cannot, or lacks what the SAEs read.
    """
    training_data(cfg)
    if not cfg.use_cached_activations:
        return
    hook_names = cfg.hook_names_per_sae
    if len({*hook_names.values()}) > 1:
        raise UserError(
            "hook_name has several values; cached activations are of one hook point"
        )
    for hook_name, d_in in {
        (hook_names[name], cfg.saes[name].d_in) for name in hook_names
    }:
        check_cache(cfg, hook_name, d_in)


def cache_fingerprint(path: str | None) -> str | None:
    """
    Hash of what a cache holds, wherever it lies: its columns, its number of rows, and the
    first and the last of them; None if there is no cache.
    """
    state = Path(path or "", "state.json")
    return _fingerprint(state, state.stat().st_mtime_ns) if state.is_file() else None


@lru_cache
def _fingerprint(state: Path, _written: int) -> str:
    rows = open_cache(str(state.parent)).with_format("numpy")
    found = sha256(json.dumps([len(rows), sorted(rows.column_names)]).encode())
    for i in {0, len(rows) - 1} if len(rows) else ():
        for _, values in sorted(rows[i].items()):
            found.update(np.ascontiguousarray(values).tobytes())
    return found.hexdigest()


class CachedActivationsStore(ActivationsStore):
    """
    Store of a training of several SAEs at one hook point that reads a cache: SAELens reads
    one for the training of one SAE only.

    Args:
        cfg: Configuration of the training, which `check_cache` has found good.
        like: The store of text that SAELens makes for it.
    """

    def __init__(self, cfg: CachedMultiSAETrainingRunnerConfig, like: ActivationsStore):
        super().__init__(
            model=like.model,
            dataset=None,
            cached_activations_path=cfg.cached_activations_path,
            hook_name=like.hook_name,
            hook_head_index=None,
            d_in=like.d_in,
            # a cache has no other positions than those that count
            context_size=like.training_context_size,
            streaming=False,
            prepend_bos=like.prepend_bos,
            normalize_activations=like.normalize_activations,
            n_batches_in_buffer=like.n_batches_in_buffer,
            total_training_tokens=like.total_training_tokens,
            store_batch_size_prompts=like.store_batch_size_prompts,
            train_batch_size_tokens=like.train_batch_size_tokens,
            device=like.device,
            dtype=cfg.dtype,
            exclude_special_tokens=like.exclude_special_tokens,
            activations_mixing_fraction=like.activations_mixing_fraction,
        )
        self._hook_names = like._hook_names

    @property
    def n_tokens(self) -> int:
        """Number of tokens in the cache."""
        assert self.cached_activation_dataset is not None
        return len(self.cached_activation_dataset) * self.context_size

    @override
    def _get_filtered_multi_hook_llm_batch(
        self, raise_on_epoch_end: bool = False
    ) -> dict[str, torch.Tensor]:
        return {self.hook_name: self.get_filtered_llm_batch(raise_on_epoch_end)}

    def skip_llm_batches(self, n: int) -> None:
        """Begin behind the first batches; rows at the end that fill none are left out."""
        assert self.cached_activation_dataset is not None
        size = self.store_batch_size_prompts
        of_epoch = len(self.cached_activation_dataset) // size
        self.current_row_idx = size * (n % of_epoch)


def without_language_model(cfg: Any) -> HookedProxyLM:
    """What SAELens's runner takes for a model where none runs: the special tokens count."""
    tokenizer: Any = None
    if cfg.exclude_special_tokens is True:
        with loading(cfg.model_name):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_name(cfg))
    return HookedProxyLM(torch.nn.Module(), tokenizer)
