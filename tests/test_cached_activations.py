"""Training from activations that SAELens's runner has cached."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, load_from_disk
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
from safetensors.torch import load_file

from saelens_scaffold.models import load_stdlib_text, register_embedded_model
from saelens_scaffold.training.command import ResumableTrainingRunner
from saelens_scaffold_cli import main

D_MODEL = 256
HOOK_NAME = "blocks.0.hook_resid_post"
CONTEXT = 32
N_TOKENS = 16_384


def write_cache(path: Path, dataset: Any, **changes: Any) -> str:
    cfg = CacheActivationsRunnerConfig(
        **{
            "model_name": register_embedded_model(),
            "dataset_path": "python-stdlib",
            "hook_name": HOOK_NAME,
            "context_size": CONTEXT,
            "d_in": D_MODEL,
            "new_cached_activations_path": str(path),
            "training_tokens": N_TOKENS,
            "buffer_size_gb": 0.004,
            "model_batch_size": 8,
            "device": "cpu",
            **changes,
        }
    )
    CacheActivationsRunner(cfg, override_dataset=dataset).run()
    return str(path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first tokens of python-stdlib at a hook point of py-neox."""
    folder = tmp_path_factory.mktemp("cached") / "activations"
    return write_cache(folder, load_stdlib_text("train").to_iterable_dataset())


def test_rows_are_tensors_beside_any_torchvision():
    code = (
        "import torchvision, saelens_scaffold, datasets, torch\n"
        "rows = datasets.Dataset.from_dict({'x': [[1, 2]]}).with_format('torch')\n"
        "assert torch.equal(rows[0]['x'], torch.tensor([1, 2]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def train(cache: str, tmp_path: Path, *changes: str) -> int:
    return main(
        [
            "train",
            "--model_name=py-neox",
            f"--hook_name={HOOK_NAME}",
            f"--context_size={CONTEXT}",
            "--dataset_path=python-stdlib",
            "--use_cached_activations=True",
            f"--cached_activations_path={cache}",
            "--architecture=scaffold_batchtopk",
            f"--d_in={D_MODEL}",
            "--d_sae=512",
            "--k=8",
            "--scaffold_rank=4",
            "--training_tokens=2048",
            "--train_batch_size_tokens=256",
            "--n_batches_in_buffer=8",
            "--store_batch_size_prompts=4",
            "--log_to_wandb=False",
            f"--checkpoint_path={tmp_path / 'checkpoints'}",
            f"--output_path={tmp_path / 'sae'}",
            *changes,
        ]
    )


def test_training_from_cached_activations(
    cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert train(cache, tmp_path) == 0
    assert "nothing was measured" in capsys.readouterr().out
    weights = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    assert weights["W_dec"].shape == (512, D_MODEL)


# --- `compare` ---

SMALL: dict[str, Any] = {
    "model_name": "py-neox",
    "hook_name": HOOK_NAME,
    "dataset_path": "python-stdlib",
    "sae": {
        "d_in": D_MODEL,
        "d_sae": 96,
        "k": 4,
        "normalize_activations": "expected_average_only_in",
    },
    "grid": {
        "architecture": ["batchtopk", "scaffold_batchtopk"],
        "scaffold_rank": [2],
    },
    "training": {
        "training_tokens": 20 * 256,
        "train_batch_size_tokens": 256,
        "context_size": CONTEXT,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 32,
        "n_batches_for_norm_estimate": 2,
        "n_checkpoints": 3,
        "lr": 1e-3,
    },
    "evaluations": {"dense_latents": {"n_tokens": 1000, "n_bootstrap": 20}},
    "evaluation_data": {"dataset": "python-stdlib", "llm_batch_size": 4},
}


def compare(folder: Path, cache: str | None = None, **training: Any) -> int:
    config = {**SMALL, "training": {**SMALL["training"], **training}}
    if cache is not None:
        named = {"use_cached_activations": True, "cached_activations_path": cache}
        config["training"] |= named
    (folder.parent / "experiment.yaml").write_text(yaml.safe_dump(config))
    file = str(folder.parent / "experiment.yaml")
    return main(["compare", file, f"--output_path={folder}"])


@pytest.fixture(scope="module")
def from_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that ran the language model."""
    folder = tmp_path_factory.mktemp("from-text") / "out"
    assert compare(folder) == 0
    return folder


@pytest.fixture(scope="module")
def from_cache(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Path:
    """The same from cached activations."""
    folder = tmp_path_factory.mktemp("from-cache") / "out"
    with pytest.MonkeyPatch.context() as patch:
        loads = "sae_lens.multi_sae_training_runner.load_model"
        patch.setattr(loads, lambda *_, **__: pytest.fail("the model was loaded"))
        assert compare(folder, cache) == 0
    return folder


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    files = sorted(folder.glob("saes/*/sae_weights.safetensors"))
    return {file.parent.name: load_file(file) for file in files}


def test_a_comparison_from_cached_activations_has_the_same_saes_and_numbers(
    from_text: Path, from_cache: Path
):
    ours, expected = weights(from_cache), weights(from_text)
    assert len(ours) == 2
    for name, tensors in expected.items():
        for tensor, values in tensors.items():
            torch.testing.assert_close(ours[name][tensor], values, rtol=0, atol=1e-5)
    found = [
        json.loads((d / "results.json").read_text()) for d in (from_cache, from_text)
    ]
    for cached, read in zip(*(each["saes"] for each in found), strict=True):
        l0 = "dense_latents.sparsity.l0_sparse"
        expected_l0 = pytest.approx(read["metrics"][l0]["value"], rel=1e-3)
        assert cached["metrics"][l0]["value"] == expected_l0


def test_a_finished_comparison_is_repeated_without_the_cache_or_from_another_place(
    from_cache: Path, cache: str, tmp_path: Path
):
    folder = tmp_path / "out"
    shutil.copytree(from_cache, folder)
    before = {file: file.stat().st_mtime_ns for file in folder.glob("saes/*/*")}
    moved = shutil.copytree(cache, tmp_path / "moved")
    assert compare(folder, str(moved)) == 0
    assert compare(folder, str(tmp_path / "gone")) == 0
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_a_comparison_goes_on_with_the_same_activations_only(
    from_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "out"
    shutil.copytree(from_cache, folder)
    shutil.rmtree(next(folder.glob("saes/batchtopk*")))
    text = load_stdlib_text("test").to_iterable_dataset()
    other = write_cache(tmp_path / "other", text)
    assert compare(folder, other) == 2
    assert "was trained with cached_activations '" in capsys.readouterr().err
    (folder / "compare.yaml").unlink()
    assert compare(folder) == 2
    said = capsys.readouterr().err
    assert "was trained with use_cached_activations True, now False" in said


def test_a_comparison_from_cached_activations_goes_on_where_it_was_broken_off(
    from_cache: Path, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def step(self: Any, *args: Any) -> Any:
        if self.n_training_steps == 12:
            raise KeyboardInterrupt
        return take_step(self, *args)

    with monkeypatch.context() as patch:
        from sae_lens.training.sae_trainer import SAETrainer

        take_step = SAETrainer.step
        patch.setattr(SAETrainer, "step", step)
        assert compare(tmp_path / "out", cache) == 130
    assert not weights(tmp_path / "out")
    assert compare(tmp_path / "out", cache) == 0
    ours, expected = weights(tmp_path / "out"), weights(from_cache)
    for name, tensors in expected.items():
        for tensor, values in tensors.items():
            assert torch.equal(ours[name][tensor], values), (name, tensor)


# --- Caches that do not go with a training ---


def test_a_cache_that_is_shorter_than_the_training_is_read_again(
    cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = load_from_disk(cache)
    assert isinstance(rows, Dataset)
    rows.select(range(100)).save_to_disk(tmp_path / "short")
    assert compare(tmp_path / "out", str(tmp_path / "short")) == 0
    assert "the cache has 3,200 tokens, of which some" in capsys.readouterr().err


@pytest.fixture(scope="module")
def made_with(tmp_path_factory: pytest.TempPathFactory, cache: str) -> str:
    """The cache with the configuration of its runner beside it, of another model."""
    folder = tmp_path_factory.mktemp("of-another") / "activations"
    shutil.copytree(cache, folder)
    file = folder / "cache_activations_runner_cfg.json"
    file.write_text(json.dumps({"model_name": "gpt2", "prepend_bos": True}))
    return str(folder)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"cached_activations_path": "nowhere"}, "'nowhere' does not exist"),
    ({"cached_activations_path": "."}, "is no folder that SAELens's CacheActiv"),
    ({"context_size": 16}, "has 32 positions of width 256 in a row; the training's"),
    ({"seqpos_slice": [1, None]}, "context has 31 (context_size, seqpos_slice)"),
    (
        {"store_batch_size_prompts": 9999},
        "has 600 rows; store_batch_size_prompts is 9999",
    ),
    ({"cached_activations_path": None}, "needs cached_activations_path"),
]


@pytest.mark.parametrize(("training", "said"), WRONG)
def test_a_cache_that_does_not_go_with_a_comparison_is_named_before_it_runs(
    training: dict[str, Any],
    said: str,
    cache: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    settings = {
        "use_cached_activations": True,
        "cached_activations_path": cache,
        **training,
    }
    assert compare(tmp_path / "out", **settings) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_cache_of_another_hook_point_or_model_is_named_before_anything_runs(
    cache: str,
    made_with: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(ResumableTrainingRunner, "run", lambda _: pytest.fail("it ran"))
    assert train(cache, tmp_path, "--hook_name=blocks.1.hook_resid_post") == 2
    said = capsys.readouterr().err
    assert (
        f"has the activations of {HOOK_NAME}, not of blocks.1.hook_resid_post" in said
    )
    assert train(made_with, tmp_path) == 2
    said = capsys.readouterr().err
    assert "was made with model_name 'gpt2'; the training's is 'py-neox'" in said
    assert (
        train(cache, tmp_path, "--n_batches_in_buffer=9", "--seqpos_slice", "1", "32")
        == 2
    )
    assert (
        "SAELens reads cached activations of all positions" in capsys.readouterr().err
    )
    rows = load_from_disk(cache).remove_columns("token_ids")
    rows.save_to_disk(tmp_path / "without-tokens")
    without = str(tmp_path / "without-tokens")
    assert train(without, tmp_path, "--exclude_special_tokens=True") == 2
    assert "has no tokens" in capsys.readouterr().err


def test_several_hook_points_of_a_comparison_need_more_than_a_cache(
    cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    hook_names = [HOOK_NAME, "blocks.1.hook_resid_post"]
    grid = {**SMALL["grid"], "hook_name": hook_names}
    monkeypatch.setitem(SMALL, "grid", grid)
    assert compare(tmp_path / "out", cache) == 2
    said = "hook_name has several values; cached activations are of one hook point"
    assert said in capsys.readouterr().err
