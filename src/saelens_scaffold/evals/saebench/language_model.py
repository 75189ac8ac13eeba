"""The language model that is lent to SAEBench."""

from collections.abc import Sequence

from saelens_scaffold.evals.base import Call
from saelens_scaffold.evals.model import by_hook_point
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.models.language_models import (
    LanguageModel,
    load_language_model,
    with_hook_points,
)


def lent_language_model(
    model_name: str, dtype: str, saes: Sequence[SelectedSAE], call: Call
) -> LanguageModel:
    """
    Load a language model as SAEBench can use it, and give the SAEs its hook points.

    SAEBench runs HookedTransformer. TransformerLens's bridge has the same hook points on
    the modules of transformers, and so stands in for these as well.

    Raises:
        UserError: The model cannot be loaded, or the SAEs do not fit it.
    """
    model_class = with_hook_points(call.model_class_name)
    model = load_language_model(model_name, call.device, dtype, model_class)
    for hooked, group in by_hook_point(model, saes):
        for sae in group:
            cfg = sae.sae.cfg
            # SAEBench reads them in two places
            cfg.hook_name = cfg.metadata.hook_name = hooked.point.name
            cfg.hook_layer = cfg.metadata.hook_layer = hooked.point.layer
    return model
