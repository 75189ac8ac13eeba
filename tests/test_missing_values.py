"""Values that were not measured: null in results, "-" in tables, and never a number."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from eval_helpers import eval_sae
from saelens_scaffold.compare.metrics import metrics_of
from saelens_scaffold.evals.base import Evaluation, Metric
from saelens_scaffold.evals.registry import EVALUATIONS
from saelens_scaffold.evals.store import StoredResult
from saelens_scaffold.evals.table import metric_cell
from saelens_scaffold.hub.findings import headline_metrics
from saelens_scaffold_cli import main

METRICS = [
    (evaluation, metric)
    for evaluation in EVALUATIONS.values()
    for metric in evaluation.metrics
]


def result_with(metric: Metric, value: Any) -> dict[str, Any]:
    category, name = metric.path.split(".")
    return {"eval_result_metrics": {category: {name: value}}}


def shown(evaluation: Evaluation, metric: Metric, value: Any) -> tuple[Any, ...]:
    """What the table, `compare` and the model card make of a value."""
    result = result_with(metric, value)
    stored = StoredResult(evaluation.name, Path("result.json"), result, None)
    of_compare = next(
        (of for of in metrics_of([evaluation]) if of.id.endswith(metric.path)), None
    )
    return (
        metric_cell(result, metric),
        of_compare.value({evaluation.name: result}) if of_compare else None,
        [value for of, value, _ in headline_metrics(stored) if of == metric],
    )


@pytest.mark.parametrize(
    ("evaluation", "metric"), METRICS, ids=[of.path for _, of in METRICS]
)
def test_what_is_no_number_is_missing(evaluation: Evaluation, metric: Metric) -> None:
    for value in (None, math.nan, math.inf, -math.inf, metric.missing):
        assert shown(evaluation, metric, value) == ("-", None, [])
    # and what may be -1 is shown where it is
    least, largest = metric.bounds
    if least is None or least <= -1:
        cell, of_compare, of_card = shown(evaluation, metric, -1.0)
        assert cell == f"{-1:.{metric.digits}f}"
        assert of_compare == (-1.0 if metric.of_sae else None)
        assert of_card == [-1.0]


def test_scores_of_core_can_be_minus_one() -> None:
    below = {
        metric.title
        for metric in EVALUATIONS["core"].metrics
        if metric.bounds[0] is None
    }
    assert below == {"expl. var.", "CE score", "KL score"}


@pytest.mark.sae_bench
def test_no_minus_one_for_nan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An SAE that reconstructs nothing, in SAEBench's own evaluation."""
    sae = eval_sae()
    sae.save_model(tmp_path / "good")
    sae.W_dec.data[0, 0] = torch.nan
    sae.save_model(tmp_path / "broken")
    argv = [
        "eval",
        "core",
        *("--sae_path", str(tmp_path / "good"), str(tmp_path / "broken")),
        "--dataset=python-stdlib",
        "--device=cpu",
        f"--output_path={tmp_path}/out",
        f"--artifacts_path={tmp_path}/artifacts",
        "--set=core.n_eval_reconstruction_batches=1",
        "--set=core.n_eval_sparsity_variance_batches=1",
        "--set=core.batch_size_prompts=2",
    ]
    tables: list[list[str]] = []
    for _ in range(2):  # measured, and read from the store
        assert main(argv) == 0
        row = capsys.readouterr().out.splitlines()[3]
        tables.append([cell.strip() for cell in row.strip("|").split("|")])
    assert tables[0] == tables[1]
    assert tables[0][0] == "broken"
    assert tables[0][2:] == ["-", "-", "-"]

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    file = tmp_path / "out" / "core" / "broken_custom_sae_eval_results.json"
    result = json.loads(file.read_text(), parse_constant=no_constant)
    metrics = result["eval_result_metrics"]
    assert metrics["model_performance_preservation"]["ce_loss_score"] is None
    assert metrics["model_performance_preservation"]["ce_loss_without_sae"] > 0
    # of a latent that never fires
    latents = result["eval_result_details"]
    assert latents[0]["feature_density"] == 0
    assert latents[0]["consistent_activation_heuristic"] is None
    assert latents[1]["consistent_activation_heuristic"] > 0


@pytest.mark.sae_bench
def test_no_minus_one_for_a_probe_that_was_not_trained(tmp_path: Path) -> None:
    eval_sae().save_model(tmp_path / "sae")
    argv = [
        "eval",
        "sparse_probing",
        f"--sae_path={tmp_path}/sae",
        "--dataset=python-stdlib",
        "--device=cpu",
        "--random_seeds",
        *("1", "2"),
        f"--output_path={tmp_path}/out",
        f"--artifacts_path={tmp_path}/artifacts",
        "--set=sparse_probing.lower_vram_usage=true",
        "--set=sparse_probing.probe_train_set_size=40",
        "--set=sparse_probing.probe_test_set_size=20",
        "--set=sparse_probing.context_length=16",
    ]
    assert main(argv) == 0
    (file,) = (tmp_path / "out" / "sparse_probing").glob("*.json")
    result = json.loads(file.read_text())
    assert result["eval_result_metrics"]["sae"]["sae_test_accuracy"] is None
    assert result["eval_result_details"][0]["sae_test_accuracy"] is None
    assert "sae_test_accuracy" not in result["metrics_over_seeds"]
    assert result["metrics_over_seeds"]["sae_top_1_test_accuracy"]["mean"] > 0


@pytest.mark.sae_bench
def test_what_one_seed_lacks_has_no_mean() -> None:
    from saelens_scaffold.evals.saebench.over_seeds import _mean, _over_seeds

    by_seed = [{"sae": {"a": 0.5, "b": 0.5}}, {"sae": {"a": None, "b": 0.7}}]
    assert _mean(by_seed) == {"sae": {"a": None, "b": pytest.approx(0.6)}}
    assert list(_over_seeds(by_seed, 0.95, (0.0, 1.0))) == ["b"]
