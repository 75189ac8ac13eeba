"""`saelens-scaffold compare`, from a configuration to a report."""

import csv
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import wandb
import yaml
from filelock import FileLock
from playwright.sync_api import sync_playwright
from sae_lens import SAE
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from safetensors.torch import load_file
from wandb.errors import UsageError

from chromium import launch, visit
from forked import Forked
from saelens_scaffold import hookimpl
from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.tasks import Workers
from saelens_scaffold.compare import CompareConfig, compare, read_config
from saelens_scaffold.compare.comparisons import SAME_L0_WITHIN
from saelens_scaffold.compare.config import ConfigChanged
from saelens_scaffold.compare.experiment import EvaluationsFailed, make_plan
from saelens_scaffold.compare.grid import runs_of
from saelens_scaffold.compare.metrics import ComparisonMetric
from saelens_scaffold.compare.training import WaveTrainer
from saelens_scaffold.evals import runner
from saelens_scaffold.evals.jobs import Job
from saelens_scaffold.evals.store import ResultStore
from saelens_scaffold.plugins import manager as plugins
from saelens_scaffold.training.metrics_log import MetricsLog
from saelens_scaffold_cli import main

SMALL: dict[str, Any] = {
    "title": "A small <experiment>",
    "log_metrics": True,
    "model_name": "py-neox",
    "hook_name": "blocks.0.hook_resid_post",
    "dataset_path": "python-stdlib",
    "sae": {
        "d_in": 256,
        "d_sae": 96,
        "topk_threshold_lr": 0.2,
        "normalize_activations": "expected_average_only_in",
    },
    "grid": {
        "architecture": ["batchtopk", "scaffold_batchtopk"],
        "k": [4, 6],
        "scaffold_rank": [2],
        "seed": [0, 1],
    },
    "training": {
        "training_tokens": 30 * 256,
        "train_batch_size_tokens": 256,
        "context_size": 32,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 32,
        "n_batches_for_norm_estimate": 2,
        "n_checkpoints": 4,
        "lr": 1e-3,
    },
    "evaluations": {
        "dense_latents": {"n_tokens": 2000, "n_bootstrap": 20},
        "core": {
            "n_eval_reconstruction_batches": 1,
            "n_eval_sparsity_variance_batches": 1,
        },
    },
    "evaluation_data": {"dataset": "python-stdlib", "llm_batch_size": 4},
    "reference": [
        {
            "what": "Dense latents, against the plain SAE",
            "value": "-84 %",
            "source": "arXiv 2606.14040",
            "definition": "reduction of the count, at matched sparsity",
            "not_stated": "the threshold (here 10 %)",
            "architecture": "scaffold_batchtopk",
            "metric": "dense_latents.sparsity.l0_total",
            "against_baseline": "ratio",
        }
    ],
}


def write(directory: Path, **changes: Any) -> Path:
    file = directory / "experiment.yaml"
    file.write_text(yaml.safe_dump({**SMALL, **changes}))
    return file


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment's folder, made in one go."""
    directory = tmp_path_factory.mktemp("unbroken")
    compare(read_config(write(directory)), directory / "out", command="as typed")
    return directory / "out"


def findings(folder: Path) -> dict[str, Any]:
    """results.json without what differs from call to call."""
    results = json.loads((folder / "results.json").read_text())
    del results["provenance"]
    for figure in results["reference"]:
        del figure["command"]
    return results


@pytest.mark.sae_bench
def test_report_has_every_number_and_where_it_comes_from(unbroken: Path) -> None:
    results = json.loads((unbroken / "results.json").read_text())
    assert len(results["saes"]) == 2 * 2 * 2
    for sae in results["saes"]:
        saved = SAE.load_from_disk(unbroken / sae["path"])
        assert saved.cfg.d_sae == 96
        assert saved.cfg.metadata.hook_name == SMALL["hook_name"]
        assert getattr(saved.cfg, "scaffold_rank", 0) == sae["scaffold_rank"]
        for metric, cell in sae["metrics"].items():
            evaluation, _, path = metric.partition(".")
            value: Any = json.loads((unbroken / cell["file"]).read_text())
            value = value["eval_result_metrics"]
            for key in path.split("."):
                value = value[key]
            assert cell["value"] == value, (sae["name"], evaluation, path)
        if sae["scaffold_rank"]:
            # the singular values of A B, formed in full
            r = sae["scaffold_rank"]
            product = (saved.W_enc[:, :r] @ saved.W_dec[:r]).detach().double()
            expected = torch.linalg.svdvals(product)[:r]
            found = torch.tensor(
                sae["scaffold"]["singular_values"], dtype=torch.float64
            )
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            assert sum(sae["scaffold"]["alignment_histogram"]["counts"]) == 96 - r
    provenance = results["provenance"]
    assert provenance["command"] == "as typed"
    assert provenance["versions"]["sae-lens"]
    (wave,) = provenance["training"]
    assert sorted(wave["saes"]) == sorted(sae["name"] for sae in results["saes"])

    rows = list(csv.DictReader((unbroken / "results.csv").open()))
    assert len(rows) == len(results["saes"]) * len(results["metrics"])
    by_name = {sae["name"]: sae for sae in results["saes"]}
    for row in rows:
        cell = by_name[row["sae"]]["metrics"][row["metric"]]
        assert row["value"] == ("" if cell["value"] is None else str(cell["value"]))
    assert "A small &lt;experiment&gt;" in (unbroken / "report.html").read_text()


def test_a_training_is_logged_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.teardown()  # the session of another test, which has read its environment
    grid = {**SMALL["grid"], "k": [4], "seed": [0]}
    dense = {"dense_latents": SMALL["evaluations"]["dense_latents"]}
    changes = {"grid": grid, "evaluations": dense, "wandb_project": "experiments"}
    file = write(tmp_path, **changes)
    compare(read_config(file), tmp_path / "out")
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (file_of_run,) = run.glob("*.wandb")
    logged = file_of_run.read_bytes()
    trained = [file.name for file in (tmp_path / "out" / "saes").iterdir()]
    assert len(trained) == 2
    assert all(
        f"{name}/metrics/explained_variance".encode() in logged for name in trained
    )

    rows = [*csv.DictReader((tmp_path / "out" / "training.csv").open())]
    logged_rows = {(int(row["step"]), row["sae"]) for row in rows}
    assert logged_rows == {(step, name) for step in (10, 20, 30) for name in trained}
    explained = [row for row in rows if row["metric"] == "metrics/explained_variance"]
    assert len(explained) == len(logged_rows)
    assert all(-1 < float(row["value"]) < 1 for row in explained)
    log = MetricsLog(tmp_path / "out" / "training.csv")
    log.forget_after(20, [trained[0]])
    kept = {(int(r["step"]), r["sae"]) for r in csv.DictReader(log.file.open())}
    assert kept == logged_rows - {(30, trained[0])}

    monkeypatch.setattr("wandb.init", Mock(side_effect=UsageError("no key")))
    with pytest.raises(UserError, match="no key .or leave wandb_project out"):
        compare(read_config(file), tmp_path / "another")


@pytest.mark.sae_bench
def test_comparisons_are_at_the_measured_sparsity(unbroken: Path) -> None:
    results = json.loads((unbroken / "results.json").read_text())
    values = {
        (sae["arm"], sae["seed"]): sae["metrics"]["core.sparsity.l0"]["value"]
        for sae in results["saes"]
    }
    found = {
        (c["matching"], c["treatment"]["axes"]["k"]): c
        for c in results["comparisons"]
        if c["metric"] == "core.sparsity.l0"
    }
    comparison = found["k", 4]
    assert comparison["baseline"]["arm"] == "batchtopk k=4"
    for seed in (0, 1):
        assert comparison["differences"][str(seed)] == pytest.approx(
            values["scaffold_batchtopk k=4 scaffold_rank=2", seed]
            - values["batchtopk k=4", seed]
        )
    # by k, batchtopk's 6 is the same l0_total; after so little training it need not be
    refused = found["l0_total", 4]
    (nearest,) = refused["baseline"]["measured"]
    assert nearest["arm"] == "batchtopk k=6"
    ours, theirs = (
        fmean(sae["l0_total"] for sae in results["saes"] if sae["arm"] == arm)
        for arm in ("scaffold_batchtopk k=4 scaffold_rank=2", "batchtopk k=6")
    )
    assert refused["treatment"]["l0_total"] == pytest.approx(ours)
    is_refused = abs(theirs / ours - 1) > SAME_L0_WITHIN
    assert (refused["verdict"] == "out of range") == is_refused
    note = r"k=6 has the same l0_total by k, but -.*train batchtopk with k=\d+$"
    assert bool(re.search(note, refused["note"] or "")) == is_refused
    (figure,) = results["reference"]
    for ours in figure["ours"]:  # l0_total of a scaffold SAE is higher
        assert ours["shown"].startswith("+")


def test_centred_saes_start_at_the_mean(tmp_path: Path) -> None:
    # with so small a learning rate an SAE stays where it started
    training = {**SMALL["training"], "lr": 1e-12, "training_tokens": 512}
    grid = {
        "architecture": ["batchtopk", "scaffold_batchtopk"],
        "scaffold_rank": [0, 2],
        "scaffold_init": ["pca", "random"],
        "b_dec_init": ["mean", "zeros"],
        "seed": [0],
    }
    file = write(
        tmp_path,
        grid=grid,
        training=training,
        sae={**SMALL["sae"], "k": 4},
        evaluations={"dense_latents": SMALL["evaluations"]["dense_latents"]},
    )
    compare(read_config(file), tmp_path / "out")
    b_dec = {
        path.name: SAE.load_from_disk(path).b_dec
        for path in (tmp_path / "out/saes").iterdir()
    }
    scaffold = b_dec.pop("scaffold_batchtopk-scaffold_init_pca-scaffold_rank_2-seed_0")
    # batchtopk, ranks 0 and 2 started at random, and rank 0 that PCA can do nothing for
    assert len(b_dec) == 2 + 2 * 3
    for name, started_at in b_dec.items():
        if "b_dec_init_zeros" in name:
            assert started_at.norm() < 1e-6, name
        else:  # means of two batches of 256 tokens
            assert (started_at - scaffold).norm() < 0.3 * scaffold.norm(), name


def _compare_until(file: Path, out: Path, pattern: str, number: int) -> int:
    def watch() -> None:
        while not any(out.glob(pattern)):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()
    return main(["compare", str(file), "--output_path", str(out)])


def break_off(file: Path, out: Path, pattern: str, number: int) -> tuple[int, str]:
    """
    Run the command in another process, which gets a signal once there is such a file.

    Returns:
        Its exit status, and the end of what it wrote to stderr.
    """
    # the process sends it itself: on a busy machine another might come too late
    process = Forked(_compare_until, file, out, pattern, number)
    return process.wait(), process.stderr[-3000:]


@pytest.mark.sae_bench
def test_killed_twice_with_the_same_results(unbroken: Path, tmp_path: Path) -> None:
    file, out = write(tmp_path), tmp_path / "out"
    in_training = "training/wave-0/checkpoints/*/activation_stream.json"
    in_evaluation = "eval_results/dense_latents"

    status, written = break_off(file, out, in_training, int(signal.SIGKILL))
    assert status == -signal.SIGKILL, written
    assert not (out / "results.json").exists()
    status, written = break_off(file, out, in_evaluation, int(signal.SIGTERM))
    assert status == 130, written
    assert not (out / "results.json").exists()
    made = {path: path.stat().st_mtime_ns for path in (out / "saes").glob("*/*")}
    assert made

    compare(read_config(file), out)
    assert findings(out) == findings(unbroken)
    for path, time_ns in made.items():
        assert path.stat().st_mtime_ns == time_ns  # not trained again
    for sae in (unbroken / "saes").iterdir():
        for name in ("sae_weights.safetensors", "sparsity.safetensors"):
            ours, theirs = (
                load_file(out / "saes" / sae.name / name),
                load_file(sae / name),
            )
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    leftovers = [*out.glob("**/.*"), *(out / "training").glob("*/checkpoints")]
    assert not leftovers
    # what the repeated steps had logged is there once
    logged = [sorted((of / "training.csv").open()) for of in (out, unbroken)]
    assert logged[0] == logged[1]


def stop() -> None:
    raise KeyboardInterrupt


def n_waves(folder: Path) -> int:
    return len(list((folder / "training").glob("wave-*")))


@pytest.mark.sae_bench
def test_results_do_not_depend_on_the_waves(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = read_config(write(tmp_path)), tmp_path / "out"
    plan = make_plan(config, out, saes_per_wave=3)
    assert [len(wave) for wave in plan.waves] == [3, 3, 2]
    # waves that have not begun are divided anew in another call
    train_wave = WaveTrainer.train_wave
    monkeypatch.setattr(
        WaveTrainer,
        "train_wave",
        lambda self, n, *wave: train_wave(self, n, *wave) if n < 1 else stop(),
    )
    with pytest.raises(KeyboardInterrupt):
        compare(config, out, saes_per_wave=3)
    monkeypatch.undo()
    compare(config, out)
    assert n_waves(out) == 2
    assert findings(out) == findings(unbroken)


class LittleMemory:
    """Lets a training step of more than some SAEs fail, once there is a checkpoint."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n_saes: int, error: Exception):
        self.sizes: list[int] = []
        begin_step = MultiSAETrainer._maybe_log_sparsity

        def fail(trainer: MultiSAETrainer, final: bool = False) -> None:
            if trainer.n_training_steps == 0:
                self.sizes.append(len(trainer.saes))
            if trainer.n_training_steps == 10 and len(trainer.saes) > n_saes:
                raise error
            begin_step(trainer, final)

        monkeypatch.setattr(MultiSAETrainer, "_maybe_log_sparsity", fail)


@pytest.mark.sae_bench
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_a_wave_that_memory_does_not_hold_is_split(
    error: Exception,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    memory = LittleMemory(monkeypatch, 3, error)
    config = read_config(write(tmp_path))
    runs = runs_of(config)
    training = tmp_path / "training"
    trainer = WaveTrainer(config, runs, "cpu", tmp_path / "saes", training)
    trainer.train([runs], Workers())
    assert memory.sizes == [8, 4, 2, 2, 4, 2, 2]
    assert n_waves(tmp_path) == 4
    names = json.loads((training / "waves.json").read_text())
    assert [len(wave) for wave in names] == [2, 2, 2, 2]
    assert "not enough memory to train 8 SAEs together" in capsys.readouterr().err
    for run in runs:
        ours, theirs = (
            load_file(folder / "saes" / run.name / "sae_weights.safetensors")
            for folder in (tmp_path, unbroken)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.sae_bench
def test_memory_that_does_not_hold_a_single_sae(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LittleMemory(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(UserError, match="make d_sae, train_batch_size_tokens, n_bat"):
        compare(read_config(write(tmp_path)), tmp_path / "out")
    monkeypatch.undo()
    LittleMemory(monkeypatch, 0, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        compare(read_config(write(tmp_path)), tmp_path / "out")


@pytest.mark.sae_bench
def test_a_finished_experiment_is_only_read(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_again(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr("saelens_scaffold.training.runner.initial_sae", not_again)
    monkeypatch.setattr("saelens_scaffold.evals.runner._measure", not_again)
    before = findings(unbroken)
    compare(read_config(write(tmp_path)), unbroken)
    assert findings(unbroken) == before


def without_config(unbroken: Path, tmp_path: Path) -> Path:
    """The finished experiment, whose configuration was lost."""
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    (out / "compare.yaml").unlink()
    return out


@pytest.mark.sae_bench
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"title": "Another", "evaluation_seeds": [7]}, None),
        ({"training": {"lr": 2e-3}}, "with lr 0.001, now 0.002"),
        ({"training": {"n_batches_in_buffer": 16}}, "with n_batches_in_buffer 32"),
        (
            {"sae": {"topk_threshold_lr": 0.1}},
            "with sae.topk_threshold_lr 0.2, now 0.1",
        ),
        ({"sae": {"d_sae": 64}}, "with sae.d_sae 96, now 64"),
        ({"data_seed": 43}, "with seed 42, now 43"),
        ({"calibrate_thresholds": False}, "with calibrate_thresholds True, now False"),
        ({"b_dec_init": "zeros"}, "with b_dec_init 'mean', now 'zeros'"),
        ({"sae": {"normalize_activations": "none"}}, "with scales True, now False"),
        ({"hook_name": "blocks.1.hook_resid_post"}, "with sae.hook_name|hook_names"),
    ],
)
def test_without_its_configuration_saes_are_known_by_their_runners(
    changes: dict[str, Any], said: str | None, unbroken: Path, tmp_path: Path
) -> None:
    merged = {
        name: {**SMALL[name], **value} if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    config = read_config(write(tmp_path, **merged))
    out = without_config(unbroken, tmp_path)
    if said is None:
        (wave,) = make_plan(config, out).waves
        assert {run.name for run in wave} == {d.name for d in (out / "saes").iterdir()}
        return
    with pytest.raises(ConfigChanged, match=said):
        compare(config, out)
    assert not (out / "compare.yaml").exists()  # nothing was touched


@pytest.mark.sae_bench
def test_saes_and_checkpoints_of_other_experiments_are_not_taken(
    unbroken: Path, tmp_path: Path
) -> None:
    config = read_config(write(tmp_path))
    out = without_config(unbroken, tmp_path)
    sae = next((out / "saes").iterdir())
    runner_cfg = (sae / "runner_cfg.json").read_text()
    (sae / "runner_cfg.json").unlink()
    with pytest.raises(ConfigChanged, match=f"{sae.name} .*nothing says with which"):
        make_plan(config, out)
    # a wave that was broken off, of the same SAEs
    names = [d.name for d in (out / "saes").iterdir()]
    shutil.rmtree(out)
    checkpoint = out / "training/wave-0/checkpoints/256"
    checkpoint.mkdir(parents=True)
    (checkpoint / "activation_stream.json").write_text("{}")
    (checkpoint / "runner_cfg.json").write_text(runner_cfg)
    (out / "training/waves.json").write_text(json.dumps([names]))
    make_plan(config, out)
    changed = write(tmp_path, training={**SMALL["training"], "lr": 2e-3})
    with pytest.raises(ConfigChanged, match="256.* was trained with lr 0.001"):
        make_plan(read_config(changed), out)
    other = write(tmp_path, grid={**SMALL["grid"], "k": [5]})
    with pytest.raises(ConfigChanged, match="256 is of other SAEs"):
        make_plan(read_config(other), out)


@pytest.mark.sae_bench
def test_results_without_a_key_are_not_shown(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    evaluator = make_plan(read_config(write(tmp_path)), out).evaluator
    before = evaluator.evaluate(Workers(), {}).results
    for key in out.glob("eval_results/dense_latents/*.key"):
        key.unlink()
    measured: list[str] = []

    def note(job: Job, saes: Any, *_: Any) -> Any:
        measured.extend(f"{job.evaluation.name} {sae.release}" for sae in saes)
        raise RuntimeError("no number but the old ones")

    monkeypatch.setattr("saelens_scaffold.evals.runner._measure", note)
    after, failures, *_ = evaluator.evaluate(Workers(), {})
    assert len(measured) == len(before)
    assert len(failures) == 2  # one for the SAEs of each seed
    assert all(name.startswith("dense_latents ") for name in measured)
    assert not any("dense_latents" in of_sae for of_sae in after.values())


@pytest.mark.sae_bench
def test_command(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path)
    assert main(["compare", str(file), "--output_path", str(unbroken)]) == 0
    printed = capsys.readouterr().out
    assert "At the same k for the sparse latents, 2 seeds:" in printed
    pair = r"scaffold_batchtopk k=4 scaffold_rank=2 \(l0_total \d+\.\d\) against "
    assert re.search(pair + r"batchtopk k=4 \(l0_total \d+\.\d\):\n\| metric", printed)
    assert "out of range, " in printed
    assert re.search(r"\d+ of 10 are after Holm's correction", printed)
    assert max(len(line) for line in printed.splitlines() if "|" in line) <= 140
    assert f"Written to {unbroken}: report.html" in printed
    provenance = json.loads((unbroken / "results.json").read_text())["provenance"]
    typed = f"saelens-scaffold compare {file} --output_path {unbroken}"
    assert provenance["command"] == typed

    assert main(["compare", str(file), "--plan", "--saes_per_wave", "3"]) == 0
    printed = capsys.readouterr().out
    assert "8 SAEs:\n  batchtopk k=4, seed 0, 1\n" in printed
    assert "in 3 waves (of 3, 3, 2), each on one pass of the language model" in printed
    arm = "scaffold_batchtopk k=4 scaffold_rank=2"
    pairs = "batchtopk k=4 (same k), batchtopk k=6 (same l0_total)"
    assert f"comparisons:\n  {arm} with {pairs}\n" in printed

    changed = write(tmp_path, data_seed=1)
    assert main(["compare", str(changed), "--output_path", str(unbroken)]) == 2
    error = capsys.readouterr().err
    assert "-data_seed: 42" in error
    assert "+data_seed: 1" in error


@pytest.mark.sae_bench
def test_text_that_evaluations_take_by_default_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("saelens_scaffold.models.datasets.load_dataset", no_network)
    config = read_config(write(tmp_path, evaluation_data={}))
    with pytest.raises(ValueError, match="core: .*/openwebtext' cannot be"):
        make_plan(config, tmp_path / "out")


@pytest.mark.sae_bench
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluations": {"dense_latent": None}}, "no evaluation 'dense_latent'"),
        ({"evaluations": {"core": {"tokens": 1}}}, "core has no field 'tokens'"),
        (
            {"evaluation_data": {"dataset": "./missing.jsonl"}},
            "there is no dataset ./missing.jsonl",
        ),
        ({"dataset_path": "./missing.jsonl"}, "./missing.jsonl"),
        ({"hook_name": "ln_final.hook_normalized"}, "must be a hook point of a layer"),
        (
            {"training": {**SMALL["training"], "lr": "fast"}},
            "lr is 'fast': Input should be a valid number",
        ),
        (
            {"training": {"train_batch_size_tokens": 10**6}},
            "n_batches_in_buffer * 128 is",
        ),
        ({"baselines": {"scaffold_batchtopk": "batchtop"}}, "did you mean 'batchtopk'"),
        ({"baselines": {"batchtopk": "batchtopk"}}, "cannot be its own baseline"),
        (
            {"evaluations": {"dense_latents": {"baseline": "x"}}},
            "dense_latents must have no baseline",
        ),
        (
            {"evaluations": {"scaffold_ablation": {"baseline": "x"}}},
            "scaffold_ablation must have no baseline",
        ),
        (
            {"training": {"training_tokens": 1.5}},
            "training_tokens is 1.5: Input should be a valid integer",
        ),
        ({"reference": [{"what": "x"}]}, "reference.0"),
        # what evaluations would find out after the training
        (
            {"evaluations": {"tpp": {"train_set_size": 40, "test_set_size": 20}}},
            "tpp: n_values has 500, but SAE",
        ),
        (
            {"evaluations": {"sparse_probing": {"probe_train_set_size": 10**6}}},
            "sparse_probing: probe_train_set_size 1000000",
        ),
        (
            {"evaluations": {"scaffold_ablation": {"topic_train_size": 10**6}}},
            "scaffold_ablation: dataset 'python-stdlib' has fewer than",
        ),
        (
            {
                "evaluation_data": {
                    "dataset": "python-stdlib",
                    "labelled_dataset": "python-stdlib",
                }
            },
            "error: labelled_dataset means nothing to core, dense_latents",
        ),
        # and later waves
        (
            {"grid": {**SMALL["grid"], "lr_scheduler_name": ["constant", "cosin"]}},
            "batchtopk k=4 lr_scheduler_name=cosin: Unsupported scheduler: cosin",
        ),
        (
            {
                "grid": {
                    **SMALL["grid"],
                    "hook_name": [SMALL["hook_name"], "blocks.1.hook_nonsense"],
                }
            },
            "py-neox has no hook point 'blocks.1.hook_nonsense'",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write(tmp_path, **changes)
    assert main(["compare", str(file), "--output_path", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("saelens-scaffold compare: error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.sae_bench
def test_a_path_that_text_cannot_be_read_in(tmp_path: Path) -> None:
    config = read_config(write(tmp_path))
    with pytest.raises(ValueError, match=r"must have none of .*out \[1\]"):
        make_plan(config, tmp_path / "out [1]")


@pytest.mark.sae_bench
def test_one_process_at_a_time(unbroken: Path, tmp_path: Path) -> None:
    config = read_config(write(tmp_path))
    with (
        FileLock(unbroken / "training.lock"),
        pytest.raises(ValueError, match="another process is at work in"),
    ):
        compare(config, unbroken)
    compare(config, unbroken)


@pytest.mark.sae_bench
def test_a_failed_evaluation_leaves_a_report_of_the_rest(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = runner._measure

    def fail(job: Job, *args: Any) -> Any:
        if job.evaluation.name == "core":
            raise RuntimeError("no luck")
        return measure(job, *args)

    monkeypatch.setattr(runner, "_measure", fail)
    config, out = read_config(write(tmp_path)), tmp_path / "out"
    with pytest.raises(EvaluationsFailed, match="core failed: RuntimeError: no luck"):
        compare(config, out)
    metrics = json.loads((out / "results.json").read_text())["saes"][0]["metrics"]
    assert metrics["core.sparsity.l0"]["value"] is None
    assert metrics["dense_latents.sparsity.l0_total"]["value"] is not None

    monkeypatch.undo()
    compare(config, out)  # tries again what failed, and nothing else
    assert findings(out) == findings(unbroken)


@pytest.mark.sae_bench
def test_plugins_offer_metrics(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)

    def per_latent(results: Any) -> float | None:
        metrics = results["dense_latents"]["eval_result_metrics"]
        return (
            metrics["dense_latents"]["dense_latents"] / metrics["sparsity"]["l0_sparse"]
        )

    class Own:
        @hookimpl
        def comparison_metrics(self) -> list[ComparisonMetric]:
            return [
                ComparisonMetric("own.dense_share", "dense per active", per_latent),
                ComparisonMetric("own.broken", "broken", lambda _: 1 / 0),
                ComparisonMetric("own.text", "text", lambda _: "no number"),  # type: ignore[arg-type]
                ComparisonMetric(
                    "own.numpy",
                    "of numpy",
                    lambda _: np.float32(0.5),  # type: ignore[arg-type]
                    interval=lambda _: (float("nan"), 1.0),
                ),
            ]

    monkeypatch.setattr(plugins, "available_plugins", lambda: {"own": None})
    monkeypatch.setattr(plugins, "load_plugin", lambda _: Own)
    results = compare(read_config(write(tmp_path)), out)
    for sae in results["saes"]:
        dense = sae["evaluations"]["dense_latents"]
        expected = (
            dense["dense_latents"]["dense_latents"] / dense["sparsity"]["l0_sparse"]
        )
        assert sae["metrics"]["own.dense_share"]["value"] == expected
        assert sae["metrics"]["own.broken"]["value"] is None
        assert sae["metrics"]["own.text"]["value"] is None
        found = sae["metrics"]["own.numpy"]
        assert (found["value"], found["ci_low"], found["ci_high"]) == (0.5, None, 1.0)
    assert any(c["metric"] == "own.dense_share" for c in results["comparisons"])

    with sync_playwright() as playwright, launch(playwright) as browser:
        page, complaints, _ = visit(browser, out / "report.html")
        page.wait_for_selector("svg.main-svg")
        assert not complaints
        for section in ("#verdicts", "#numbers"):
            text = page.locator(section).inner_text()
            assert "dense per active" in text
            assert "None" not in text


@pytest.mark.sae_bench
def test_reference_is_of_chosen_pairs_and_says_what_it_leaves_out(
    unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    for file in (out / "eval_results/dense_latents").glob("batchtopk-k_6-*.json"):
        result = json.loads(file.read_text())
        result["eval_result_metrics"]["sparsity"]["l0_total"] = 0
        key = json.loads(file.with_suffix(".key").read_text())
        ResultStore(file.parent).keep(file.name, key, result)
    (all_k,) = SMALL["reference"]
    one = {**all_k, "where": {"k": 4, "seed": 1}}
    difference = {**all_k, "against_baseline": "difference", "where": {"k": 4}}
    unmeasured = {**all_k, "metric": "tpp.tpp_metrics.tpp_threshold_10_total_metric"}
    file = write(tmp_path, reference=[one, all_k, difference, unmeasured])
    results = compare(read_config(file), out)
    l0 = {
        (sae["architecture"], sae["axes"]["k"], sae["seed"]): sae["evaluations"][
            "dense_latents"
        ]["sparsity"]["l0_total"]
        for sae in results["saes"]
    }
    pairs = [(l0["scaffold_batchtopk", 4, s], l0["batchtopk", 4, s]) for s in (0, 1)]
    of_one, of_all, of_difference, of_none = (r["ours"] for r in results["reference"])
    ((mine, plain),) = pairs[1:]
    assert [ours["shown"] for ours in of_one] == [f"{mine / plain - 1:+.0%}"]
    assert [ours["arm"] for ours in of_all] == [
        f"scaffold_batchtopk k={k} scaffold_rank=2" for k in (4, 6)
    ]
    assert of_all[1]["shown"] == "-; 2 with a baseline of 0 left out"
    (ours,) = of_difference
    assert ours["mean"] == pytest.approx(np.mean([a - b for a, b in pairs]))
    assert ours["n_saes"] == 2
    assert of_none == []


@pytest.mark.sae_bench
def test_reference_alone_computes_nothing(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["compare", str(write(tmp_path)), "--output_path", str(out)]
    assert main([*command, "--reference"]) == 2
    assert f"there are no results in {out} yet" in capsys.readouterr().err
    assert not out.exists()

    # results are all that is needed; figures are those that the file names now
    out.mkdir()
    for name in ("results.json", "compare.yaml"):
        shutil.copy(unbroken / name, out)
    (figure,) = SMALL["reference"]
    figures = [
        figure,
        {
            **figure,
            "differs": "a\nmedian",
            "metric": "dense_latents.sparsity.l0_sparse",
        },
        {**figure, "metric": "core.sparsity.l0", "not_stated": None},
        {**figure, "metric": "tpp.tpp_metrics.tpp_threshold_10_total_metric"},
    ]
    write(tmp_path, reference=figures)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main([*command, "--reference"]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line.startswith("| ")]
    marks = [line.split("|")[-2].strip() for line in rows]
    assert marks.count("not stated") == 2
    assert marks.count("differs") == marks.count("same definition") == 1
    assert "not measured" in rows[-1]
    notes = said[said.index("\n1. ") :]
    assert "arXiv 2606.14040: reduction of the count, at matched sparsity" in notes
    assert "Sparse latents that fire per token, plus the rank of the scaffold" in notes
    assert "not stated: the threshold (here 10 %)" in notes
    # all that `compare` itself would show of them
    of_call = json.loads((unbroken / "results.json").read_text())["reference"]
    assert of_call[0]["ours"][0]["shown"] in said

    write(tmp_path, reference=[])
    assert main([*command, "--reference"]) == 2
    assert "names no published figures" in capsys.readouterr().err
    write(tmp_path, data_seed=1)
    assert main([*command, "--reference"]) == 2
    assert "trained with another configuration" in capsys.readouterr().err


@pytest.mark.sae_bench
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "scafold_batchtopk"}, "architecture 'scafold_batchtopk'"),
        ({"architecture": "batchtopk"}, "against_baseline needs"),
        ({"metric": None}, "against_baseline needs a metric"),
        ({"metric": "dense.dense_latents"}, "no evaluation 'dense'"),
        ({"metric": "dense_latents.sparsity"}, "no metric of dense_latents 'sparsity'"),
        ({"metric": "core.sparsity.l1_"}, "did you mean 'sparsity.l1'"),
        ({"differs": ""}, "at least 1 character"),
        ({"where": {"kk": 4}}, "no axis of the grid 'kk'"),
    ],
)
def test_references_that_no_sae_can_have(change: dict[str, Any], message: str) -> None:
    config = {**SMALL, "reference": [{**SMALL["reference"][0], **change}]}
    with pytest.raises(ValueError, match=message):
        CompareConfig(**config)


def test_an_sae_that_came_to_nothing_leaves_a_report_of_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(
        tmp_path,
        grid={**SMALL["grid"], "k": [4], "lr": [1e-3, 1e30]},
        training={n: v for n, v in SMALL["training"].items() if n != "lr"},
        evaluations={"dense_latents": SMALL["evaluations"]["dense_latents"]},
    )
    out = tmp_path / "out"
    assert main(["compare", str(file), "--output_path", str(out)]) == 1
    errors = capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert len(results["saes"]) == 8
    for sae in results["saes"]:
        is_healthy = sae["axes"]["lr"] == 1e-3
        assert bool(sae["evaluations"]) == is_healthy
        # each of the others is named
        assert (f"{sae['name']}: its weights are not finite" in errors) != is_healthy
    compared = [c for c in results["comparisons"] if c["differences"]]
    assert compared
    for comparison in compared:
        assert comparison["treatment"]["axes"]["lr"] == 1e-3
        assert sorted(comparison["differences"]) == ["0", "1"]
    assert "repeat the command" not in errors  # which would change nothing
    assert (out / "report.html").exists()
