"""Streaming least squares: linear maps from activations, from one pass over them."""

from collections.abc import Sequence
from copy import copy
from functools import cached_property
from typing import NamedTuple

import torch

# Variance of a direction of x, relative to the largest, below which nothing is read from it.
_RELATIVE_TOLERANCE = 1e-12


class LinearMap(NamedTuple):
    """
    The map x -> x weight + bias.

    Attributes:
        weight: Shape (d_x, d_y).
        bias: Shape (d_y,).
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The prediction, shape (n_tokens, d_y), in the precision of x."""
        return x @ self.weight.to(x) + self.bias.to(x)


class LeastSquares:
    """
    Least-squares maps from x to y, from running sums in float64.

    The memory is d_x (d_x + d_y) numbers, whatever the number of tokens. Several targets
    share the sums over x as columns of one y.

    Attributes:
        n: Number of tokens.
    """

    def __init__(self, d_x: int, d_y: int, device: torch.device | str):
        # MPS has no float64
        self._device = torch.device("cpu") if "mps" in str(device) else device
        self.n = 0
        sums = torch.zeros(d_x + d_y, dtype=torch.float64, device=self._device)
        self._x_sum, self._y_sum = sums.split([d_x, d_y])
        self._xx = sums.new_zeros(d_x, d_x)
        self._xy = sums.new_zeros(d_x, d_y)
        self._y_squares = torch.zeros_like(self._y_sum)

    @torch.no_grad()
    def update(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """
        Args:
            x: Shape (n_tokens, d_x).
            y: Shape (n_tokens, d_y).
        """
        x, y = x.to(self._device, torch.float64), y.to(self._device, torch.float64)
        if self.n == 0:
            # Residual streams lie far from zero, and rounding would destroy a variance that
            # is the difference of two large numbers: so sums are about a first guess.
            self._x_shift, self._y_shift = x.mean(dim=0), y.mean(dim=0)
        x, y = x - self._x_shift, y - self._y_shift
        self.n += len(x)
        self._x_sum += x.sum(dim=0)
        self._y_sum += y.sum(dim=0)
        self._xx.addmm_(x.T, x)
        self._xy.addmm_(x.T, y)
        self._y_squares += y.pow(2).sum(dim=0)
        vars(self).pop("_directions", None)  # of fewer tokens

    @property
    def mean_x(self) -> torch.Tensor:
        """Shape (d_x,)."""
        return self._x_sum / self.n + self._x_shift

    @property
    def mean_y(self) -> torch.Tensor:
        """Shape (d_y,)."""
        return self._y_sum / self.n + self._y_shift

    @property
    def covariance_x(self) -> torch.Tensor:
        """Shape (d_x, d_x)."""
        mean = self._x_sum / self.n
        return self._xx / self.n - torch.outer(mean, mean)

    @property
    def covariance_xy(self) -> torch.Tensor:
        """Shape (d_x, d_y)."""
        return self._xy / self.n - torch.outer(self._x_sum, self._y_sum) / self.n**2

    @property
    def variance_y(self) -> torch.Tensor:
        """Variance of each column of y, shape (d_y,)."""
        return self._y_squares / self.n - (self._y_sum / self.n).pow(2)

    def solve(self, intercept: bool = True) -> LinearMap:
        """
        The map that minimises the squared error; of several, the one of least norm.

        Args:
            intercept: Whether the map has a bias. Without one it is the linear map of
                arXiv 2410.14670.
        """
        if intercept:
            weight = self._inverse(*self._directions) @ self.covariance_xy
            return LinearMap(weight, self.mean_y - self.mean_x @ weight)
        mean = self.mean_x
        products = self.covariance_x + torch.outer(mean, mean)
        cross = self.covariance_xy + torch.outer(mean, self.mean_y)
        weight = self._inverse(*torch.linalg.eigh(products)) @ cross
        return LinearMap(weight, torch.zeros_like(self.mean_y))

    def of_inputs(self, inputs: Sequence[int]) -> "LeastSquares":
        """The same of some columns of x only, as they are now."""
        columns = torch.tensor(inputs, device=self._device)
        part = copy(self)
        vars(part).pop("_directions", None)
        part._x_sum, part._x_shift = self._x_sum[columns], self._x_shift[columns]
        part._xx, part._xy = self._xx[columns][:, columns], self._xy[columns]
        part._y_sum, part._y_squares = self._y_sum.clone(), self._y_squares.clone()
        return part

    def reduced_rank(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Reduced-rank regression of y on x with an intercept, of every rank at once
        (Izenman 1975, with the identity as the weight).

        Returns:
            Encoder A, shape (d_x, q), and decoder B, orthonormal rows of shape (q, d_y),
            for q = min(d_x, d_y). Of all maps x -> (x - E[x]) W + E[y] with a W of rank r,
            W = A[:, :r] B[:r] has the least squared error.
        """
        weight = self.solve().weight
        # Principal directions of the predictions, of which A is the map.
        fitted = weight.T @ self.covariance_x @ weight
        directions = torch.linalg.eigh(fitted)[1].flip(1)[:, : min(weight.shape)]
        return weight @ directions, directions.T.contiguous()

    def squared_error(self, fit: LinearMap) -> torch.Tensor:
        """Mean squared error of a map on the tokens seen, for each column of y, (d_y,)."""
        weight, bias = fit.weight.to(self._xx), fit.bias.to(self._xx)
        offset = self.mean_x @ weight + bias - self.mean_y
        explained = (self.covariance_x @ weight - 2 * self.covariance_xy) * weight
        return self.variance_y + explained.sum(dim=0) + offset.pow(2)

    @cached_property
    def _directions(self) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = torch.linalg.eigh(self.covariance_x)
        return values, vectors

    @staticmethod
    def _inverse(variances: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        used = variances > _RELATIVE_TOLERANCE * variances[-1]
        directions = directions[:, used]
        return directions / variances[used] @ directions.T
