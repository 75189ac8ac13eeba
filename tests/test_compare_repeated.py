"""What a repeated `saelens-scaffold compare` does again, and what it does not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from saelens_scaffold.compare import compare, read_config
from saelens_scaffold.compare.config import ConfigChanged
from saelens_scaffold.compare.experiment import EvaluationsFailed
from saelens_scaffold.compare.training import WaveTrainer
from test_compare import SMALL, findings, stop, write

DENSE = SMALL["evaluations"]["dense_latents"]
TINY: dict[str, Any] = {
    "grid": {
        "architecture": ["batchtopk", "scaffold_batchtopk"],
        "k": [4],
        "scaffold_rank": [2],
        "seed": [0],
    },
    "training": {**SMALL["training"], "training_tokens": 1024, "n_checkpoints": 1},
    "evaluations": {"dense_latents": {**DENSE, "n_tokens": 500}},
    "reference": [],
}
NAME = "batchtopk-k_4-seed_0"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an experiment that is finished."""
    folder = tmp_path_factory.mktemp("finished")
    compare(read_config(write(folder, **TINY)), folder / "out")
    return folder / "out"


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "out")


def again(out: Path, **changes: Any) -> dict[str, Any]:
    """Repeat the command; returns what is written as results.json."""
    return compare(read_config(write(out.parent, **{**TINY, **changes})), out)


def not_again(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("done again")


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saelens_scaffold.training.runner.initial_sae", not_again)


def n_tokens(results: dict[str, Any]) -> set[int]:
    return {
        sae["evaluations"]["dense_latents"]["token_stats"]["n_tokens"]
        for sae in results["saes"]
    }


@pytest.mark.usefixtures("no_training")
def test_what_is_said_of_the_report_just_applies(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saelens_scaffold.evals.runner._measure", not_again)
    results = again(out, title="Corrected", confidence=0.8)
    assert results["title"] == "Corrected"
    assert {c["confidence"] for c in results["comparisons"]} == {0.8}
    assert read_config(out / "compare.yaml").title == "Corrected"
    # the same, said in another order
    sae, training = (
        dict(reversed([*section.items()]))
        for section in (SMALL["sae"], TINY["training"])
    )
    again(out, sae=sae, training=training)


@pytest.mark.usefixtures("no_training")
def test_a_changed_evaluation_is_done_again(out: Path) -> None:
    longer = {"dense_latents": {**DENSE, "n_tokens": 700}}
    before = json.loads((out / "results.json").read_text())
    results = again(out, evaluations=longer)
    assert max(n_tokens(before)) < min(n_tokens(results))
    # what a broken or mistaken call leaves does not pass for a result of this one
    with pytest.raises(ValueError, match="'no-such-split'"):
        again(
            out,
            evaluation_data={
                "dataset": "python-stdlib",
                "dataset_split": "no-such-split",
            },
        )
    assert n_tokens(again(out, evaluations=longer)) == n_tokens(results)


@pytest.mark.usefixtures("no_training")
def test_no_result_of_another_configuration_stays(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(
        "saelens_scaffold.evals.dense_latents.main.load_language_model", fail
    )
    with pytest.raises(EvaluationsFailed, match="no luck") as raised:
        again(out, evaluations={"dense_latents": {**DENSE, "n_tokens": 700}})
    assert all(not sae["evaluations"] for sae in raised.value.results["saes"])


@pytest.mark.usefixtures("no_training")
def test_results_are_of_the_weights_that_are_there(out: Path) -> None:
    before = json.loads((out / "results.json").read_text())
    file = out / "saes" / NAME / "sae_weights.safetensors"
    weights = load_file(file)
    weights["W_dec"] = (-weights["W_dec"]).contiguous()
    save_file(weights, file)
    results = again(out)
    key = "dense_latents.reconstruction_quality.explained_variance"
    values = [
        {sae["name"]: sae["metrics"][key]["value"] for sae in of["saes"]}
        for of in (before, results)
    ]
    assert values[1][NAME] < values[0][NAME]


@pytest.mark.usefixtures("no_training")
def test_a_damaged_result_is_made_again(out: Path, finished: Path) -> None:
    (file,) = (out / "eval_results/dense_latents").glob(f"{NAME}*.json")
    file.write_text(file.read_text()[:100])
    again(out)
    assert findings(out) == findings(finished)


@pytest.mark.usefixtures("no_training")
def test_saes_that_are_there_count_as_trained(out: Path, finished: Path) -> None:
    shutil.rmtree(out / "training")
    again(out)
    assert findings(out) == findings(finished)
    with pytest.raises(ConfigChanged):
        again(out, data_seed=1)


def test_a_damaged_sae_is_named(out: Path) -> None:
    file = out / "saes" / NAME / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{NAME}/sae_weights.safetensors is damaged"):
        again(out)


def test_an_sae_that_was_lost_is_trained_again(out: Path, finished: Path) -> None:
    shutil.rmtree(out / "saes" / NAME)
    again(out)
    assert findings(out) == findings(finished)
    for folder in (out, finished):
        assert (folder / "saes" / NAME / "sae_weights.safetensors").is_file()
    ours, theirs = (
        load_file(folder / "saes" / NAME / "sae_weights.safetensors")
        for folder in (out, finished)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_until_something_is_trained_all_can_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(WaveTrainer, "train_wave", lambda *_: stop())
    for seed in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            again(out, data_seed=seed)
    assert yaml.safe_load((out / "compare.yaml").read_text())["data_seed"] == 2


@pytest.mark.usefixtures("no_training")
def test_evaluations_of_twins_are_given_the_baseline_of_the_same_k(out: Path) -> None:
    ablation = {
        "n_tokens": 60,
        "n_fit_tokens": 60,
        "n_bootstrap": 5,
        "n_random_draws": 1,
        "n_aligned_latents": [3],
        "aligned_cosines": [],
        "topics": False,
    }
    dark_matter = {"n_tokens": 60, "n_fit_tokens": 300, "n_bootstrap": 5}
    evaluations = {"scaffold_ablation": ablation, "dark_matter": dark_matter}
    results = again(out, evaluations=evaluations)
    judged, plain = "scaffold_batchtopk-k_4-scaffold_rank_2-seed_0", NAME
    of = {sae["name"]: sae["evaluations"] for sae in results["saes"]}
    ablated, error = (of[judged][name] for name in evaluations)
    assert ablated["cross_entropy"]["ce_ratio_baseline_aligned_latents"] > 0
    left, of_twin = (
        of[name]["dark_matter"]["reconstruction"]["fvu_linear"]
        for name in (judged, plain)
    )
    taken = error["scaffold"]["linear_error_taken"]
    assert taken == pytest.approx(1 - left / of_twin)
    of_plain = of[plain]["scaffold_ablation"]["cross_entropy"]
    assert of_plain["ce_ratio_baseline_aligned_latents"] is None
    (file,) = (out / "eval_results/scaffold_ablation").glob(f"{judged}*.json")
    result = json.loads(file.read_text())
    assert result["eval_config"]["baseline"] == plain
    assert [a["sae"] for a in result["dictionary_alignments"]] == [judged, plain]
    # claim i, of SAEs that have a scaffold
    in_curves = {curve["metric"].rpartition(".")[2] for curve in results["curves"]}
    assert {
        "overlap_with_pca",
        "overlap_of_random",
        "outlier_share_in_scaffold",
        "outlier_share_of_random",
    } <= in_curves
    # what it was made from says so, too
    written = file.read_bytes()
    again(out, evaluations=evaluations)
    assert file.read_bytes() == written
    again(out, evaluations=evaluations, baselines={})
    assert json.loads(file.read_text())["eval_config"]["baseline"] is None
