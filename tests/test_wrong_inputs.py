"""Wrong input of every command: one line that names the culprit, and nothing written."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from sae_lens import AbsTopKSAE, AbsTopKSAEConfig, StandardSAE, StandardSAEConfig

from eval_helpers import HOOK, eval_sae
from helpers import scaffold_sae
from saelens_scaffold_cli import main

TRAIN = {
    "architecture": "scaffold_batchtopk",
    "scaffold_rank": 4,
    "k": 8,
    "d_in": 256,
    "d_sae": 512,
    "model_name": "py-neox",
    "hook_name": HOOK,
    "dataset_path": "./text",
    "is_dataset_tokenized": False,
    "context_size": 64,
    "training_tokens": 4096,
    "train_batch_size_tokens": 256,
    "n_batches_in_buffer": 16,
    "log_to_wandb": False,
    "verbose": False,
    "output_path": "new",
}
EXPERIMENT: dict[str, Any] = {
    "model_name": "py-neox",
    "hook_name": HOOK,
    "dataset_path": "python-stdlib",
    "sae": {"d_in": 256, "d_sae": 64},
    "grid": {
        "architecture": ["batchtopk", "scaffold_batchtopk"],
        "k": [4],
        "scaffold_rank": [2],
        "seed": [0],
    },
    "training": {
        "training_tokens": 4096,
        "train_batch_size_tokens": 1024,
        "context_size": 64,
    },
    "evaluations": {"dense_latents": {"n_tokens": 1000}},
    "evaluation_data": {"dataset": "python-stdlib"},
}
EVAL = ["dense_latents", "--sae_path", "sae", "--dataset", "python-stdlib"]
RANK = ["--model", "py-neox", "--hook_name", HOOK, "--dataset", "python-stdlib"]
TEXT = ["--dataset", "python-stdlib"]
GEMMA = "gemma-scope-2b-pt-res-canonical"
NEW = ["--output_path", "new", "--dataset", "./text"]
UPLOAD = ["--repo_id", "user/saes", "--dry-run"]


def train(**changes: object) -> list[str]:
    options = {name: v for name, v in {**TRAIN, **changes}.items() if v is not None}
    return ["train", *(f"--{name}={v}" for name, v in options.items())]


def compare(**changes: object) -> list[str]:
    """The experiment, with changes, goes into a file before the folder is listed."""
    return ["compare", "--experiment", json.dumps({**EXPERIMENT, **changes})]


CASES: list[tuple[list[str], str]] = [
    (train(d_in=128), "d_in is 128"),
    (train(hook_name="blocks.1.hook_nonsense"), "hook_nonsense"),
    (train(hook_name="blocks.9.hook_resid_post"), "layer 9"),
    (train(hook_name="blocks.1.attn.hook_result"), "hook_result"),
    (train(model_name="no-such-model"), "no-such-model"),
    (train(model_name="./text"), "text has no config.json"),
    (train(model_class_name="HookedNonsense"), "HookedNonsense"),
    (train(context_size=1024), "context_size is 1024"),
    (train(dataset_path="./tokens"), "context_size is 64; it must be at most 32"),
    (train(scaffold_rank=256), "scaffold_rank"),
    (train(scaffold_plugins='{"no_such_plugin": {}}'), "no_such_plugin"),
    (train(device="cuda:99"), "cuda:99"),
    (train(device="nonsense"), "nonsense"),
    (train(output_path="file/new"), "file/new"),
    (train(dataset_path="./no-such-text"), "./no-such-text"),
    (train(dataset_path="no-such-user/no-such-text"), "no-such-user/no-such-text"),
    (train(dataset_path="./columns"), "columns body"),
    (train(architecture="no_such_architecture"), "no_such_architecture"),
    (train(k=600), "k must be above 0"),
    (train(no_such_option=3), "no_such_option"),
    (train(d_sae="many"), "many"),
    (train(dtype="float31"), "float31"),
    (train(lr_scheduler_name="sideways"), "sideways"),
    (train(training_tokens=100), "training_tokens is 100"),
    (train(lr_warm_up_steps=100), "lr_warm_up_steps is 100"),
    (train(resume_from_checkpoint="nowhere"), "resume_from_checkpoint 'nowhere'"),
    (train(resume_from_checkpoint="checkpoint"), "no trainer_state.pt"),
    (
        train(from_pretrained_path="text"),
        "from_pretrained_path 'text' is no checkpoint",
    ),
    (train(from_pretrained_path="sae"), "has d_sae 96; the SAE to train has 512"),
    (train(from_pretrained_path="plain"), "96, to which a scaffold of rank 4 adds 4;"),
    (train(from_pretrained_path="nested"), "has d_in 16, not 256"),
    (
        train(
            architecture="batchtopk", scaffold_rank=None, from_pretrained_path="plain"
        ),
        "architecture 'jumprelu'",
    ),
    (["run", "json.tool"], "-m"),
    (["run", "-mjson.tool"], "-m"),
    (["run", "--verbose", "-m", "json.tool"], "--verbose"),
    (["run", "-m"], "-m"),
    (["run", "-m", ""], "''"),
    (["run", "-m", "no_such_module"], "'no_such_module'"),
    (["run", "-m", "no_such.module"], "'no_such.module'"),
    (["run", "-m", "json.no_such"], "'json.no_such'"),
    (["run", "-m", ".relative"], "'.relative'"),
    (["run", "-m", "json"], "'json' is a package"),
    (["run", "-m", "json.tool.x"], "'json.tool.x'"),
    (["run", "-m", "script.py"], "Try using 'script'"),
    (["eval"], "NAME"),
    (["eval", "no_such_evaluation", *EVAL[1:]], "no_such_evaluation"),
    (["eval", "dense_latents"], "--sae_path"),
    (["eval", "dense_latents", "--sae_path", "nowhere"], "nowhere"),
    (["eval", "dense_latents", "--sae_path", "text"], "text"),
    (["eval", "dense_latents", "--sae_regex_pattern", "x"], "--sae_block_pattern"),
    (["eval", *EVAL, "--model", "no-such-model"], "no-such-model"),
    (["eval", *EVAL, "--dataset", "./no-such-text"], "no-such-text"),
    (["eval", *EVAL, "--text_column", "body"], "body"),
    (["eval", *EVAL, "--device", "cuda:99"], "cuda:99"),
    (["eval", *EVAL, "--llm_dtype", "float31"], "float31"),
    (["eval", *EVAL, "--llm_batch_size", "0"], "--llm_batch_size"),
    (["eval", *EVAL, "--baseline", "nobody"], "nobody"),
    (["eval", *EVAL, "--set", "n_tokens=10"], "n_tokens=10"),
    (["eval", *EVAL, "--set", "tpp.n_tokens=10"], "tpp"),
    (["eval", *EVAL, "--set", "dense_latents.no_such_field=1"], "no_such_field"),
    (["eval", *EVAL, "--set", "dense_latents.n_tokens=many"], "n_tokens"),
    (["eval", *EVAL, "--output_path", "file/new"], "file"),
    (["rank", "--dataset", "python-stdlib", "--model", "py-neox"], "--hook_name"),
    (["rank", *RANK, "--model", "no-such-model"], "no-such-model"),
    (["rank", *RANK, "--model", "./text"], "config.json"),
    (["rank", *RANK, "--hook_name", "blocks.1.hook_nonsense"], "hook_nonsense"),
    (["rank", *RANK, "--dataset", "./no-such-text"], "no-such-text"),
    (["rank", *RANK, "--text_column", "body"], "body"),
    (["rank", *RANK, "--sae_path", "nowhere"], "nowhere"),
    (["rank", *RANK, "--n_tokens", "0"], "--n_tokens"),
    (["rank", *RANK, "--context_size", "1024"], "1024"),
    (["rank", *RANK, "--device", "cuda:99"], "cuda:99"),
    (["rank", *RANK, "--llm_dtype", "float31"], "float31"),
    (["rank", *RANK, "--output_path", "file/new"], "file"),
    (["absorb", "plain"], "--output_path"),
    (["absorb", *NEW], "SAE"),
    (["absorb", "nowhere", *NEW], "nowhere"),
    (["absorb", "text", *NEW], "text"),
    (["absorb", "checkpoint", *NEW], "export CHECKPOINT OUTPUT"),
    (["absorb", f"{GEMMA}/layer_0", *NEW], "has no SAE 'layer_0'"),
    (["absorb", f"{GEMMA}/layer_12/width_16k/canonical", *NEW], GEMMA),
    (["absorb", "signed", *NEW], "'abstopk' has no JumpReLU form"),
    (["absorb", "narrow", *NEW], "d_in is 128"),
    (["absorb", "plain", *NEW, "--output_path", "sae"], "sae exists already"),
    (["absorb", "plain", *NEW, "--output_path", "file/new"], "file"),
    (["absorb", "plain", *NEW, "--rank", "256"], "rank is 256; it must be at most 255"),
    (["absorb", "sae", *NEW, "--rank", "252"], "rank is 252; it must be at most 251"),
    (["absorb", "plain", *NEW, "--rank", "-1"], "rank"),
    (["absorb", "plain", *NEW, "--drop_dense", "1.5"], "drop_dense is 1.5"),
    (["absorb", "plain", *NEW, "--n_tokens", "256"], "more than 256 tokens"),
    (["absorb", "plain", *NEW, "--held_out_tokens", "0"], "--held_out_tokens"),
    (["absorb", "plain", *NEW, "--held_out_split", "dev"], "dev"),
    (["absorb", "plain", *NEW, "--dataset", "./no-such-text"], "no-such-text"),
    (["absorb", "plain", *NEW, "--text_column", "body"], "body"),
    (["absorb", "plain", *NEW, "--model", "no-such-model"], "no-such-model"),
    (["absorb", "plain", *NEW, "--context_size", "1024"], "1024"),
    (["absorb", "plain", *NEW, "--device", "cuda:99"], "cuda:99"),
    (["inspect"], "SAE"),
    (["inspect", "nowhere"], "nowhere"),
    (["inspect", "text"], "text"),
    (["inspect", "checkpoint"], "export CHECKPOINT OUTPUT"),
    (["inspect", "plain", *TEXT, "--n_tokens", "2000"], "n_tokens is 2000"),
    (["inspect", "plain", *TEXT, "--n_removal_tokens", "0"], "--n_removal_tokens"),
    (["inspect", "plain", "--dataset", "./no-such-text"], "no-such-text"),
    (["inspect", "plain", "--dataset", "./text", "--text_column", "body"], "body"),
    (["inspect", "plain", *TEXT, "--model", "no-such-model"], "no-such-model"),
    (["inspect", "plain", *TEXT, "--context_size", "1024"], "1024"),
    (["inspect", "plain", *TEXT, "--device", "cuda:99"], "cuda:99"),
    (["inspect", "plain", *TEXT, "--output_path", "file/new"], "file"),
    (["compare"], "CONFIG"),
    (["compare", "nowhere.yaml"], "nowhere.yaml"),
    (["compare", "file"], "file"),
    (["compare", "experiment.yaml", "--memory_gb", "8"], "--memory_gb"),
    (["compare", "experiment.yaml", "--saes_per_wave", "0"], "--saes_per_wave"),
    (["compare", "experiment.yaml", "--device", "cuda:99"], "cuda:99"),
    (["compare", "experiment.yaml", "--output_path", "file/new"], "file"),
    (compare(no_such_field=1), "no_such_field"),
    (compare(model_name="no-such-model"), "no-such-model"),
    (compare(hook_name="blocks.1.hook_nonsense"), "hook_nonsense"),
    (compare(hook_name="blocks.9.hook_resid_post"), "layer 9"),
    (compare(dataset_path="./no-such-text"), "no-such-text"),
    (compare(sae={"d_in": 128, "d_sae": 64}), "d_in is 128"),
    (compare(grid={"architecture": ["no_such_one"], "k": [4]}), "no_such_one"),
    (compare(grid={**EXPERIMENT["grid"], "no_such_axis": [1]}), "no_such_axis"),
    (compare(grid={**EXPERIMENT["grid"], "scaffold_rank": [256]}), "scaffold_rank"),
    (compare(training={**EXPERIMENT["training"], "training_tokens": 10}), "is 10;"),
    (compare(training={**EXPERIMENT["training"], "context_size": 1024}), "is 1024;"),
    (compare(dataset_path="./tokens"), "context_size is 64; it must be at most 32"),
    (compare(evaluations={"no_such_evaluation": None}), "no_such_evaluation"),
    (compare(evaluations={"dense_latents": {"no_such_field": 1}}), "no_such_field"),
    (["export", "checkpoint"], "OUTPUT"),
    (["export", "nowhere", "new"], "nowhere"),
    (["export", "text", "new"], "text is no checkpoint"),
    (["export", "file", "new"], "file is no checkpoint"),
    (["export", "sae", "new"], "'scaffold_jumprelu', the form in which SAEs are used"),
    (["export", ".", "new"], "name one of those in it: broken, checkpoint"),
    (["export", "no-scale", "new"], "no activation_scaler.json"),
    (["export", "checkpoint", "sae"], "sae exists already"),
    (["export", "checkpoint", "file/new"], "file"),
    (["export", "cut-off", "new"], "cut-off"),
    (["export", "checkpoint", "new", "--form", "dense"], "dense"),
    (["export", "checkpoint", "new", "--no_such_option"], "--no_such_option"),
    (["eval", "dense_latents", "--sae_path", "checkpoint"], "export CHECKPOINT OUTPUT"),
    (["rank", *RANK, "--sae_path", "checkpoint"], "export CHECKPOINT OUTPUT"),
    (["upload", "checkpoint", *UPLOAD], "export CHECKPOINT OUTPUT"),
    (["upload", *UPLOAD], "DIR"),
    (["upload", "k=4=nowhere", *UPLOAD], "'k=4=nowhere' is neither"),
    (["upload", "sae"], "--repo_id"),
    (["upload", "nowhere", *UPLOAD], "nowhere"),
    (["upload", "file", *UPLOAD], "file"),
    (["upload", "text", *UPLOAD], "text"),
    (["upload", "broken", *UPLOAD], "broken"),
    (["upload", "a b=sae", *UPLOAD], "a b"),
    (["upload", "../x=sae", *UPLOAD], "../x"),
    (["upload", "x=sae", "x=sae", *UPLOAD], "x"),
    (["upload", "sae", "--repo_id", "saes", "--dry-run"], "saes"),
    (["upload", "sae", "--repo_id", "user/sa es", "--dry-run"], "user/sa es"),
    (["upload", "sae", *UPLOAD, "--eval_results", "nowhere"], "nowhere"),
    (["upload", "sae", *UPLOAD, "--no_such_option"], "--no_such_option"),
    (["demo", "--seeds", "0"], "--seeds"),
    (["demo", "--seeds", "-1"], "--seeds"),
    (["demo", "--seeds", "three"], "three"),
    (["demo", "--seeds", "1.5"], "1.5"),
    (["demo", "--seeds"], "--seeds"),
    (["demo", "--seed", "zero"], "zero"),
    (["demo", "--quick=true"], "--quick"),
    (["demo", "--quick", "true"], "true"),
    (["demo", "--no_such_option"], "--no_such_option"),
    (["demo", "folder"], "folder"),
    (["demo", "--output_path", "file/new"], "file"),
]

PROGRESS = re.compile(
    r"\d+%\||examples/s|it/s|^\w+: \d+ SAEs$|^Using device: |^Loaded pretrained"
)
"""What long work says of how far it is."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, an SAE, an experiment, and files that are none of these."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, column in ("text", "text"), ("columns", "body"):
        (folder / name).mkdir()
        row = json.dumps({column: "import os\n" * 100})
        (folder / name / "train.jsonl").write_text(f"{row}\n" * 8)
    (folder / "tokens").mkdir()
    row = json.dumps({"input_ids": [*range(32)]})
    (folder / "tokens" / "train.jsonl").write_text(f"{row}\n" * 8)
    (folder / "file").write_text("- neither a folder\n- nor an experiment\n")
    (folder / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    eval_sae(rank=4).save_model(folder / "sae")
    eval_sae(rank=4).save_model(folder / "broken")
    (folder / "broken" / "sae_weights.safetensors").write_bytes(b"not weights")
    eval_sae().save_model(folder / "plain")
    fields: Any = {"d_sae": 64, "metadata": eval_sae().cfg.metadata}
    AbsTopKSAE(AbsTopKSAEConfig(256, k=4, **fields)).save_model(folder / "signed")
    StandardSAE(StandardSAEConfig(128, **fields)).save_model(folder / "narrow")
    for name in "checkpoint", "cut-off":
        scaffold_sae().save_model(folder / name)
    scaffold_sae("scaffold_matryoshka").save_model(folder / "nested")
    scaled: Any = {"normalize_activations": "expected_average_only_in"}
    scaffold_sae(**scaled).save_model(folder / "no-scale")
    (folder / "cut-off" / "sae_weights.safetensors").write_bytes(b"")
    return folder


def contents(folder: Path) -> dict[str, int]:
    return {
        str(path): path.stat().st_size if path.is_file() else 0
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    ("argv", "culprit"), CASES, ids=[f"{argv[0]}-{culprit}" for argv, culprit in CASES]
)
def test_one_line_names_the_culprit(
    argv: list[str],
    culprit: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    if argv[1:2] == ["--experiment"]:
        Path("changed.yaml").write_text(yaml.safe_dump(json.loads(argv[2])))
        argv = ["compare", "changed.yaml"]
    before = contents(folder)
    try:
        status = main(argv)
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()

    assert status == 2, captured.err
    assert captured.out == ""
    said = [line for line in re.split("[\r\n]", captured.err) if line.strip()]
    (line,) = (line for line in said if not PROGRESS.search(line))
    assert line.startswith(f"saelens-scaffold {argv[0]}: error: ")
    assert culprit in line
    assert contents(folder) == before


def test_there_are_ten_of_each_command() -> None:
    commands = [argv[0] for argv, _ in CASES]
    assert all(commands.count(command) >= 10 for command in set(commands))
    assert len(set(commands)) == 10


@pytest.mark.parametrize(
    "argv",
    [
        train(model_name="google/gemma-2-2b", d_in=2304),
        ["rank", *RANK, "--model", "google/gemma-2-2b"],
    ],
    ids=["train", "rank"],
)
def test_weights_that_the_hub_does_not_give_are_one_line(
    argv: list[str],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """TransformerLens knows the configuration; the weights are gated, and here offline."""
    (tmp_path / "text").symlink_to(folder / "text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert main(argv) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"saelens-scaffold {argv[0]}: error: ")
    assert "model_name 'google/gemma-2-2b': " in line
