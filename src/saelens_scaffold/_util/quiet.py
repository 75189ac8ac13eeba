"""Keeping what libraries say of their own affairs off the screen."""

import logging
import warnings


def ignore_model_kwargs() -> None:
    """
    No notice that an SAE has non-empty model_from_pretrained_kwargs: many have, and neither
    SAEBench nor this package gives heed to them.
    """
    warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty")


def quiet() -> None:
    """For a command that shows its own progress: no notices that no user can act upon."""
    ignore_model_kwargs()
    warnings.filterwarnings("ignore", message="Dataset is not tokenized")
    warnings.filterwarnings("ignore", message=".*fewer samples than context size")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("sae_lens", "transformer_lens"):
        logging.getLogger(name).setLevel(logging.ERROR)
