"""The findings of an experiment, as results.json and results.csv have them."""

import csv
import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE

from saelens_scaffold._util.provenance import versions
from saelens_scaffold.compare import comparisons
from saelens_scaffold.compare.config import CompareConfig
from saelens_scaffold.compare.evaluating import EVAL_RESULTS, SAES
from saelens_scaffold.compare.grid import Run, runner_config
from saelens_scaffold.compare.metrics import ComparisonMetric, Results
from saelens_scaffold.compare.reference import references
from saelens_scaffold.evals.selected_saes import result_file_name
from saelens_scaffold.saes import ScaffoldJumpReLUSAE
from saelens_scaffold.saes.digest import weights_sha256
from saelens_scaffold.saes.subspaces import orthonormal_basis, share_in_subspace

logger = logging.getLogger(__name__)

N_ALIGNMENT_BINS = 100

_METRIC_FIELDS = ("id", "evaluation", "title", "digits", "better", "random", "bounds")


def collect(
    config: CompareConfig,
    runs: Sequence[Run],
    metrics: Sequence[ComparisonMetric],
    results: Mapping[str, Results],
    output_path: Path,
    **provenance: Any,
) -> dict[str, Any]:
    """
    Collect the findings of an experiment.

    Args:
        config: The experiment.
        runs: Its SAEs.
        metrics: The metrics by which they are compared.
        results: Results of each SAE, by evaluation.
        output_path: Folder of the experiment.
        provenance: The command, the hardware, and the facts of each wave (`training`).

    Returns:
        The content of results.json, in plain JSON values.
    """
    saes = [_sae(run, metrics, results[run.name], output_path) for run in runs]
    measured = [
        comparisons.MeasuredSAE(
            run,
            {metric: cell["value"] for metric, cell in sae["metrics"].items()},
            sae["l0_total"],
        )
        for run, sae in zip(runs, saes, strict=True)
    ]
    hook_name = _common([run.hook_name for run in runs])
    at = f"at {hook_name} of" if hook_name else "of"
    return {
        "title": config.title or f"SAEs {at} {config.model_name}",
        "summary": {
            "model_name": config.model_name,
            # None where the grid has several
            "hook_name": hook_name,
            "training_tokens": _common(
                [runner_config(config, [run]).training_tokens for run in runs]
            ),
            "seeds": sorted({run.seed for run in runs}),
            "n_saes": len(runs),
        },
        "config": asdict(config),
        "provenance": {
            "command": provenance["command"],
            "versions": versions(),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "hardware": provenance["hardware"],
            "evaluation_seeds": config.evaluation_seeds,
            "training": provenance["training"],
        },
        "metrics": [
            {name: getattr(metric, name) for name in _METRIC_FIELDS}
            for metric in metrics
        ],
        "saes": saes,
        "curves": comparisons.curves(measured, metrics, config.confidence),
        "comparisons": comparisons.compare_arms(
            measured, metrics, config.baselines, config.confidence, config.max_bracket
        ),
        "reference": references(config, saes, provenance["command"]),
    }


def results_csv(results: Mapping[str, Any]) -> str:
    """Every number of every SAE, a row for each SAE and metric."""
    titles = {metric["id"]: metric["title"] for metric in results["metrics"]}
    axes = [*dict.fromkeys(axis for sae in results["saes"] for axis in sae["axes"])]
    of_sae = ("seed", "scaffold_rank", "l0_total")
    of_cell = ("value", "ci_low", "ci_high", "file")
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["sae", "architecture", *axes, *of_sae, "metric", "title", *of_cell])
    for sae in results["saes"]:
        about = [sae["name"], sae["architecture"]]
        about += [sae["axes"].get(axis) for axis in axes]
        about += [sae[field] for field in of_sae]
        for metric, cell in sae["metrics"].items():
            numbers = [cell[field] for field in of_cell]
            rows.writerow([*about, metric, titles[metric], *numbers])
    return text.getvalue()


def _common(values: Sequence[Any]) -> Any:
    """The value if all are the same, else None."""
    return values[0] if len(set(values)) == 1 else None


def _sae(
    run: Run, metrics: Sequence[ComparisonMetric], results: Results, output_path: Path
) -> dict[str, Any]:
    path = f"{SAES}/{run.name}"
    sae = SAE.load_from_disk(output_path / path)
    return {
        "name": run.name,
        "path": path,
        **run.arm.facts,
        "seed": run.seed,
        "scaffold_rank": run.scaffold_rank,
        "l0_nominal": run.nominal_l0_total,
        "l0_total": comparisons.l0_total(run, results),
        "metrics": {metric.id: _cell(metric, run, results) for metric in metrics},
        "evaluations": {
            name: result["eval_result_metrics"] for name, result in results.items()
        },
        "firing_histogram": results.get("dense_latents", {}).get("firing_histogram"),
        "weights_sha256": weights_sha256(sae),
        "scaffold": _scaffold(sae) if isinstance(sae, ScaffoldJumpReLUSAE) else None,
    }


def _cell(metric: ComparisonMetric, run: Run, results: Results) -> dict[str, Any]:
    """An SAE's value, and the ends of its interval; None for what is missing."""
    try:
        found = [metric.value(results), *(metric.interval(results) or (None, None))]
        numbers = [math.nan if number is None else float(number) for number in found]
    except Exception as error:  # a plugin's; the rest is worth a report without it
        logger.warning("metric %s: %s: %s", metric.id, type(error).__name__, error)
        numbers = [math.nan] * 3
    names = ("value", "ci_low", "ci_high")
    known = (number if math.isfinite(number) else None for number in numbers)
    file = None
    if metric.evaluation in results:
        file = f"{EVAL_RESULTS}/{metric.evaluation}/{result_file_name(run.name)}"
    return {**dict(zip(names, known, strict=True)), "file": file}


def _scaffold(sae: ScaffoldJumpReLUSAE) -> dict[str, Any] | None:
    """Spectrum of an SAE's scaffold, and its latents' alignment; None if it has none."""
    rank = sae.cfg.scaffold_rank
    A, B = sae.W_enc[:, :rank].detach().double(), sae.W_dec[:rank].detach().double()
    if not (rank and A.isfinite().all() and B.isfinite().all()):
        return None
    # the singular values of A B, without the large product
    left, right = torch.linalg.qr(A)[1], torch.linalg.qr(B.T)[1]
    shares = share_in_subspace(sae.W_dec[rank:].detach(), orthonormal_basis(B))
    counts = torch.histc(shares.float(), bins=N_ALIGNMENT_BINS, min=0.0, max=1.0)
    edges = [i / N_ALIGNMENT_BINS for i in range(N_ALIGNMENT_BINS + 1)]
    return {
        "singular_values": torch.linalg.svdvals(left @ right.T).tolist(),
        "alignment_histogram": {"edges": edges, "counts": counts.int().tolist()},
    }
