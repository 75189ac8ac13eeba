"""Everything that an inspection sums over the tokens."""

from collections.abc import Sequence

import torch

from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.evals.tokens import TokenStream
from saelens_scaffold.inspect.axes import AxesFit, ScaffoldAxes
from saelens_scaffold.inspect.explanations import Explanations, Tokens
from saelens_scaffold.inspect.sides import SideBySide
from saelens_scaffold.inspect.statistics import DirectionStatistics, LatentStatistics
from saelens_scaffold.models.language_models import LanguageModel
from saelens_scaffold.saes.facts import (
    DENSE_THRESHOLD,
    FiringStatistics,
    tokens_at_once,
)
from saelens_scaffold.saes.scaffold import ScaffoldMixin
from saelens_scaffold.saes.subspaces import ActivationMoments

MAX_DENSE = 32
"""Dense latents of an SAE that are explained: those that fire most often."""

N_CONTEXTS = 10
CONTEXT_BYTES, ALL_CONTEXTS_BYTES = 180, 20_000_000
"""What a context takes in JSON, and what all contexts of latents together may take."""


class Sample:
    """What the first tokens fix: the axes, and which latents are dense."""

    def __init__(self, saes: Sequence[SelectedSAE], device: str):
        self.moments = ActivationMoments(saes[0].sae.cfg.d_in, device)
        self.firing = [FiringStatistics(of.sae, n_replicates=0) for of in saes]
        self._fits = [
            AxesFit(of.sae) if isinstance(of.sae, ScaffoldMixin) and of.rank else None
            for of in saes
        ]

    def update(self, x: torch.Tensor) -> None:
        self.moments.update(x)
        for firing in self.firing:
            firing.update_unsampled(x)
        for fit in self._fits:
            if fit is not None:
                fit.update(x)

    @property
    def axes(self) -> list[ScaffoldAxes | None]:
        """Axes of each SAE; None without a scaffold."""
        return [fit and fit.result() for fit in self._fits]

    def dense(self, index: int) -> torch.Tensor:
        """Dense latents of an SAE, most frequent first, shape (n_dense,)."""
        frequencies = self.firing[index].fired / self.moments.n
        order = frequencies.argsort(descending=True, stable=True)[:MAX_DENSE]
        return order[frequencies[order] > DENSE_THRESHOLD]


class Sums:
    """
    Everything that is summed over the tokens, of all SAEs.

    All is found in one pass of the language model. Axes and dense latents must be known
    before contexts can be ranked along them, so they come from a small first sample of the
    text; what follows is measured on the rest, which had no say in them. R² are held out by
    sums over two halves, not by a second pass. Only the loss without a direction needs more
    runs of the layers above the hook point, and takes a few sequences for that. Memory
    depends on the latents, the vocabulary and the contexts kept, and not on the tokens.
    """

    def __init__(
        self,
        model: LanguageModel,
        saes: Sequence[SelectedSAE],
        stream: TokenStream,
        sample: Sample,
    ):
        n_sparse = sum(of.sae.cfg.d_sae - of.rank for of in saes)
        budget = ALL_CONTEXTS_BYTES // (CONTEXT_BYTES * n_sparse)
        n_contexts = max(1, min(N_CONTEXTS, budget))
        size = stream.selection.context_size
        self._at_once = max(1, min(tokens_at_once(of.sae) for of in saes) // size)
        mean = sample.moments.mean.float()
        self.latents = [
            LatentStatistics(of.sae, sample.dense(i), n_contexts)
            for i, of in enumerate(saes)
        ]
        self.directions = [
            axes and DirectionStatistics(axes, mean, size, N_CONTEXTS)
            for axes in sample.axes
        ]
        self.sides = [SideBySide(self.latents[0], of) for of in self.latents[1:]]
        centre: list[torch.Tensor] = []
        for directions, of, firing in zip(
            self.directions, self.latents, sample.firing, strict=True
        ):
            if directions is not None:
                centre.append(torch.zeros_like(directions.axes.stds))
            centre.append(firing.activation_sums[of.dense] / sample.moments.n)
        centre_of_targets = torch.cat([of.float() for of in centre])
        norm = float(sample.moments.covariance.trace() + mean.double().pow(2).sum())
        self.explanations = Explanations(
            stream.tokenizer, model.cfg.d_vocab, size, norm**0.5, centre_of_targets
        )
        device = centre_of_targets.device
        self.moments = ActivationMoments(len(mean), device)
        self.targets = ActivationMoments(len(centre_of_targets), device)

    def update(self, batch: Tokens) -> None:
        """Add a batch."""
        for part in batch.parts(self._at_once):
            targets: list[torch.Tensor] = []
            acts: list[torch.Tensor] = []
            for directions, latents in zip(self.directions, self.latents, strict=True):
                if directions is not None:
                    targets.append(directions.update(part))
                acts.append(latents.update(part))
                targets.append(acts[-1][:, latents.dense])
            for other, side in zip(acts[1:], self.sides, strict=True):
                side.update(acts[0], other)
            joined = torch.cat([of.float() for of in targets], dim=1)
            self.explanations.update(part, joined)
            self.targets.update(joined)
            self.moments.update(part.x[part.counts])
