"""A last layer that multiplies means over tokens instead of each token."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformer_lens import HookedTransformer
from transformer_lens.components import transformer_block
from transformer_lens.components.attention import Attention
from transformer_lens.components.mlps.gated_mlp import GatedMLP
from transformer_lens.components.mlps.mlp import MLP

NamedHook = tuple[str, Callable[..., torch.Tensor]]


def pooling_hooks(model: HookedTransformer, weights: torch.Tensor) -> list[NamedHook]:
    """
    Hooks with which a mean of the residual stream after the last layer costs less.

    It is linear in the MLP's neurons, and in a parallel layer also in what the heads read,
    before they are multiplied by W_out and W_O. So these are pooled, and each token of the
    layer's output then gets the same from them: its mean is what it was, though its tokens
    are not.

    Args:
        model: The language model.
        weights: Weight of each token in the mean, of sum 1 in each sequence (or all 0),
            shape (batch, seq).

    Returns:
        Hooks for `run_with_hooks`; none where the last layer is not linear so (with a norm
        behind its MLP, say), or not in single or double precision.
    """
    cfg, block = model.cfg, model.blocks[-1]
    post_norm = getattr(transformer_block, "POST_NORM_ARCHITECTURES", ())
    if (
        type(block) is not transformer_block.TransformerBlock
        or type(getattr(block, "mlp", None)) not in (MLP, GatedMLP)
        or cfg.use_normalization_before_and_after
        or cfg.original_architecture in post_norm
        or cfg.dtype not in (torch.float32, torch.float64)
    ):
        return []
    points = ["mlp.hook_post"]
    if cfg.parallel_attn_mlp and type(block.attn) is Attention:
        points.append("attn.hook_z")
    pool = partial(_pool, weights=weights)
    return [(f"blocks.{cfg.n_layers - 1}.{point}", pool) for point in points]


def _pool(x: torch.Tensor, hook: Any, weights: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    return torch.einsum("bs,bs...->b...", weights.to(x.dtype), x)[:, None]
