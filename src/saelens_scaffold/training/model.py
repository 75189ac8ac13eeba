"""The language model of a training, where SAELens cannot load it."""

from typing import Any

from saelens_scaffold.models.language_models import load_language_model
from saelens_scaffold.models.local import EMBEDDED_MODEL_NAME


def override_model(cfg: Any) -> Any:
    """
    The model for SAELens's argument of that name; None where SAELens loads it by its name.

    SAELens (6.54) trains on TransformerLens's bridge, but does not load it. And
    transformers has no model of the embedded one's name.

    Args:
        cfg: Configuration of a training of one SAE or several.

    Raises:
        UserError: There is no such model, or its files cannot be had.
    """
    of_transformers = cfg.model_class_name == "AutoModelForCausalLM"
    is_embedded = of_transformers and cfg.model_name == EMBEDDED_MODEL_NAME
    if cfg.model_class_name != "TransformerBridge" and not is_embedded:
        return None
    keywords = dict(cfg.model_from_pretrained_kwargs or {})
    dtype = str(keywords.pop("dtype", "float32")).removeprefix("torch.")
    device = str(cfg.llm_device or cfg.device)
    kind = cfg.model_class_name
    return load_language_model(cfg.model_name, device, dtype, kind, **keywords)
