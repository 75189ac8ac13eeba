"""Ablations that include BOS, against hooks of TransformerLens on all tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from transformer_lens import HookedTransformer

from eval_helpers import D_MODEL, HOOK, eval_sae
from saelens_scaffold._util.configs import config_fields
from saelens_scaffold.evals.runner import run_eval
from saelens_scaffold.evals.scaffold_ablation import ScaffoldAblationEvalConfig, main
from saelens_scaffold.evals.scaffold_ablation.eval_output import (
    ScaffoldAblationMetricCategories,
)
from saelens_scaffold.models import load_embedded_model, load_stdlib_text

RANK = 3
BOS = 0
N_FIT, N_TOKENS = 1_500, 500
SUFFIX = "_with_special_tokens"


@pytest.fixture(scope="module")
def direction() -> torch.Tensor:
    planted = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
    return planted / planted.norm()


@pytest.fixture(scope="module")
def model(direction: torch.Tensor) -> HookedTransformer:
    """The embedded model with massive activations at BOS, planted in its embedding."""
    model = load_embedded_model()
    with torch.no_grad():
        tokens = torch.arange(1, 65)[None]
        _, cache = model.run_with_cache(tokens, names_filter=HOOK)
        model.W_E[BOS] += 100 * cache[HOOK].norm(dim=-1).mean() * direction
    return model


def run(model: HookedTransformer, path: Path, **overrides: Any) -> dict[str, Any]:
    kwargs: dict[str, Any] = {
        "model_name": "py-neox",
        "dataset": "python-stdlib",
        "dataset_split": "test",
        "n_fit_tokens": N_FIT,
        "n_tokens": N_TOKENS,
        "n_bootstrap": 20,
        "n_random_draws": 1,
        "n_aligned_latents": [5],
        "topics": False,
        **overrides,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "load_language_model", lambda *_: model)
        results = run_eval(
            "scaffold_ablation",
            ScaffoldAblationEvalConfig(**kwargs),
            [("sae", eval_sae(rank=RANK))],
            output_path=path / "out",
            artifacts_path=path / "artifacts",
        )
    return results["sae_custom_sae"]


@pytest.fixture(scope="module")
def result(
    model: HookedTransformer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return run(model, tmp_path_factory.mktemp("out"))


def details(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {d["intervention"]: d for d in result["eval_result_details"]}


@pytest.fixture(scope="module")
def split_tokens(model: HookedTransformer) -> list[torch.Tensor]:
    texts = (row["text"] for row in load_stdlib_text("test"))  # type: ignore[index]
    tokens = (model.to_tokens(t, prepend_bos=False, truncate=False)[0] for t in texts)
    stream = concat_and_batch_sequences(tokens, 64, BOS, None, BOS)
    parts = []
    for n_tokens in (N_FIT, N_TOKENS):
        part: list[torch.Tensor] = []
        while sum(int((s != BOS).sum()) for s in part) < n_tokens:
            part.append(next(stream))
        parts.append(torch.stack(part))
    return parts


@torch.no_grad()
def cross_entropy(
    model: HookedTransformer,
    tokens: torch.Tensor,
    changes: torch.Tensor,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> float:
    """Of predictions from text to text, with a hook that changes the tokens it may."""

    def hook(x: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        return torch.where(changes[..., None], change(x), x)

    logits = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, hook)])[:, :-1]
    counts = (tokens[:, :-1] != BOS) & (tokens[:, 1:] != BOS)
    return float(F.cross_entropy(logits[counts], tokens[:, 1:][counts]))


@pytest.mark.parametrize("special", [False, True])
@torch.no_grad()
def test_figures_are_those_of_hooks_on_the_tokens_they_say(
    result: dict[str, Any],
    model: HookedTransformer,
    split_tokens: list[torch.Tensor],
    special: bool,
) -> None:
    fit, tokens = split_tokens
    _, cache = model.run_with_cache(fit, names_filter=HOOK)
    x = cache[HOOK][torch.ones_like(fit, dtype=torch.bool) if special else fit != BOS]
    sae = eval_sae(rank=RANK)
    mean, mean_s = x.mean(dim=0), sae.scaffold(x, fix_gauge=True).mean(dim=0)
    pca = torch.linalg.eigh(torch.cov(x.double().T)).eigenvectors[:, -RANK:].T.float()

    expected: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "mean_ablation": lambda x: mean.expand_as(x),
        "scaffold_mean_ablated": lambda x: x - sae.scaffold(x, fix_gauge=True) + mean_s,
        "pca_projected_out": lambda x: x - (x @ pca.T) @ pca,
        "pca_mean_ablated": lambda x: x - ((x - mean) @ pca.T) @ pca,
        "sae_reconstruction": lambda x: sae.decode(sae.encode(x)),
    }
    found = details(result)
    may_change = (tokens != BOS) | special
    for name, change in expected.items():
        row = found[name + SUFFIX if special else name]
        assert row["special_tokens"] is special
        ce = cross_entropy(model, tokens, may_change, change)
        assert row["ce"] == pytest.approx(ce, rel=2e-4), name


@torch.no_grad()
def test_massive_bos_owns_the_first_direction_only_where_it_is_included(
    result: dict[str, Any],
    model: HookedTransformer,
    direction: torch.Tensor,
    split_tokens: list[torch.Tensor],
) -> None:
    metrics = result["eval_result_metrics"]["special_tokens"]
    assert metrics["top_direction_variance" + SUFFIX] > 0.99
    assert metrics["top_direction_variance"] < 0.9

    # BOS takes one of the principal directions, so one fewer is taken from text; and what
    # BOS loses of the planted direction costs something by itself.
    found = details(result)
    excluded, included = (
        found["pca_projected_out" + suffix]["ce"] for suffix in ("", SUFFIX)
    )
    assert included < excluded - 0.2
    tokens = split_tokens[1]
    without_massive_bos = cross_entropy(
        model,
        tokens,
        tokens == BOS,
        lambda x: x - (x @ direction)[..., None] * direction,
    )
    assert abs(without_massive_bos - found["clean"]["ce"]) > 0.005


def test_headlines_are_those_of_the_rows(result: dict[str, Any]) -> None:
    metrics = result["eval_result_metrics"]["special_tokens"]
    found = details(result)
    for name in ("scaffold", "pca"):
        for how in ("mean_ablated", "projected_out"):
            row = found[f"{name}_{how}{SUFFIX}"]
            for end in ("", "_ci_low", "_ci_high"):
                headline = metrics[f"ce_ratio_{name}_{how}{SUFFIX}{end}"]
                assert headline == row[f"ce_ratio{end}"]


def test_nothing_is_reported_twice_if_special_tokens_are_excluded(
    result: dict[str, Any], model: HookedTransformer, tmp_path: Path
) -> None:
    excluded = run(model, tmp_path, include_special_tokens=False)
    rows = [d for d in result["eval_result_details"] if not d["special_tokens"]]
    assert excluded["eval_result_details"] == rows
    metrics = excluded["eval_result_metrics"]["special_tokens"]
    assert set(metrics.values()) == {None}
    for category in ("cross_entropy", "geometry"):
        ours = excluded["eval_result_metrics"][category]
        assert ours == result["eval_result_metrics"][category]


def test_no_two_metrics_have_one_name() -> None:
    """SAEBench's graphs flatten categories."""
    fields = config_fields(ScaffoldAblationMetricCategories).values()
    categories: list[Any] = [field.annotation for field in fields]
    names = [name for category in categories for name in config_fields(category)]
    assert len(set(names)) == len(names)
