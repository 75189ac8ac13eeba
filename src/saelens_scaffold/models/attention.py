"""A language model's attention in one pass, where nothing but activations is read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformer_lens import HookedTransformer
from transformer_lens.components.attention import Attention

from saelens_scaffold.saes.scaffold import is_hooked

_REPLACED = ("calculate_attention_scores", "apply_causal_mask", "calculate_z_scores")


def fuse_attention(model: Any) -> list[Attention]:
    """
    Give a HookedTransformer PyTorch's fused attention.

    TransformerLens computes scores and patterns, of shape (batch, head, query, key), in a
    dozen passes, so that hooks can read them. As long as none does, the result is the same
    up to rounding. Layers with soft caps, sinks, local or grouped-query attention stay as they
    are, and so do models of other classes.

    Args:
        model: The language model.

    Returns:
        The layers that have it now, and had not before.
    """
    layers = [block.attn for block in model.blocks] if _may_be_fused(model) else []
    fused = [attention for attention in layers if _can_be_fused(attention)]
    for attention in fused:
        _fuse(attention)
    return fused


@contextmanager
def fused_attention(model: Any) -> Iterator[None]:
    """`fuse_attention`, for as long as this lasts."""
    fused = fuse_attention(model)
    try:
        yield
    finally:
        for attention in fused:
            for name in _REPLACED:
                del vars(attention)[name]


def _may_be_fused(model: Any) -> bool:
    # padding on the left has a mask of its own
    return (
        isinstance(model, HookedTransformer)
        and getattr(model.tokenizer, "padding_side", None) == "right"
        and model.cfg.positional_embedding_type in ("rotary", "standard")
    )


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


def _fuse(attention: Attention) -> None:
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

    vars(attention).update(zip(_REPLACED, (scores, mask, z), strict=True))
