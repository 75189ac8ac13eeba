"""Hash of an SAE's weights."""

from hashlib import sha256
from typing import Any

import torch
from sae_lens.saes.sae import SAE


def weights_sha256(sae: SAE[Any], dtype: torch.dtype | None = None) -> str:
    """
    SHA-256 hash of an SAE's weights, the same on every device.

    Args:
        sae: The SAE.
        dtype: Data type to convert the weights to first; None for their own.
    """
    digest = sha256()
    for name, weights in sorted(sae.state_dict().items()):
        weights = weights.detach().to(dtype=dtype or weights.dtype)
        digest.update(f"{name}{tuple(weights.shape)}{weights.dtype}".encode())
        weights = weights.cpu().flatten().contiguous().view(torch.uint8)
        digest.update(weights.numpy().data)
    return digest.hexdigest()
