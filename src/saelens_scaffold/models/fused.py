"""A language model's attention and GELU, each in one pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformer_lens import HookedTransformer
from transformer_lens.components.attention import Attention
from transformer_lens.utilities.activation_functions import gelu_fast, gelu_new

from saelens_scaffold.saes.scaffold import is_hooked

_REPLACED = ("calculate_attention_scores", "apply_causal_mask", "calculate_z_scores")

Undo = Callable[[], None]


def fuse(model: Any) -> list[Undo]:
    """
    Give a HookedTransformer PyTorch's fused attention and GELU.

    TransformerLens computes scores and patterns, of shape (batch, head, query, key), in a
    dozen passes, so that hooks can read them. As long as none does, the result is the same
    up to rounding. Layers with soft caps, sinks, local or grouped-query attention stay as they
    are, and so do models of other classes. The GELU of GPT-2 ("gelu_new"), a dozen passes
    as well, is PyTorch's approximation by tanh.

    Args:
        model: The language model.

    Returns:
        What undoes it, layer by layer.
    """
    if not isinstance(model, HookedTransformer):
        return []
    blocks: list[Any] = [*model.blocks]
    layers = [block.attn for block in blocks] if _has_plain_attention(model) else []
    undo = [_fuse(attention) for attention in layers if _can_be_fused(attention)]
    mlps: list[Any] = [block.mlp for block in blocks if hasattr(block, "mlp")]
    tanh = partial(gelu, approximate="tanh")
    of_gpt2 = [mlp for mlp in mlps if mlp.act_fn in (gelu_new, gelu_fast)]
    return undo + [_replace(mlp, act_fn=tanh) for mlp in of_gpt2]


@contextmanager
def fused(model: Any) -> Iterator[None]:
    """`fuse`, for as long as this lasts."""
    undo = fuse(model)
    try:
        yield
    finally:
        for each in undo:
            each()


def _has_plain_attention(model: HookedTransformer) -> bool:
    # padding on the left has a mask of its own; random weights may have no tokenizer
    padding_side = getattr(model.tokenizer, "padding_side", "right")
    positions = model.cfg.positional_embedding_type
    return padding_side == "right" and positions in ("rotary", "standard")


def _can_be_fused(attention: Any) -> bool:
    cfg = attention.cfg
    return (
        type(attention) is Attention
        and not vars(attention).keys() & {*_REPLACED}
        and attention.attn_type == "global"
        and cfg.attention_dir == "causal"
        and cfg.attn_scores_soft_cap <= 0
        and not getattr(cfg, "use_attention_sinks", False)
    )


def _fuse(attention: Attention) -> Undo:
    own_scores, own_mask, own_z = (getattr(attention, name) for name in _REPLACED)
    held: list[torch.Tensor] = []

    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        read = is_hooked(attention.hook_attn_scores) or is_hooked(
            attention.hook_pattern
        )
        if read or q.shape[1] != k.shape[1]:
            return own_scores(q, k)
        held[:] = q, k
        # what is normalised on the way to z
        return q.new_empty(0, q.shape[2], q.shape[1], k.shape[1])

    def mask(scores: torch.Tensor, offset: int = 0, padding: Any = None) -> Any:
        if held and padding is not None:
            scores = own_scores(*held)
            held.clear()
        return scores if held else own_mask(scores, offset, padding)

    def z(v: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
        if not held:
            return own_z(v, pattern)
        q, k = held
        held.clear()
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scale = 1 / float(attention.attn_scale)
        z = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return attention.hook_z(z.transpose(1, 2))

    return _replace(attention, **dict(zip(_REPLACED, (scores, mask, z), strict=True)))


def _replace(module: torch.nn.Module, **attributes: Any) -> Undo:
    """Replace attributes of a module, or methods of its class, until that is undone."""
    own = {name: of for name, of in vars(module).items() if name in attributes}
    vars(module).update(attributes)

    def undo() -> None:
        for name in attributes:
            del vars(module)[name]
        vars(module).update(own)

    return undo
