"""Two SAEs side by side: which latents match, which are gone, and which are new."""

import torch
from torch.nn.functional import normalize

from saelens_scaffold.inspect.output import Pair
from saelens_scaffold.inspect.statistics import LatentStatistics

MATCHED_COSINE = 0.7
"""Cosine of decoder directions from which mutual nearest neighbours match."""


class SideBySide:
    """
    Latents of two SAEs, matched by their decoder directions.

    The nearest latent is known before any text is read, so that the activations of both can
    be correlated on the way.

    Args:
        first: The one SAE's statistics, which are filled elsewhere.
        second: The other's.
    """

    def __init__(self, first: LatentStatistics, second: LatentStatistics):
        self._first, self._second = first, second
        self.cosine, self.nearest = _nearest(first.decoder, second.decoder)
        self._backwards = _nearest(second.decoder, first.decoder)[1]
        self._products = torch.zeros_like(first.sums)

    def update(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """
        Args:
            first: Activations of the one SAE's sparse latents, shape (n_tokens, n_sparse).
            second: Those of the other's, on the same tokens.
        """
        products = first.float() * second[:, self.nearest].float()
        self._products += products.sum(dim=0)

    def result(self, n_tokens: int, indices: tuple[int, int]) -> Pair:
        """
        Args:
            n_tokens: Number of tokens seen.
            indices: Those of the SAEs.
        """
        one, other = self._first, self._second
        means = [one.sums / n_tokens, other.sums[self.nearest] / n_tokens]
        squares = [one.squares / n_tokens, other.squares[self.nearest] / n_tokens]
        variances = [s - m.pow(2) for s, m in zip(squares, means, strict=True)]
        spread = (variances[0] * variances[1]).clamp_min(0).sqrt()
        covariance = self._products / n_tokens - means[0] * means[1]
        correlation = (covariance / spread).where(spread > 0, 0.0)
        own = torch.arange(len(self.nearest), device=self.nearest.device)
        matched = self._backwards[self.nearest] == own
        matched &= self.cosine >= MATCHED_COSINE
        alive, others_alive = one.fired > 0, other.fired > 0
        matched &= alive & others_alive[self.nearest]
        others_alive[self.nearest[matched]] = False
        gone, new = (alive & ~matched).nonzero()[:, 0], others_alive.nonzero()[:, 0]
        return Pair(
            *indices,
            nearest=(self.nearest + other.rank).tolist(),
            cosine=self.cosine.tolist(),
            correlation=correlation.tolist(),
            matched=matched.tolist(),
            gone=(gone + one.rank).tolist(),
            new=(new + other.rank).tolist(),
        )


def _nearest(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest cosine of each row of a with a row of b, and which row that is."""
    unit = normalize(b, dim=1)
    best = [(normalize(of, dim=1) @ unit.T).max(dim=1) for of in a.split(1024)]
    return torch.cat([of.values for of in best]), torch.cat([of.indices for of in best])
