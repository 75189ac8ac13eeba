"""A training SAE that starts from a saved scaffold SAE."""

import torch

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.saes.scaffold_batchtopk_sae import ScaffoldBatchTopKTrainingSAE
from saelens_scaffold.saes.scaffold_jumprelu_sae import ScaffoldJumpReLUSAE

# Singular values of I - B A below which W_enc[:, r:] says nothing of what it was before the
# residual input was folded in; rounding in single precision is below.
_TOLERANCE = 1e-5
# How many times its norm an encoder may grow. Of a folded residual input it grows by a tenth,
# of an absorbed scaffold by up to ten. From a hundred on, where little changes of the scaffold
# are large ones of what the encoder reads, the first steps destroy the SAE.
_MAX_GROWTH = 20.0


@torch.no_grad()
def start_from(sae: ScaffoldBatchTopKTrainingSAE, saved: ScaffoldJumpReLUSAE) -> None:
    """
    Give a training SAE, in place, the weights with which it computes what a saved one does.

    Its inference form has the outputs of the saved SAE if the thresholds of the latents are
    one, at unit decoder norm with `rescale_acts_by_decoder_norm`: so it is of all SAEs of
    this package. Otherwise the running threshold starts at their median. In training, k
    latents fire whatever the thresholds were.

    Args:
        sae: The SAE to train, of the same d_in, d_sae and scaffold_rank.
        saved: The SAE, at the scale of the activations that are trained on.

    Raises:
        UserError: With sparse_encoder_input="residual", its sparse encoder reads what its
            scaffold leaves nothing of.
    """
    cfg, rank = sae.cfg, sae.cfg.scaffold_rank
    dtype = torch.promote_types(saved.dtype, torch.float32)
    W_enc, b_enc, W_dec, b_dec, threshold = (
        getattr(saved, name).to(sae.W_enc.device, dtype)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    )
    if saved.cfg.apply_b_dec_to_input != cfg.apply_b_dec_to_input:
        sign = 1 if cfg.apply_b_dec_to_input else -1
        b_enc = b_enc + sign * b_dec @ W_enc
    if cfg.rescale_acts_by_decoder_norm:
        norms = W_dec.norm(dim=1)
        unused = norms == 0
        norms[unused] = 1
        W_enc, b_enc, threshold = W_enc * norms, b_enc * norms, threshold * norms
        W_dec = W_dec / norms[:, None]
        # activations are divided by the norm: a row of zeros would make them NaN
        W_enc[:, unused], b_enc[unused] = 0.0, 0.0
        fresh = torch.nn.functional.normalize(sae.W_dec[unused], dim=1)
        W_dec[unused] = fresh.to(W_dec)
    if cfg.sparse_encoder_input == "residual" and rank > 0:
        W_enc, b_enc = _unfold_residual_input(W_enc, b_enc, W_dec[:rank])
    for name, value in ("W_enc", W_enc), ("b_enc", b_enc), ("W_dec", W_dec):
        getattr(sae, name).copy_(value)
    sae.b_dec.copy_(b_dec)
    sae.topk_threshold.copy_(threshold[rank:].median())
    sae.mark_scaffold_initialized()


def _unfold_residual_input(
    W_enc: torch.Tensor, b_enc: torch.Tensor, B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The encoder whose sparse latents read the residual x̄ - z B, and equal those that read x̄.

    The inverse of folding: W_enc[:, r:] <- (I - A B)⁻¹ W_enc[:, r:], by the inverse of the
    small I - B A. A scaffold that is a projection leaves nothing of its subspace, and
    I - B A is singular; but then, neither does a folded encoder read anything there.
    """
    rank = len(B)
    A, W_sparse = W_enc[:, :rank], W_enc[:, rank:]
    # on the CPU, since MPS has no double precision
    left = torch.eye(rank, dtype=torch.float64) - B.cpu().double() @ A.cpu().double()
    inverse = torch.linalg.pinv(left, atol=_TOLERANCE, rtol=0.0)
    read = B @ W_sparse
    read_by_sparse = inverse.to(read) @ read
    added = A @ read_by_sparse
    missed = A @ (left.to(read) @ read_by_sparse - read)
    size = W_sparse.norm()
    if added.norm() > _MAX_GROWTH * size or missed.norm() > 1e-4 * size:
        raise UserError(
            "sparse_encoder_input is 'residual', but the sparse encoder of the saved SAE "
            "reads what its scaffold leaves nothing of; train with 'activation'"
        )
    W_sparse = W_sparse + added
    b_sparse = b_enc[rank:] + b_enc[:rank] @ (B @ W_sparse)
    return torch.cat([A, W_sparse], dim=1), torch.cat([b_enc[:rank], b_sparse])
