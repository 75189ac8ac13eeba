"""`saelens-scaffold rank`: what each way of counting dimensions finds in known data."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_helpers import HOOK, eval_sae
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.rank import suggest_rank, suggestion
from saelens_scaffold.evals.rank.analysis import (
    RankAnalysis,
    RankCandidate,
    analyse_covariance,
    dense_latent_candidates,
    knee_of,
    null_eigenvalues,
    outlier_dimensions,
    suggested,
    without_dimensions,
)
from saelens_scaffold.evals.rank.suggestion import analysis_text, picture


def ranks(candidates: list[RankCandidate]) -> dict[str, int]:
    return {candidate.name: candidate.rank for candidate in candidates}


PLANTED_STDS = (20.0, 15.0, 12.0, 10.0, 8.0, 8.0, 6.0, 6.0)


def planted(
    seed: int, d_in: int, n_tokens: int, aligned: int = 0, rotated: int = 0
) -> tuple[torch.Tensor, list[int]]:
    """
    Noise whose dimensions have spreads of 0.5 to 1.5, and on top of it dense directions:
    `aligned` of them basis vectors, whose indices are returned, and `rotated` not.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n_tokens, d_in)) * rng.uniform(0.5, 1.5, size=d_in)
    dimensions = rng.permutation(d_in)[:aligned]
    directions = np.linalg.qr(rng.normal(size=(d_in, rotated)))[0].T
    directions = np.concatenate([np.eye(d_in)[dimensions], directions])
    stds = PLANTED_STDS[: len(directions)]
    x += rng.normal(size=(n_tokens, len(directions))) * stds @ directions
    return torch.from_numpy(x), dimensions.tolist()


def analysis_of(x: torch.Tensor) -> RankAnalysis:
    return analyse_covariance(torch.cov(x.T), len(x), seed=0)


@pytest.mark.parametrize(("d_in", "n_tokens"), [(128, 4000), (256, 2560)])
@pytest.mark.parametrize("aligned", [8, 0, 3])
def test_eight_of_eight_planted_directions(
    aligned: int, d_in: int, n_tokens: int
) -> None:
    upper_bounds = []
    for seed in range(20):
        x, dimensions = planted(seed, d_in, n_tokens, aligned, 8 - aligned)
        found = analysis_of(x)
        assert found.suggestion is not None and found.suggestion.rank == 8, seed
        # a rotated direction may lean on one dimension enough to make it an outlier too
        named = {outlier["dimension"] for outlier in found.outlier_dimensions}
        assert named >= set(dimensions), seed
        upper_bounds.append(ranks(found.candidates)["parallel analysis"])
    assert min(upper_bounds) == 8
    # chance exceeds a quantile of 95 % in one of twenty, and in P(more than 5) = 0.03 %
    assert sum(bound > 8 for bound in upper_bounds) <= 5
    assert max(upper_bounds) <= 10


def test_noise_has_no_dense_part() -> None:
    suggestions = [analysis_of(planted(s, 128, 2000)[0]).suggestion for s in range(20)]
    assert sum(suggestion is not None for suggestion in suggestions) <= 5
    assert all(s is None or s.rank <= 2 for s in suggestions)


def test_outlier_dimensions_and_their_shares() -> None:
    variances = torch.ones(100, dtype=torch.float64)
    variances[::2] = 1.2
    variances[[7, 90]] = torch.tensor([50.0, 80.0], dtype=torch.float64)
    variances[11] = 3.9  # far off, but not far above
    found = analyse_covariance(variances.diag(), 10_000, seed=0).outlier_dimensions
    assert [outlier["dimension"] for outlier in found] == [90, 7]
    total = float(variances.sum())
    assert [o["variance_share"] for o in found] == pytest.approx(
        [80 / total, 50 / total]
    )
    median = float(variances.median())
    assert [o["ratio_to_median"] for o in found] == pytest.approx(
        [80 / median, 50 / median]
    )


def test_spread_variances_hold_no_outliers() -> None:
    # a tenth of them lie above 4 times the median, as they should in such a spread
    spread = torch.linspace(-3, 3, 101, dtype=torch.float64).exp()
    assert outlier_dimensions(spread).tolist() == []
    assert outlier_dimensions(torch.ones(10, dtype=torch.float64)).tolist() == []
    assert outlier_dimensions(torch.zeros(10, dtype=torch.float64)).tolist() == []


def test_what_outlier_dimensions_explain_is_not_counted_again() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5000, 32))
    dense = 30 * rng.normal(size=5000)
    x[:, 5] += dense
    x += 0.05 * dense[:, None]
    found = analysis_of(torch.from_numpy(x))
    assert ranks(found.candidates)["parallel analysis"] == 1
    # as a regression on that dimension would leave it
    a = x - x.mean(axis=0)
    rest, own = np.delete(a, 5, axis=1), a[:, [5]]
    residual = rest - own @ np.linalg.lstsq(own, rest, rcond=None)[0]
    left = without_dimensions(torch.cov(torch.from_numpy(x).T), torch.tensor([5]))
    np.testing.assert_allclose(left, np.cov(residual.T), atol=1e-9)


def test_null_is_that_of_shuffled_tokens() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_t(df=6, size=(1000, 40)) * np.linspace(1, 9, 40)
    tops = []
    for _ in range(100):
        shuffled = rng.permuted(x, axis=0)
        tops.append(np.linalg.eigvalsh(np.corrcoef(shuffled.T))[::-1])
    null = null_eigenvalues(40, 1000, np.random.default_rng(0))
    np.testing.assert_allclose(null, np.quantile(tops, 0.95, axis=0), rtol=0.03)


def test_a_constant_dimension_is_no_obstacle() -> None:
    x, dimensions = planted(0, 64, 2000, aligned=4)
    x[:, min(set(range(64)) - set(dimensions))] = 3.0
    found = analysis_of(x)
    assert found.suggestion is not None and found.suggestion.rank == 4


@settings(deadline=None, max_examples=50)
@given(
    variances=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40).map(
        lambda values: torch.tensor(sorted(values, reverse=True)).double()
    )
)
def test_knee_is_a_rank(variances: torch.Tensor) -> None:
    assert 1 <= knee_of(variances) <= max(3, len(variances) // 2)


def test_antipodal_dense_latents_span_one_dimension() -> None:
    eye = torch.eye(10)
    decoder = torch.cat([eye[:2], -eye[:2], eye[:1] + 0.01 * eye[5:6]])
    found = ranks(dense_latent_candidates(decoder, eye.double()))
    assert found == {"dense latents": 2, "dense latents in PCA": 2}
    reversed_directions = eye.flip(0).double()
    found = ranks(dense_latent_candidates(decoder, reversed_directions))
    assert found == {"dense latents": 2, "dense latents in PCA": 10}
    assert dense_latent_candidates(decoder[:0], eye.double()) == []


def test_suggestion() -> None:
    def of(**ranks: int) -> str | None:
        named = [RankCandidate(n.replace("_", " "), r, "") for n, r in ranks.items()]
        found = suggested(named)
        return found and found.name

    assert of(outlier_dimensions=0, knee=5, parallel_analysis=9) == "knee"
    assert of(outlier_dimensions=0, knee=9, parallel_analysis=5) == "parallel analysis"
    assert of(outlier_dimensions=6, knee=5, parallel_analysis=9) == "outlier dimensions"
    assert of(outlier_dimensions=0, knee=9, parallel_analysis=0) is None
    bounds = {"outlier_dimensions": 6, "knee": 9, "parallel_analysis": 9}
    assert of(**bounds, dense_latents=20) == "dense latents"


@pytest.fixture
def suggest(tmp_path: Path) -> Any:
    def suggest(**options: Any) -> str:
        given = {"dataset": "python-stdlib", "n_tokens": 2000, "device": "cpu"}
        return suggest_rank(output_path=tmp_path / "out", **given | options)

    return suggest


def test_with_a_plain_sae(suggest: Any, tmp_path: Path) -> None:
    eval_sae().save_model(tmp_path / "sae")
    out = suggest(sae_path=f"{tmp_path}/sae")
    written = json.loads((tmp_path / "out" / "rank.json").read_text())
    assert f"Try scaffold_rank={written['suggestion']['rank']}" in out
    for candidate in written["candidates"]:
        assert candidate["name"] in out and candidate["reason"] in out
    assert written["suggestion"]["name"] == "dense latents"
    assert written["n_dense_latents"] > 0
    assert sum(written["variance_shares"]) == pytest.approx(1)
    outliers = written["outlier_dimensions"]
    assert outliers  # the embedded model has some
    variances = written["dimension_variances"]
    for outlier in outliers:
        share = variances[outlier["dimension"]] / sum(variances)
        assert outlier["variance_share"] == pytest.approx(share)
        assert str(outlier["dimension"]) in out
    assert len(written["null_eigenvalues"]) == 256 - len(outliers)
    assert (written["null_quantile"], written["null_draws"]) == (0.95, 19)
    picture = (tmp_path / "out" / "rank.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_without_an_sae(suggest: Any) -> None:
    assert "dense latents" not in suggest(model_name="py-neox", hook_name=HOOK)


def test_nothing_is_suggested_for_noise() -> None:
    seed = next(
        s for s in range(9) if analysis_of(planted(s, 64, 2000)[0]).suggestion is None
    )
    analysis = analysis_of(planted(seed, 64, 2000)[0])
    assert "Nothing stands out from chance" in analysis_text(analysis)
    assert "Try scaffold_rank" not in analysis_text(analysis)
    (axes,) = picture(analysis).axes
    _, legend = axes.get_legend_handles_labels()
    # a rank of 0 has no place on a logarithmic axis
    shown = [candidate for candidate in analysis.candidates if candidate.rank]
    assert legend == [f"{candidate.name}: {candidate.rank}" for candidate in shown]
    assert "outlier dimensions: 0" not in legend


def test_sae_of_another_hook_point(suggest: Any, tmp_path: Path) -> None:
    eval_sae().save_model(tmp_path / "sae")
    other = "blocks.1.hook_resid_post"
    with pytest.raises(UserError, match=f"was trained at {HOOK}, not at {other}"):
        suggest(sae_path=f"{tmp_path}/sae", hook_name=other)


def test_scaffold_sae_is_no_plain_one(suggest: Any, tmp_path: Path) -> None:
    sae = eval_sae(rank=4)
    for name, form in ("scaffold", sae), ("jumprelu", sae.to_jumprelu()):
        form.save_model(tmp_path / name)
        with pytest.raises(UserError, match=r"has a scaffold \(of rank 4\)"):
            suggest(sae_path=f"{tmp_path / name}")


def test_folder_is_seen_to_before_the_work(
    suggest: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suggestion, "analyse_rank", None)  # not even called
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match=f"{tmp_path}/out"):
        suggest(model_name="py-neox", hook_name=HOOK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name": "py-neox"}, "name the hook point"),
        ({"model_name": "py-neox", "hook_name": "nowhere"}, "no hook point 'nowhere'"),
        ({"hook_name": HOOK}, "model_name is empty"),
        ({"sae_path": "/nowhere"}, "holds no SAE"),
        ({"model_name": "py-neox", "hook_name": HOOK, "n_tokens": 0}, "n_tokens"),
        (
            {"model_name": "py-neox", "hook_name": HOOK, "n_tokens": 256},
            "n_tokens is 256; a spectrum of the 256 dimensions",
        ),
    ],
)
def test_mistakes(suggest: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        suggest(**options)
    assert "\n" not in str(error.value)
