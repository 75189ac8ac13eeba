"""The digest that tells whose an evaluation result is."""

from hashlib import sha256
from typing import Any

import torch
from sae_lens.saes.sae import SAE


def weights_sha256(sae: SAE[Any], dtype: torch.dtype | None = None) -> str:
    """
    Digest of an SAE's weights, the same on every device.

    Args:
        sae: The SAE.
        dtype: That to which the weights are converted first; None for their own.
    """
    digest = sha256()
    for name, weights in sorted(sae.state_dict().items()):
        weights = weights.detach().to(dtype=dtype or weights.dtype)
        digest.update(f"{name}{tuple(weights.shape)}{weights.dtype}".encode())
        weights = weights.cpu().flatten().contiguous().view(torch.uint8)
        digest.update(weights.numpy().data)
    return digest.hexdigest()
