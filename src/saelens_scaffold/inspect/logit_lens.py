"""Which tokens a direction promotes, through the final norm and the unembedding."""

import re

import torch

from saelens_scaffold.evals.model import HookedModel
from saelens_scaffold.inspect.output import Weighted, weighted
from saelens_scaffold.models.language_models import LanguageModel, residual_post

_LOGITS_AT_ONCE = 2**24


@torch.no_grad()
def logit_lens(model: LanguageModel, directions: torch.Tensor) -> torch.Tensor:
    """
    Logits that directions of the residual stream give, by the model's own last steps.

    That is unembed(ln_final(v)) - unembed(ln_final(0)) for a direction v, scaled to a root
    mean square of 1, so that the final norm's epsilon is nothing beside it. Biases, which
    are the same for all directions, drop out, and opposite directions have opposite logits.

    Args:
        model: The language model, of any of the three classes.
        directions: Shape (n, d_model).

    Returns:
        Shape (n, d_vocab), float32.
    """
    last = _last_layer(model)
    device, dtype = model.cfg.device, next(model.parameters()).dtype
    scale = directions.shape[1] ** 0.5
    unit = torch.nn.functional.normalize(directions.float(), dim=1) * scale
    rows = torch.cat([torch.zeros_like(unit[:1]), unit]).to(device, dtype)
    tokens = torch.zeros(len(rows), 1, dtype=torch.long, device=device)
    logits = last.above((tokens, None), rows[:, None])[:, 0].float()
    return logits[1:] - logits[0]


def _width(model: LanguageModel) -> int:
    """Width of the residual stream."""
    tokens = torch.zeros(1, 1, dtype=torch.long, device=model.cfg.device)
    return _last_layer(model).below(tokens)[0].shape[-1]


def _last_layer(model: LanguageModel) -> HookedModel:
    return HookedModel(model, residual_post(model, model.cfg.n_layers - 1))


def promoted_tokens(
    model: LanguageModel, hook_name: str, directions: torch.Tensor, n: int
) -> tuple[list[Weighted], list[Weighted]]:
    """
    The tokens that each direction promotes most and suppresses most, and their logits.

    Args:
        model: The language model.
        hook_name: The hook point of the directions. Those of heads, or of another width
            than the residual stream's, promote no tokens.
        directions: Shape (n_directions, d_in).
        n: Number of tokens at each end.
    """
    of_heads = re.search(r"hook_[qkvz]$", hook_name)
    if of_heads or directions.shape[1] != _width(model):
        return [[]] * len(directions), [[]] * len(directions)
    ends: tuple[list[Weighted], list[Weighted]] = [], []
    for part in directions.split(max(1, _LOGITS_AT_ONCE // model.cfg.d_vocab)):
        logits = logit_lens(model, part)
        for largest, end in zip((True, False), ends, strict=True):
            top = logits.topk(n, largest=largest)
            end += [*map(weighted, top.indices, top.values)]
    return ends
