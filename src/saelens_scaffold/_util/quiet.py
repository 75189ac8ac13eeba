"""Keeping libraries' notices off the screen."""

import logging
import warnings


def quiet() -> None:
    """Silence notices that no user of a command can act upon."""
    for message in (
        # many SAEs have them, and neither SAEBench nor this package reads them
        r"\s*This SAE has non-empty",
        "Dataset is not tokenized",
        ".*fewer samples than context size",
        "All samples in the training dataset",
    ):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("sae_lens", "transformer_lens"):
        logging.getLogger(name).setLevel(logging.ERROR)
