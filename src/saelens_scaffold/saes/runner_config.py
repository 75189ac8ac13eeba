"""What the configuration of the runner that trained an SAE tells of the SAE."""

import re
from pathlib import Path
from typing import Any

from sae_lens.constants import RUNNER_CFG_FILENAME

from saelens_scaffold._util.untrusted import read_json
from saelens_scaffold.saes.facts import trained_k

# What SAELens's runners write into the metadata of an SAE that they train.
_METADATA = (
    "dataset_path",
    "hook_name",
    "model_name",
    "model_class_name",
    "hook_head_index",
    "context_size",
    "seqpos_slice",
    "model_from_pretrained_kwargs",
    "prepend_bos",
    "exclude_special_tokens",
    "sequence_separator_token",
    "disable_concat_sequences",
)
_OF_EACH_SAE = {"hook_names": "hook_name", "hook_head_indices": "hook_head_index"}


def read_runner_config(directory: Path) -> dict[str, Any]:
    """
    The configuration of the runner that trained an SAE.

    SAELens's runner of one SAE writes it beside the SAE; that of several writes one into
    the folder of their directories.

    Args:
        directory: The SAE's, which has the SAE's name.

    Returns:
        The configuration, with `sae`, `hook_name` and `hook_head_index` of this SAE;
        empty if there is none that can be read.
    """
    directory = directory.resolve()
    for folder in (directory, directory.parent):
        try:
            found = read_json(folder / RUNNER_CFG_FILENAME)
            if "saes" in found:
                found["sae"] = found["saes"][directory.name]
                for name, of_one in _OF_EACH_SAE.items():
                    value = found.get(name)
                    is_named = isinstance(value, dict)
                    found[of_one] = value.get(directory.name) if is_named else value
            elif folder == directory.parent:
                continue  # of another SAE
        except (OSError, ValueError, KeyError, TypeError):
            continue  # missing, or written by another program
        return found
    return {}


def complete_metadata(metadata: Any, directory: Path) -> None:
    """
    Write into an SAE's metadata what they lack and the runner's configuration has.

    Args:
        metadata: SAELens's metadata object, which is changed.
        directory: Directory that the SAE was loaded from.
    """
    found = read_runner_config(directory)
    for name in _METADATA:
        if name not in metadata and name in found:
            metadata[name] = found[name]
    if trained_k(metadata) is None and isinstance(found.get("sae"), dict):
        metadata.k = trained_k(found["sae"])


MIN_SPARSITY_TOKENS = 100_000
"""Tokens below which a trainer's firing frequencies are not published: a latent that fires
on one token in 100,000, where SAELens begins to count latents as rare, would look dead."""


def n_sparsity_tokens(metadata: Any, directory: Path) -> int | None:
    """
    Number of tokens that the firing frequencies in `sparsity.safetensors` are of.

    The trainer counts anew every `feature_sampling_window` steps, so they are of the steps
    of the last, perhaps incomplete window.

    Args:
        metadata: The SAE's metadata, where the runners of this package write the number.
        directory: The SAE's directory, with the configuration of SAELens's runner.

    Returns:
        The number; None if it is not known: there is no such configuration, the training
        was resumed, which shifts the windows, or an older SAELens had others.
    """
    noted = metadata.get("n_sparsity_tokens")
    if isinstance(noted, int):
        return noted
    cfg = read_runner_config(directory)
    version = re.findall(r"\d+", str(cfg.get("sae_lens_training_version")))
    if cfg.get("resume_from_checkpoint") or [*map(int, version[:3])] < [6, 54, 9]:
        return None
    try:
        batch, window = cfg["train_batch_size_tokens"], cfg["feature_sampling_window"]
        n_steps = -(-cfg["training_tokens"] // batch)
        return ((n_steps - 1) % window + 1) * batch
    except (KeyError, TypeError, ZeroDivisionError):
        return None
