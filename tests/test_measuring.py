"""What is said of a saved SAE is what it does: measured in inference form, held out."""

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
)
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file

from eval_helpers import D_MODEL, HOOK, eval_sae
from helpers import batches, scaffold_sae, trainer_for
from hub_fixtures import some_activations
from saelens_scaffold import (
    ResumableTrainingRunner,
    ScaffoldBatchTopKTrainingSAEConfig,
)
from saelens_scaffold.models import load_embedded_model, load_stdlib_text
from saelens_scaffold.saes.facts import l0_warning, trained_k
from saelens_scaffold.saes.runner_config import n_sparsity_tokens
from saelens_scaffold.training import runner as runner_module
from saelens_scaffold.training.measurement import Measurement, NotMeasuredError, measure
from saelens_scaffold_cli import main

CONTEXT, D_SAE, RANK, K = 32, 96, 2, 4
BATCH = 8 * CONTEXT
"""Tokens of one run of the language model."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little of the embedded text, as a dataset on disk."""
    path = tmp_path_factory.mktemp("text")
    rows = load_stdlib_text("test").select(range(12))
    assert isinstance(rows, Dataset)
    rows.select_columns("text").to_json(path / "data.jsonl")
    return path


def sequences(text: Path) -> torch.Tensor:
    """All of the text, put together as SAELens does, shape (n, CONTEXT)."""
    model: Any = load_embedded_model()
    lines = (text / "data.jsonl").read_text().splitlines()
    tokens = (
        model.to_tokens(json.loads(line)["text"], prepend_bos=False, truncate=False)[0]
        for line in lines
    )
    bos = model.tokenizer.bos_token_id
    return torch.stack(
        list(concat_and_batch_sequences(tokens, CONTEXT, bos, None, bos))
    )


def runner_config(
    text: Path, output_path: Path, rank: int = RANK, **overrides: Any
) -> LanguageModelSAERunnerConfig[Any]:
    sae: dict[str, Any] = {
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "k": K,
        "normalize_activations": "expected_average_only_in",
    }
    kwargs: dict[str, Any] = {
        "sae": (
            ScaffoldBatchTopKTrainingSAEConfig(**sae, scaffold_rank=rank)
            if rank
            else BatchTopKTrainingSAEConfig(**sae)
        ),
        "model_name": "py-neox",
        "hook_name": HOOK,
        "dataset_path": str(text),
        "streaming": False,
        "context_size": CONTEXT,
        "training_tokens": 20 * BATCH,
        "train_batch_size_tokens": BATCH,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 16,
        "n_batches_for_norm_estimate": 2,
        "lr": 1e-3,
        "output_path": str(output_path),
        "checkpoint_path": None,
        "logger": LoggingConfig(log_to_wandb=False),
        **overrides,
    }
    return LanguageModelSAERunnerConfig(**kwargs)


@pytest.fixture
def read_by_model(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """All tokens that a store lets the language model run on, batch by batch."""
    seen: list[torch.Tensor] = []
    get_activations = ActivationsStore.get_activations

    def spy(store: ActivationsStore, tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tokens.clone())
        return get_activations(store, tokens)

    monkeypatch.setattr(ActivationsStore, "get_activations", spy)
    return seen


def measured_in(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "cfg.json").read_text())["metadata"]["measured"]


@torch.no_grad()
def by_hand(directory: Path, x: torch.Tensor, rank: int) -> dict[str, Any]:
    """The same numbers, from the weights on disk in plain torch."""
    w = load_file(directory / "sae_weights.safetensors")
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    acts = torch.where((pre > w["threshold"]) & (pre > 0), pre, 0.0)
    acts[:, :rank] = pre[:, :rank]
    error = (x - acts @ w["W_dec"] - w["b_dec"]).double()
    fired = acts[:, rank:] != 0
    centred = x.double() - x.double().mean(dim=0)
    return {
        "n_tokens": len(x),
        "l0_sparse": float(fired.sum()) / len(x),
        "l0_total": float(fired.sum()) / len(x) + rank,
        "explained_variance": float(1 - error.pow(2).sum() / centred.pow(2).sum()),
        "dense": int((fired.float().mean(dim=0) > 0.1).sum()),
    }


CASES = {
    "scaffold": {},
    "plain": {"rank": 0},
    "without special tokens": {"exclude_special_tokens": True},
    "some positions": {"seqpos_slice": (3, 30)},
    "prefetching": {"prefetch_llm_batches": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_recorded_is_what_plain_torch_counts_on_text_not_read(
    case: str, text: Path, tmp_path: Path, read_by_model: list[torch.Tensor]
) -> None:
    overrides: dict[str, Any] = CASES[case]
    rank = overrides.get("rank", RANK)
    n_tokens = 500
    runner = ResumableTrainingRunner(
        runner_config(text, tmp_path, **overrides),
        override_model=load_embedded_model(),
    )
    runner.n_measured_tokens = n_tokens
    n_read = 0
    unread_activations = runner._unread_activations

    def note() -> Iterator[torch.Tensor]:
        # called while a prefetching provider is paused: it reads on before that
        nonlocal n_read
        n_read = len(read_by_model)
        return unread_activations()

    runner._unread_activations = note
    runner.run()

    stream = sequences(text)
    read = torch.cat(read_by_model)
    # what is measured on follows in the text, and nothing was left out or read twice
    assert torch.equal(read, stream[: len(read)])
    tokens = read[8 * n_read :]
    assert len(tokens) > 0
    _, cache = load_embedded_model().run_with_cache(tokens, names_filter=HOOK)
    x = cache[HOOK]
    if case == "some positions":
        x, tokens = x[:, 3:30], tokens[:, 3:30]
    keep = tokens != 0 if case == "without special tokens" else tokens >= 0
    expected = by_hand(tmp_path, x[keep][:n_tokens], rank)
    assert expected["n_tokens"] == n_tokens

    found = measured_in(tmp_path)
    assert found["form"] == "inference"
    assert "held out" in found["text"]
    assert ("special tokens count" in found["text"]) == bool(keep.all())
    assert found["n_tokens"] == n_tokens
    for name in "l0_sparse", "l0_total":
        assert found[name] == pytest.approx(expected[name], abs=0.01)
    assert found["explained_variance"] == pytest.approx(
        expected["explained_variance"], abs=1e-4
    )
    assert found["dense_latents"]["threshold"] == 0.1
    assert abs(found["dense_latents"]["count"] - expected["dense"]) <= 1
    # and it is of the SAE that is there
    assert Measurement.of(SAE.load_from_disk(tmp_path)) == runner.measurement


def test_the_command_records_prints_and_warns(
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "sae"
    arguments = {
        "architecture": "scaffold_batchtopk",
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "k": K,
        "scaffold_rank": RANK,
        "model_name": "py-neox",
        "hook_name": HOOK,
        "dataset_path": text,
        "streaming": "false",
        "context_size": CONTEXT,
        "training_tokens": 3 * BATCH,
        "train_batch_size_tokens": BATCH,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 16,
        # so slow a running average that no threshold follows k
        "topk_threshold_lr": 1e-6,
        "log_to_wandb": "false",
        "output_path": out,
    }
    argv = [
        word for name, value in arguments.items() for word in (f"--{name}", str(value))
    ]
    with caplog.at_level(logging.WARNING):
        assert main(["train", *argv]) == 0
    found = measured_in(out)
    (line,) = (
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(f"{out}: ")
    )
    assert f"l0_sparse {found['l0_sparse']:.1f}, " in line
    assert f"{found['dense_latents']['count']} dense latents" in line
    assert f"on {found['n_tokens']:,} tokens" in line
    cfg = json.loads((out / "cfg.json").read_text())
    expected = l0_warning(
        str(out), found["l0_sparse"], found["n_tokens"], cfg["metadata"]
    )
    warned = [r.message for r in caplog.records if r.message.startswith(str(out))]
    assert warned == ([expected] if expected else [])


def test_nothing_is_measured_where_training_has_read_everything(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    n = len(sequences(text)) * CONTEXT
    runner = ResumableTrainingRunner(
        # reads more than there is, and goes on at the start
        runner_config(text, tmp_path, training_tokens=n, n_batches_in_buffer=64),
        override_model=load_embedded_model(),
    )
    runner.run()
    assert runner.measurement is None
    assert measured_in(tmp_path) == {
        "n_tokens": 0,
        "reason": "training has read all of its text",
    }
    assert Measurement.of(SAE.load_from_disk(tmp_path)) is None


def test_a_rest_of_the_text_is_measured_on_until_it_ends(
    text: Path, tmp_path: Path, read_by_model: list[torch.Tensor]
) -> None:
    runner = ResumableTrainingRunner(
        runner_config(text, tmp_path), override_model=load_embedded_model()
    )
    runner.n_measured_tokens = 10**9
    runner.run()
    assert runner.measurement is not None
    # whole batches, each once
    n_batches = len(sequences(text)) // 8
    assert len(read_by_model) == n_batches
    assert runner.measurement.n_tokens % BATCH == 0
    assert 0 < runner.measurement.n_tokens < n_batches * BATCH


def test_an_interruption_while_measuring_costs_no_training(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner_module, "measure", interrupted)
    runner = ResumableTrainingRunner(
        runner_config(text, tmp_path, training_tokens=2 * BATCH),
        override_model=load_embedded_model(),
    )
    runner.run()
    assert measured_in(tmp_path)["reason"] == "the measuring was interrupted"
    assert SAE.load_from_disk(tmp_path).cfg.d_sae == D_SAE


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 120))
def test_batches_do_not_matter(sizes: list[int], n_tokens: int) -> None:
    x = some_activations(sum(sizes))
    sae = eval_sae(rank=RANK)
    if min(n_tokens, len(x)) < 2:  # a single token has no variance
        return
    in_batches = measure(sae, x.split(sizes), n_tokens, "some")
    at_once = measure(sae, [x], n_tokens, "some")
    assert in_batches.n_tokens == at_once.n_tokens == min(n_tokens, len(x))
    assert in_batches.l0_sparse == at_once.l0_sparse
    assert in_batches.l0_total == at_once.l0_sparse + RANK
    assert in_batches.dense_latents == at_once.dense_latents
    assert in_batches.explained_variance == pytest.approx(
        at_once.explained_variance, abs=1e-5
    )


def test_what_was_measured_of_other_weights_is_not_of_these() -> None:
    sae = eval_sae(rank=RANK)
    found = measure(sae, [some_activations()], 50, "some")
    sae.cfg.metadata.measured = json.loads(json.dumps(found.to_metadata()))
    assert Measurement.of(sae) == found
    assert Measurement.of(sae.sparse_sae()) is None
    sae.threshold.data[RANK:] += 0.1
    assert Measurement.of(sae) is None
    for said in None, 3, "much", {}, {"n_tokens": 0, "reason": "none"}, {**found.to_metadata(), "l0_sparse": None}:  # fmt: skip
        sae.cfg.metadata.measured = said
        assert Measurement.of(sae) is None


def test_what_cannot_be_measured_is_said() -> None:
    sae = eval_sae(rank=RANK)
    with pytest.raises(NotMeasuredError, match="has read all"):
        measure(sae, [], 10, "none")
    with pytest.raises(NotMeasuredError, match="not finite"):
        measure(sae, [some_activations() * math.nan], 10, "some")
    sae.W_dec.data[5] = math.nan
    with pytest.raises(NotMeasuredError, match="not finite"):
        measure(sae, [some_activations()], 10, "some")


@given(st.floats(0, 1000), st.floats(0.5, 500), st.integers(1, 10**6))
def test_a_warning_where_l0_and_k_differ_by_more_than_a_tenth(
    l0: float, k: float, n_tokens: int
) -> None:
    for metadata in {"k": k}, {"training_architecture_details": {"k": k}}:
        said = l0_warning("my-sae", l0, n_tokens, metadata)
        assert (said is not None) == (abs(l0 - k) > 0.1 * k)
        if said is not None:
            assert said.startswith(f"my-sae: l0_sparse is {l0:.1f}, ")
            assert f"k was {k:g}" in said and f"{n_tokens:,} tokens" in said
            assert "\n" not in said
    assert l0_warning("my-sae", l0, n_tokens, {"l1_coefficient": 5}) is None


def test_the_dense_latent_evaluation_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, k in ("right", None), ("wrong", 3.0), ("unknown", None):
        sae = eval_sae(rank=RANK)
        sae.cfg.metadata.k = k
        sae.save_model(tmp_path / name)
    # as SAELens's runner writes it, for an SAE that does not know k itself
    x_l0 = 33.0
    (tmp_path / "right" / "runner_cfg.json").write_text(
        json.dumps({"sae": {"k": x_l0}})
    )
    (tmp_path / "unknown" / "runner_cfg.json").write_text('{"saes": {}}')
    command = ["eval", "dense_latents", "--dataset=python-stdlib", "--device=cpu"]
    command += [
        "--set=dense_latents.n_tokens=500",
        "--set=dense_latents.n_bootstrap=10",
    ]
    command += [f"--output_path={tmp_path / 'out'}", "--sae_path"]
    command += [str(tmp_path / name) for name in ("right", "wrong", "unknown")]
    for _ in range(2):  # the second time, of results that are there
        assert main(command) == 0
        said = capsys.readouterr().err.splitlines()
        warned = [line for line in said if "l0_sparse is" in line]
        assert [message.partition(":")[0] for message in warned] == ["wrong"]
    result = json.loads(
        next((tmp_path / "out").rglob("wrong*.json")).read_text(encoding="utf-8")
    )
    metrics = result["eval_result_metrics"]
    assert warned == [
        l0_warning(
            "wrong",
            metrics["sparsity"]["l0_sparse"],
            metrics["token_stats"]["n_tokens"],
            {"k": 3.0},
        )
    ]
    right = json.loads(next((tmp_path / "out").rglob("right*.json")).read_text())
    assert right["sae_cfg_dict"]["metadata"]["k"] == x_l0


def test_the_remedy_fits_the_threshold() -> None:
    def remedy(**metadata: Any) -> str:
        said = l0_warning("sae", 66, 1000, {"k": 4, **metadata})
        assert said is not None
        return said

    running = {"estimator": "running_average", "n_tokens": 100}
    assert remedy() == remedy(threshold_calibration=running)
    assert "where it is calibrated at the end" in remedy()
    recent = {"estimator": "training_activations", "n_tokens": 100}
    assert "measure on more tokens" in remedy(threshold_calibration=recent)
    assert trained_k({"k": True}) is None


@pytest.mark.parametrize("window", [1, 3, 4, 10, 11])
def test_the_tokens_of_firing_frequencies_are_those_that_the_trainer_counted(
    window: int, tmp_path: Path
) -> None:
    steps, batch = 10, 128
    trainer = trainer_for(
        scaffold_sae(), steps, batches(batch), batch, feature_sampling_window=window
    )
    counted: list[int] = []
    step = trainer.step
    trainer.step = lambda x: counted.append(len(x)) or step(x)  # type: ignore
    reset = trainer._reset_running_sparsity_stats
    trainer._reset_running_sparsity_stats = lambda: counted.clear() or reset()
    trainer.fit()

    runner_cfg = {
        "training_tokens": steps * batch,
        "train_batch_size_tokens": batch,
        "feature_sampling_window": window,
        "sae_lens_training_version": sae_lens.__version__,
    }
    (tmp_path / "runner_cfg.json").write_text(json.dumps(runner_cfg))
    assert n_sparsity_tokens({}, tmp_path) == sum(counted)
    assert trainer.n_frac_active_samples == sum(counted)


def test_the_runner_notes_the_tokens_of_firing_frequencies(
    text: Path, tmp_path: Path
) -> None:
    runner = ResumableTrainingRunner(
        runner_config(text, tmp_path, feature_sampling_window=6),
        override_model=load_embedded_model(),
    )
    runner.n_measured_tokens = 100
    runner.run()
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert cfg["metadata"]["n_sparsity_tokens"] == 2 * BATCH  # of 20 steps
    assert n_sparsity_tokens({}, tmp_path) == 2 * BATCH
