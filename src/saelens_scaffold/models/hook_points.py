"""A language model's hook points, their widths and its context, without its weights."""

import copy
import re
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import get_pretrained_model_config
from transformers import AutoModelForCausalLM

from saelens_scaffold._util.compat import release
from saelens_scaffold._util.errors import UserError, one_line
from saelens_scaffold.models.language_models import (
    ModelClass,
    layer_of_residual_post,
    layers_name,
    transformers_config,
)
from saelens_scaffold.models.local import official_name, register_local_model


def model_config(model_name: str, **keywords: Any) -> Any:
    """
    TransformerLens's configuration of a language model.

    Args:
        model_name: A name in TransformerLens, or the directory of a local model.
        keywords: What the model is loaded with; of these, n_ctx and first_n_layers count.

    Raises:
        UserError: There is no such model, its configuration cannot be read, or
            TransformerLens cannot change its n_ctx.
    """
    changes = {k: keywords[k] for k in ("n_ctx", "first_n_layers") if k in keywords}
    if "n_ctx" in changes and release("transformer-lens") < (2, 17):
        raise UserError(
            "n_ctx in model_from_pretrained_kwargs needs transformer-lens >= 2.17; "
            f"{version('transformer-lens')} is installed"
        )
    name = model_name
    if Path(model_name).is_dir():
        # TransformerLens would read the config.json there, and not the one it needs
        name = official_name(register_local_model(model_name))
    official_name(name)
    try:
        config = get_pretrained_model_config(name, **changes)
    except (OSError, ValueError) as error:
        raise UserError(f"model_name {model_name!r}: {one_line(error)}") from error
    if name != model_name:
        config.model_name = model_name
    return config


def context_length(
    model_name: str, model_class_name: str = "HookedTransformer", **keywords: Any
) -> int | None:
    """
    Number of tokens that a language model reads at once, from its configuration alone.

    Args:
        model_name: A name in TransformerLens or, for another class, on the Hub; or the
            directory of a local model.
        model_class_name: As in SAELens.
        keywords: What the model is loaded with (`model_from_pretrained_kwargs`).

    Returns:
        None for a model without a limit.

    Raises:
        UserError: There is no such model, or its configuration cannot be read.
    """
    if model_class_name == "HookedTransformer":
        return model_config(model_name, **keywords).n_ctx
    if model_class_name not in get_args(ModelClass):
        return None
    config = transformers_config(model_name, **keywords)
    # Rotary embeddings can be computed for more positions, but mean nothing there.
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_context(
    context_size: int,
    model_name: str,
    model_class_name: str = "HookedTransformer",
    *,
    field: str = "context_size",
    **keywords: Any,
) -> None:
    """
    Check that a language model has room for sequences, without loading it.

    Args:
        context_size: Tokens per sequence.
        model_name: As for `context_length`, like model_class_name and keywords.
        field: What the user calls context_size.

    Raises:
        UserError: It has not.
    """
    limit = context_length(model_name, model_class_name, **keywords)
    if limit is not None and context_size > limit:
        raise UserError(
            f"{field} is {context_size}; {model_name} reads at most {limit} tokens"
        )


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
    model_name: str,
    hook_name: str,
    d_in: int | None = None,
    head_index: int | None = None,
    model_class_name: str = "HookedTransformer",
    by_either_name: bool = False,
    **keywords: Any,
) -> None:
    """
    Check that a language model has the activations that an SAE reads, without its weights.

    Args:
        model_name: As for `context_length`, like model_class_name and keywords.
        hook_name: As in "blocks.12.hook_resid_post", or "model.layers.12" of transformers.
        d_in: Width of the SAE's input, if known.
        head_index: As for `width_at`.
        by_either_name: Whether the residual stream may have the name of the other library,
            as `HookPoint` takes it. SAELens's training does not.

    Raises:
        UserError: It does not.
    """
    layer = layer_of_residual_post(hook_name) if by_either_name else None
    if model_class_name == "HookedTransformer":
        config = model_config(model_name, **keywords)
        hook_name = hook_name if layer is None else f"blocks.{layer}.hook_resid_post"
        width = width_at(config, hook_name, head_index)
    elif model_class_name == "AutoModelForCausalLM":
        width = _width_in_transformers(model_name, hook_name, layer, **keywords)
    else:  # known once it is loaded
        return
    if None not in (d_in, width) and d_in != width:
        raise UserError(
            f"d_in is {d_in}; {model_name} has width {width} at {hook_name}"
        )


def _width_in_transformers(
    model_name: str, hook_name: str, layer: int | None, **keywords: Any
) -> int | None:
    """As `width_at`, of a module of transformers, or the layer of that number."""
    config = transformers_config(model_name, **keywords)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = layers_name(model)
    hook_name = hook_name if layer is None else f"{layers}.{layer}"
    if hook_name not in dict(model.named_modules()):
        raise UserError(
            f"{model_name} has no module {hook_name!r}; its layers are {layers}.0 to "
            f"{layers}.{len(model.get_submodule(layers)) - 1}"
        )
    is_layer = re.fullmatch(rf"{re.escape(layers)}\.\d+", hook_name)
    return config.get_text_config().hidden_size if is_layer else None


def _one_layer(config: Any) -> HookedTransformer:
    """The model's first layer without weights: it has the hook points of every layer."""
    config = copy.copy(config)
    config.n_layers, config.init_weights, config.tokenizer_name = 1, False, None
    config.device = "meta"
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return HookedTransformer(config, move_to_device=False)
