"""Keep the scaffold's decoder rows orthonormal."""

import torch
from sae_lens.saes.sae import TrainingSAE

from saelens_scaffold.hookspecs import hookimpl


class OrthonormalDecoder:
    """
    After each optimizer step, replace the scaffold's decoder rows by the nearest
    orthonormal ones (the polar factor), and let the encoder take up the difference.

    The scaffold's coordinates then are distances along right-angled axes, so that their
    variances can be read off. What the scaffold writes changes as little as that allows.
    """

    @hookimpl
    def after_optimizer_step(self, sae: TrainingSAE) -> None:
        rank = sae.cfg.scaffold_rank
        if rank == 0:
            return
        B = sae.W_dec[:rank]
        # not in autocast's or the SAE's half precision, in which there is no SVD
        U, S, Vh = torch.linalg.svd(B.float(), full_matrices=False)
        sae.W_dec[:rank] = (U @ Vh).to(B)
        # B = U S Uᵀ (U Vh), so A B is kept if A takes up U S Uᵀ
        A = sae.W_enc[:, :rank]
        sae.W_enc[:, :rank] = (A.float() @ (U * S) @ U.T).to(A)
