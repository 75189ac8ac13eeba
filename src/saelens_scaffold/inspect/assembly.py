"""From sums over the tokens to what an inspection says."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from saelens_scaffold.evals.rank.analysis import outlier_dimensions
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.inspect import output
from saelens_scaffold.inspect.contexts import Vocabulary
from saelens_scaffold.inspect.explanations import PREDICTORS, label_of
from saelens_scaffold.inspect.logit_lens import Tops, promoted_tokens, residual_width
from saelens_scaffold.inspect.removal import Removals
from saelens_scaffold.inspect.statistics import DirectionStatistics, LatentStatistics
from saelens_scaffold.inspect.sums import Sums
from saelens_scaffold.models.language_models import LanguageModel
from saelens_scaffold.saes.subspaces import subspace_overlap

N_DIMENSIONS = 10
"""Dimensions that are named as those written to most."""


class Assembly:
    """
    An inspection, put together once all tokens are seen.

    Args:
        model: The language model.
        tokenizer: Its tokenizer.
        saes: The SAEs.
        sums: The sums over the tokens.
        removals: Losses without directions.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Any,
        saes: Sequence[SelectedSAE],
        sums: Sums,
        removals: Removals,
    ):
        self._model, self._saes, self._sums = model, saes, sums
        self._removals, self._width = removals, residual_width(model)
        self._vocabulary = Vocabulary(tokenizer)
        self._covariance = sums.moments.covariance.cpu()
        variances, principal = sums.moments.principal_directions()
        self._variances, self._principal = variances.cpu(), principal.cpu()
        self._of_targets = sums.targets.covariance.cpu()
        self._r_squared = iter(sums.explanations.r_squared())
        self._removal = iter(removals.result())
        # where each SAE's directions and dense latents are among the targets
        self._places: list[tuple[range, range]] = []
        start = 0
        for directions, latents in zip(sums.directions, sums.latents, strict=True):
            middle = start + (len(directions.axes.rows) if directions else 0)
            end = middle + len(latents.dense)
            self._places.append((range(start, middle), range(middle, end)))
            start = end

    def result(self, n_promoted: int, about: Mapping[str, Any]) -> output.Inspection:
        """
        Args:
            n_promoted: Number of tokens named as promoted.
            about: Further fields.
        """
        total = self._variances.sum()
        saes = [self._sae(i, n_promoted) for i in range(len(self._saes))]
        n_tokens = self._sums.moments.n
        return output.Inspection(
            **about,
            n_tokens=n_tokens,
            n_removal_tokens=self._removals.n_predictions,
            cross_entropy=self._removals.cross_entropy,
            variance_shares=(self._variances / total).tolist(),
            predictors=[*PREDICTORS],
            tokens=self._vocabulary.strings,
            saes=saes,
            pairs=[
                side.result(n_tokens, (0, i))
                for i, side in enumerate(self._sums.sides, start=1)
            ],
        )

    def _sae(self, index: int, n_promoted: int) -> output.InspectedSAE:
        of, n_tokens = self._saes[index], self._sums.moments.n
        directions, latents = self._sums.directions[index], self._sums.latents[index]
        scaffold = self._scaffold(index, directions, n_promoted) if directions else None
        dense = [*self._dense(index, latents)]
        other = next(filter(None, [directions, *self._sums.directions]), None)
        rows = other.axes.rows if other else None
        tops = self._tops(latents.decoder, n_promoted)
        columns = latents.result(n_tokens, rows, tops, self._vocabulary)
        return output.InspectedSAE(
            name=of.label,
            architecture=of.sae.cfg.architecture(),
            d_sae=of.sae.cfg.d_sae,
            l0_sparse=float(latents.fired.sum()) / n_tokens,
            scaffold=scaffold,
            dense=sorted(dense, key=lambda d: -columns.frequency[d.latent - of.rank]),
            latents=columns,
        )

    def _tops(self, directions: torch.Tensor, n: int) -> Tops:
        """Of none, where the SAEs are not of the residual stream's width."""
        if directions.shape[1] != self._width:
            return [([], [])] * len(directions)
        return promoted_tokens(self._model, directions, n)

    def _scaffold(
        self, index: int, of: DirectionStatistics, n_promoted: int
    ) -> output.Scaffold:
        rows = of.axes.rows.cpu().double()
        places = self._places[index][0]
        variances = self._of_targets.diagonal()[places.start : places.stop]
        inside = rows.pow(2).sum(dim=0)
        outliers = outlier_dimensions(self._covariance.diagonal())
        most = inside.topk(min(N_DIMENSIONS, len(inside)))
        rank, d_in = rows.shape
        tops = self._tops(of.axes.rows, n_promoted)
        return output.Scaffold(
            rank=rank,
            share_of_variance=float(variances.sum() / self._variances.sum()),
            overlap_with_pca=subspace_overlap(rows, self._principal[:rank]),
            overlap_of_random=rank / d_in,
            dimensions=_weighted(most.indices, most.values),
            outlier_dimensions=_weighted(outliers, inside[outliers]),
            positions=of.positions(),
            directions=[
                self._direction(of, i, variances, tops[i]) for i in range(rank)
            ],
        )

    def _direction(
        self,
        of: DirectionStatistics,
        i: int,
        variances: torch.Tensor,
        tops: tuple[Any, Any],
    ) -> output.Direction:
        row, r_squared = of.axes.rows[i].cpu().double(), next(self._r_squared)
        cosines = (self._principal @ row).abs()
        most = row.abs().topk(min(N_DIMENSIONS, len(row))).indices
        rank, contexts, words = len(variances), of.contexts, self._vocabulary
        scale = float(contexts.values[[i, rank + i], 0].abs().max())
        low = contexts.windows(rank + i, -scale, words)
        return output.Direction(
            variance=float(variances[i]),
            share_of_scaffold=float(variances[i] / variances.sum()),
            share_of_variance=float(variances[i] / self._variances.sum()),
            label=label_of(r_squared),
            r_squared=r_squared,
            removal=self._shown(next(self._removal)),
            principal_component=int(cosines.argmax()),
            cosine=float(cosines.max()),
            dimensions=_weighted(most, row[most]),
            promoted=words.weighted(tops[0]),
            suppressed=words.weighted(tops[1]),
            histogram=of.histogram[i].tolist(),
            scale=scale,
            high=contexts.windows(i, scale, words),
            low=low,
        )

    def _shown(self, removal: output.Removal) -> output.Removal:
        tokens = [
            (*self._vocabulary.indices([token]), n, more)
            for token, n, more in removal.tokens
        ]
        removal.tokens = tokens  # type: ignore[assignment]
        return removal

    def _dense(self, index: int, of: LatentStatistics) -> Any:
        antipodes = of.antipodes(self._sums.moments.n)
        places = self._places[index][1]
        for latent, place, antipode in zip(
            of.dense.tolist(), places, antipodes, strict=True
        ):
            r_squared = next(self._r_squared)
            yield output.DenseLatent(
                latent=latent + of.rank,
                label=label_of(r_squared),
                r_squared=r_squared,
                antipode=antipode,
                successor=self._successor(place, of.decoder[latent].cpu()),
            )

    def _successor(self, place: int, decoder: torch.Tensor) -> output.Successor | None:
        """The direction whose coordinate correlates most with a target."""
        best: output.Successor | None = None
        variances = self._of_targets.diagonal()
        for i, (own, directions) in enumerate(
            zip((p[0] for p in self._places), self._sums.directions, strict=True)
        ):
            if directions is None:
                continue
            covariances = self._of_targets[place, own.start : own.stop]
            spread = (variances[place] * variances[own.start : own.stop]).sqrt()
            correlations = (covariances / spread).nan_to_num(0)
            direction = int(correlations.abs().argmax())
            correlation = float(correlations[direction])
            row = directions.axes.rows[direction].cpu()
            cosine = torch.nn.functional.cosine_similarity(row, decoder, dim=0)
            if best is None or abs(correlation) > abs(best.correlation):
                best = output.Successor(i, direction, float(cosine), correlation)
        return best


def _weighted(indices: torch.Tensor, weights: torch.Tensor) -> output.Weighted:
    return [*zip(indices.tolist(), weights.tolist(), strict=True)]
