"""
Gradient pursuit: better activations for the latents of a trained SAE, found token by token.

The encoder of an SAE only estimates which latents reconstruct a token best. Gradient pursuit
(Blumensath and Davies 2008) builds the reconstruction up from the decoder instead. It is the
first of two remedies against nonlinear SAE error in "Decomposing the Dark Matter of Sparse
Autoencoders" (arXiv 2410.14670), and computes here what that paper's code computes: from
weights w = 0 and residual r = x, once for each latent of the token's budget,

    p = r D^T                           inner products with the decoder's rows
    S = {j : w_j > 0} + {argmax p}      the support; signs count
    g = p on S, else 0                  the gradient
    w = max(w + g |g|² / |g D|², 0)     the step of least squared error, then clamped
    r = x - w D

A latent of the support may be chosen again, and the clamp removes latents, so a token has at
most as many latents as its budget.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sae_lens.saes.sae import SAE

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.saes.facts import scaffold_rank
from saelens_scaffold.saes.validation import check_is_autoencoder

# Inner products at once, of tokens with latents: 16 MB, for a CPU's cache. Products of
# matrices need some hundred tokens all the same.
_PRODUCTS, _MIN_TOKENS = 2**22, 256
_INT8_MAX = 127
# Error of an inner product by rounding one factor: steps of the rounding, times the norm of
# the other.
_MAX_ERROR = 4
# Of a token, to compute exactly. With more, as where nothing is left to explain, all are.
_MAX_CANDIDATES = 256
_MIN_LATENTS, _ROWS_AT_ONCE, _GROUP = 512, 2**12, 32


def encode(
    sae: SAE[Any],
    x: torch.Tensor,
    l0: int | torch.Tensor | None = None,
    batch_tokens: int | None = None,
) -> torch.Tensor:
    """
    Activations by gradient pursuit, in place of the SAE's `encode`.

    To encode several batches, make one `GradientPursuit` for all of them.

    Args:
        sae: SAE with a linear decoder. The coordinates of a scaffold are those of the SAE's
            `encode`, and what the scaffold leaves is pursued with the sparse dictionary.
        x: Activations as the SAE takes them, shape (..., d_in), or
            (..., n_heads, d_head) for `reshape_activations="hook_z"`.
        l0: Budget of sparse latents: one for all tokens, or one for each, shape (...). By
            default a token's L0 under the SAE's `encode`.
        batch_tokens: Tokens that are pursued at once; by default as many as a CPU's cache
            has room for. Budgets are sorted first, so more tokens in a call cost less each.

    Returns:
        Shape (..., d_sae), of which `sae.decode` makes the reconstruction.

    Raises:
        UserError: The SAE is no autoencoder with a linear decoder, or l0 is no count.
    """
    return GradientPursuit(sae).encode(x, l0, batch_tokens)


class GradientPursuit:
    """
    Encodes by gradient pursuit, and keeps what is computed of the decoder between batches.

    The SAE's weights must not change meanwhile.

    Args:
        sae: SAE with a linear decoder.

    Raises:
        UserError: It is no autoencoder.
    """

    def __init__(self, sae: SAE[Any]):
        check_is_autoencoder(sae)
        self.sae = sae
        self._rank = scaffold_rank(sae)
        decoder = sae.W_dec.detach()
        decoder = decoder.to(torch.promote_types(decoder.dtype, torch.float32))
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            decoder = decoder / decoder.norm(dim=1, keepdim=True)
        self._decoder = decoder
        self._dictionary = _Dictionary(decoder[self._rank :])

    @torch.no_grad()
    def encode(
        self,
        x: torch.Tensor,
        l0: int | torch.Tensor | None = None,
        batch_tokens: int | None = None,
    ) -> torch.Tensor:
        """The function `encode` for this SAE."""
        sae, rank = self.sae, self._rank
        of_heads = sae.cfg.reshape_activations == "hook_z"
        self.check_decoder(x.shape[-2 if of_heads else -1 :])
        sae_in = sae.process_sae_in(x)
        acts = sae_in.new_zeros(*sae_in.shape[:-1], sae.cfg.d_sae)
        if l0 is None or rank:
            encoded = sae.encode(x).to_dense()
            acts[..., :rank] = encoded[..., :rank]
            if l0 is None:
                l0 = encoded[..., rank:].count_nonzero(dim=-1)
        budgets = _budgets(l0, sae_in.shape[:-1]).to(acts.device)

        targets = sae_in.to(self._decoder.dtype)
        if not sae.cfg.apply_b_dec_to_input:
            targets = targets - sae.b_dec
        flat = acts.view(-1, sae.cfg.d_sae)
        targets = targets.reshape(-1, sae.cfg.d_in)
        targets = targets - flat[:, :rank].to(targets) @ self._decoder[:rank]
        # Tokens of like budgets, so that those of a batch end together.
        at_once = batch_tokens or max(_MIN_TOKENS, _PRODUCTS // sae.cfg.d_sae)
        for tokens in budgets.argsort(descending=True).split(at_once):
            # Autocast's precision would choose other latents.
            with torch.autocast(acts.device.type, enabled=False):
                latents, weights = self._dictionary.pursue(
                    targets[tokens], budgets[tokens]
                )
            places = tokens.unsqueeze(1), latents + rank
            # A latent that was clamped and chosen again is there twice.
            flat.index_put_(places, weights.to(flat), accumulate=True)
        return acts

    def check_decoder(self, features: Sequence[int]) -> None:
        """
        See that tokens are decoded by f W_dec + b_dec, whatever the class of the SAE.

        Args:
            features: Shape of the activations of a token as the SAE takes them.

        Raises:
            UserError: They are not.
        """
        sae = self.sae
        x = torch.linspace(-1, 1, math.prod(features)).to(sae.W_dec).view(1, *features)
        acts = torch.linspace(0, 1, sae.cfg.d_sae).to(sae.W_dec).expand(1, -1)
        # Run-time normalisation remembers the scale of its last input, once.
        sae.process_sae_in(x)
        decoded = sae.decode(acts)
        sae.process_sae_in(x)
        expected = (acts.to(self._decoder) @ self._decoder).to(acts) + sae.b_dec
        expected = sae.run_time_activation_norm_fn_out(expected)
        error = decoded - sae.reshape_fn_out(expected, sae.d_head)
        if not error.norm() <= 0.05 * expected.norm():
            raise UserError(
                f"architecture {sae.cfg.architecture()!r}: gradient pursuit needs a linear "
                "decoder, f W_dec + b_dec, and this SAE decodes in another way"
            )


def _budgets(l0: int | torch.Tensor, shape: torch.Size) -> torch.Tensor:
    budgets = torch.as_tensor(l0)
    if (
        budgets.is_floating_point()
        or budgets.dtype == torch.bool
        or budgets.shape not in ((), shape)
        or (budgets < 0).any()
    ):
        raise UserError(
            f"l0 must be a count of latents, or one for each token, {tuple(shape)}, got "
            f"{l0!r:.100}"
        )
    return budgets.expand(shape).reshape(-1)


class _Dictionary:
    """
    Rows of a decoder, and the search for the one with the largest inner product.

    That search, of all residuals with all rows in each step, is by far the most work. Where
    the CPU has instructions for it, products of 8-bit integers find a few candidates, of
    which the exact products decide:

    - Rows and residuals are rotated at random, which changes no product. No coordinate is
      then much larger than the others, as a few of a residual stream are.
    - Both are rounded up or down at random, without bias, so errors average out whatever
      the data. By Hoeffding's inequality a product errs by more than `_MAX_ERROR` allows
      with a probability below 4 exp(-2 x 4²), 1e-13.

    The paper's code takes three products of matrices of a token's d_in x d_sae a step, and
    takes as many steps for all tokens of a batch as the largest budget has.

    Args:
        rows: D, shape (n_latents, d_in).
    """

    def __init__(self, rows: torch.Tensor):
        self._rows = rows
        self._rotation = None
        if _has_integer_products(rows):
            self._generator = torch.Generator().manual_seed(0)
            square = rows.shape[1], rows.shape[1]
            noise = torch.randn(square, generator=self._generator)
            self._rotation = torch.linalg.qr(noise)[0]
            self._rows = rows @ self._rotation
            self._largest_norm = rows.norm(dim=1).amax()
            self._unit = self._rows.abs().amax() / _INT8_MAX
            # A whole number of groups: the last row again
            n_padding = -len(rows) % _GROUP
            parts = self._rows, self._rows[-1:].expand(n_padding, -1)
            rounded = [
                self._round(some / self._unit)
                for part in parts
                for some in part.split(_ROWS_AT_ONCE)
            ]
            self._integers = torch.cat(rounded).T

    def pursue(
        self, x: torch.Tensor, budgets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x: Shape (n_tokens, d_in).
            budgets: Shape (n_tokens,), descending.

        Returns:
            The latents that each token chose, step by step, and their weights, 0 where
            clamped, both of shape (n_tokens, max(budgets)).
        """
        if self._rotation is not None:
            x = x @ self._rotation
        steps = torch.arange(int(budgets[:1].sum()), device=budgets.device)
        latents = budgets.new_zeros(len(x), len(steps), dtype=torch.long)
        weights = x.new_zeros(len(x), len(steps))
        residual = x.clone()
        for step, n in enumerate((budgets.unsqueeze(1) > steps).sum(dim=0).tolist()):
            support, w = latents[:n, : step + 1], weights[:n, : step + 1]
            residual = residual[:n]
            chosen = self._best(residual)
            active = w > 0
            active[:, step:] = ~((support[:, :step] == chosen) & active[:, :step]).any(
                dim=1, keepdim=True
            )
            support[:, step:] = chosen
            gradient = self._products(residual, support) * active
            direction = self._sums(support, gradient)
            length = gradient.square().sum(dim=1) / direction.square().sum(dim=1)
            # 0 / 0 where nothing is left to explain, as for x = 0
            length = length.nan_to_num(0, 0, 0).unsqueeze(1)
            w.addcmul_(gradient, length)
            residual.addcmul_(direction, length, value=-1)
            clamped = (w < 0).any(dim=1).nonzero().squeeze(1)
            if len(clamped):
                w.clamp_(min=0)
                explained = self._sums(support[clamped], w[clamped])
                residual[clamped] = x[clamped] - explained
        return latents, weights

    def _products(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Inner products of each token with its latents, shape (n_tokens, n_latents)."""
        if x.device.type != "cpu":
            return torch.bmm(self._rows[latents], x.unsqueeze(2)).squeeze(2)
        n_tokens, n_latents = latents.shape
        counts = latents.new_full((n_tokens,), n_latents)
        return self._products_of_pairs(x, latents.flatten(), counts).view_as(latents)

    def _products_of_pairs(
        self, x: torch.Tensor, latents: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        """
        Inner products, without copies of the rows.

        Args:
            x: Shape (n_tokens, d_in).
            latents: Those of the first token, then of the second, ..., shape (n_pairs,).
            counts: How many latents each token has, shape (n_tokens,).

        Returns:
            Shape (n_pairs,).
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            pairs = torch.sparse_csr_tensor(
                F.pad(counts.cumsum(0), (1, 0)),
                latents,
                x.new_zeros(len(latents)),
                (len(x), len(self._rows)),
                check_invariants=False,
            )
        return torch.sparse.sampled_addmm(pairs, x, self._rows.T, beta=0).values()

    def _sums(self, latents: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sum of each token's latents, shape (n_tokens, d_in)."""
        return F.embedding_bag(
            latents, self._rows, mode="sum", per_sample_weights=weights.contiguous()
        )

    def _best(self, x: torch.Tensor) -> torch.Tensor:
        """The latent of the largest inner product with each token, shape (n_tokens, 1)."""
        if self._rotation is None:
            return (x @ self._rows.T).argmax(dim=1, keepdim=True)
        tiny = torch.finfo(x.dtype).tiny
        unit = (x.abs().amax(dim=1) / _INT8_MAX).clamp(min=tiny)
        rounded = self._round(x / unit.unsqueeze(1))
        products = torch.ops.aten._int_mm(rounded, self._integers).unflatten(
            1, (-1, _GROUP)
        )
        largest = products.amax(dim=2)
        norm = rounded.float().norm(dim=1)
        error = _MAX_ERROR * (self._largest_norm / self._unit + norm)
        least = largest.amax(dim=1) - 2 * error
        tokens, groups = (largest >= least.unsqueeze(1)).nonzero(as_tuple=True)
        of_groups = products[tokens, groups] >= least[tokens].unsqueeze(1)
        which, places = of_groups.nonzero(as_tuple=True)
        tokens = tokens[which]
        candidates = (groups[which] * _GROUP + places).clamp(max=len(self._rows) - 1)
        counts = tokens.bincount(minlength=len(x))
        undecided = counts > _MAX_CANDIDATES
        if undecided.any():
            decided = ~undecided[tokens]
            tokens, candidates = tokens[decided], candidates[decided]
            counts[undecided] = 0

        exact = self._products_of_pairs(x, candidates, counts)
        largest = x.new_full((len(x),), -torch.inf)
        largest.scatter_reduce_(0, tokens, exact, "amax")
        best = torch.full_like(counts, len(self._rows))
        first = candidates.where(exact == largest[tokens], len(self._rows))
        best.scatter_reduce_(0, tokens, first, "amin")
        if undecided.any():
            best[undecided] = (x[undecided] @ self._rows.T).argmax(dim=1)
        # Without a largest, where something is not a number, any will do.
        return best.clamp(max=len(self._rows) - 1).unsqueeze(1)

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        """Integers next to x, drawn so that x is their mean, shape (n, d_in)."""
        noise = torch.rand(x.shape[1], generator=self._generator)
        return (x + noise).floor().clamp(-_INT8_MAX, _INT8_MAX).to(torch.int8)


def _has_integer_products(rows: torch.Tensor) -> bool:
    """Whether products of 8-bit integers are fast here, and exact."""
    if (
        rows.device.type != "cpu"
        or rows.dtype != torch.float32
        or len(rows) < _MIN_LATENTS
        or not torch.backends.cpu.get_cpu_capability().startswith("AVX")
    ):
        return False
    # Instructions older than VNNI add in 16 bits, and saturate.
    ones = torch.full((32, 64), _INT8_MAX, dtype=torch.int8)
    expected = 64 * _INT8_MAX**2
    return bool((torch.ops.aten._int_mm(ones, ones.T) == expected).all())
