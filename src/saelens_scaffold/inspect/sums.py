"""Everything that an inspection sums over the tokens."""

from collections.abc import Sequence

import torch

from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.evals.tokens import TokenStream, special_ids
from saelens_scaffold.inspect.axes import AxesFit
from saelens_scaffold.inspect.explanations import Explanations, Tokens
from saelens_scaffold.inspect.sides import SideBySide
from saelens_scaffold.inspect.statistics import DirectionStatistics, LatentStatistics
from saelens_scaffold.saes.facts import (
    DENSE_THRESHOLD,
    FiringStatistics,
    tokens_at_once,
)
from saelens_scaffold.saes.subspaces import ActivationMoments

MAX_DENSE = 32
"""Dense latents of an SAE that are explained, at most."""

MAY_BE_DENSE = DENSE_THRESHOLD / 2
"""Share of the first tokens above which a latent may be dense on all of them."""

N_CONTEXTS = 10
CONTEXT_BYTES, ALL_CONTEXTS_BYTES = 180, 20_000_000
"""What a context takes in JSON, and what all contexts of latents together may take."""


class Sample:
    """What the first tokens fix: the axes, and which latents may be dense."""

    def __init__(self, saes: Sequence[SelectedSAE], device: str):
        self.moments = ActivationMoments(saes[0].sae.cfg.d_in, device)
        self.firing = [FiringStatistics(of.sae, n_replicates=0) for of in saes]
        self.axes = [AxesFit(of.sae) if of.rank else None for of in saes]

    def update(self, x: torch.Tensor) -> None:
        """Add activations, shape (n_tokens, d_in)."""
        self.moments.update(x)
        for firing in self.firing:
            firing.update_unsampled(x)
        for fit in filter(None, self.axes):
            fit.update(x)

    def may_be_dense(self, index: int) -> torch.Tensor:
        """Latents of an SAE that may be dense on all tokens, shape (n_latents,)."""
        frequencies = self.firing[index].fired / self.moments.n
        order = frequencies.argsort(descending=True, stable=True)[:MAX_DENSE]
        return order[frequencies[order] > MAY_BE_DENSE]


class Sums:
    """
    Everything that is summed over the tokens, of all SAEs.

    All is found in one pass of the language model. Axes must be known before contexts can be
    ranked along them, and what is to be explained before R² are summed, so axes and the
    latents that may be dense come from a small first sample of the text; what follows is
    measured on the rest, which had no say in them. Which of those latents are dense, the
    rest decides. R² are held out by sums over two halves, not by a second pass. Only the
    loss without a direction needs more runs of the language model, and takes a few sequences
    for that. Memory depends on the latents, the vocabulary and the contexts kept, and not on
    the tokens.

    Attributes:
        latents: Of each SAE.
        directions: Of each SAE; None without a scaffold.
        sides: Each SAE but the first beside the first.
        explanations: Of the targets: directions, and latents that may be dense, of each SAE in
            turn.
        moments: Of the activations.
        targets: Moments of the targets.
    """

    def __init__(
        self,
        saes: Sequence[SelectedSAE],
        stream: TokenStream,
        sample: Sample,
        texts: Sequence[str],
    ):
        n_sparse = sum(of.sae.cfg.d_sae - of.rank for of in saes)
        n_contexts = ALL_CONTEXTS_BYTES // (CONTEXT_BYTES * n_sparse)
        n_contexts = max(1, min(N_CONTEXTS, n_contexts))
        size, mean = stream.selection.context_size, sample.moments.mean.float()
        self._at_once = max(1, min(tokens_at_once(of.sae) for of in saes) // size)
        self.latents = [
            LatentStatistics(of.sae, sample.may_be_dense(i), n_contexts)
            for i, of in enumerate(saes)
        ]
        self.directions = [
            fit and DirectionStatistics(fit.result(), mean, size, N_CONTEXTS)
            for fit in sample.axes
        ]
        self.sides = [SideBySide(self.latents[0], of) for of in self.latents[1:]]
        n_targets = sum(len(of.candidates) for of in self.latents)
        n_targets += sum(len(of.axes.rows) for of in filter(None, self.directions))
        special, device = special_ids(stream.tokenizer), mean.device
        self.explanations = Explanations(texts, special, size, n_targets, device)
        self.moments = ActivationMoments(len(mean), device)
        self.targets = ActivationMoments(n_targets, device)

    def update(self, batch: Tokens) -> None:
        """Add a batch."""
        for part in batch.parts(self._at_once):
            acts = [of.update(part) for of in self.latents]
            for other, side in zip(acts[1:], self.sides, strict=True):
                side.update(acts[0], other)
            targets: list[torch.Tensor] = []
            for i, directions in enumerate(self.directions):
                targets += [directions.update(part)] if directions else []
                targets.append(acts[i][:, self.latents[i].candidates])
            joined = torch.cat(targets, dim=1).float()
            self.explanations.update(part, joined)
            self.targets.update(joined)
            self.moments.update(part.x[part.counts])
