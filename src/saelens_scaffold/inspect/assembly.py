"""From sums over the tokens to what an inspection says."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from saelens_scaffold.evals.rank.analysis import outlier_dimensions
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.inspect import output
from saelens_scaffold.inspect.axes import ScaffoldAxes
from saelens_scaffold.inspect.explanations import PREDICTORS, label_of
from saelens_scaffold.inspect.logit_lens import promoted_tokens
from saelens_scaffold.inspect.removal import Removals, WrittenByLatents
from saelens_scaffold.inspect.statistics import (
    FIRST_BIN,
    DirectionStatistics,
    LatentStatistics,
)
from saelens_scaffold.inspect.sums import Sums
from saelens_scaffold.models.language_models import LanguageModel
from saelens_scaffold.saes.facts import DENSE_THRESHOLD
from saelens_scaffold.saes.subspaces import share_in_subspace, subspace_overlap

N_DIMENSIONS = 10
"""Dimensions that are named as those written to most."""

N_PROMOTED = 10
"""Tokens that are named as promoted and as suppressed."""


class Assembly:
    """
    An inspection, put together once all tokens are seen.

    Args:
        model: The language model.
        saes: The SAEs.
        sums: The sums over the tokens.
        removals: Losses without directions.
    """

    def __init__(
        self,
        model: LanguageModel,
        saes: Sequence[SelectedSAE],
        sums: Sums,
        removals: Removals,
    ):
        self._saes, self._sums = saes, sums
        self._promoted = partial(promoted_tokens, model, saes[0].hook_name)
        self._removals = removals
        variances, directions = sums.moments.principal_directions()
        self._variances, self._principal = variances.cpu(), directions.cpu()
        self._covariances = sums.targets.covariance.cpu()
        # in the order of the targets
        self._r_squared = enumerate(sums.explanations.r_squared())
        self._is_dense = [
            of.fired > DENSE_THRESHOLD * sums.moments.n for of in sums.latents
        ]
        removed: list[ScaffoldAxes | WrittenByLatents] = []
        for directions, latents, is_dense in zip(
            sums.directions, sums.latents, self._is_dense, strict=True
        ):
            removed += [directions.axes] if directions else []
            dense = latents.candidates[is_dense[latents.candidates]]
            removed.append(latents.written_by(dense, sums.moments.n))
        self._removal = iter(removals.measure(removed))

    def result(self, **about: Any) -> output.Inspection:
        """
        Args:
            about: Further fields.
        """
        sums, n_tokens = self._sums, self._sums.moments.n
        sides = enumerate(sums.sides, start=1)
        of_saes = self._saes, sums.directions, sums.latents, self._is_dense
        return output.Inspection(
            n_tokens=n_tokens,
            n_removal_tokens=self._removals.n_predictions,
            cross_entropy=self._removals.cross_entropy,
            variance_shares=(self._variances / self._variances.sum()).tolist(),
            predictors=[*PREDICTORS],
            saes=[*map(self._sae, *of_saes)],
            pairs=[side.result(n_tokens, (0, i)) for i, side in sides],
            **about,
        )

    def _sae(
        self,
        sae: SelectedSAE,
        directions: DirectionStatistics | None,
        latents: LatentStatistics,
        is_dense: torch.Tensor,
    ) -> output.InspectedSAE:
        scaffold = directions and self._scaffold(directions)
        dense = [*self._dense(latents, is_dense.tolist())]
        columns = self._latents(latents, directions)
        return output.InspectedSAE(
            name=sae.label,
            architecture=sae.sae.cfg.architecture(),
            d_sae=sae.sae.cfg.d_sae,
            l0_sparse=float(latents.fired.sum()) / self._sums.moments.n,
            scaffold=scaffold,
            n_dense=int(is_dense.sum()),
            dense=sorted(
                dense, key=lambda of: -columns.frequency[of.latent - sae.rank]
            ),
            latents=columns,
        )

    def _scaffold(self, of: DirectionStatistics) -> output.Scaffold:
        rows = of.axes.rows.cpu().double()
        inside, (rank, d_in) = rows.pow(2).sum(dim=0), rows.shape
        outliers = outlier_dimensions(self._sums.moments.covariance.cpu().diagonal())
        most = inside.topk(min(N_DIMENSIONS, d_in))
        tops = self._promoted(of.axes.rows, N_PROMOTED)
        directions = [*map(partial(self._direction, of), range(rank), *tops)]
        variance = sum(direction.variance for direction in directions)
        for direction in directions:
            direction.share_of_scaffold = direction.variance / variance
        return output.Scaffold(
            rank=rank,
            share_of_variance=sum(of.share_of_variance for of in directions),
            overlap_with_pca=subspace_overlap(rows, self._principal[:rank]),
            overlap_of_random=rank / d_in,
            dimensions=output.weighted(most.indices, most.values),
            outlier_dimensions=output.weighted(outliers, inside[outliers]),
            positions=of.positions(),
            directions=directions,
        )

    def _direction(
        self,
        of: DirectionStatistics,
        i: int,
        promoted: output.Weighted,
        suppressed: output.Weighted,
    ) -> output.Direction:
        row, (target, r_squared) = of.axes.rows[i].cpu().double(), next(self._r_squared)
        cosines = (self._principal @ row).abs()
        most = row.abs().topk(min(N_DIMENSIONS, len(row))).indices
        variance = float(self._covariances[target, target])
        ends = [i, i + len(of.axes.rows)]
        scale = float(of.contexts.values[ends, 0].abs().max())
        return output.Direction(
            vector=row.tolist(),
            variance=variance,
            share_of_variance=variance / float(self._variances.sum()),
            label=label_of(r_squared),
            r_squared=r_squared,
            removal=next(self._removal),
            principal_component=int(cosines.argmax()),
            cosine=float(cosines.max()),
            dimensions=output.weighted(most, row[most]),
            promoted=promoted,
            suppressed=suppressed,
            histogram=of.histogram[i].tolist(),
            scale=scale,
            high=of.contexts.windows(ends[0], scale),
            low=of.contexts.windows(ends[1], -scale),
        )

    def _dense(
        self, of: LatentStatistics, is_dense: list[bool]
    ) -> Iterator[output.DenseLatent]:
        for place, latent in enumerate(of.candidates.tolist()):
            target, r_squared = next(self._r_squared)
            if not is_dense[latent]:
                continue
            yield output.DenseLatent(
                latent=latent + of.rank,
                label=label_of(r_squared),
                r_squared=r_squared,
                removal=next(self._removal),
                antipode=of.antipode(place, self._sums.moments.n),
                successor=self._successor(target, of.decoder[latent].cpu()),
            )

    def _successor(self, target: int, decoder: torch.Tensor) -> output.Successor | None:
        """The direction whose coordinate correlates most with a target."""
        found: list[output.Successor] = []
        deviations, start = self._covariances.diagonal().clamp_min(0).sqrt(), 0
        for i, (of, latents) in enumerate(
            zip(self._sums.directions, self._sums.latents, strict=True)
        ):
            rows = of.axes.rows.cpu() if of else decoder[:0]
            for j, row in enumerate(rows, start=start):
                spread = float(deviations[target] * deviations[j]) or 1.0
                correlation = float(self._covariances[target, j]) / spread
                cosine = float(cosine_similarity(row, decoder, dim=0))
                found.append(output.Successor(i, j - start, cosine, correlation))
            start += len(rows) + len(latents.candidates)
        return max(found, key=lambda of: abs(of.correlation), default=None)

    def _latents(
        self, of: LatentStatistics, directions: DirectionStatistics | None
    ) -> output.Latents:
        # a latent is in a context only where it fires
        values, n_latents = of.contexts.values, range(len(of.fired))
        values[values <= 0] = -torch.inf
        scale = values[:, 0].clamp_min(0).tolist()
        share = None
        scaffold = next(filter(None, [directions, *self._sums.directions]), None)
        if scaffold is not None:
            rows = scaffold.axes.rows.cpu().double()
            share = share_in_subspace(of.decoder.cpu(), rows).tolist()
        promoted, suppressed = self._promoted(of.decoder, N_PROMOTED)
        is_used = of.histogram.cpu() > 0
        first = is_used.int().argmax(dim=1).tolist()
        end = (is_used.cumsum(dim=1).argmax(dim=1) + 1).tolist()
        histogram = of.histogram.tolist()
        return output.Latents(
            index=[i + of.rank for i in n_latents],
            frequency=(of.fired / self._sums.moments.n).tolist(),
            mean=(of.sums / of.fired.clamp_min(1)).tolist(),
            scale=scale,
            share_in_scaffold=share,
            first_bin=[bin + FIRST_BIN for bin in first],
            histogram=[histogram[i][first[i] : end[i]] for i in n_latents],
            promoted=promoted,
            suppressed=suppressed,
            contexts=[of.contexts.windows(i, scale[i]) for i in n_latents],
        )
