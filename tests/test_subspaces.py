"""Subspaces and moments against torch's own functions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import overlap
from saelens_scaffold.saes.subspaces import (
    ActivationMoments,
    orthonormal_basis,
    share_in_subspace,
    subspace_overlap,
)


def rows(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 6), m=st.integers(1, 6), seed=st.integers(0, 100))
def test_overlap(n: int, m: int, seed: int) -> None:
    a, b = rows(n, 10, seed), rows(m, 10, seed + 1)
    found = subspace_overlap(orthonormal_basis(a), orthonormal_basis(b))
    assert found == pytest.approx(overlap(a, b))


def test_overlap_of_nested_and_of_orthogonal_subspaces() -> None:
    eye = torch.eye(10)
    assert subspace_overlap(eye[:3], eye[:5]) == pytest.approx(1)
    assert subspace_overlap(eye[:3], eye[5:]) == pytest.approx(0)


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 6), extra=st.integers(0, 3), seed=st.integers(0, 100))
def test_basis_spans_the_rows_and_nothing_else(n: int, extra: int, seed: int) -> None:
    independent = rows(n, 10, seed).double()
    dependent = rows(extra, n, seed + 1).double() @ independent
    basis = orthonormal_basis(torch.cat([independent, dependent]))
    assert basis.shape == (n, 10)
    assert torch.allclose(basis @ basis.T, torch.eye(n).double(), atol=1e-9)
    shares = share_in_subspace(independent, basis)
    assert torch.allclose(shares, torch.ones(n).double())


def test_share_of_a_direction() -> None:
    basis = torch.eye(3).double()[:1]
    directions = torch.tensor([[2.0, 0, 0], [0, 3.0, 0], [1.0, 0, 1.0], [0, 0, 0]])
    assert share_in_subspace(directions, basis).tolist() == pytest.approx(
        [1, 0, 0.5, 0]
    )


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    offset=st.floats(-1000, 1000),
    seed=st.integers(0, 100),
)
def test_moments_batch_by_batch(sizes: list[int], offset: float, seed: int) -> None:
    scale = torch.logspace(0, 2, 5)
    x = rows(sum(sizes) + 2, 5, seed) * scale + offset
    moments = ActivationMoments(5, "cpu")
    for part in x.split([2, *sizes]):
        moments.update(part)
    expected = torch.cov(x.double().T, correction=0)
    assert torch.allclose(moments.mean, x.double().mean(dim=0), rtol=1e-5, atol=1e-3)
    assert torch.allclose(moments.covariance, expected, rtol=1e-3, atol=1e-2)
    variances, directions = moments.principal_directions()
    assert torch.allclose(variances.sum(), expected.trace(), rtol=1e-4, atol=1e-2)
    assert moments.explained_variance(directions[:1]) == pytest.approx(
        float(variances[0] / variances.sum()), abs=1e-6
    )
