"""The scaffold ablation against the same interventions by TransformerLens's own hooks."""

import copy
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from transformer_lens import HookedTransformer

from eval_helpers import D_MODEL, HOOK, eval_sae
from saelens_scaffold.evals.model import HookedModel
from saelens_scaffold.evals.registry import EVALUATIONS
from saelens_scaffold.evals.runner import run_eval
from saelens_scaffold.evals.scaffold_ablation import (
    ScaffoldAblationEvalConfig,
    ScaffoldAblationEvalOutput,
)
from saelens_scaffold.evals.scaffold_ablation.fit import (
    matched_frequency,
    most_aligned,
)
from saelens_scaffold.evals.table import metric_cell
from saelens_scaffold.models import load_embedded_model, load_stdlib_text

CONTEXT = 64
RANK = 4


def config(**overrides: Any) -> ScaffoldAblationEvalConfig:
    kwargs: dict[str, Any] = {
        "model_name": "py-neox",
        "dataset": "python-stdlib",
        "dataset_split": "test",
        "n_fit_tokens": 3_000,
        "n_tokens": 1_000,
        "n_bootstrap": 50,
        "n_aligned_latents": [5, 20],
        "aligned_cosines": [0.2, 0.9],
        "topics": False,
        "include_special_tokens": False,
        **overrides,
    }
    return ScaffoldAblationEvalConfig(**kwargs)


def evaluate(path: Path, saes: dict[str, Any], **overrides: Any) -> dict[str, Any]:
    results = run_eval(
        "scaffold_ablation",
        config(**overrides),
        list(saes.items()),
        output_path=path / "out",
        artifacts_path=path / "artifacts",
    )
    return {name: results[f"{name}_custom_sae"] for name in saes}


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {d["intervention"]: d for d in result["eval_result_details"]}


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return load_embedded_model()


@pytest.fixture(scope="module")
def split_tokens(model: HookedTransformer) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences to fit on, and those to evaluate on."""
    texts = (row["text"] for row in load_stdlib_text("test"))  # type: ignore[index]
    tokens = (model.to_tokens(t, prepend_bos=False, truncate=False)[0] for t in texts)
    stream = concat_and_batch_sequences(tokens, CONTEXT, 0, None, 0)
    parts = []
    for n_tokens in (3_000, 1_000):
        part: list[torch.Tensor] = []
        while sum(int((s != 0).sum()) for s in part) < n_tokens:
            part.append(next(stream))
        parts.append(torch.stack(part))
    return parts[0], parts[1]


@torch.no_grad()
def losses(
    model: HookedTransformer,
    tokens: torch.Tensor,
    change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    hook_name: str = HOOK,
) -> tuple[float, float]:
    """CE and KL from the clean predictions, by a hook that changes what is no BOS."""

    def hook(x: torch.Tensor, hook: Any) -> torch.Tensor:
        assert change is not None
        return torch.where((tokens != 0)[..., None], change(x), x)

    clean = model(tokens)
    logits = clean
    if change is not None:
        logits = model.run_with_hooks(tokens, fwd_hooks=[(hook_name, hook)])
    counts = (tokens[:, :-1] != 0) & (tokens[:, 1:] != 0)
    log_q = logits[:, :-1][counts].log_softmax(-1)
    log_p = clean[:, :-1][counts].log_softmax(-1)
    ce = F.nll_loss(log_q, tokens[:, 1:][counts])
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return float(ce), float(kl)


@torch.no_grad()
def activations(model: HookedTransformer, tokens: torch.Tensor) -> torch.Tensor:
    _, cache = model.run_with_cache(tokens, names_filter=HOOK)
    return cache[HOOK][tokens != 0]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    saes = {"scaffold": eval_sae(rank=RANK), "plain": eval_sae(seed=1)}
    return evaluate(tmp_path_factory.mktemp("out"), saes, baseline="plain")


def project(
    x: torch.Tensor, rows: torch.Tensor, at: torch.Tensor | float = 0.0
) -> torch.Tensor:
    return x - ((x - at) @ rows.T) @ rows


@torch.no_grad()
def most_aligned_latents(
    sae: Any, x: torch.Tensor, basis: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Living latents by cosine with a subspace, and how many have one above 0.2."""
    rank = getattr(sae.cfg, "scaffold_rank", 0)
    alive = (sae.encode(x) != 0).any(dim=0)
    alive[:rank] = False
    # the decoder rows of these SAEs have norm 1
    cosines = (sae.W_dec @ basis.T).norm(dim=1).where(alive, -torch.inf)
    order = cosines.argsort(descending=True)[: int(alive.sum())]
    return order, int((cosines > 0.2).sum())


def test_every_ce_and_kl_agrees_with_transformer_lens_hooks(
    results: dict[str, Any],
    model: HookedTransformer,
    split_tokens: tuple[torch.Tensor, torch.Tensor],
) -> None:
    sae = eval_sae(rank=RANK)
    fit, tokens = split_tokens
    x = activations(model, fit).double()
    mean = x.mean(dim=0)
    pca = torch.linalg.eigh(torch.cov(x.T)).eigenvectors[:, -RANK:].T.float()
    outliers = x.pow(2).mean(dim=0).topk(RANK).indices
    with torch.no_grad():
        mean_s = sae.scaffold(x.float()).mean(dim=0)
    scaffold = torch.linalg.qr(sae.W_dec[:RANK].detach().T).Q.T
    with torch.no_grad():
        bias = project(sae.b_dec, scaffold) - sae.b_dec
    own, n_own = most_aligned_latents(sae, x.float(), scaffold)
    plain = eval_sae(seed=1)
    of_plain, n_of_plain = most_aligned_latents(plain, x.float(), scaffold)
    assert 0 < n_own < 20
    assert 0 < n_of_plain < 20

    def without_latents(
        x: torch.Tensor, of: Any, latents: torch.Tensor
    ) -> torch.Tensor:
        f = of.encode(x)
        kept = f.clone()
        kept[..., latents] = 0
        return x - of.decode(f) + of.decode(kept)

    def with_dimensions(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[..., outliers] = values[outliers]
        return x

    expected: dict[str, Callable[[torch.Tensor], torch.Tensor] | None] = {
        "clean": None,
        "sae_reconstruction": lambda x: sae.decode(sae.encode(x)),
        "zero_ablation": torch.zeros_like,
        "mean_ablation": lambda x: mean.float().expand_as(x),
        "scaffold_mean_ablated": lambda x: x - sae.scaffold(x) + mean_s,
        "scaffold_projected_out": lambda x: project(x, scaffold),
        "scaffold_subtracted_gauge_fixed": lambda x: x - sae.scaffold(x) + bias,
        "scaffold_subtracted": lambda x: x - sae.scaffold(x),
        "pca_mean_ablated": lambda x: project(x, pca, mean.float()),
        "pca_projected_out": lambda x: project(x, pca),
        "outlier_dimensions_mean_ablated": lambda x: with_dimensions(x, mean.float()),
        "outlier_dimensions_projected_out": lambda x: with_dimensions(x, 0 * x[0, 0]),
    }
    for prefix, of, latents, n_above in (
        ("", sae, own, n_own),
        ("baseline_", plain, of_plain, n_of_plain),
    ):
        for name, n in {"5": 5, "20": 20, "above_0.2": n_above}.items():
            expected[f"{prefix}aligned_{name}_latents"] = partial(
                without_latents, of=of, latents=latents[:n]
            )
    found = by_name(results["scaffold"])
    drawn = {n for n in found if "random" in n or "matched" in n}
    assert len(drawn) == 2 + 2 * 2
    assert set(found) == set(expected) | drawn
    clean_ce, _ = losses(model, tokens)
    for name, change in expected.items():
        ce, kl = losses(model, tokens, change)
        assert found[name]["ce"] == pytest.approx(ce, abs=1e-4), name
        assert found[name]["kl"] == pytest.approx(kl, abs=1e-4), name
        assert found[name]["ce_ratio"] == pytest.approx(ce / clean_ce, abs=1e-4)
        assert found[name]["delta_ce"] == pytest.approx(ce - clean_ce, abs=2e-4)
        assert found[name]["ce_ci_low"] < ce < found[name]["ce_ci_high"], name
    assert found["aligned_above_0.2_latents"]["size"] == n_own
    assert found["baseline_aligned_above_0.2_latents"]["size"] == n_of_plain
    counts = (tokens[:, :-1] != 0) & (tokens[:, 1:] != 0)
    assert results["scaffold"]["n_predictions"] == int(counts.sum())


def test_headline_metrics_are_those_of_the_details(results: dict[str, Any]) -> None:
    found = by_name(results["scaffold"])
    metrics = results["scaffold"]["eval_result_metrics"]["cross_entropy"]
    assert metrics["ce_clean"] == found["clean"]["ce"]
    for metric, name in {
        "ce_ratio_reconstruction": "sae_reconstruction",
        "ce_ratio_scaffold_mean_ablated": "scaffold_mean_ablated",
        "ce_ratio_pca_mean_ablated": "pca_mean_ablated",
        "ce_ratio_random_mean_ablated": "random_mean_ablated",
        "ce_ratio_scaffold_projected_out": "scaffold_projected_out",
        "ce_ratio_pca_projected_out": "pca_projected_out",
        "ce_ratio_random_projected_out": "random_projected_out",
        "ce_ratio_scaffold_subtracted_gauge_fixed": "scaffold_subtracted_gauge_fixed",
        # 787 was not asked for
        "ce_ratio_aligned_latents": "aligned_20_latents",
        "ce_ratio_baseline_aligned_latents": "baseline_aligned_20_latents",
    }.items():
        assert metrics[metric] == found[name]["ce_ratio"]
        for end in ("ci_low", "ci_high"):
            if f"{metric}_{end}" in metrics:
                assert metrics[f"{metric}_{end}"] == found[name][f"ce_ratio_{end}"]
    assert metrics["n_aligned_latents"] == 20
    score = (found["zero_ablation"]["ce"] - found["sae_reconstruction"]["ce"]) / (
        found["zero_ablation"]["ce"] - found["clean"]["ce"]
    )
    assert metrics["ce_loss_score"] == pytest.approx(score)


def test_tables_of_plain_and_scaffold_saes_line_up(results: dict[str, Any]) -> None:
    plain, scaffold = by_name(results["plain"]), by_name(results["scaffold"])
    assert set(plain) < set(scaffold)
    assert {scaffold[name]["kind"] for name in set(scaffold) - set(plain)} == {
        "scaffold",
        "dictionary",
    }
    for name in set(plain) - {"sae_reconstruction"}:
        assert plain[name] == scaffold[name]
    metrics = results["plain"]["eval_result_metrics"]
    assert metrics["cross_entropy"]["ce_ratio_scaffold_mean_ablated"] is None
    assert results["plain"]["dictionary_alignments"] == []
    assert metrics["geometry"]["overlap_with_pca"] is None
    assert metrics["geometry"]["pca_rank"] == RANK
    TypeAdapter(ScaffoldAblationEvalOutput).validate_python(results["plain"])
    TypeAdapter(ScaffoldAblationEvalOutput).validate_python(results["scaffold"])


@pytest.fixture(scope="module")
def pca(
    model: HookedTransformer, split_tokens: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Top principal directions, shape (RANK, d_model)."""
    x = activations(model, split_tokens[0]).double()
    return torch.linalg.eigh(torch.cov(x.T)).eigenvectors[:, -RANK:].T


def with_pca_scaffold(sae: Any, pca: torch.Tensor) -> Any:
    """The SAE with s(x) the projection of x - b_dec on the principal directions."""
    # of the same subspace another basis, and its dual
    mixing = torch.randn(
        RANK, RANK, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    with torch.no_grad():
        sae.W_dec[:RANK] = (mixing @ pca).float()
        sae.W_enc[:, :RANK] = (pca.T @ mixing.inverse()).float()
    return sae


def test_scaffold_that_is_the_pca_projection_costs_what_pca_does(
    tmp_path: Path, pca: torch.Tensor
) -> None:
    sae = with_pca_scaffold(eval_sae(rank=RANK), pca)
    with torch.no_grad():
        sae.b_dec += 3 * pca[0]  # a bias of which much is in the span
    result = evaluate(tmp_path, {"sae": sae})["sae"]
    found = by_name(result)
    for ours, theirs in (
        ("scaffold_mean_ablated", "pca_mean_ablated"),
        ("scaffold_projected_out", "pca_projected_out"),
        ("scaffold_subtracted_gauge_fixed", "pca_projected_out"),
    ):
        for key in ("ce", "ce_ratio", "ce_ratio_ci_low", "ce_ratio_ci_high", "kl"):
            assert found[ours][key] == pytest.approx(found[theirs][key], rel=2e-5)
    metrics = result["eval_result_metrics"]["cross_entropy"]
    for way in ("mean_ablated", "projected_out"):
        assert metrics[f"ce_ratio_scaffold_{way}"] == pytest.approx(
            metrics[f"ce_ratio_pca_{way}"], rel=2e-5
        )
    # unlike removals of the very same thing differ, and so does one without a gauge
    costs = [
        found[name]["ce_ratio"]
        for name in ("pca_mean_ablated", "pca_projected_out", "scaffold_subtracted")
    ]
    assert all(abs(a - b) > 0.01 for a, b in itertools.combinations(costs, 2))


@torch.no_grad()
def in_other_gauge(sae: Any, seed: int = 0) -> Any:
    """
    An SAE of other weights with the same reconstruction.

    A constant of the scaffold's span goes from z to b_dec, the scaffold's coordinates get
    another basis, and latents another scale.
    """
    g = torch.Generator().manual_seed(seed)
    sae = copy.deepcopy(sae)
    constant = 2 * torch.randn(RANK, generator=g)
    mixing = torch.eye(RANK) + 0.3 * torch.randn(RANK, RANK, generator=g)
    scale = 0.5 + torch.rand(sae.cfg.d_sae, generator=g)
    scale[:RANK] = 1
    moved = constant @ sae.W_dec[:RANK]
    sae.b_dec += moved
    if sae.cfg.apply_b_dec_to_input:
        sae.b_enc += moved @ sae.W_enc
    sae.b_enc[:RANK] -= constant
    sae.W_enc[:, :RANK] = sae.W_enc[:, :RANK] @ mixing
    sae.b_enc[:RANK] = sae.b_enc[:RANK] @ mixing
    sae.W_dec[:RANK] = mixing.inverse() @ sae.W_dec[:RANK]
    sae.W_enc *= scale
    sae.b_enc *= scale
    sae.threshold[RANK:] *= scale[RANK:]
    sae.W_dec /= scale[:, None]
    return sae


def test_headline_figures_do_not_depend_on_the_gauge(
    tmp_path: Path, pca: torch.Tensor
) -> None:
    sae = with_pca_scaffold(eval_sae(rank=RANK), pca)
    with torch.no_grad():
        sae.W_enc[:, :RANK] *= 0.7  # no projection, as a trained scaffold is none
    results = evaluate(
        tmp_path,
        {"one": sae, "other": in_other_gauge(sae), "plain": eval_sae(seed=1)},
        baseline="plain",
        n_tokens=500,
        n_random_draws=1,
        n_aligned_latents=[5],
    )
    of = [results["one"], results["other"]]
    metrics = [m for m in EVALUATIONS["scaffold_ablation"].metrics if m.value(of[0])]
    assert len(metrics) >= 10
    for metric in metrics:
        assert metric.value(of[1]) == pytest.approx(metric.value(of[0]), rel=1e-4)
        if (interval := metric.interval(of[0])) is not None:
            assert metric.interval(of[1]) == pytest.approx(interval, rel=1e-4)
    one, other = (result["eval_result_metrics"]["cross_entropy"] for result in of)
    figures = [name for name, value in one.items() if isinstance(value, float)]
    assert len(figures) > 20
    for name in figures:
        assert other[name] == pytest.approx(one[name], rel=1e-4), name
    one, other = by_name(of[0]), by_name(of[1])
    assert set(one) == set(other)
    for name in set(one) - {"scaffold_subtracted"}:
        assert other[name]["ce"] == pytest.approx(one[name]["ce"], rel=1e-4), name
    subtracted = [ratios["scaffold_subtracted"]["ce_ratio"] for ratios in (one, other)]
    assert abs(subtracted[0] - subtracted[1]) > 0.01


def test_topic_accuracy_does_not_depend_on_the_gauge(tmp_path: Path) -> None:
    sae = eval_sae(rank=RANK)
    results = evaluate(
        tmp_path,
        {"one": sae, "other": in_other_gauge(sae)},
        **{**TOPICS, "topic_train_size": 10, "topic_test_size": 10},
    )
    one, other = (
        {
            (a["intervention"], a["read_at"]): (a["accuracy"], a["accuracy_retrained"])
            for a in results[name]["topic_accuracies"]
            if a["intervention"] != "scaffold_subtracted"
        }
        for name in ("one", "other")
    )
    assert ("scaffold_mean_ablated", "last_layer") in one
    assert other.keys() == one.keys()
    for key in one:
        # of 50 texts at most one, on the edge of two topics, by rounding
        assert other[key] == pytest.approx(one[key], abs=0.021)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    apply_b_dec_to_input=st.booleans(),
    normalize_activations=st.sampled_from(
        ["none", "layer_norm", "constant_norm_rescale"]
    ),
)
@torch.no_grad()
def test_scaffold_in_the_fixed_gauge(
    seed: int, apply_b_dec_to_input: bool, normalize_activations: str
) -> None:
    """Of every gauge the same, though the scaffold's part itself is not."""
    sae = eval_sae(
        rank=RANK,
        apply_b_dec_to_input=apply_b_dec_to_input,
        normalize_activations=normalize_activations,
    )
    other = in_other_gauge(sae, seed)
    g = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(40, D_MODEL, generator=g) + torch.randn(D_MODEL, generator=g)
    acts, acts_of_other = (of.encode(x)[:, RANK:] for of in (sae, other))
    # but for a latent at its threshold, by rounding
    same = ((acts != 0) == (acts_of_other != 0)).all(dim=1)
    assert same.sum() >= len(x) - 1
    torch.testing.assert_close(
        other.decode(other.encode(x))[same],
        sae.decode(sae.encode(x))[same],
        atol=1e-3,
        rtol=1e-3,
    )
    fixed = sae.scaffold(x, fix_gauge=True)
    torch.testing.assert_close(
        other.scaffold(x, fix_gauge=True), fixed, atol=1e-3, rtol=1e-3
    )
    assert not torch.allclose(other.scaffold(x), sae.scaffold(x), atol=1e-2)
    # it is s itself where b_dec is orthogonal to the span
    sae.b_dec.copy_(project(sae.b_dec, torch.linalg.qr(sae.W_dec[:RANK].T).Q.T))
    torch.testing.assert_close(
        sae.scaffold(x, fix_gauge=True), sae.scaffold(x), atol=1e-4, rtol=1e-4
    )


def test_geometry_of_a_scaffold_that_is_the_pca_subspace(
    tmp_path: Path,
    model: HookedTransformer,
    split_tokens: tuple[torch.Tensor, torch.Tensor],
    pca: torch.Tensor,
) -> None:
    x = activations(model, split_tokens[0]).double()
    variances = torch.linalg.eigvalsh(torch.cov(x.T))
    sae = with_pca_scaffold(eval_sae(rank=RANK), pca)
    result = evaluate(tmp_path, {"sae": sae})["sae"]
    found = result["eval_result_metrics"]["geometry"]
    assert found["overlap_with_pca"] == pytest.approx(1, abs=1e-5)
    assert max(result["principal_angles"]["degrees"]) < 0.2
    share = float(variances[-RANK:].sum() / variances.sum())
    assert found["variance_explained_by_pca"] == pytest.approx(share, abs=1e-4)
    assert found["variance_explained_by_scaffold"] == pytest.approx(share, abs=1e-4)
    outliers = x.pow(2).mean(dim=0).topk(RANK).indices
    outlier_share = float(pca[:, outliers].pow(2).sum() / RANK)
    assert found["outlier_share_in_pca"] == pytest.approx(outlier_share, abs=1e-4)
    assert found["outlier_share_in_scaffold"] == pytest.approx(outlier_share, abs=1e-4)
    assert found["outlier_share_in_random"] == RANK / D_MODEL
    assert found["outlier_share_of_random"] == RANK / D_MODEL
    magnitudes = x.pow(2).mean(dim=0).sqrt().sort(descending=True).values
    # of an even number of dimensions, torch takes the lower one of the two in the middle
    ratio = float(magnitudes[RANK - 1] / magnitudes[D_MODEL // 2])
    assert found["outlier_rms_ratio"] == pytest.approx(ratio, rel=1e-4)


def test_random_subspaces_are_of_the_ranks_they_stand_beside(tmp_path: Path) -> None:
    """In expectation: the mean over many random subspaces, in plain torch."""
    rank = 3 * RANK
    result = evaluate(tmp_path, {"sae": eval_sae(rank=RANK)}, pca_rank=rank)["sae"]
    found = result["eval_result_metrics"]["geometry"]
    g = torch.Generator().manual_seed(0)
    fixed = torch.eye(D_MODEL)[:rank]
    draws = [
        torch.linalg.qr(torch.randn(D_MODEL, RANK, generator=g)).Q.T for _ in range(400)
    ]
    overlaps = [torch.linalg.svdvals(d @ fixed.T).pow(2).mean() for d in draws]
    shares = [d[:, :rank].pow(2).sum() / rank for d in draws]
    assert found["overlap_of_random"] == pytest.approx(
        float(np.mean(overlaps)), rel=0.05
    )
    assert found["outlier_share_of_random"] == pytest.approx(
        float(np.mean(shares)), rel=0.05
    )


def test_aligned_latents_are_counted(
    results: dict[str, Any],
    model: HookedTransformer,
    split_tokens: tuple[torch.Tensor, torch.Tensor],
) -> None:
    x = activations(model, split_tokens[0])
    scaffold = eval_sae(rank=RANK)
    basis = torch.linalg.qr(scaffold.W_dec[:RANK].detach().T).Q.T
    own, baseline = results["scaffold"]["dictionary_alignments"]
    for found, sae, name, label in (
        (own, scaffold, "own", "scaffold"),
        (baseline, eval_sae(seed=1), "baseline", "plain"),
    ):
        order, n_above = most_aligned_latents(sae, x, basis)
        cosines = (sae.W_dec.detach() @ basis.T).norm(dim=1)[order]
        assert (found["dictionary"], found["sae"]) == (name, label)
        assert found["n_alive"] == len(order)
        assert (found["cosines"], found["n_above"]) == ([0.2, 0.9], [n_above, 0])
        assert found["n_aligned_latents"] == [5, 20]
        expected = [float(cosines[4]), float(cosines[19])]
        assert found["cosine_of_last"] == pytest.approx(expected, abs=1e-5)


def test_fewer_alive_latents_than_are_asked_for(tmp_path: Path) -> None:
    saes = {"scaffold": eval_sae(rank=RANK), "plain": eval_sae(seed=1)}
    result = evaluate(
        tmp_path, saes, baseline="plain", n_aligned_latents=[5, 787], n_tokens=300
    )["scaffold"]
    metrics = result["eval_result_metrics"]["cross_entropy"]
    titled = {m.title: m for m in EVALUATIONS["scaffold_ablation"].metrics}
    for alignment, prefix, title in zip(
        result["dictionary_alignments"],
        ("", "baseline_"),
        ("its own", "baseline"),
        strict=True,
    ):
        assert 5 < alignment["n_alive"] <= 96
        assert alignment["cosine_of_last"][1] is None
        assert metrics[f"ce_ratio_{prefix}aligned_latents"] is None
        cell = metric_cell(result, titled[f"CE x, no aligned latents of {title}"])
        assert cell == f"{alignment['n_alive']} alive, fewer than 787"
    assert not any("787" in name for name in by_name(result))


def test_baseline_whose_result_is_there_already(tmp_path: Path) -> None:
    saes = {"scaffold": eval_sae(rank=RANK), "plain": eval_sae(seed=1)}
    # with the same rank beside it, as the baseline's result shows it
    settings: dict[str, Any] = {"pca_rank": RANK, "n_tokens": 300}
    at_once = evaluate(
        tmp_path / "at once", saes, baseline={"scaffold": "plain"}, **settings
    )
    evaluate(tmp_path / "resumed", {"plain": saes["plain"]}, baseline=None, **settings)
    resumed = evaluate(tmp_path / "resumed", saes, baseline="plain", **settings)
    assert (
        resumed["scaffold"]["eval_result_metrics"]
        == at_once["scaffold"]["eval_result_metrics"]
    )


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ("other", r"baseline is 'other'; it must be one of the SAEs in the call: \["),
        ({"sea": "plain"}, "baseline is 'sea'; it must be one of"),
        ("scaffold2", "whose scaffold has rank 4; it must be a plain SAE"),
        ("elsewhere", f"at blocks.1.hook_mlp_out; it must be an SAE at {HOOK}"),
    ],
)
def test_baseline_that_is_none(tmp_path: Path, baseline: Any, message: str) -> None:
    saes = {
        "scaffold": eval_sae(rank=RANK),
        "scaffold2": eval_sae(rank=RANK, seed=1),
        "elsewhere": eval_sae(hook_name="blocks.1.hook_mlp_out"),
        "plain": eval_sae(),
    }
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path / "out", saes, baseline=baseline)


TOPICS: dict[str, Any] = {
    "topics": True,
    "topic_dataset": "python-stdlib",
    "topic_train_size": 30,
    "topic_test_size": 20,
    "n_fit_tokens": 1_000,
    "n_tokens": 200,
    "n_random_draws": 1,
}


def test_topic_is_lost_with_a_scaffold_that_holds_it(
    tmp_path: Path, model: HookedTransformer
) -> None:
    from saelens_scaffold.models import load_stdlib_chunks

    rows = load_stdlib_chunks("train", per_label=50)
    means: dict[str, list[torch.Tensor]] = {}
    for row in rows:
        tokens = model.to_tokens(row["text"])[:, :CONTEXT]  # type: ignore[index]
        means.setdefault(row["label"], []).append(  # type: ignore[index]
            activations(model, tokens).mean(dim=0)
        )
    # The whole subspace that mean activations span but for a few dimensions: nothing
    # about the topic is left outside.
    every = torch.stack([m for ms in means.values() for m in ms])
    basis = torch.linalg.svd(every, full_matrices=False).Vh[:250]
    sae = eval_sae(rank=250, d_sae=300)
    with torch.no_grad():
        sae.W_enc[:, :250] = basis.T
        sae.W_dec[:250] = basis
        sae.b_dec.zero_()
        sae.W_dec[250:] = torch.randn(
            50, D_MODEL, generator=torch.Generator().manual_seed(0)
        )
    result = evaluate(tmp_path, {"sae": sae}, **TOPICS)["sae"]
    found = {(a["intervention"], a["read_at"]): a for a in result["topic_accuracies"]}
    metrics = result["eval_result_metrics"]["topics"]
    assert metrics["chance"] == pytest.approx(0.2)
    assert metrics["n_topics"] == 5
    clean = found["clean", "hook_point"]
    assert clean["accuracy"] > 0.6
    assert clean["accuracy_retrained"] == pytest.approx(clean["accuracy"])
    assert clean["accuracy_ci_low"] < clean["accuracy"] < clean["accuracy_ci_high"]
    removed = found["scaffold_subtracted", "hook_point"]
    assert removed["accuracy"] < 0.4
    assert metrics["accuracy_clean"] == found["clean", "last_layer"]["accuracy"]
    for name in ("scaffold_mean_ablated", "topic_latents_ablated"):
        for figure in ("accuracy", "accuracy_retrained"):
            headline = figure.replace("accuracy", f"accuracy_{name}")
            for end in ("", "_ci_low", "_ci_high"):
                value = found[name, "last_layer"][figure + end]
                assert metrics[headline + end] == value
    assert metrics["n_topic_latents"] == metrics["n_topic_latents_alive"] <= 50


def test_topics_of_a_plain_sae_and_of_a_harmless_scaffold(tmp_path: Path) -> None:
    harmless = eval_sae(rank=RANK)
    with torch.no_grad():
        harmless.W_enc[:, :RANK] = 0
    saes = {"plain": eval_sae(), "harmless": harmless}
    results = evaluate(tmp_path, saes, **TOPICS)
    of = {
        name: {
            (a["intervention"], a["read_at"]): a["accuracy"]
            for a in result["topic_accuracies"]
        }
        for name, result in results.items()
    }
    for place in ("hook_point", "last_layer"):
        clean = of["plain"]["clean", place]
        assert of["harmless"]["clean", place] == clean
        assert of["harmless"]["scaffold_subtracted", place] == clean
        assert ("scaffold_subtracted", place) not in of["plain"]
        assert ("topic_latents_ablated", place) in of["plain"]


@pytest.mark.parametrize(
    "hook_name",
    [
        "blocks.0.hook_resid_pre",
        "blocks.1.hook_resid_post",
        "blocks.3.hook_resid_post",
        "blocks.1.hook_mlp_out",
        "blocks.1.attn.hook_z",
    ],
)
def test_upper_layers_go_on_where_the_lower_ones_stopped(
    model: HookedTransformer, hook_name: str
) -> None:
    tokens = torch.randint(1, 4096, (2, 16), generator=torch.Generator().manual_seed(0))
    hooked = HookedModel(model, hook_name)
    x, start = hooked.below(tokens)
    with torch.no_grad():
        expected, cache = model(tokens), model.run_with_cache(tokens)[1]
        assert torch.equal(x, cache[hook_name].flatten(2))
        assert torch.allclose(hooked.above(start, x), expected, atol=1e-4)
        changed = model.run_with_hooks(
            tokens,
            fwd_hooks=[(hook_name, lambda x, hook: 0.5 * x)],  # noqa: ARG005
        )
    assert torch.allclose(hooked.above(start, 0.5 * x), changed, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), n=st.integers(2, 40))
def test_matched_latents_are_others_of_like_frequency(
    data: st.DataObject, n: int
) -> None:
    fired = torch.tensor(
        data.draw(st.lists(st.integers(0, 50), min_size=n, max_size=n))
    )
    alive = (fired > 0).nonzero()[:, 0]
    chosen = alive[: data.draw(st.integers(0, len(alive)))]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    matched = matched_frequency(fired, chosen, generator)
    if len(alive) - len(chosen) < len(chosen):
        assert matched is None
        return
    assert matched is not None
    assert len(matched) == len(chosen) == len(set(matched.tolist()))
    assert not set(matched.tolist()) & set(chosen.tolist())
    assert (fired[matched] > 0).all()


def test_matched_latent_is_the_nearest_in_frequency() -> None:
    fired = torch.tensor([10, 1000, 90, 9, 0, 100])
    matched = matched_frequency(
        fired, torch.tensor([5, 0]), torch.Generator().manual_seed(0)
    )
    assert matched is not None
    assert matched.tolist() == [2, 3]


def test_plain_sae_lines_up_with_what_was_measured_before(tmp_path: Path) -> None:
    saes = {"plain": eval_sae(seed=1), "scaffold": eval_sae(rank=RANK)}
    settings: dict[str, Any] = {"n_tokens": 200, "n_fit_tokens": 500}
    evaluate(tmp_path, {"scaffold": saes["scaffold"]}, **settings)
    found = evaluate(tmp_path, saes, **settings)["plain"]["eval_result_metrics"]
    assert found["geometry"]["pca_rank"] == RANK


def test_dead_latents_are_not_the_most_aligned() -> None:
    decoder = torch.eye(4)[[0, 0, 1]] + 0.1 * torch.eye(4)[[1, 1, 0]]
    latents, cosines = most_aligned(
        decoder, torch.tensor([False, True, True]), torch.eye(4)[:1].double()
    )
    assert latents.tolist() == [1, 2]
    assert cosines.tolist() == pytest.approx([1 / 1.01**0.5, 0.1 / 1.01**0.5])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n_fit_tokens": 10_000_000, "context_size": 512}, "no text left"),
        ({"topics": True, "topic_dataset": "./nowhere.csv"}, "no such file"),
        (
            {
                "topics": True,
                "topic_dataset": "python-stdlib",
                "topic_train_size": 10**6,
            },
            "fewer than",
        ),
    ],
)
def test_bad_input_gets_one_clear_line(
    tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    if "n_fit_tokens" in overrides:
        text = tmp_path / "a.jsonl"
        text.write_text('{"text": "' + "import os " * 400 + '"}')
        overrides = {**overrides, "dataset": str(text), "dataset_split": "train"}
    with pytest.raises(ValueError, match=message) as error:
        evaluate(tmp_path / "out", {"sae": eval_sae()}, **overrides)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    "field",
    [
        {"n_aligned_latents": []},
        {"n_aligned_latents": [0]},
        {"n_random_draws": 0},
        {"aligned_cosines": [1.0]},
        {"aligned_cosines": [0.2, 0.2]},
        {"max_topics": 1},
        {"n_topic_latents": 0},
    ],
)
def test_config_names_the_field(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(field))):
        config(**field)


def test_half_precision(tmp_path: Path) -> None:
    """Large models are evaluated in bfloat16; the figures are those of float32, roughly."""
    saes = {"scaffold": eval_sae(rank=RANK)}
    kwargs = {"n_random_draws": 1, "n_aligned_latents": [5]}
    # few, since a CPU without instructions for it takes fifty times as long
    kwargs |= {"n_fit_tokens": 400, "n_tokens": 60}
    full = by_name(evaluate(tmp_path / "full", saes, **kwargs)["scaffold"])
    half = by_name(
        evaluate(tmp_path / "half", saes, llm_dtype="bfloat16", **kwargs)["scaffold"]
    )
    for name in full:
        assert half[name]["ce_ratio"] == pytest.approx(full[name]["ce_ratio"], rel=0.1)
