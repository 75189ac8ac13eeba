"""Evaluation results on the Hub: whose they are, and what the card says of them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from sae_lens import SAE

from eval_helpers import HOOK, eval_sae
from hub_fixtures import REPO, hub, paths_in, save_sae
from hub_server import HubServer
from saelens_scaffold import upload_scaffold_saes
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals import store
from saelens_scaffold.evals.store import (
    KEY_SUFFIX,
    ResultStore,
    _current_versions,
    fingerprints,
    stored_results,
)
from saelens_scaffold.saes.facts import weights_sha256
from saelens_scaffold_cli import main

__all__ = ["hub"]  # a fixture


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `compare` leaves it: two SAEs, and results of these and of another."""
    folder = tmp_path_factory.mktemp("run")
    save_sae(folder / "saes" / "base", rank=0, seed=1)
    save_sae(folder / "saes" / "scaffold" / "rank_4")
    eval_sae(rank=2, seed=3).save_model(folder / "another")
    (folder / "compare.yaml").write_text("grid: {seed: [0]}")
    saes = ["saes/base", "saes/scaffold/rank_4", "another"]
    status = main(
        [
            "eval",
            "dense_latents,sparse_probing",
            *("--sae_path", *(str(folder / sae) for sae in saes)),
            "--dataset=python-stdlib",
            "--baseline=base",
            "--device=cpu",
            "--llm_batch_size=16",
            "--set=dense_latents.n_tokens=2000",
            "--set=sparse_probing.probe_train_set_size=40",
            "--set=sparse_probing.probe_test_set_size=20",
            f"--output_path={folder}/eval_results",
            f"--artifacts_path={folder}/artifacts",
        ]
    )
    assert status == 0
    return folder


def result_of(run: Path, evaluation: str, sae: str) -> dict[str, Any]:
    file = run / "eval_results" / evaluation / f"{sae}_custom_sae_eval_results.json"
    return json.loads(file.read_text())


@pytest.mark.sae_bench
def test_results_go_with_their_sae(hub: HubServer, run: Path) -> None:
    summary = upload_scaffold_saes(run, REPO, show_progress=False)
    results = {"eval_results/dense_latents.json", "eval_results/sparse_probing.json"}
    assert results < paths_in(hub, "base")
    assert results < paths_in(hub, "scaffold/rank_4")
    assert {file.name for file in summary.left_out} == {
        "another_custom_sae_eval_results.json"
    }
    files = hub.repositories[REPO].files()
    for sae_id, name in ("base", "base"), ("scaffold/rank_4", "rank_4"):
        for evaluation in "dense_latents", "sparse_probing":
            stored = files[f"{sae_id}/eval_results/{evaluation}.json"].content
            assert json.loads(stored) == result_of(run, evaluation, name)


@pytest.mark.sae_bench
def test_the_card_says_what_was_measured(hub: HubServer, run: Path) -> None:
    upload_scaffold_saes(run, REPO, show_progress=False)
    readme = hub.repositories[REPO].files()["README.md"].content.decode()
    data = yaml.safe_load(readme.split("---\n")[1])

    (index,) = data["model-index"]
    assert index["name"] == "saes"
    values = {
        (result["task"]["type"], metric["args"]["sae_id"], metric["type"]): metric
        for result in index["results"]
        for metric in result["metrics"]
    }
    expected = {
        (evaluation, sae_id, path): result_of(run, evaluation, name)
        for sae_id, name in (("base", "base"), ("scaffold/rank_4", "rank_4"))
        for evaluation, paths in {
            "dense_latents": (
                "dense_latents.dense_latents",
                "dense_latents.reduction",
                "sparsity.l0_sparse",
                "sparsity.l0_total",
                "reconstruction_quality.explained_variance",
            ),
            "sparse_probing": (
                "sae.sae_top_1_test_accuracy",
                "sae.sae_top_5_test_accuracy",
            ),
        }.items()
        for path in paths
    }
    del expected["dense_latents", "base", "dense_latents.reduction"]  # has none
    assert set(values) == set(expected)
    for (evaluation, sae_id, path), result in expected.items():
        metrics: Any = result["eval_result_metrics"]
        for key in path.split("."):
            metrics = metrics[key]
        assert values[evaluation, sae_id, path]["value"] == metrics
    assert {result["dataset"]["name"] for result in index["results"]} == {
        "python-stdlib"
    }

    dense = result_of(run, "dense_latents", "rank_4")["eval_result_metrics"]
    row = next(r for r in readme.splitlines() if r.startswith("| `scaffold/rank_4`"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[7:9] == [
        f"{dense['sparsity']['l0_sparse']:.1f}",
        f"{dense['sparsity']['l0_sparse'] + 4:.1f}",
    ]
    n_tokens = dense["token_stats"]["n_tokens"]
    assert (
        "The numbers of `base`, `scaffold/rank_4` were measured in inference form by "
        f"`saelens-scaffold eval dense_latents`, on {n_tokens:,} tokens of python-stdlib "
        "(test)."
    ) in readme
    figure = hub.repositories[REPO].files()["firing_frequencies.png"]
    assert figure.content.startswith(b"\x89PNG")
    assert cells[9].split()[0] == str(dense["dense_latents"]["dense_latents"])
    assert cells[10].split()[0] == f"{dense['dense_latents']['reduction']:.2f}"
    assert "to the dense latents of `base`" in readme
    assert "| `scaffold/rank_4` | sparse_probing | python-stdlib | top-1" in readme


def test_a_compare_run(tmp_path: Path) -> None:
    config = {
        "model_name": "py-neox",
        "hook_name": HOOK,
        "dataset_path": "python-stdlib",
        "sae": {
            "d_in": 256,
            "d_sae": 96,
            "normalize_activations": "expected_average_only_in",
        },
        "grid": {
            "architecture": ["batchtopk", "scaffold_batchtopk"],
            "k": [4],
            "scaffold_rank": [2],
            "seed": [0],
        },
        "training": {
            "training_tokens": 30 * 256,
            "train_batch_size_tokens": 256,
            "context_size": 32,
            "store_batch_size_prompts": 8,
            "n_batches_in_buffer": 32,
            "n_batches_for_norm_estimate": 2,
        },
        "evaluations": {"dense_latents": {"n_tokens": 2000, "n_bootstrap": 20}},
        "evaluation_data": {"dataset": "python-stdlib", "llm_batch_size": 4},
    }
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(config))
    folder = tmp_path / "run"
    argv = [str(tmp_path / "experiment.yaml"), "--output_path", str(folder)]
    assert main(["compare", *argv, "--device", "cpu"]) == 0
    summary = upload_scaffold_saes(folder, REPO, show_progress=False, dry_run=True)

    plain, scaffold = (path.name for path in sorted((folder / "saes").iterdir()))
    assert {"compare.yaml", "results.json", "report.html"} < set(summary.files)
    for name in plain, scaffold:
        for file in "runner_cfg.json", "eval_results/dense_latents.json":
            assert f"{name}/{file}" in summary.files
        # of a training as short as this one
        sparsity = folder / "saes" / name / "sparsity.safetensors"
        assert "tokens; at least 100,000 are needed" in summary.left_out.pop(sparsity)
    assert not summary.left_out

    # and says which SAEs do not have the L0 they were trained for
    l0s = {
        name: metrics["sparsity"]["l0_sparse"]
        for name in (plain, scaffold)
        for metrics in [result_of(folder, "dense_latents", name)["eval_result_metrics"]]
    }
    warnings = json.loads((folder / "results.json").read_text())["warnings"]
    off = [name for name in (plain, scaffold) if abs(l0s[name] - 4) > 0.4]
    assert [warning.partition(":")[0] for warning in warnings] == off

    counts = [
        result_of(folder, "dense_latents", name)["eval_result_metrics"]["dense_latents"]
        for name in (plain, scaffold)
    ]
    before, after = (count["dense_latents"] for count in counts)
    row = next(
        line
        for line in summary.readme.splitlines()
        if line.startswith(f"| `{scaffold}`")
    )
    assert row.split("|")[10].strip() == f"{1 - after / before:.2f}"
    assert "to the dense latents of `batchtopk k=4`" in summary.readme

    # other weights of the same name have no share in it
    sae = SAE.load_from_disk(folder / "saes" / scaffold)
    sae.b_dec.data += 1
    sae.save_model(folder / "saes" / scaffold)
    changed = upload_scaffold_saes(folder, REPO, show_progress=False, dry_run=True)
    assert "to the dense latents of" not in changed.readme


def keep_result(
    folder: Path, name: str, sae: Any, evaluation: str = "dense_latents", **config: Any
) -> Path:
    """A result in the store, with the key that it would have now."""
    key = {
        "evaluation": {"name": evaluation},
        "eval_config": config,
        "weights": {"sae": weights_sha256(sae)},
        "fingerprints": fingerprints(config),
        "versions": _current_versions(),
    }
    content = {"eval_result_metrics": {}, "eval_config": config}
    ResultStore(folder / evaluation).keep(name, key, content)
    return folder / evaluation / name


def test_outdated_results_stay_at_home(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = save_sae(tmp_path / "sae")
    results, text = tmp_path / "results", tmp_path / "text.txt"
    text.write_text("some text")
    current = keep_result(results, "current.json", sae, "core", dataset=str(text))
    other = keep_result(results, "other.json", eval_sae(rank=2, seed=3))
    by_versions = keep_result(results, "versions.json", sae)
    key_file = by_versions.with_suffix(KEY_SUFFIX)
    key_file.write_text(key_file.read_text().replace('"torch": "', '"torch": "0.'))
    unknown = keep_result(results, "unknown.json", sae)
    unknown.with_suffix(KEY_SUFFIX).unlink()

    def left_out() -> dict[Path, str]:
        summary = upload_scaffold_saes(
            {"sae": tmp_path / "sae"},
            REPO,
            eval_results=results,
            show_progress=False,
            dry_run=True,
        )
        uploaded = [path for path in summary.files if "eval_results" in path]
        assert bool(uploaded) == (current not in summary.left_out)
        return dict(summary.left_out)

    reasons = left_out()
    assert set(reasons) == {other, by_versions, unknown}
    assert reasons[other] == "is of none of these SAEs"
    assert "measured with torch '0." in reasons[by_versions]
    assert "nothing says what it was measured with" in reasons[unknown]

    text.write_text("another text")
    assert "of the same name" in left_out()[current]
    argv = ["upload", f"sae={tmp_path / 'sae'}", "--repo_id", REPO, "--dry-run"]
    assert main([*argv, "--eval_results", str(results)]) == 0
    assert f"{current}: stays here, measured with another" in capsys.readouterr().err


def test_a_result_does_not_decide_how_much_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = save_sae(tmp_path / "sae")
    results, text = tmp_path / "results", tmp_path / "text.jsonl"
    text.write_text("some text")
    file = keep_result(results, "x.json", sae, "core", dataset=str(text))
    (result,) = stored_results(results)
    with text.open("ab") as opened:
        opened.truncate(1 << 40)
    with pytest.warns(UserWarning, match=f"{file}: the dataset .* was not checked"):
        assert result.why_stale() is None
    text.unlink()
    os.mkfifo(text)  # which nobody writes to
    assert "another dataset" in str(result.why_stale())
    text.unlink()
    text.mkdir()
    for name in "abc":
        (text / name).touch()
    assert "another dataset" in str(result.why_stale())
    monkeypatch.setattr(store, "MAX_FILES", 2)
    with pytest.warns(UserWarning, match="was not checked"):
        assert result.why_stale() is None


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    save_sae(tmp_path / "sae")
    (tmp_path / "broken.json").write_text('{"eval_type_id": "dense')
    with pytest.raises(UserError, match="broken.json is not JSON"):
        upload_scaffold_saes(
            tmp_path / "sae",
            REPO,
            eval_results=tmp_path,
            show_progress=False,
            dry_run=True,
        )
