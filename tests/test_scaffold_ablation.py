"""The scaffold ablation against the same interventions by TransformerLens's own hooks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sae_bench")

from pydantic import TypeAdapter, ValidationError
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from transformer_lens import HookedTransformer

from eval_helpers import D_MODEL, HOOK, eval_sae
from saelens_scaffold.embedded import load_embedded_model, load_stdlib_text
from saelens_scaffold.evals.language_model import HookedModel
from saelens_scaffold.evals.scaffold_ablation import (
    ScaffoldAblationEvalConfig,
    ScaffoldAblationEvalOutput,
)
from saelens_scaffold.evals.scaffold_ablation.latents import (
    matched_frequency,
    most_aligned,
)
from saelens_scaffold.evals.scaffold_ablation.main import run_eval

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
        "aligned_cosine": 0.2,
        "topics": False,
        "include_special_tokens": False,
        **overrides,
    }
    return ScaffoldAblationEvalConfig(**kwargs)


def evaluate(path: Path, saes: dict[str, Any], **overrides: Any) -> dict[str, Any]:
    results = run_eval(config(**overrides), list(saes.items()), "cpu", str(path))
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
    return evaluate(tmp_path_factory.mktemp("out"), saes)


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
        acts = sae.encode(x.float())[:, RANK:]
    scaffold = torch.linalg.qr(sae.W_dec[:RANK].detach().T).Q.T
    alive = (acts != 0).any(dim=0)
    cosines = (sae.W_dec[RANK:].detach() @ scaffold.T).norm(dim=1)
    order = cosines.where(alive, -torch.inf).argsort(descending=True)
    n_above = int((cosines[alive] > 0.2).sum())
    assert 0 < n_above < 20

    def project(
        x: torch.Tensor, rows: torch.Tensor, at: torch.Tensor | float = 0.0
    ) -> torch.Tensor:
        return x - ((x - at) @ rows.T) @ rows

    def without_latents(x: torch.Tensor, n: int) -> torch.Tensor:
        f = sae.encode(x)
        kept = f.clone()
        kept[..., RANK + order[:n]] = 0
        return x - sae.decode(f) + sae.decode(kept)

    def without_dimensions(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[..., outliers] = 0
        return x

    expected: dict[str, Callable[[torch.Tensor], torch.Tensor] | None] = {
        "clean": None,
        "sae_reconstruction": lambda x: sae.decode(sae.encode(x)),
        "zero_ablation": torch.zeros_like,
        "mean_ablation": lambda x: mean.float().expand_as(x),
        "scaffold_subtracted": lambda x: x - sae.scaffold(x),
        "scaffold_mean_ablated": lambda x: x - sae.scaffold(x) + mean_s,
        "scaffold_projected_out": lambda x: project(x, scaffold),
        "pca_projected_out": lambda x: project(x, pca),
        "pca_mean_ablated": lambda x: project(x, pca, mean.float()),
        "outlier_dimensions_zeroed": without_dimensions,
        "aligned_5_latents": lambda x: without_latents(x, 5),
        "aligned_20_latents": lambda x: without_latents(x, 20),
        "aligned_above_0.2_latents": lambda x: without_latents(x, n_above),
    }
    found = by_name(results["scaffold"])
    drawn = {"random_projected_out"} | {n for n in found if n.startswith("matched_")}
    assert set(found) == set(expected) | drawn
    clean_ce, _ = losses(model, tokens)
    for name, change in expected.items():
        ce, kl = losses(model, tokens, change)
        assert found[name]["ce"] == pytest.approx(ce, abs=1e-4), name
        assert found[name]["kl"] == pytest.approx(kl, abs=1e-4), name
        assert found[name]["ce_ratio"] == pytest.approx(ce / clean_ce, abs=1e-4)
        assert found[name]["delta_ce"] == pytest.approx(ce - clean_ce, abs=2e-4)
        assert found[name]["ce_ci_low"] < ce < found[name]["ce_ci_high"], name
    assert found["aligned_above_0.2_latents"]["size"] == n_above
    counts = (tokens[:, :-1] != 0) & (tokens[:, 1:] != 0)
    assert results["scaffold"]["n_predictions"] == int(counts.sum())


def test_headline_metrics_are_those_of_the_details(results: dict[str, Any]) -> None:
    found = by_name(results["scaffold"])
    metrics = results["scaffold"]["eval_result_metrics"]["cross_entropy"]
    assert metrics["ce_clean"] == found["clean"]["ce"]
    for metric, name in {
        "ce_ratio_reconstruction": "sae_reconstruction",
        "ce_ratio_scaffold_subtracted": "scaffold_subtracted",
        "ce_ratio_scaffold_mean_ablated": "scaffold_mean_ablated",
        "ce_ratio_scaffold_projected_out": "scaffold_projected_out",
        "ce_ratio_pca_projected_out": "pca_projected_out",
        "ce_ratio_random_projected_out": "random_projected_out",
        "ce_ratio_aligned_latents": "aligned_20_latents",  # 787 was not asked for
    }.items():
        assert metrics[metric] == found[name]["ce_ratio"]
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
    assert metrics["cross_entropy"]["ce_ratio_scaffold_subtracted"] is None
    assert metrics["geometry"]["overlap_with_pca"] is None
    assert metrics["geometry"]["pca_rank"] == RANK
    TypeAdapter(ScaffoldAblationEvalOutput).validate_python(results["plain"])
    TypeAdapter(ScaffoldAblationEvalOutput).validate_python(results["scaffold"])


def test_planted_scaffold_is_taken_out_exactly(
    tmp_path: Path,
    model: HookedTransformer,
    split_tokens: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """s(x) is the projection of x on known directions, so x - s(x) lacks just those."""
    sae = eval_sae(rank=RANK)
    g = torch.Generator().manual_seed(7)
    directions = torch.linalg.qr(torch.randn(D_MODEL, RANK, generator=g)).Q
    with torch.no_grad():
        sae.W_enc[:, :RANK] = directions
        sae.W_dec[:RANK] = directions.T
        sae.b_dec.zero_()
    found = by_name(evaluate(tmp_path, {"sae": sae})["sae"])
    ce, kl = losses(model, split_tokens[1], lambda x: x - x @ directions @ directions.T)
    for name in ("scaffold_subtracted", "scaffold_projected_out"):
        assert found[name]["ce"] == pytest.approx(ce, abs=1e-5)
        assert found[name]["kl"] == pytest.approx(kl, abs=1e-5)


def test_geometry_of_a_scaffold_that_is_the_pca_subspace(
    tmp_path: Path,
    model: HookedTransformer,
    split_tokens: tuple[torch.Tensor, torch.Tensor],
) -> None:
    x = activations(model, split_tokens[0]).double()
    variances, vectors = torch.linalg.eigh(torch.cov(x.T))
    pca = vectors[:, -RANK:].T
    sae = eval_sae(rank=RANK)
    mixing = torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_dec[:RANK] = mixing @ pca.float()  # the same subspace, another basis
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
    assert found["outlier_share_in_random"] == RANK / D_MODEL


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
    from saelens_scaffold.embedded import load_stdlib_chunks

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
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "field",
    [
        {"n_aligned_latents": []},
        {"n_aligned_latents": [0]},
        {"n_random_draws": 0},
        {"aligned_cosine": 1.0},
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
    full = by_name(evaluate(tmp_path / "full", saes, **kwargs)["scaffold"])
    half = by_name(
        evaluate(tmp_path / "half", saes, llm_dtype="bfloat16", **kwargs)["scaffold"]
    )
    for name in full:
        assert half[name]["ce_ratio"] == pytest.approx(full[name]["ce_ratio"], rel=0.1)
