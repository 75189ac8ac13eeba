"""Nonzero activations of an SAE, and decoding from them."""

from typing import Any

import torch
from sae_lens import SAE

# Share of active latents below which a sparse product is faster.
_SPARSE_BELOW = 0.05
_SPARSE_DTYPES = (torch.float32, torch.float64)


class ActiveLatents:
    """
    The nonzero activations of a batch.

    Args:
        acts: Activations, shape (n_tokens, d_sae).

    Attributes:
        token: Index of each one's token, shape (n_active,).
        latent: Index of each one's latent, shape (n_active,).
        values: The activations, shape (n_active,).
    """

    def __init__(self, acts: torch.Tensor):
        self._acts = acts
        self.token, self.latent = acts.nonzero(as_tuple=True)
        self.values = acts[self.token, self.latent]

    def decode(self, sae: SAE[Any], kept: torch.Tensor | None = None) -> torch.Tensor:
        """
        The SAE's `decode`, with a sparse product where that is faster.

        Args:
            sae: The SAE of these activations.
            kept: Mask of the latents to decode, shape (d_sae,). By default all.

        Returns:
            Shape (n_tokens, d_in).
        """
        acts = self._acts
        # sparse products do not exist on MPS, nor everywhere in half precision
        may_be_sparse = acts.device.type != "mps" and acts.dtype in _SPARSE_DTYPES
        if may_be_sparse and len(self.values) < _SPARSE_BELOW * acts.numel():
            indices, values = torch.stack([self.token, self.latent]), self.values
            if kept is not None:
                of_kept = kept[self.latent]
                indices, values = indices[:, of_kept], values[of_kept]
            acts = torch.sparse_coo_tensor(
                indices, values, acts.shape, is_coalesced=True, check_invariants=False
            )
        elif kept is not None:
            acts = acts * kept
        return sae.decode(acts)
