"""The embedded language model: GPT-NeoX, 5.2 M parameters, trained on Python's library."""

from importlib.resources import files
from pathlib import Path

import torch
from transformer_lens import HookedTransformer

from saelens_scaffold.models.local import register_local_model

EMBEDDED_MODEL_NAME = "py-neox"


def embedded_model_path() -> Path:
    """The model's Hugging Face directory inside the installed package."""
    return Path(str(files("saelens_scaffold.models") / EMBEDDED_MODEL_NAME))


def register_embedded_model() -> str:
    """Make the embedded model known to TransformerLens, SAELens and SAEBench.

    Returns:
        Its name, "py-neox". Saved SAEs contain the name, and no path of this machine.

    Raises:
        UserError: Another model is registered under that name.
    """
    return register_local_model(embedded_model_path(), name=EMBEDDED_MODEL_NAME)


def load_embedded_model(device: str | torch.device = "cpu") -> HookedTransformer:
    """Load the embedded model as SAELens does: float32, weights unprocessed.

    Args:
        device: Device of the model.

    Returns:
        The model: 4 layers, d_model 256, context 512 (trained at 256), 4,096 tokens;
        `<|endoftext|>` (id 0) is BOS, EOS and padding.
    """
    return HookedTransformer.from_pretrained_no_processing(
        register_embedded_model(), device=device
    )
