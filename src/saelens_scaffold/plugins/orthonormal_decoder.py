"""Orthonormal decoder rows of the scaffold."""

import torch
from sae_lens.saes.sae import TrainingSAE

from saelens_scaffold.plugins.hookspecs import hookimpl


class OrthonormalDecoder:
    """
    After each optimizer step, replace the scaffold's decoder rows by the nearest
    orthonormal rows (the polar factor), and compensate in the encoder.

    The scaffold's coordinates are then distances along orthogonal axes, with variances
    that can be read off. The scaffold's output changes as little as that allows.
    """

    fit_for_shards = True

    # last, so that no other plugin undoes it
    @hookimpl(trylast=True)
    def after_optimizer_step(self, sae: TrainingSAE) -> None:
        rank = sae.cfg.scaffold_rank
        if rank == 0:
            return
        B, A = sae.W_dec[:rank], sae.W_enc[:, :rank]
        # there is no SVD in half precision
        dtype = torch.promote_types(B.dtype, torch.float32)
        exact = B.to(dtype)
        # repeated rounding would move a frozen scaffold
        if _is_orthonormal(exact, stored_as=B.dtype):
            return
        U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
        sae.W_dec[:rank] = (U @ Vh).to(B)
        # B = U S Uᵀ (U Vh), so A B stays the same if A is multiplied by U S Uᵀ
        sae.W_enc[:, :rank] = (A.to(dtype) @ (U * S) @ U.T).to(A)


def _is_orthonormal(rows: torch.Tensor, stored_as: torch.dtype) -> bool:
    """Whether rows are orthonormal up to the rounding of storage and SVD."""
    error = rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    # the SVD's error is up to 21 eps for 256 rows of 2304
    rounding = max(torch.finfo(stored_as).eps, 32 * torch.finfo(rows.dtype).eps)
    return bool(error.abs().max() <= rounding)
