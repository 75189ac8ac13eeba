"""The dense-latent count: exact, with honest intervals, and hard to misuse."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval_helpers import D_MODEL, HOOK, assert_fired, eval_sae, write_texts
from saelens_scaffold.evals.dense_latents import (
    DenseLatentsEvalConfig,
    DenseLatentsEvalOutput,
)
from saelens_scaffold.evals.intervals import SequenceBootstrap, interval
from saelens_scaffold.evals.runner import run_eval
from saelens_scaffold.evals.tokens import TokenStream
from saelens_scaffold.models import (
    Split,
    embedded_model_path,
    load_embedded_model,
    load_stdlib_text,
)

CONTEXT = 64


def config(**overrides: Any) -> DenseLatentsEvalConfig:
    kwargs: dict[str, Any] = {
        "model_name": "py-neox",
        "dataset": "python-stdlib",
        "dataset_split": "train" if "dataset" in overrides else "test",
        "n_tokens": 5_000,
        "n_bootstrap": 50,
        **overrides,
    }
    return DenseLatentsEvalConfig(**kwargs)


def run(
    tmp_path: Path, cfg: DenseLatentsEvalConfig, saes: Any, force_rerun: bool = False
) -> dict[str, Any]:
    folders = tmp_path / "out", tmp_path / "artifacts"
    return run_eval(
        "dense_latents", cfg, saes, "cpu", folders[0], force_rerun, folders[1]
    )


def evaluate(tmp_path: Path, saes: dict[str, Any], **overrides: Any) -> dict[str, Any]:
    """The results by the SAEs' own names."""
    results = run(tmp_path, config(**overrides), list(saes.items()))
    return {name: results[f"{name}_custom_sae"] for name in saes}


def sequences(n: int, split: Split = "test") -> torch.Tensor:
    """The first sequences of the embedded text, put together as SAELens does."""
    model = load_embedded_model()
    texts = (row["text"] for row in load_stdlib_text(split))  # type: ignore[index]
    tokens = (model.to_tokens(t, prepend_bos=False, truncate=False)[0] for t in texts)
    stream = concat_and_batch_sequences(tokens, CONTEXT, 0, None, 0)
    return torch.stack([next(stream) for _ in range(n)])


@torch.no_grad()
def residuals(tokens: torch.Tensor) -> torch.Tensor:
    _, cache = load_embedded_model().run_with_cache(tokens, names_filter=HOOK)
    return cache[HOOK]


def test_counts_equal_an_independent_count_over_200_k_tokens(tmp_path: Path) -> None:
    saes = {"plain": eval_sae(), "scaffold": eval_sae(rank=4, seed=1)}
    # the training split, since the other is shorter in Pythons without their tests
    results = evaluate(
        tmp_path, saes, n_tokens=200_000, llm_batch_size=64, dataset_split="train"
    )

    model = load_embedded_model()
    tokens = sequences(3300, "train")
    parts: list[torch.Tensor] = []
    n = 0
    for batch in tokens.split(100):
        for sequence in batch:
            if n < 200_000:  # whole sequences, until enough tokens have counted
                n += int((sequence != 0).sum())
            else:
                sequence.zero_()
        with torch.no_grad():
            _, cache = model.run_with_cache(batch, names_filter=HOOK, stop_at_layer=1)
            parts.append(cache[HOOK][batch != 0])
    x = torch.cat(parts)

    for name, sae in saes.items():
        rank = getattr(sae.cfg, "scaffold_rank", 0)
        result = results[name]
        metrics = result["eval_result_metrics"]
        fired = result["eval_result_unstructured"]["fired"]
        assert_fired(fired, sae, x)
        expected = torch.tensor(fired)
        assert metrics["token_stats"]["n_tokens"] == n
        for detail in result["eval_result_details"]:
            threshold = detail["threshold"]
            assert detail["count"] == int((expected / n > threshold).sum())
        assert metrics["dense_latents"]["dense_latents"] > 0  # else it proves little
        sparsity = metrics["sparsity"]
        assert sparsity["l0_sparse"] == pytest.approx(int(expected.sum()) / n)
        assert sparsity["l0_total"] == pytest.approx(int(expected.sum()) / n + rank)
        assert sparsity["scaffold_rank"] == rank
        assert sparsity["alive_latents"] == int((expected > 0).sum())
        assert sparsity["dead_latents"] == int((expected == 0).sum())
        histogram = result["firing_histogram"]["counts"]
        assert sum(histogram) == sparsity["alive_latents"]


def test_explained_variance_is_that_of_the_whole_sae(tmp_path: Path) -> None:
    sae = eval_sae(rank=4)
    result = evaluate(tmp_path, {"sae": sae}, n_tokens=2_000)["sae"]
    n_sequences = result["eval_result_metrics"]["token_stats"]["n_sequences"]
    tokens = sequences(n_sequences)
    x = residuals(tokens)[tokens != 0].double()
    with torch.no_grad():
        error = x - sae.decode(sae.encode(x.float()))
    expected = 1 - error.pow(2).sum() / (x - x.mean(dim=0)).pow(2).sum()
    quality = result["eval_result_metrics"]["reconstruction_quality"]
    assert quality["explained_variance"] == pytest.approx(float(expected), abs=1e-5)
    assert (
        quality["explained_variance_ci_low"]
        < quality["explained_variance"]
        < quality["explained_variance_ci_high"]
    )


def test_scaffold_latents_are_not_counted(tmp_path: Path) -> None:
    sae = eval_sae(rank=4)
    saes = {
        "scaffold": sae,
        "sparse": sae.sparse_sae(),
        "plain form": sae.to_jumprelu(),
    }
    results = evaluate(tmp_path, saes)
    counts = {
        name: result["eval_result_unstructured"]["fired"]
        for name, result in results.items()
    }
    assert counts["scaffold"] == counts["sparse"] == counts["plain form"]
    of_plain_form = results["plain form"]["eval_result_metrics"]
    of_scaffold = results["scaffold"]["eval_result_metrics"]
    assert of_plain_form["sparsity"] == of_scaffold["sparsity"]
    assert of_plain_form["reconstruction_quality"]["explained_variance"] == (
        pytest.approx(of_scaffold["reconstruction_quality"]["explained_variance"])
    )


def test_many_saes_in_one_call_are_as_each_alone(tmp_path: Path) -> None:
    saes = {"a": eval_sae(), "b": eval_sae(rank=4, seed=1), "c": eval_sae(seed=2)}
    # at another hook point, in the same pass
    saes["d"] = eval_sae(seed=3, hook_name="blocks.1.hook_resid_pre")
    together = evaluate(tmp_path / "together", saes, pca_rank=4)
    for name, sae in saes.items():
        alone = evaluate(tmp_path / name, {name: sae}, pca_rank=4)[name]
        for field in (
            "eval_result_metrics",
            "eval_result_details",
            "dense_latents",
            "eval_result_unstructured",
        ):
            assert together[name][field] == alone[field]


def test_intervals_resample_sequences(tmp_path: Path) -> None:
    sae = eval_sae()
    threshold = 0.37
    result = evaluate(tmp_path, {"sae": sae}, n_tokens=1_500, thresholds=[threshold])
    result = result["sae"]
    n = result["eval_result_metrics"]["token_stats"]["n_sequences"]
    tokens = sequences(n)
    with torch.no_grad():
        acts = sae.encode(residuals(tokens))
    fired = ((acts != 0) & (tokens != 0)[..., None]).sum(dim=1)  # (sequence, latent)
    lengths = (tokens != 0).sum(dim=1)

    # one draw of all sequences at once, where the evaluation draws batch by batch
    bootstrap = SequenceBootstrap(50, seed=42)
    weights = torch.cat([bootstrap.draw(len(part)) for part in tokens.split(32)], dim=1)
    counts = []
    for row in weights.long():
        resampled = [i for i in range(n) for _ in range(int(row[i]))]
        frequency = fired[resampled].sum(dim=0) / lengths[resampled].sum()
        counts.append(int((frequency > threshold).sum()))
    stored = result["eval_result_unstructured"]["dense_counts_of_replicates"]
    assert stored == [counts]
    assert len(set(counts)) > 1  # else the interval is not put to the test
    detail = result["eval_result_details"][0]
    low, high = (
        torch.tensor(counts[1:])
        .double()
        .quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    )
    assert detail["count_ci_low"] == pytest.approx(float(low))
    assert detail["count_ci_high"] == pytest.approx(float(high))


def test_dense_latents_are_described(tmp_path: Path) -> None:
    sae = eval_sae(rank=2)
    with torch.no_grad():
        sae.threshold[2:] = 10.0  # nothing fires
        dense, opposite, copy_of_dense = 10, 20, 30
        sae.threshold[dense] = 0.05
        sae.W_enc[:, opposite] = -2 * sae.W_enc[:, dense]
        sae.W_dec[opposite] = -3 * sae.W_dec[dense]
        sae.W_enc[:, copy_of_dense] = sae.W_enc[:, dense]
        sae.W_dec[copy_of_dense] = sae.W_dec[dense]
        inside = 40
        sae.threshold[inside] = 0.04
        sae.W_dec[inside] = sae.W_dec[0] + 2 * sae.W_dec[1]
    result = evaluate(tmp_path, {"sae": sae}, thresholds=[0.5, 0.01])["sae"]
    found = {latent["index"]: latent for latent in result["dense_latents"]}
    assert set(found) == {dense, inside}
    assert found[dense]["antipode"] == opposite
    assert found[dense]["antipodality"] == pytest.approx(1, abs=1e-5)
    assert found[inside]["share_in_scaffold"] == pytest.approx(1, abs=1e-6)
    assert found[dense]["share_in_scaffold"] < 0.2
    frequencies = [latent["frequency"] for latent in result["dense_latents"]]
    assert frequencies == sorted(frequencies, reverse=True)

    n_sequences = result["eval_result_metrics"]["token_stats"]["n_sequences"]
    tokens = sequences(n_sequences)
    x = residuals(tokens)[tokens != 0]
    with torch.no_grad():
        acts = sae.encode(x)[:, dense]
    assert found[dense]["mean_activation"] == pytest.approx(
        float(acts[acts != 0].mean()), rel=1e-5
    )
    covariance = torch.cov(x.double().T)
    top = torch.linalg.eigh(covariance).eigenvectors[:, -2:]
    direction = sae.W_dec[dense].detach().double()
    share = (direction @ top).pow(2).sum() / direction.pow(2).sum()
    assert found[dense]["share_in_pca"] == pytest.approx(float(share), abs=1e-4)


def test_reduction_against_a_baseline(tmp_path: Path) -> None:
    saes = {"base": eval_sae(), "sae": eval_sae(rank=4, seed=1)}
    # the baseline's result is there already when the other SAE is evaluated
    resumed = tmp_path / "resumed"
    run(resumed, config(baseline="base"), [("base", saes["base"])])
    resumed = evaluate(resumed, saes, baseline="base")
    results = evaluate(tmp_path / "at once", saes, baseline="base")
    assert (
        resumed["sae"]["eval_result_metrics"] == results["sae"]["eval_result_metrics"]
    )

    counts = {
        name: torch.tensor(
            result["eval_result_unstructured"]["dense_counts_of_replicates"][0]
        ).double()
        for name, result in results.items()
    }
    reductions = 1 - counts["sae"] / counts["base"]
    metrics = results["sae"]["eval_result_metrics"]["dense_latents"]
    assert metrics["reduction"] == pytest.approx(float(reductions[0]))
    assert metrics["reduction_ci_low"] == pytest.approx(
        float(reductions[1:].quantile(0.025))
    )
    assert results["base"]["eval_result_metrics"]["dense_latents"]["reduction"] is None


def test_result_does_not_depend_on_what_was_measured_before(tmp_path: Path) -> None:
    saes = {"plain": eval_sae(), "scaffold": eval_sae(rank=4, seed=1)}
    together = evaluate(tmp_path / "together", saes)
    assert together["plain"]["pca_rank"] == 4
    for first in saes:
        folder = tmp_path / first
        alone = evaluate(folder, {first: saes[first]})[first]
        resumed = evaluate(folder, saes)
        for name in saes:
            assert resumed[name]["pca_rank"] == 4
            assert resumed[name]["dense_latents"] == together[name]["dense_latents"]
        # of a scaffold SAE, the others of the call change nothing
        kept = resumed[first]["eval_id"] == alone["eval_id"]
        assert kept == (first == "scaffold")


def test_baseline_that_was_measured_before_it_was_one(tmp_path: Path) -> None:
    saes = {"base": eval_sae(), "sae": eval_sae(seed=1)}
    alone = evaluate(tmp_path, {"base": saes["base"]})["base"]
    results = evaluate(tmp_path, saes, baseline="base")
    assert results["base"]["eval_id"] == alone["eval_id"]  # read, not measured
    assert results["sae"]["eval_result_metrics"]["dense_latents"]["reduction"]
    # and without a baseline, only the other is measured again
    without = evaluate(tmp_path, saes)
    assert without["base"]["eval_id"] == alone["eval_id"]
    assert without["sae"]["eval_id"] != results["sae"]["eval_id"]
    metrics = without["sae"]["eval_result_metrics"]["dense_latents"]
    assert metrics["reduction"] is None


def test_baseline_of_a_release_is_found_where_sae_bench_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens import SAE

    loaded = {"layer_0": eval_sae(), "layer_1": eval_sae(rank=4, seed=1)}

    def from_hub(
        release: str, sae_id: str, **_: Any
    ) -> tuple[Any, dict[str, Any], None]:
        return copy.deepcopy(loaded[sae_id]), {}, None

    monkeypatch.setattr(SAE, "from_pretrained_with_cfg_and_sparsity", from_hub)
    pairs = [("release", sae_id) for sae_id in loaded]
    cfg = config(baseline="release/layer_0")
    run(tmp_path, cfg, pairs[:1])
    results = run(tmp_path, cfg, pairs)
    metrics = results["release_layer_1"]["eval_result_metrics"]["dense_latents"]
    assert metrics["reduction"] is not None


def test_batches_end_where_they_should_and_go_on_there(tmp_path: Path) -> None:
    """Two calls on one stream see every sequence once, whatever the batch size."""
    model = load_embedded_model()

    def seen(batch_size: int) -> torch.Tensor:
        stream = TokenStream(
            config(llm_batch_size=batch_size, context_size=16, prepend_bos=True),
            model,
            [],
        )
        parts = [t for n in (500, 300) for t, _ in stream.batches(n, "test")]
        return torch.cat(parts)

    # one sequence at a time, with no call nested into another for each batch
    reference = seen(1)
    assert torch.equal(seen(7), reference)
    assert torch.equal(seen(1000), reference)
    assert len(reference.unique(dim=0)) > 50


def test_result_is_written_once_and_kept_while_it_is_current(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = eval_sae()
    first = evaluate(tmp_path, {"sae": sae})["sae"]
    file = tmp_path / "out" / "sae_custom_sae_eval_results.json"
    text = file.read_text()
    stored = json.loads(text)
    TypeAdapter(DenseLatentsEvalOutput).validate_python(stored)
    assert stored["eval_type_id"] == "dense_latents"
    assert stored["sae_cfg_dict"]["architecture"] == "jumprelu"

    again = evaluate(tmp_path, {"sae": sae})["sae"]
    assert again["eval_id"] == first["eval_id"]  # read, not measured
    # how fast it is measured is no other measurement
    assert evaluate(tmp_path, {"sae": sae}, llm_batch_size=7)["sae"] == again
    assert file.read_text() == text

    more = evaluate(tmp_path, {"sae": sae}, n_tokens=6_000)["sae"]
    assert "n_tokens 5000 (now 6000)" in capsys.readouterr().err
    other = evaluate(tmp_path, {"sae": eval_sae(seed=5)}, n_tokens=6_000)["sae"]
    assert "other weights" in capsys.readouterr().err
    fired = [r["eval_result_unstructured"]["fired"] for r in (first, more, other)]
    assert fired[0] != fired[1] != fired[2]

    forced = run(
        tmp_path, config(n_tokens=6_000), [("sae", eval_sae(seed=5))], force_rerun=True
    )["sae_custom_sae"]
    assert forced["eval_id"] != other["eval_id"]
    assert forced["eval_result_metrics"] == other["eval_result_metrics"]
    assert {p.suffix for p in file.parent.iterdir()} == {".json", ".key"}


def test_sae_that_was_evaluated_is_not_changed(tmp_path: Path) -> None:
    sae = eval_sae(rank=4)
    weights = copy.deepcopy(sae.state_dict())
    evaluate(tmp_path, {"sae": sae})
    for name, value in sae.state_dict().items():
        assert torch.equal(value, weights[name])


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [row["text"][:4000] for row in load_stdlib_text("test").select(range(8))]  # type: ignore[index]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "saved"])
def test_any_local_text(tmp_path: Path, texts: list[str], name: str) -> None:
    reference = write_texts(tmp_path / "reference.jsonl", texts)
    path = write_texts(tmp_path / name, texts)
    fired = [
        evaluate(
            tmp_path / str(i), {"sae": eval_sae()}, dataset=str(p), n_tokens=2_000
        )["sae"]["eval_result_unstructured"]["fired"]
        for i, p in enumerate((reference, path))
    ]
    assert fired[0] == fired[1]


def test_short_text_ends_early(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = write_texts(tmp_path / "a.jsonl", ["import os\n" * 200])
    result = evaluate(tmp_path, {"sae": eval_sae()}, dataset=str(text))["sae"]
    assert 0 < result["eval_result_metrics"]["token_stats"]["n_tokens"] < 5_000
    assert "ended after" in caplog.text


def broken_model(tmp_path: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(embedded_model_path())
    with torch.no_grad():
        next(iter(model.parameters())).fill_(torch.nan)
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(embedded_model_path()).save_pretrained(
        tmp_path / "broken"
    )
    return str(tmp_path / "broken")


def without_text(tmp_path: Path) -> dict[str, Any]:
    Dataset.from_dict({"content": ["x"]}).to_json(tmp_path / "a.jsonl")
    return {"dataset": str(tmp_path / "a.jsonl")}


def empty(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "a.jsonl").touch()
    return {"dataset": str(tmp_path / "a.jsonl")}


def without_rows(tmp_path: Path) -> dict[str, Any]:
    Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "saved")
    return {"dataset": str(tmp_path / "saved")}


def too_short(tmp_path: Path) -> dict[str, Any]:
    return {"dataset": str(write_texts(tmp_path / "a.jsonl", ["import os"]))}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (without_text, r"has no column 'text'; it has \['content'\]"),
        (empty, "is empty"),
        # datasets 5 cannot read what it writes of no rows
        (without_rows, "is empty|cannot be read"),
        (too_short, "no text of 64 tokens"),
        (lambda _: {"dataset": "./nowhere.jsonl"}, "no such file"),
        (lambda _: {"dataset_split": "validation"}, "'train' and 'test'"),
        (
            lambda tmp_path: {**too_short(tmp_path), "dataset_split": "test"},
            "has no split 'test'; a single file is the split 'train'",
        ),
        (lambda _: {"context_size": 4096}, "has room for 512"),
        (lambda _: {"baseline": "other"}, r"baseline is 'other'; .*\['sae'\]"),
        (lambda _: {"model_name": ""}, "model_name is empty"),
        (lambda tmp_path: {"model_name": broken_model(tmp_path)}, "NaN or infinite"),
    ],
)
def test_bad_input_gets_one_clear_line(
    tmp_path: Path,
    overrides: Callable[[Path], dict[str, Any]],
    message: str,
) -> None:
    before = evaluate(tmp_path, {"sae": eval_sae()})["sae"]
    with pytest.raises(ValueError, match=message) as error:
        run(
            tmp_path,
            config(**overrides(tmp_path)),
            [("sae", eval_sae())],
            force_rerun=True,
        )
    assert "\n" not in str(error.value)
    assert evaluate(tmp_path, {"sae": eval_sae()})["sae"] == before


def test_saes_that_do_not_fit_the_model(tmp_path: Path) -> None:
    def message(*saes: tuple[str, Any]) -> str:
        with pytest.raises(ValueError) as error:
            run(tmp_path, config(), list(saes))
        assert not list((tmp_path / "out").glob("*"))
        return str(error.value)

    missing = eval_sae(hook_name="blocks.9.hook_resid_post")
    assert "has no hook point 'blocks.9.hook_resid_post'" in message(("sae", missing))
    narrow = eval_sae()
    narrow.cfg.d_in = 128
    assert f"d_in 128, but py-neox has width {D_MODEL}" in message(("sae", narrow))
    assert "same name" in message(("sae", eval_sae()), ("sae", eval_sae(seed=1)))
    assert "selected_saes is empty" in message()
    unlabelled = eval_sae()
    unlabelled.cfg.metadata.hook_name = None
    assert "SAE 'sae'" in message(("sae", unlabelled))
    other = eval_sae()
    other.cfg.metadata.context_size = 32
    assert "different context_size" in message(("a", eval_sae()), ("b", other))


@pytest.mark.parametrize(
    "field",
    [
        {"n_tokens": 0},
        {"thresholds": []},
        {"thresholds": [1.5]},
        {"thresholds": [0.1, 0.1]},
        {"confidence": 1.0},
        {"llm_dtype": "int8"},
        {"context_size": 1},
        {"pca_rank": 0},
    ],
)
def test_config_names_the_field(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(field))):
        config(**field)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    parts=st.lists(st.integers(1, 20), min_size=1, max_size=6),
)
def test_replicates_are_paired_and_start_with_the_sample(
    seed: int, parts: list[int]
) -> None:
    def draws() -> torch.Tensor:
        bootstrap = SequenceBootstrap(20, seed)
        return torch.cat([bootstrap.draw(n) for n in parts], dim=1)

    assert torch.equal(draws(), draws())
    assert torch.equal(draws()[0], torch.ones(sum(parts)))


def test_interval_covers_a_known_mean() -> None:
    g = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        values = torch.rand(100, generator=g)
        weights = SequenceBootstrap(200, seed=trial).draw(100)
        _, low, high = interval((weights @ values) / weights.sum(dim=1), 0.95)
        covered += low < 0.5 < high
    assert 180 <= covered <= 200  # 95 % of 200, give or take


def test_half_precision(tmp_path: Path) -> None:
    saes = {"sae": eval_sae(rank=4)}
    # few, since a CPU without instructions for it takes fifty times as long
    full, half = (
        evaluate(tmp_path / dtype, saes, llm_dtype=dtype, n_tokens=1_000)["sae"]
        for dtype in ("float32", "bfloat16")
    )
    for path in ("sparsity.l0_sparse", "reconstruction_quality.explained_variance"):
        category, name = path.split(".")
        expected = full["eval_result_metrics"][category][name]
        assert half["eval_result_metrics"][category][name] == pytest.approx(
            expected, rel=0.05
        )
