"""A training step in sparse kernels, on the active latents alone, and its fused Adam."""

import itertools
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

import torch
from sae_lens.saes.batchtopk_sae import BatchTopK
from torch.optim.optimizer import register_optimizer_step_pre_hook

from saelens_scaffold.kernels.choice import choose_kernels
from saelens_scaffold.kernels.entries import Entries, sorted_entries
from saelens_scaffold.kernels.lazy import LazyTensor, SparseActivations
from saelens_scaffold.kernels.selection import Encoder
from saelens_scaffold.kernels.sparse_forward import SparseForward
from saelens_scaffold.saes.scaffold import ScaffoldActivation, is_hooked

if TYPE_CHECKING:
    from saelens_scaffold.saes import ScaffoldBatchTopKTrainingSAE as ScaffoldSAE


def kernels_for(sae: "ScaffoldSAE", sae_in: torch.Tensor) -> ModuleType | None:
    """The sparse kernels for a training step, or None for dense code."""
    activation_fn = sae.activation_fn
    if (
        # hooks read, change or train real tensors
        any(is_hooked(point) for point in sae.hook_dict.values())
        or not isinstance(activation_fn, ScaffoldActivation)
        or type(activation_fn.sparse_activation) is not BatchTopK
        or sae_in.requires_grad
        or sae_in.ndim != 2
        or len(sae_in) == 0
    ):
        return None
    rank = sae.cfg.scaffold_rank
    # rank 0 is SAELens's architecture to the last bit
    worthwhile = (rank > 0 or sae.trains_plain_sae) and is_worthwhile(
        sae.cfg.k, sae.cfg.d_sae - rank
    )
    return choose_kernels(sae.cfg.kernels, sae.W_enc.device, worthwhile=worthwhile)


def is_worthwhile(k: float, n_latents: int) -> bool:
    """Whether sparse kernels gain anything: k latents of n are active per token."""
    return 8 * k <= n_latents


class Revival(NamedTuple):
    """
    Dead latents that reconstruct the error of a level (Gao et al. 2024, A.2).

    Attributes:
        latents: The dead latents, counted from the dictionary's first, shape (n,).
        k: Number of them that are active per token.
        weight: Weight of the loss.
        level: Index of the level.
    """

    latents: torch.Tensor
    k: int
    weight: float
    level: int


def revivals_of(sae: "ScaffoldSAE", dead: torch.Tensor) -> list[Revival]:
    """
    The revivals of an SAE's dead latents, with SAELens's k and weights.

    Args:
        sae: The SAE.
        dead: Mask of the dictionary's latents, shape (d_sae - r,).
    """
    by_level = sae.dead_latents(dead)
    # of all shards, of which some may have no dead latents
    (n_dead,) = sae.sum_over_shards(torch.tensor([len(of) for of in by_level.values()]))
    k = sae.cfg.d_in // 2
    return [
        Revival(latents, min(k, n), min(n / k, 1.0), level)
        for (level, latents), n in zip(by_level.items(), n_dead.tolist(), strict=True)
        if n > 0
    ]


class SparseStep:
    """
    One training step.

    The reconstruction has parts: the contribution of each Matryoshka level (one level for
    BatchTopK), and that of the dead latents of each revival. All are encoded, decoded and
    trained in one pass, each part as further rows of the same sparse matrix.

    Args:
        ops: The kernels.
        sae: The SAE.
        dead: Mask of the dead latents, shape (d_sae,); None revives none.

    Attributes:
        feature_acts: Activations, once encoded.
        levels: Reconstruction of each level without b_dec, of shape (n_tokens, d_in).
        revived: Contribution of each revival, of shape (n_tokens, d_in).
    """

    def __init__(self, ops: ModuleType, sae: "ScaffoldSAE", dead: torch.Tensor | None):
        rank = sae.cfg.scaffold_rank
        self._ops = ops
        self._sae = sae
        # in latents of the dictionary, ascending
        self._widths = [width - rank for width in sae.level_widths()]
        self._revivals = [] if dead is None else revivals_of(sae, dead[rank:])
        self.feature_acts: SparseActivations | None = None
        self.levels: Sequence[torch.Tensor] = ()
        self.revived: Sequence[torch.Tensor] = ()

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Activations and pre-activations; sets the attributes.

        Args:
            x: Processed input x̄, shape (n_tokens, d_in).

        Returns:
            `feature_acts` and `hidden_pre`, both of shape (n_tokens, d_sae), and both
            made when first used.
        """
        sae, cfg, rank = self._sae, self._sae.cfg, self._sae.cfg.scaffold_rank
        norms = sae.W_dec.norm(dim=-1) if cfg.rescale_acts_by_decoder_norm else None
        scale = None if norms is None else norms[rank:].detach()
        k: float = sae.activation_fn.sparse_activation.k  # type: ignore[union-attr]

        def select(encoder: Encoder) -> tuple[Entries, torch.Tensor]:
            return self._select(encoder._replace(scale=scale), int(k * len(x)))

        found: list[Entries] = []
        subtracted = sae.b_dec if cfg.apply_b_dec_to_input else None
        weights = (sae.W_enc, sae.b_enc, sae.W_dec, subtracted)
        of_residual = cfg.sparse_encoder_input == "residual"
        z, values, written = SparseForward.apply(  # type: ignore[misc]
            x.detach(), *weights, rank, of_residual, select, self._ops, found,
            sae.gradient_memory, sae.sum_over_shards,
        )  # fmt: skip
        (entries,) = found
        n_levels = len(self._widths)
        parts = written.view(-1, *x.shape).unbind()
        self.levels = list(itertools.accumulate(parts[:n_levels]))
        self.revived = parts[n_levels:]

        # the entries of the revivals come last
        n_active = int(entries.row_offsets[n_levels * len(x)])
        tokens, latents = entries.tokens[:n_active], entries.latents[:n_active]
        active = values[:n_active]
        if norms is not None:
            z, active = z * norms[:rank], active * norms.index_select(0, rank + latents)
        n_latents = entries.n_latents
        self.feature_acts = SparseActivations(z, active, tokens, latents, n_latents)
        return self.feature_acts, self._hidden_pre(x)

    def _select(self, encoder: Encoder, n_active: int) -> tuple[Entries, torch.Tensor]:
        n_tokens, n_latents = len(encoder.x), encoder.W.shape[1]
        selection = self._sae.selection
        at_once = self._ops.block_elements(encoder.x.device)
        if self._revivals and n_tokens * n_latents <= at_once:
            encoder = encoder.multiply()  # dead latents' products are among them
        active = selection(encoder, n_active, self._ops)
        dead = [
            selection.of_each_token(encoder, each.latents, each.k, self._ops)
            for each in self._revivals
        ]
        places = torch.cat([selected.places for selected in (active, *dead)])
        values = torch.cat([selected.values for selected in (active, *dead)])
        tokens = places // n_latents
        latents = places - tokens * n_latents
        if encoder.scale is not None:
            values = values / encoder.scale.index_select(0, latents)

        ends = torch.tensor(self._widths[:-1], device=places.device)
        n_levels, n_active = len(self._widths), len(active.values)
        levels = torch.bucketize(latents[:n_active], ends, right=True)
        parts = (torch.full_like(d.places, n_levels + i) for i, d in enumerate(dead))
        rows = tokens.add_(torch.cat([levels, *parts]), alpha=n_tokens)
        n_rows = n_tokens * (n_levels + len(dead))
        return sorted_entries(rows, latents, values, n_tokens, n_rows, n_latents)

    def _hidden_pre(self, x: torch.Tensor) -> LazyTensor:
        sae = self._sae
        before = _some_weights(sae)

        def make() -> torch.Tensor:
            now = _some_weights(sae)
            if not torch.allclose(now, before, rtol=0, atol=0, equal_nan=True):
                raise RuntimeError(
                    "hidden_pre is computed when it is first looked into, and the weights "
                    "have changed since this training step: look into it before the "
                    "optimizer's step, or train with kernels='reference'."
                )
            return sae.pre_activations(x)

        return LazyTensor(make, (len(x), sae.cfg.d_sae), x)

    def auxiliary_loss(self, sae_in: torch.Tensor) -> torch.Tensor:
        """SAELens's auxiliary loss for dead latents, before its coefficient."""
        loss = self.levels[-1].new_tensor(0.0)
        for revival, written in zip(self._revivals, self.revived, strict=True):
            # without run-time normalisation, for which SAELens has no auxiliary loss
            residual = sae_in - self.levels[revival.level] - self._sae.b_dec
            error = (written - residual.detach()).pow(2).sum(dim=-1).mean()
            loss = loss + revival.weight * error
        return loss


@torch.no_grad()
def _some_weights(sae: "ScaffoldSAE") -> torch.Tensor:
    """A sample of weights of every kind and latent, to detect changes."""
    # PyTorch's own change counters miss the steps of fused optimizers
    return torch.cat([sae.W_enc[0], sae.W_dec[:, 0], sae.b_enc, sae.b_dec])


# ---- PyTorch's fused Adam
#
# With sparse products, the optimizer takes much of a training step. SAELens's trainer
# creates Adam with PyTorch's defaults, which on a CPU is a dozen passes over the weights.
# Fused Adam is the same in one pass, chosen by a flag that Adam reads in each step.

_SAES: "WeakSet[ScaffoldSAE]" = WeakSet()
_watch_optimizers = cache(register_optimizer_step_pre_hook)


@torch.compiler.disable()
def fuse_adam_of(sae: "ScaffoldSAE") -> None:
    """
    Make the Adam that trains an SAE's weights PyTorch's fused one.

    Other optimizers, and an Adam with `fused` or `foreach` set, stay as they are.
    """
    _watch_optimizers(_before_step)  # before each step of every optimizer
    _SAES.add(sae)


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        if group.get("fused") is None and group.get("foreach") is None:
            parameters = group["params"]
            ours = any(p is sae.W_dec for sae in _SAES for p in parameters)
            if ours and all(_can_be_fused(p, optimizer) for p in parameters):
                group["fused"] = True


def _can_be_fused(p: torch.Tensor, optimizer: torch.optim.Optimizer) -> bool:
    step = optimizer.state[p].get("step") if p in optimizer.state else None
    return (
        p.device.type in ("cpu", "cuda")
        and p.dtype in (torch.float32, torch.float64)
        # the step of a resumed run may be on the CPU
        and (step is None or step.device == p.device)
    )
