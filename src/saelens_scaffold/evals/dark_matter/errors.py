"""Linear maps from activations to the errors of SAEs, and what is left of these."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from saelens_scaffold.evals.intervals import ReplicateSums
from saelens_scaffold.saes.least_squares import LeastSquares, LinearMap

_ROWS = 4096
"""Tokens at once, which keeps what is in float64 small."""


@dataclass
class Batch:
    """
    Tokens at one hook point, and what SAEs make of them.

    Attributes:
        x: Activations, shape (n_tokens, d_in).
        reconstructions: x̂ of each SAE, by its key, shape (n_tokens, d_in).
        l0: Number of sparse latents active on each token, by the SAEs' keys, shape
            (n_tokens,).
        token: Ids of the tokens, shape (n_tokens,).
        loss: The language model's loss on the next token, in nats, shape (n_tokens,), where
            norms are predicted.
        sequence: Index of each token's sequence in the language model's batch, shape
            (n_tokens,).
        earlier: Reconstruction and error of the earlier SAE, by the keys of those SAEs
            that have one, shape (n_tokens, 2 d_earlier).
    """

    x: torch.Tensor
    reconstructions: Mapping[str, torch.Tensor]
    l0: Mapping[str, torch.Tensor]
    token: torch.Tensor
    loss: torch.Tensor
    sequence: torch.Tensor
    earlier: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def error(self, key: str) -> torch.Tensor:
        """e = x - x̂ of an SAE, shape (n_tokens, d_in)."""
        return self.x - self.reconstructions[key]

    def parts(self) -> Iterator["Batch"]:
        """The same, some tokens at a time."""

        def rows(of: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {key: value[at] for key, value in of.items()}

        for start in range(0, len(self.x), _ROWS):
            at = slice(start, start + _ROWS)
            yield replace(
                self,
                x=self.x[at],
                reconstructions=rows(self.reconstructions),
                l0=rows(self.l0),
                token=self.token[at],
                loss=self.loss[at],
                sequence=self.sequence[at],
                earlier=rows(self.earlier),
            )


class LinearErrors:
    """
    Least-squares maps from activations to the errors of SAEs.

    Args:
        d_in: Width of the activations.
        keys: Keys of the SAEs.
        earlier: Width of the earlier SAE, by the keys of those SAEs that have one.
        device: Where to compute.

    Attributes:
        fitted: Moments of activations and all errors.
        sums: Sums over the test tokens. Those with a dimension are about the means of the
            tokens fitted on.
    """

    def __init__(
        self,
        d_in: int,
        keys: Sequence[str],
        earlier: Mapping[str, int],
        device: torch.device | str,
    ):
        self.keys = keys
        self.d_in = d_in
        self.fitted = LeastSquares(d_in, d_in * len(keys), device)
        self.sums = ReplicateSums()
        self._with_earlier = {
            key: LeastSquares(d_in + 2 * d_earlier, d_in, device)
            for key, d_earlier in earlier.items()
        }

    def fit(self, batch: Batch) -> None:
        """Add tokens to fit on."""
        for part in batch.parts():
            errors = [part.error(key) for key in self.keys]
            self.fitted.update(part.x, torch.cat(errors, dim=1))
            for key, moments in self._with_earlier.items():
                inputs = torch.cat([part.x, part.earlier[key]], dim=1)
                moments.update(inputs, part.error(key))

    def of(self, key: str) -> slice:
        """Columns of an SAE among those of all errors."""
        start = self.keys.index(key) * self.d_in
        return slice(start, start + self.d_in)

    @cached_property
    def maps(self) -> dict[bool, LinearMap]:
        """The maps to all errors, without intercept under False and with it under True."""
        return {intercept: self.fitted.solve(intercept) for intercept in (False, True)}

    @cached_property
    def squared_errors(self) -> dict[bool, torch.Tensor]:
        """Mean squared errors of the maps on the tokens fitted on, for each dimension of
        all errors."""
        return {name: self.fitted.squared_error(fit) for name, fit in self.maps.items()}

    @cached_property
    def _maps_with_earlier(self) -> dict[str, list[tuple[int, LinearMap]]]:
        """Number of inputs and map: of x with the earlier x̂, then with its error as well."""
        return {
            key: [
                (n, moments.of_inputs(range(n)).solve(intercept=False))
                for width in [moments.covariance_x.shape[0]]
                for n in ((self.d_in + width) // 2, width)
            ]
            for key, moments in self._with_earlier.items()
        }

    def map_of(self, key: str, intercept: bool = False) -> LinearMap:
        """The map to the error of an SAE, W."""
        weight, bias = self.maps[intercept]
        return LinearMap(weight[:, self.of(key)], bias[self.of(key)])

    def test(self, batch: Batch, weights: torch.Tensor) -> None:
        """
        Add tokens to test on.

        Args:
            batch: The tokens.
            weights: As of `SequenceBootstrap.draw`.
        """
        mean_x = self.fitted.mean_x
        for part in batch.parts():
            x = part.x - mean_x.to(part.x)
            sums = {"n": torch.ones(len(x)), "x": x, "x_squares": _squares(x)}
            for key in self.keys:
                sums |= {f"{key} {name}": v for name, v in self._of(part, key).items()}
            self.sums.add(part.sequence, weights, **sums)

    def _of(self, part: Batch, key: str) -> dict[str, torch.Tensor]:
        error = part.error(key)
        linear = self.map_of(key)(part.x)
        left = error - linear
        centred = error - self.fitted.mean_y[self.of(key)].to(error)
        affine_left = error - self.map_of(key, intercept=True)(part.x)
        sums = {
            "l0": part.l0[key],
            "error": _squares(error),
            "linear": _squares(linear),
            "centred": centred,
            "centred_squares": centred.pow(2),
            "left": left.pow(2),
            "affine_left": affine_left.pow(2),
        }
        for i, (n, fit) in enumerate(self._maps_with_earlier.get(key, ())):
            inputs = torch.cat([part.x, part.earlier[key]], dim=1)
            sums[f"earlier_{i}"] = _squares(error - fit(inputs[:, :n]))
        return sums

    # ---- of the test tokens, for the sample and every replicate

    @property
    def variance(self) -> torch.Tensor:
        """Sum of |x - E[x]|², shape (1 + n_replicates,)."""
        sums = self.sums
        of_mean = sums["x"].pow(2).sum(dim=1) / sums["n"][:, 0]
        return sums["x_squares"][:, 0] - of_mean

    def total(self, key: str, name: str) -> torch.Tensor:
        """A sum over tokens and dimensions, shape (1 + n_replicates,)."""
        return self.sums[f"{key} {name}"].sum(dim=1)

    def fvu(self, key: str, name: str = "error") -> torch.Tensor:
        """Fraction of variance unexplained by x̂, or with "left" by x̂ + xW, shape
        (1 + n_replicates,)."""
        return self.total(key, name) / self.variance

    def r_squared(self, key: str, left: str, pooled: bool) -> torch.Tensor:
        """R² of e, shape (1 + n_replicates,): of all dimensions, or the mean over them."""
        unexplained = self.sums[f"{key} {left}"]
        of_mean = self.sums[f"{key} centred"].pow(2) / self.sums["n"]
        return r_squared(
            unexplained, self.sums[f"{key} centred_squares"] - of_mean, pooled
        )


def r_squared(
    unexplained: torch.Tensor, total: torch.Tensor, pooled: bool
) -> torch.Tensor:
    """
    R² of several columns, the last dimension: of their sums, or the mean over those that
    vary.
    """
    if pooled:
        return 1 - unexplained.sum(dim=-1) / total.sum(dim=-1)
    return (1 - unexplained / total).where(total > 0, torch.nan).nanmean(dim=-1)


def _squares(vectors: torch.Tensor) -> torch.Tensor:
    """Squared norms, shape (n_tokens,)."""
    return vectors.pow(2).sum(dim=1)
