"""Training from activations that SAELens's runner has cached."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

from saelens_scaffold.models import load_stdlib_chunks, register_embedded_model
from saelens_scaffold_cli import main

D_MODEL = 256


def test_rows_are_tensors_beside_any_torchvision():
    code = (
        "import torchvision, saelens_scaffold, datasets, torch\n"
        "rows = datasets.Dataset.from_dict({'x': [[1, 2]]}).with_format('torch')\n"
        "assert torch.equal(rows[0]['x'], torch.tensor([1, 2]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_training_from_cached_activations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    chunks = load_stdlib_chunks("train", 1000, ("json",), per_label=30)
    chunks.to_json(tmp_path / "text.jsonl")
    text, cache = str(tmp_path / "text.jsonl"), str(tmp_path / "cache")
    at = {"hook_name": "blocks.0.hook_resid_post", "context_size": 32}
    cfg = CacheActivationsRunnerConfig(
        model_name=register_embedded_model(),
        dataset_path=text,
        d_in=D_MODEL,
        new_cached_activations_path=cache,
        training_tokens=2048,
        buffer_size_gb=0.001,
        model_batch_size=4,
        device="cpu",
        **at,
    )
    rows: Any = chunks.select_columns(["text"]).to_iterable_dataset()
    CacheActivationsRunner(cfg, override_dataset=rows).run()

    options = [
        "--model_name=py-neox",
        *(f"--{name}={value}" for name, value in at.items()),
        f"--dataset_path={text}",
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
    ]
    assert main(["train", *options]) == 0
    assert "nothing was measured" in capsys.readouterr().out
    assert os.path.getsize(tmp_path / "sae" / "sae_weights.safetensors")
