"""The form in which SAEs are judged."""

from typing import Any

import torch
from sae_lens.saes.sae import SAE
from sae_lens.saes.topk_sae import TopKSAE


@torch.no_grad()
def fold_decoder_norms(sae: SAE[Any]) -> bool:
    """
    Give the decoder rows of an SAE unit norm, in place, and its latents their scale.

    The SAE computes the same as before. What is read from its activations, as the latents
    that a probe picks, then depends on what it computes alone, and not on how the scale of
    a latent is shared between encoder and decoder. Zero rows stay zero.

    The norms of a selection that depends on them stay: those of TopK SAEs without
    `rescale_acts_by_decoder_norm` that differ, and of matching pursuit.

    Args:
        sae: The SAE, of at least single precision.

    Returns:
        Whether all rows but zero ones have unit norm now.
    """
    norms = sae.get_W_dec_norm()
    try:
        sae.fold_W_dec_norm()
    except NotImplementedError:
        # A factor that all rows share changes no selection of a TopK.
        if not (isinstance(sae, TopKSAE) and torch.allclose(norms, norms[0])):
            return torch.allclose(norms, torch.ones_like(norms))
        sae.fold_and_get_W_dec_norm()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        # by 1, which would be 0 / 0 for zero rows
        sae.cfg.rescale_acts_by_decoder_norm = False
    return True
