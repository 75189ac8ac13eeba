"""Training many SAEs, broken off and resumed, ends where it ends unbroken."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    LoggingConfig,
    MultiSAETrainingRunnerConfig,
)
from safetensors.torch import load_file

from forked import Forked
from saelens_scaffold import (
    RepeatableMultiSAETrainingRunner,
    ScaffoldBatchTopKTrainingSAE,
    ScaffoldBatchTopKTrainingSAEConfig,
)
from saelens_scaffold.models import load_embedded_model, load_stdlib_text
from saelens_scaffold.training.activation_stream import ActivationStream
from saelens_scaffold.training.runner import last_checkpoint

STEPS = 24


def runner(directory: Path, **overrides: Any) -> RepeatableMultiSAETrainingRunner:
    shared: dict[str, Any] = {
        "d_in": 256,
        "d_sae": 128,
        "k": 4,
        "normalize_activations": "expected_average_only_in",
        "topk_threshold_lr": 0.2,
    }
    cfg = MultiSAETrainingRunnerConfig(
        saes={
            "plain": BatchTopKTrainingSAEConfig(**shared),
            "scaffold": ScaffoldBatchTopKTrainingSAEConfig(**shared, scaffold_rank=4),
        },
        hook_names="blocks.0.hook_resid_post",
        model_name="py-neox",
        streaming=False,
        context_size=32,
        n_batches_in_buffer=32,
        store_batch_size_prompts=8,
        training_tokens=STEPS * 256,
        train_batch_size_tokens=256,
        lr=1e-3,
        lr_warm_up_steps=5,
        lr_decay_steps=6,
        n_checkpoints=3,
        n_batches_for_norm_estimate=2,
        feature_sampling_window=10,
        dead_feature_window=5,
        logger=LoggingConfig(log_to_wandb=False),
        output_path=str(directory / "saes"),
        **overrides,
    )
    cfg.checkpoint_path = str(directory / "checkpoints")
    torch.manual_seed(0)
    return RepeatableMultiSAETrainingRunner(
        cfg,
        override_dataset=load_stdlib_text("train").select(range(40)),
        override_model=load_embedded_model(),
    )


def _die_in(directory: Path, step: int, name: str) -> None:
    last = sorted((directory / "checkpoints").glob("*")) or None
    forward = ScaffoldBatchTopKTrainingSAE.training_forward_pass

    def forward_or_die(self: Any, step_input: Any) -> Any:
        if step_input.n_training_steps == step:
            os.kill(os.getpid(), getattr(signal, name))
        return forward(self, step_input)

    ScaffoldBatchTopKTrainingSAE.training_forward_pass = forward_or_die  # type: ignore[method-assign]
    runner(directory, resume_from_checkpoint=last and str(last[-1])).run()


def break_off(directory: Path, step: int, signal_name: str) -> None:
    """Train until a step, in another process, and end it there with a signal."""
    process = Forked(_die_in, directory, step, signal_name)
    expected = {"SIGKILL": -signal.SIGKILL, "SIGINT": 1}
    assert process.wait() == expected[signal_name], process.stderr


def test_broken_twice_is_the_same_as_unbroken(tmp_path: Path) -> None:
    runner(tmp_path / "unbroken").run()

    broken = tmp_path / "broken"
    break_off(broken, step=10, signal_name="SIGKILL")
    first = last_checkpoint(broken / "checkpoints")
    assert first is not None
    assert 0 < int(first.name) <= 10 * 256
    break_off(broken, step=16, signal_name="SIGINT")
    second = last_checkpoint(broken / "checkpoints")
    assert second is not None
    assert int(second.name) > int(first.name)
    assert not first.exists()  # one checkpoint is enough
    runner(broken, resume_from_checkpoint=str(second)).run()

    for sae in ("plain", "scaffold"):
        for file in ("sae_weights.safetensors", "sparsity.safetensors"):
            ours = load_file(broken / "saes" / sae / file)
            unbroken = load_file(tmp_path / "unbroken" / "saes" / sae / file)
            assert set(ours) == set(unbroken)
            for name, values in unbroken.items():
                assert torch.equal(ours[name], values), (sae, file, name)


def test_a_checkpoint_that_was_cut_off_is_none(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "checkpoints") is None
    trained = runner(tmp_path)
    trained.run()
    whole = last_checkpoint(tmp_path / "checkpoints")
    assert whole is not None
    cut_off = tmp_path / "checkpoints" / "999999"
    (cut_off / "plain").mkdir(parents=True)
    assert last_checkpoint(tmp_path / "checkpoints") == whole


def test_the_stream_goes_on_where_it_was_without_the_language_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ActivationStream(runner(tmp_path).activations_store, seed=3)
    first.begin()
    drawn = [
        next(first) for _ in range(30)
    ]  # more than there is text, so that it wraps
    place = first.begin_anew()
    expected = [next(first) for _ in range(3)]
    assert not torch.equal(
        drawn[0]["blocks.0.hook_resid_post"], expected[0]["blocks.0.hook_resid_post"]
    )

    store = runner(tmp_path).activations_store
    passes = 0
    run_model = store.get_multi_hook_activations

    def counted(batch_tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        nonlocal passes
        passes += 1
        return run_model(batch_tokens)

    monkeypatch.setattr(store, "get_multi_hook_activations", counted)
    again = ActivationStream(store, seed=3)
    again.begin(**place)
    assert passes == 0
    for batch in expected:
        for hook, activations in next(again).items():
            assert torch.equal(activations, batch[hook])


def test_prefetching_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prefetch_llm_batches must be False"):
        runner(tmp_path, prefetch_llm_batches=True).run()


def test_the_last_checkpoint_is_the_furthest_whole_one(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for name in ("512", "2048", "final_7680"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "activation_stream.json").touch()
    (tmp_path / "4096").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "2048"
