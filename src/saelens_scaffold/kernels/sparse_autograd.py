"""Encode and decode over the selected latents alone, forward and backward.

With the scaffold's A = W_enc[:, :r] and B = W_dec[:r], the dictionary's S = W_enc[:, r:] and
D = W_dec[r:], and the entries e = (token, latent) that are selected:

    z   = x A                                scaffold coordinates, dense
    h_e = (x - ρ z B)[token] · S[:, latent] + b[latent]
    x̂   = z B + Σ_e h_e D[latent]            for each token

A gradient for h has only the selected entries, so that what would be a product of two large
matrices in `S`'s and `D`'s gradients is a sum over a few rows. A product of full width
for the gradient of the input is never made: that of b_dec, which x contains, is that of a
bias of W_enc's columns; and where the dictionary reads the residual, the gradient goes
through the rank-r factors (x, z) (I; -B) S, of which B S is small.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from saelens_scaffold.kernels.entries import Entries
from saelens_scaffold.kernels.selection import Encoder

Select = Callable[[Encoder], tuple[Entries, torch.Tensor]]
"""Selects entries, and gives their pre-activations, without the latents' scale."""


class SelectedPreActivations(torch.autograd.Function):
    """
    Scaffold coordinates and the selected pre-activations of the dictionary.

    Args:
        x: x̄ = x - b_dec, shape (n_tokens, d_in), through which no gradient goes.
        W_enc: Shape (d_in, d_sae).
        b_enc: Shape (d_sae,); that of the scaffold is not trained.
        B: The scaffold's decoder, shape (r, d_in), if the dictionary reads the residual;
            None if it reads the activation.
        b_dec: The b_dec that x is without, shape (d_in,), for its gradient; None if x
            contains it.
        rank: r.
        select: Selects, given what makes the dictionary's pre-activations.
        ops: The kernels to use.
        found: Receives the entries, whose latents are counted from the dictionary's first.

    Returns:
        z, shape (n_tokens, r), and the pre-activations h_e, shape (n_entries,).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        B: torch.Tensor | None,
        b_dec: torch.Tensor | None,
        rank: int,
        select: Select,
        ops: ModuleType,
        found: list[Entries],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # not in autocast's precision: cheap, and where A dominates, the residual is a
        # small difference
        with torch.autocast(x.device.type, enabled=False):
            z = torch.addmm(b_enc[:rank], x, W_enc[:, :rank])
            read = x if B is None else torch.addmm(x, z, B, alpha=-1)
        entries, values = select(Encoder(read, W_enc[:, rank:], b_enc[rank:], None))
        found.append(entries)
        ctx.entries, ctx.ops, ctx.rank = entries, ops, rank
        ctx.has_b_dec = b_dec is not None
        ctx.save_for_backward(x, read, z, W_enc, B)
        return z, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        grad_z, grad_values = grads
        x, read, z, W_enc, B = ctx.saved_tensors
        entries, ops, rank = ctx.entries, ctx.ops, ctx.rank
        A, S = W_enc[:, :rank], W_enc[:, rank:]
        by_latent = entries.by_latent
        tokens, weights = entries.tokens[by_latent], grad_values[by_latent]

        grad_b_enc = W_enc.new_zeros(W_enc.shape[1])
        grad_b_enc[rank:].index_add_(0, entries.latents, grad_values.to(W_enc.dtype))

        grad_B = None
        if B is not None and rank > 0:
            read_through_B = (B @ S).T  # (n_latents, r)
            through_z = z.new_empty(entries.n_rows, rank)
            ops.row_sums(
                entries.row_offsets,
                entries.latents,
                grad_values,
                read_through_B,
                through_z,
            )
            grad_z = grad_z - through_z.view(-1, *z.shape).sum(0)
            of_z = W_enc.new_empty(S.shape[1], rank)
            ops.row_sums(entries.latent_offsets, tokens, weights, z, of_z)
            grad_B = -(S @ of_z).T

        grad_W_enc = torch.empty_like(W_enc)
        grad_W_enc[:, :rank] = x.T @ grad_z
        ops.row_sums(
            entries.latent_offsets, tokens, weights, read, grad_W_enc[:, rank:].T
        )
        grad_b_dec = None
        if ctx.has_b_dec:
            grad_b_dec = -(A @ grad_z.sum(0) + S @ grad_b_enc[rank:])
        return None, grad_W_enc, grad_b_enc, grad_B, grad_b_dec, *[None] * 4


class Reconstructions(torch.autograd.Function):
    """
    What the scaffold and the selected latents write, without b_dec.

    Args:
        z: Scaffold coordinates, shape (n_tokens, r).
        values: The entries' activations, shape (n_entries,).
        W_dec: Shape (d_sae, d_in).
        entries: The entries, whose latents are counted from the dictionary's first.
        ops: The kernels to use.

    Returns:
        The sum of each row, shape (n_rows, d_in). The scaffold's part is in the first
        n_tokens rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: torch.Tensor,
        values: torch.Tensor,
        W_dec: torch.Tensor,
        entries: Entries,
        ops: ModuleType,
    ) -> torch.Tensor:
        rank = z.shape[1]
        out = W_dec.new_empty(entries.n_rows, W_dec.shape[1])
        ops.row_sums(entries.row_offsets, entries.latents, values, W_dec[rank:], out)
        with torch.autocast(z.device.type, enabled=False):
            out[: entries.n_tokens].addmm_(z, W_dec[:rank])
        ctx.entries, ctx.ops = entries, ops
        ctx.save_for_backward(z, values, W_dec)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        z, values, W_dec = ctx.saved_tensors
        entries, ops, rank = ctx.entries, ctx.ops, z.shape[1]
        grad = grad.contiguous()
        of_scaffold = grad[: entries.n_tokens]
        by_latent = entries.by_latent

        grad_values = ops.entry_dots(
            entries.row_offsets, entries.rows, entries.latents, grad, W_dec[rank:]
        )
        grad_W_dec = torch.empty_like(W_dec)
        grad_W_dec[:rank] = z.T @ of_scaffold
        ops.row_sums(
            entries.latent_offsets,
            entries.rows[by_latent],
            values[by_latent],
            grad,
            grad_W_dec[rank:],
        )
        return of_scaffold @ W_dec[:rank].T, grad_values, grad_W_dec, None, None
