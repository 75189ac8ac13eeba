"""How well norms of SAEs' errors are predicted, from activations and from single numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from saelens_scaffold.evals.dark_matter.errors import Batch, LinearErrors
from saelens_scaffold.evals.intervals import ReplicateSums
from saelens_scaffold.saes.least_squares import LeastSquares, LinearMap

ERROR, SQUARED_ERROR = "error norm", "squared error norm"
SQUARED_NONLINEAR = "squared nonlinear error norm"
SQUARED_RECONSTRUCTION = "squared reconstruction norm"
SQUARED_X = "squared activation norm"
X, NORM_X, L0, LOSS, TOKEN = "activation", "activation norm", "l0", "loss", "token"
NONLINEAR = "nonlinear error norm"


@dataclass(frozen=True)
class Prediction:
    """
    A prediction of a norm.

    Attributes:
        target: Name of the norm.
        predictor: Name of what it is predicted from.
        intercept: Whether the linear map has a bias.
        key: Key of the SAE whose norm it is; "" if it is the activations'.
        other: Key of the SAE whose error norms it is predicted from, if it is.
    """

    target: str
    predictor: str
    intercept: bool
    key: str = ""
    other: str = ""


class NormPredictions:
    """
    Least-squares predictions of norms.

    All share one set of moments: of activations and single numbers as inputs, of which each
    prediction takes some, and of all norms as targets.

    Args:
        errors: The fitted maps to the errors.
        keys: Keys of the SAEs whose norms are predicted.
        scaling: Whether those of each are predicted from those of the others.
        n_vocab: Number of ids of tokens.
        device: Where to compute.

    Attributes:
        sums: Sums over the test tokens.
        predictions: All predictions, once solved.
        in_sample: R² of each on the tokens fitted on.
    """

    def __init__(
        self,
        errors: LinearErrors,
        keys: Sequence[str],
        scaling: bool,
        n_vocab: int,
        device: torch.device | str,
    ):
        self._errors, self._keys, self._scaling = errors, keys, scaling
        scalars = [("", NORM_X), ("", LOSS)]
        scalars += [(key, of) for key in keys for of in (L0, ERROR, NONLINEAR)]
        self._inputs = {of: errors.d_in + i for i, of in enumerate(scalars)}
        norms = (SQUARED_ERROR, ERROR, SQUARED_RECONSTRUCTION, SQUARED_NONLINEAR)
        targets = [("", SQUARED_X), *((key, norm) for key in keys for norm in norms)]
        self._targets = {of: i for i, of in enumerate(targets)}
        d_inputs = errors.d_in + len(scalars)
        self._moments = LeastSquares(d_inputs, len(targets), device)
        self._by_token = _TokenMeans(n_vocab, len(targets))
        self.sums = ReplicateSums()
        self.predictions: list[Prediction] = []
        self.in_sample: list[float] = []

    def fit(self, batch: Batch) -> None:
        """Add tokens to fit on."""
        for part in batch.parts():
            inputs, norms = self._columns(part)
            self._moments.update(inputs, norms)
            self._by_token.update(part.token, norms)

    def _columns(self, part: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, shape (n_tokens, n_columns)."""
        squared_x = part.x.pow(2).sum(dim=1)
        inputs, norms = [squared_x.sqrt(), part.loss], [squared_x]
        for key in self._keys:
            error = part.error(key)
            left = error - self._errors.map_of(key)(part.x)
            squares = [of.pow(2).sum(dim=1) for of in (error, left)]
            reconstruction = part.reconstructions[key].pow(2).sum(dim=1)
            inputs += [part.l0[key], squares[0].sqrt(), squares[1].sqrt()]
            norms += [squares[0], squares[0].sqrt(), reconstruction, squares[1]]
        scalars = torch.stack([of.to(part.x) for of in inputs], dim=1)
        return torch.cat([part.x, scalars], dim=1), torch.stack(norms, dim=1)

    def solve(self) -> None:
        """Fit all predictions."""
        variances = self._moments.variance_y
        n_inputs = self._errors.d_in + len(self._inputs)
        maps: dict[tuple[tuple[int, ...], bool], tuple[LinearMap, torch.Tensor]] = {}
        weights: list[torch.Tensor] = []
        biases: list[torch.Tensor] = []
        self.predictions, self.in_sample = [], []
        for prediction, columns in self._asked():
            found = columns, prediction.intercept
            if found not in maps:
                part = self._moments.of_inputs(columns)
                fit = part.solve(prediction.intercept)
                maps[found] = fit, 1 - part.squared_error(fit) / variances
            fit, explained = maps[found]
            target = self._targets[prediction.key, prediction.target]
            weight = fit.weight.new_zeros(n_inputs)
            weight[list(columns)] = fit.weight[:, target]
            weights.append(weight)
            biases.append(fit.bias[target])
            self.predictions.append(prediction)
            self.in_sample.append(float(explained[target]))
        self._map = LinearMap(torch.stack(weights, dim=1), torch.stack(biases))
        by_token = [
            Prediction(norm, TOKEN, True, key)
            for key in self._keys
            for norm in (SQUARED_ERROR, ERROR)
        ]
        self._token_targets = [self._targets[of.key, of.target] for of in by_token]
        self.predictions += by_token
        self.in_sample += self._by_token.r_squared()[self._token_targets].tolist()
        targets = [self._targets[of.key, of.target] for of in self.predictions]
        self._target_of = torch.tensor(targets)

    def _asked(self) -> Iterator[tuple[Prediction, tuple[int, ...]]]:
        """Predictions by least squares, and the columns of the inputs that they take."""
        x, column = tuple(range(self._errors.d_in)), self._inputs
        for key, target in self._targets:
            for intercept in (False, True):
                yield Prediction(target, X, intercept, key), x
        for key in self._keys:
            for target in (SQUARED_ERROR, ERROR):
                for name, owner in ((NORM_X, ""), (L0, key), (LOSS, "")):
                    yield Prediction(target, name, True, key), (column[owner, name],)
            for other in self._keys if self._scaling else ():
                if other != key:
                    norms = (column[other, ERROR], column[other, NONLINEAR])
                    yield Prediction(ERROR, ERROR, True, key, other), norms[:1]
                    yield Prediction(ERROR, NONLINEAR, True, key, other), norms

    def test(self, batch: Batch, weights: torch.Tensor) -> None:
        """As of `LinearErrors`."""
        shift = self._moments.mean_y
        for part in batch.parts():
            inputs, norms = (of.to(shift) for of in self._columns(part))
            of_token = self._by_token.predict(part.token)[:, self._token_targets]
            predicted = torch.cat([self._map(inputs), of_token.to(shift)], dim=1)
            left = norms[:, self._target_of.to(shift.device)] - predicted
            norms = norms - shift
            sums = {"left": left.pow(2), "norms": norms, "squares": norms.pow(2)}
            n = torch.ones(len(left))
            self.sums.add(part.sequence, weights, n=n, **sums)

    def r_squared(self) -> torch.Tensor:
        """R² of each prediction on the test tokens, in the sample and every replicate,
        shape (1 + n_replicates, n_predictions)."""
        sums = self.sums
        totals = sums["squares"] - sums["norms"].pow(2) / sums["n"]
        return 1 - sums["left"] / totals[:, self._target_of]


class _TokenMeans:
    """Means of columns over the tokens of each id."""

    def __init__(self, n_vocab: int, n_columns: int):
        self._counts = torch.zeros(n_vocab, dtype=torch.float64)
        self._sums = torch.zeros(n_vocab, n_columns, dtype=torch.float64)
        self._squares = torch.zeros(n_columns, dtype=torch.float64)

    def update(self, token: torch.Tensor, columns: torch.Tensor) -> None:
        token, columns = token.cpu(), columns.cpu().double()
        self._counts += torch.bincount(token, minlength=len(self._counts))
        self._sums.index_add_(0, token, columns)
        self._squares += columns.pow(2).sum(dim=0)

    def predict(self, token: torch.Tensor) -> torch.Tensor:
        """The mean of each token's id, or of all for an id not seen, shape
        (n_tokens, n_columns)."""
        token, overall = token.cpu(), self._sums.sum(dim=0) / self._counts.sum()
        counts = self._counts[token, None]
        return (self._sums[token] / counts).where(counts > 0, overall)

    def r_squared(self) -> torch.Tensor:
        """R² on the tokens seen, shape (n_columns,)."""
        of_mean = self._sums.sum(dim=0).pow(2) / self._counts.sum()
        of_means = (self._sums.pow(2) / self._counts.clamp_min(1)[:, None]).sum(dim=0)
        return (of_means - of_mean) / (self._squares - of_mean)
