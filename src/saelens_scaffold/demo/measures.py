"""What the demo measures of a trained SAE, and how it writes a number of runs as one."""

from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens import SAE

from saelens_scaffold.saes.scaffold import scaffold_rank
from saelens_scaffold.saes.subspaces import orthonormal_basis, subspace_overlap
from saelens_scaffold.training.measurement import l0_warning

DENSE_THRESHOLDS = (0.1, 0.2, 0.5)


@dataclass
class Measured:
    """
    One trained SAE, measured on held-out activations.

    Attributes:
        sae: Its name in the table.
        seed: The seed it was trained with.
        scaffold_rank: Rank of its scaffold, 0 for a plain SAE.
        dense_latents: Number of sparse latents that fire on more than each of
            `DENSE_THRESHOLDS` of the tokens.
        alive_latents: Number of sparse latents that fire at all.
        l0_sparse: Sparse latents that fire per token.
        l0_total: l0_sparse plus the rank of the scaffold.
        explained_variance: Share of the variance that the reconstruction explains.
        scaffold_overlap: Mean squared cosine of the principal angles between the
            scaffold and the planted dense subspace, or the top-r PCA subspace. None
            for a plain SAE.
        ce_loss_score: SAELens's: 1 if the language model predicts as well from the
            reconstruction, 0 if as badly as from zeros. None for planted data.
        feature_cosine: Mean, over living sparse latents, of the best cosine with a
            planted feature. None for a language model.
        firing_frequencies: Share of the tokens on which each sparse latent fires.
        l0_warning: What to say if l0_sparse is not the k it was trained with.
    """

    sae: str
    seed: int
    scaffold_rank: int
    dense_latents: list[int]
    alive_latents: int
    l0_sparse: float
    l0_total: float
    explained_variance: float
    scaffold_overlap: float | None = None
    ce_loss_score: float | None = None
    feature_cosine: float | None = None
    firing_frequencies: list[float] = field(default_factory=list, repr=False)
    l0_warning: str | None = None


def measured(
    sae: SAE[Any],
    name: str,
    seed: int,
    n_tokens: int,
    firing_frequencies: torch.Tensor,
    explained_variance: float,
    dense_subspace: torch.Tensor,
    **others: float | None,
) -> Measured:
    """
    Put together what is measured the same way on planted data and on a language model.

    Args:
        sae: The SAE.
        name: Its name in the table.
        seed: The seed it was trained with.
        n_tokens: Number of activations that it was measured on.
        firing_frequencies: Of all latents, scaffold included, shape (d_sae,).
        explained_variance: Share of the variance explained.
        dense_subspace: Orthonormal rows to compare the scaffold with, shape (n, d_in).
        others: Further fields of `Measured`.
    """
    rank = scaffold_rank(sae)
    sparse = firing_frequencies[rank:]
    l0_sparse = float(sparse.sum())
    return Measured(
        sae=name,
        seed=seed,
        scaffold_rank=rank,
        dense_latents=[int((sparse > t).sum()) for t in DENSE_THRESHOLDS],
        alive_latents=int((sparse > 0).sum()),
        l0_sparse=l0_sparse,
        l0_total=l0_sparse + rank,
        explained_variance=explained_variance,
        scaffold_overlap=(
            subspace_overlap(
                orthonormal_basis(sae.W_dec[:rank].detach()),
                orthonormal_basis(dense_subspace[:rank]),
            )
            if rank
            else None
        ),
        firing_frequencies=[round(f, 6) for f in sparse.tolist()],
        l0_warning=l0_warning(
            f"{name}, seed {seed}", l0_sparse, n_tokens, sae.cfg.metadata
        ),
        **others,
    )
