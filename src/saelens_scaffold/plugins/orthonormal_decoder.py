"""Keep the scaffold's decoder rows orthonormal."""

import torch
from sae_lens.saes.sae import TrainingSAE

from saelens_scaffold.plugins.hookspecs import hookimpl


class OrthonormalDecoder:
    """
    After each optimizer step, replace the scaffold's decoder rows by the nearest
    orthonormal ones (the polar factor), and let the encoder take up the difference.

    The scaffold's coordinates then are distances along right-angled axes, so that their
    variances can be read off. What the scaffold writes changes as little as that allows.
    """

    # last, so that no other plugin's change of the weights undoes it
    @hookimpl(trylast=True)
    def after_optimizer_step(self, sae: TrainingSAE) -> None:
        rank = sae.cfg.scaffold_rank
        if rank == 0:
            return
        B, A = sae.W_dec[:rank], sae.W_enc[:, :rank]
        # not in autocast's or the SAE's half precision, in which there is no SVD
        dtype = torch.promote_types(B.dtype, torch.float32)
        exact = B.to(dtype)
        # done again and again, the rounding would move a scaffold that is frozen
        if _is_orthonormal(exact, stored_as=B.dtype):
            return
        U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
        sae.W_dec[:rank] = (U @ Vh).to(B)
        # B = U S Uᵀ (U Vh), so A B is kept if A takes up U S Uᵀ
        sae.W_enc[:, :rank] = (A.to(dtype) @ (U * S) @ U.T).to(A)


def _is_orthonormal(rows: torch.Tensor, stored_as: torch.dtype) -> bool:
    """Whether rows are orthonormal, but for what storing them and an SVD round off."""
    error = rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    # the SVD's is up to 21 eps, for 256 rows of 2304
    rounding = max(torch.finfo(stored_as).eps, 32 * torch.finfo(rows.dtype).eps)
    return bool(error.abs().max() <= rounding)
