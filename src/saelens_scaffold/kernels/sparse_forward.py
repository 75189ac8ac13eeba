"""Forward and backward pass of an SAE over the selected latents alone.

With the scaffold's A = W_enc[:, :r] and B = W_dec[:r], the dictionary's S = W_enc[:, r:] and
D = W_dec[r:], and the entries e = (token, latent) that are selected:

    z   = x A                                scaffold coordinates, dense
    u   = x - ρ z B                          what the dictionary reads
    h_e = u[token] · S[:, latent] + b[latent]
    x̂   = z B + Σ_e h_e D[latent]            for each token, without b_dec

Products of matrices as wide as d_sae thus become sums over the few entries, except the one
from which the entries are selected. The gradients are

    ∂D[latent] = Σ_e h_e ∂x̂[token]           ∂h_e = ∂x̂[token] · D[latent]
    ∂S[:, latent] = Σ_e ∂h_e u[token]        ∂b[latent] = Σ_e ∂h_e

There is none for x or u, which would take another wide product: b_dec, which is subtracted
from x, is a bias -Sᵀ b_dec of the encoder, with its gradient from ∂b; and the gradient of h
through u reaches z and B through the rank-r factors, -ρ z (B S).

Where several processes each hold a part of the dictionary, and all have x and the scaffold,
sums over latents become sums over the processes: of x̂, and of the gradients that z, B and
b_dec get through h.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from saelens_scaffold.kernels.entries import Entries
from saelens_scaffold.kernels.memory import GradientMemory
from saelens_scaffold.kernels.selection import Encoder

SumOverShards = Callable[..., Sequence[torch.Tensor]]
Select = Callable[[Encoder], tuple[Entries, torch.Tensor]]
"""Selects entries; returns them with their pre-activations, without the latents' scale."""


class SparseForward(torch.autograd.Function):
    """
    Encode, select and decode.

    Args:
        x: x̄ = x - b_dec, shape (n_tokens, d_in), through which no gradient goes.
        W_enc: Shape (d_in, d_sae).
        b_enc: Shape (d_sae,). The scaffold's part of it is not trained.
        W_dec: Shape (d_sae, d_in).
        b_dec: Bias that was subtracted from x, shape (d_in,), for its gradient through
            the encoder; None if none was.
        rank: r.
        residual: Whether ρ is 1 rather than 0.
        select: Selects entries with the dictionary's encoder.
        ops: The kernels.
        found: List that receives the entries, with latents counted from the dictionary's
            first.
        memory: Where the weights' gradients go.
        over_shards: Sums tensors over the processes that each hold a part of the
            dictionary.

    Returns:
        z, shape (n_tokens, r); the pre-activations h_e, shape (n_entries,); and the sum of
        each row's entries, shape (n_rows, d_in), with the scaffold's part in the first
        n_tokens rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        W_dec: torch.Tensor,
        b_dec: torch.Tensor | None,
        rank: int,
        residual: bool,
        select: Select,
        ops: ModuleType,
        found: list[Entries],
        memory: GradientMemory,
        over_shards: SumOverShards,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        residual = residual and rank > 0
        A, S = W_enc[:, :rank], W_enc[:, rank:]
        B, D = W_dec[:rank], W_dec[rank:]
        # Not in autocast's precision, which is for the wide product alone: this is cheap,
        # and where A dominates, the residual is a small difference.
        with torch.autocast(x.device.type, enabled=False):
            z = torch.addmm(b_enc[:rank], x, A)
            read = torch.addmm(x, z, B, alpha=-1) if residual else x
        entries, values = select(Encoder(read, S, b_enc[rank:], None))
        found.append(entries)
        written = D.new_empty(entries.n_rows, D.shape[1])
        ops.row_sums(entries.row_offsets, entries.latents, values, D, written)
        (written,) = over_shards(written)
        with torch.autocast(x.device.type, enabled=False):
            written[: len(x)].addmm_(z, B)

        ctx.entries, ctx.ops, ctx.over_shards = entries, ops, over_shards
        ctx.memory = memory
        ctx.rank, ctx.residual, ctx.has_b_dec = rank, residual, b_dec is not None
        ctx.save_for_backward(x, read, z, values, W_enc, W_dec)
        ctx.set_materialize_grads(False)
        return z, values, written

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        _refuse_second_derivatives()
        grad_z, grad_values, grad_written = grads
        x, read, z, values, W_enc, W_dec = ctx.saved_tensors
        entries, ops, rank = ctx.entries, ctx.ops, ctx.rank
        A, S = W_enc[:, :rank], W_enc[:, rank:]
        B, D = W_dec[:rank], W_dec[rank:]
        by_latent = entries.by_latent

        # each gradient in one piece, since adding parts would be passes over all of it
        grad_W_dec, grad_W_enc = map(ctx.memory.empty_like, (W_dec, W_enc))
        grad_b_enc = torch.zeros_like(W_enc[0])

        # the decoder
        if grad_written is None:
            grad_written = W_dec.new_zeros(entries.n_rows, W_dec.shape[1])
        grad_written = grad_written.contiguous()
        of_scaffold = grad_written[: len(x)]
        grad_z = _sum(grad_z, of_scaffold @ B.T)
        through_decoder = ops.entry_dots(
            entries.row_offsets, entries.rows, entries.latents, grad_written, D
        )
        grad_values = _sum(grad_values, through_decoder)
        grad_W_dec[:rank] = z.T @ of_scaffold
        ops.row_sums(
            entries.latent_offsets,
            entries.rows.index_select(0, by_latent),
            values.index_select(0, by_latent),
            grad_written,
            grad_W_dec[rank:],
        )

        # the dictionary's encoder
        tokens = entries.tokens.index_select(0, by_latent)
        weights = grad_values.index_select(0, by_latent)
        ops.row_sums(
            entries.latent_offsets, tokens, weights, read, grad_W_enc[:, rank:].T
        )
        grad_b_enc[rank:] = _sums_of_latents(entries, weights, ops)

        # its input without z B, and b_dec: sums over all latents, as wide as x
        of_z, of_B = z.new_empty(0), z.new_empty(0)
        if ctx.residual:
            through_rows = z.new_empty(entries.n_rows, rank)
            ops.row_sums(
                entries.row_offsets,
                entries.latents,
                grad_values,
                (B @ S).T,
                through_rows,
            )
            of_z = through_rows.view(-1, *z.shape).sum(0)
            z_of_latents = z.new_empty(S.shape[1], rank)
            ops.row_sums(entries.latent_offsets, tokens, weights, z, z_of_latents)
            of_B = (S @ z_of_latents).T
        of_b_dec = S @ grad_b_enc[rank:] if ctx.has_b_dec else z.new_empty(0)
        of_z, of_B, of_b_dec = ctx.over_shards(of_z, of_B, of_b_dec)
        if ctx.residual:
            grad_z = grad_z - of_z
            grad_W_dec[:rank] -= of_B

        # the scaffold's encoder
        grad_W_enc[:, :rank] = x.T @ grad_z
        grad_b_dec = None
        if ctx.has_b_dec:
            grad_b_dec = -(A @ grad_z.sum(0) + of_b_dec)
        return None, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec, *[None] * 7


def _sums_of_latents(
    entries: Entries, weights: torch.Tensor, ops: ModuleType
) -> torch.Tensor:
    """Sums of the entries' weights, in the order `by_latent`, shape (n_latents,)."""
    # at least in single precision, since the sums may be long; and not by index_add_,
    # which on a GPU adds in a different order each time
    precise = torch.promote_types(weights.dtype, torch.float32)
    one = weights.new_ones(1, 1, dtype=precise)
    sums = one.new_empty(entries.n_latents, 1)
    of_one = torch.zeros_like(entries.rows)
    ops.row_sums(entries.latent_offsets, of_one, weights, one, sums)
    return sums[:, 0]


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "sparse kernels have no second derivatives (create_graph=True); use "
            "kernels='reference'"
        )


def _sum(grad: torch.Tensor | None, further: torch.Tensor) -> torch.Tensor:
    return further if grad is None else grad + further
