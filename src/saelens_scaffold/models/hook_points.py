"""A language model's hook points and their widths, without its weights."""

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import get_pretrained_model_config

from saelens_scaffold._util.errors import UserError, one_line
from saelens_scaffold.models.local import official_name, register_local_model


def model_config(model_name: str, **changes: Any) -> Any:
    """
    TransformerLens's configuration of a language model.

    Args:
        model_name: A name in TransformerLens, or the directory of a local model.
        changes: n_ctx and first_n_layers, if not the model's own.

    Raises:
        UserError: There is no such model, or its configuration cannot be read.
    """
    if Path(model_name).is_dir():
        register_local_model(model_name)
    official_name(model_name)
    try:
        return get_pretrained_model_config(model_name, **changes)
    except (OSError, ValueError) as error:
        raise UserError(f"model_name {model_name!r}: {one_line(error)}") from error


def width_at(config: Any, hook_name: str, head_index: int | None = None) -> int | None:
    """
    Width of the activations at a hook point.

    Args:
        config: TransformerLens's configuration of the language model.
        hook_name: As in "blocks.12.hook_resid_post".
        head_index: Attention head to read; None concatenates all heads.

    Returns:
        The width, as SAELens counts it; None if TransformerLens cannot tell shapes without
        weights.

    Raises:
        UserError: The model has no such layer or hook point, or does not compute it.
    """
    layer = re.match(r"blocks\.(\d+)\.", hook_name)
    if layer is not None and int(layer[1]) >= config.n_layers:
        raise UserError(
            f"hook_name {hook_name!r} names layer {layer[1]}; {config.model_name} has "
            f"layers 0 to {config.n_layers - 1}"
        )
    model = _one_layer(config)
    name = re.sub(r"^blocks\.\d+\.", "blocks.0.", hook_name)
    if name not in model.hook_dict:
        examples = sorted(known for known in model.hook_dict if ".0." in known)[:8]
        raise UserError(
            f"{config.model_name} has no hook point {hook_name!r}; those of a layer are, "
            f"for example, {', '.join(examples)}"
        )
    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    try:
        _, cache = model.run_with_cache(tokens, names_filter=name)
    except NotImplementedError:  # of operations that need values, as experts' routing
        return None
    if name not in cache:
        raise UserError(
            f"{config.model_name} does not compute hook point {hook_name!r} by default"
        )
    shape = cache[name].shape[2:]
    return shape[-1] if head_index is not None else shape.numel()


def check_activations(
    config: Any,
    hook_name: str,
    d_in: int | None = None,
    context_size: int | None = None,
    head_index: int | None = None,
) -> None:
    """
    Check that a language model has the activations that an SAE reads.

    Args:
        config: TransformerLens's configuration of the language model.
        hook_name: As in "blocks.12.hook_resid_post".
        d_in: Width of the SAE's input, if known.
        context_size: Number of tokens that the model reads at once, if known.
        head_index: As for `width_at`.

    Raises:
        UserError: It does not.
    """
    name, n_ctx = config.model_name, config.n_ctx
    width = width_at(config, hook_name, head_index)
    if None not in (d_in, width) and d_in != width:
        raise UserError(f"d_in is {d_in}; {name} has width {width} at {hook_name}")
    if context_size is not None and context_size > n_ctx:
        raise UserError(
            f"context_size is {context_size}; {name} reads at most {n_ctx} tokens"
        )


def _one_layer(config: Any) -> HookedTransformer:
    """The model's first layer without weights: it has the hook points of every layer."""
    config = copy.copy(config)
    config.n_layers, config.init_weights, config.tokenizer_name = 1, False, None
    config.device = "meta"
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return HookedTransformer(config, move_to_device=False)
