"""Streamed least squares against solutions from all tokens in memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelens_scaffold.saes.least_squares import LeastSquares


def pairs(
    n: int = 600, d_x: int = 7, d_y: int = 5, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_x, generator=generator) * torch.logspace(-1, 1, d_x) + 30
    y = x @ torch.randn(d_x, d_y, generator=generator) - 5
    return x, y + 3 * torch.randn(n, d_y, generator=generator)


def streamed(x: torch.Tensor, y: torch.Tensor, batch: int) -> LeastSquares:
    sums = LeastSquares(x.shape[1], y.shape[1], "cpu")
    for part in zip(x.split(batch), y.split(batch), strict=True):
        sums.update(*part)
    return sums


@pytest.mark.parametrize("intercept", [True, False])
def test_maps_are_those_of_lstsq_on_all_tokens(intercept: bool):
    x, y = (of.double() for of in pairs())
    inputs = torch.cat([x, torch.ones(len(x), 1)], dim=1) if intercept else x
    expected = inputs @ torch.linalg.lstsq(inputs, y).solution

    sums = streamed(x, y, batch=64)
    fit = sums.solve(intercept)
    assert torch.allclose(fit(x), expected, rtol=1e-8)
    errors = (y - expected).pow(2).mean(dim=0)
    assert torch.allclose(sums.squared_error(fit), errors, rtol=1e-8)


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 700), seed=st.integers(0, 9), order=st.permutations(range(6))
)
def test_batches_and_their_order_change_nothing(
    batch: int, seed: int, order: list[int]
):
    x, y = pairs(seed=seed)
    x_, y_ = (torch.cat([of.chunk(6)[i] for i in order]) for of in (x, y))
    one, other = streamed(x, y, len(x)).solve(), streamed(x_, y_, batch).solve()
    assert torch.allclose(one.weight, other.weight, rtol=1e-6, atol=1e-9)
    assert torch.allclose(one.bias, other.bias, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("d_x", "d_y"), [(7, 5), (5, 7)])
def test_reduced_rank_maps_are_the_optimum_by_svd(d_x: int, d_y: int):
    x, y = (of.double() for of in pairs(d_x=d_x, d_y=d_y))
    centred_x, centred_y = x - x.mean(dim=0), y - y.mean(dim=0)
    encoder, decoder = streamed(x, y, 100).reduced_rank()
    projected = centred_x @ torch.linalg.lstsq(centred_x, centred_y).solution
    u, s, vh = torch.linalg.svd(projected, full_matrices=False)
    for rank in range(min(d_x, d_y) + 1):
        best = u[:, :rank] * s[:rank] @ vh[:rank]
        found = centred_x @ encoder[:, :rank] @ decoder[:rank]
        assert torch.allclose(found, best, atol=1e-6 * float(y.std()))
    assert torch.allclose(decoder @ decoder.T, torch.eye(len(decoder)).double())


def test_a_direction_without_variance_is_not_used():
    x, y = (of.double() for of in pairs())
    x[:, 3] = x[:, 2]  # twice the same
    fit = streamed(x, y, 100).solve()
    expected = streamed(x[:, [0, 1, 2, 4, 5, 6]], y, 100).solve()
    assert torch.allclose(fit(x), expected(x[:, [0, 1, 2, 4, 5, 6]]), rtol=1e-7)
    assert torch.allclose(fit.weight[2], fit.weight[3])  # of least norm


def test_more_tokens_after_a_solution_count():
    x, y = pairs()
    sums = streamed(x[:300], y[:300], 100)
    sums.solve()
    sums.update(x[300:], y[300:])
    assert torch.allclose(sums.solve().weight, streamed(x, y, 600).solve().weight)


def test_some_inputs_are_as_if_there_were_no_others():
    x, y = pairs()
    sums, columns = streamed(x, y, 100), [5, 0, 2]
    sums.solve()
    part = sums.of_inputs(columns)
    sums.update(x, y)  # which is not of the part any more
    expected = streamed(x[:, columns], y, 100)
    for intercept in (True, False):
        fit = part.solve(intercept)
        assert torch.allclose(fit.weight, expected.solve(intercept).weight, rtol=1e-7)
        assert torch.allclose(part.squared_error(fit), expected.squared_error(fit))
