"""Which tokens a direction promotes, through the final norm and the unembedding."""

import torch

from saelens_scaffold.evals.model import HookedModel
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


def residual_width(model: LanguageModel) -> int:
    """Width of the residual stream."""
    tokens = torch.zeros(1, 1, dtype=torch.long, device=model.cfg.device)
    return _last_layer(model).below(tokens)[0].shape[-1]


def _last_layer(model: LanguageModel) -> HookedModel:
    return HookedModel(model, residual_post(model, model.cfg.n_layers - 1))


Tops = list[tuple[list[tuple[int, float]], list[tuple[int, float]]]]
"""For each direction: the tokens with the highest and with the lowest logits."""


def promoted_tokens(model: LanguageModel, directions: torch.Tensor, n: int) -> Tops:
    """
    The tokens that directions promote and suppress most.

    Args:
        model: The language model.
        directions: Shape (n_directions, d_model). A zero direction promotes none.
        n: Number of tokens at each end.
    """
    found: Tops = []
    at_once = max(1, _LOGITS_AT_ONCE // model.cfg.d_vocab)
    for part in directions.split(at_once):
        logits = logit_lens(model, part)
        ends = [logits.topk(n, largest=largest) for largest in (True, False)]
        both = zip(
            *([e.indices.tolist(), e.values.tolist()] for e in ends), strict=True
        )
        (high, low), (of_high, of_low) = both
        for of in zip(high, of_high, low, of_low, strict=True):
            pairs = [[*zip(of[i], of[i + 1], strict=True)] for i in (0, 2)]
            found.append((pairs[0], pairs[1]))
    return found
