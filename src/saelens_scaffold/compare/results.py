"""What an experiment has found, as results.json and results.csv have it."""

import csv
import io
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE

from saelens_scaffold._util.provenance import versions
from saelens_scaffold.compare.comparisons import Comparison, compare_arms
from saelens_scaffold.compare.config import CompareConfig
from saelens_scaffold.compare.curves import Curve, curves
from saelens_scaffold.compare.grid import Arm, Run
from saelens_scaffold.compare.matching import Known, MeasuredSAE, l0_total
from saelens_scaffold.compare.metrics import ComparisonMetric, Results
from saelens_scaffold.compare.reference import references
from saelens_scaffold.compare.runner_config import runner_config
from saelens_scaffold.compare.training import hardware
from saelens_scaffold.evals.selected_saes import weights_sha256
from saelens_scaffold.saes import ScaffoldJumpReLUSAE
from saelens_scaffold.saes.subspaces import orthonormal_basis, share_in_subspace

logger = logging.getLogger(__name__)

N_ALIGNMENT_BINS = 100


def collect(
    config: CompareConfig,
    runs: Sequence[Run],
    metrics: Sequence[ComparisonMetric],
    results: Mapping[str, Mapping[str, Path]],
    saes_path: Path,
    training: Sequence[Mapping[str, Any]],
    device: str,
    command: str,
) -> dict[str, Any]:
    """
    Put together what an experiment has found.

    Args:
        config: The experiment.
        runs: Its SAEs.
        metrics: What they are compared by.
        results: The files with each SAE's results, by SAE and evaluation.
        saes_path: Folder with the SAEs.
        training: What is known of each wave.
        device: Where it was run.
        command: That which made it.

    Returns:
        What is written as results.json: all of it plain JSON values.
    """
    root = saes_path.parent
    read: dict[str, dict[str, Any]] = {
        run.name: {
            # without NaN, which JSON does not know, and browsers do not read
            evaluation: json.loads(
                file.read_text(encoding="utf-8"), parse_constant=lambda _: None
            )
            for evaluation, file in results[run.name].items()
        }
        for run in runs
    }
    cells = {
        run.name: {
            metric.id: _cell(metric, read[run.name], results[run.name], root)
            for metric in metrics
        }
        for run in runs
    }
    measured = [
        MeasuredSAE(
            run,
            {metric: cell["value"] for metric, cell in cells[run.name].items()},
            l0_total(run, read[run.name]),
        )
        for run in runs
    ]
    found = compare_arms(
        measured, metrics, config.baselines, config.confidence, config.max_bracket
    )
    seeds = sorted({run.seed for run in runs})
    hook_names = {run.hook_name for run in runs}
    hook_name = hook_names.pop() if len(hook_names) == 1 else None
    at = f"at {hook_name} of" if hook_name else "of"
    tokens = {runner_config(config, [run], device).training_tokens for run in runs}
    results_of_saes = {
        "title": config.title or f"SAEs {at} {config.model_name}",
        "summary": {
            "model_name": config.model_name,
            # None where the grid has several
            "hook_name": hook_name,
            "training_tokens": tokens.pop() if len(tokens) == 1 else None,
            "seeds": seeds,
            "n_saes": len(runs),
        },
        "config": asdict(config),
        "provenance": {
            "command": command,
            "versions": versions(),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "hardware": hardware(device),
            "evaluation_seeds": config.evaluation_seeds,
            "training": list(training),
        },
        "metrics": [
            {
                "id": metric.id,
                "evaluation": metric.evaluation,
                "title": metric.title,
                "digits": metric.digits,
                "better": metric.better,
                "bounds": list(metric.bounds),
                "random": metric.random,
            }
            for metric in metrics
        ],
        "saes": [
            {
                "name": sae.run.name,
                "path": os.fspath((saes_path / sae.run.name).relative_to(root)),
                "architecture": sae.run.arm.architecture,
                "arm": sae.run.arm.label,
                "axes": dict(sae.run.arm.axes),
                "seed": sae.run.seed,
                "scaffold_rank": sae.run.scaffold_rank,
                "l0_nominal": sae.run.nominal_l0_total,
                "l0_total": sae.l0_total,
                "metrics": cells[sae.run.name],
                "evaluations": {
                    name: result["eval_result_metrics"]
                    for name, result in read[sae.run.name].items()
                },
                "firing_histogram": read[sae.run.name]
                .get("dense_latents", {})
                .get("firing_histogram"),
                **_of_weights(saes_path / sae.run.name),
            }
            for sae in measured
        ],
        "curves": [_curve(c) for c in curves(measured, metrics, config.confidence)],
        "comparisons": [_comparison(c, config.confidence) for c in found],
    }
    return {
        **results_of_saes,
        "reference": references(config, results_of_saes["saes"], command),
    }


def results_csv(results: Mapping[str, Any]) -> str:
    """Every number of every SAE, a row for each SAE and metric."""
    titles = {metric["id"]: metric["title"] for metric in results["metrics"]}
    axes = [*dict.fromkeys(axis for sae in results["saes"] for axis in sae["axes"])]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(
        [
            *("sae", "architecture", *axes, "seed", "scaffold_rank", "l0_total"),
            *("metric", "title", "value", "ci_low", "ci_high", "file"),
        ]
    )
    for sae in results["saes"]:
        for metric, cell in sae["metrics"].items():
            rows.writerow(
                [
                    sae["name"],
                    sae["architecture"],
                    *(sae["axes"].get(axis) for axis in axes),
                    *(sae[field] for field in ("seed", "scaffold_rank", "l0_total")),
                    metric,
                    titles[metric],
                    *(cell[field] for field in ("value", "ci_low", "ci_high", "file")),
                ]
            )
    return text.getvalue()


def _cell(
    metric: ComparisonMetric,
    results: Results,
    files: Mapping[str, Path],
    root: Path,
) -> dict[str, Any]:
    value, low, high = _numbers(metric, results)
    file = files.get(metric.evaluation or "")
    return {
        "value": value,
        "ci_low": low,
        "ci_high": high,
        "file": file and os.fspath(file.relative_to(root)),
    }


def _numbers(metric: ComparisonMetric, results: Results) -> list[float | None]:
    """An SAE's value, and the ends of its interval; None for what is missing."""
    try:
        found = [metric.value(results), *(metric.interval(results) or (None, None))]
        numbers = [None if number is None else float(number) for number in found]
    except Exception as error:  # a plugin's; the rest is worth a report without it
        logger.warning("metric %s: %s: %s", metric.id, type(error).__name__, error)
        return [None, None, None]
    return [n if n is not None and math.isfinite(n) else None for n in numbers]


def _of_weights(path: Path) -> dict[str, Any]:
    """What an SAE's weights tell: a digest, the scaffold's spectrum and its alignment."""
    sae = SAE.load_from_disk(path)
    found = {"weights_sha256": weights_sha256(sae), "scaffold": None}
    if isinstance(sae, ScaffoldJumpReLUSAE) and sae.cfg.scaffold_rank:
        rank = sae.cfg.scaffold_rank
        A, B = sae.W_enc[:, :rank].detach().double(), sae.W_dec[:rank].detach().double()
        if not (A.isfinite().all() and B.isfinite().all()):
            return found
        # the singular values of A B, without the large product
        left, right = torch.linalg.qr(A)[1], torch.linalg.qr(B.T)[1]
        shares = share_in_subspace(
            sae.W_dec[rank:].detach(), orthonormal_basis(B)
        ).float()
        counts = torch.histc(shares, bins=N_ALIGNMENT_BINS, min=0.0, max=1.0)
        edges = [i / N_ALIGNMENT_BINS for i in range(N_ALIGNMENT_BINS + 1)]
        found["scaffold"] = {
            "singular_values": torch.linalg.svdvals(left @ right.T).tolist(),
            "alignment_histogram": {"edges": edges, "counts": counts.int().tolist()},
        }
    return found


def _curve(curve: Curve) -> dict[str, Any]:
    return {
        "architecture": curve.arm.architecture,
        "label": curve.arm.label,
        "metric": curve.metric,
        "points": [
            {
                "axes": dict(point.arm.axes),
                "l0": point.l0_total,
                "mean": point.mean,
                "ci_low": point.ci_low,
                "ci_high": point.ci_high,
                "n_seeds": point.n_seeds,
            }
            for point in curve.points
        ],
    }


def _comparison(comparison: Comparison, confidence: float) -> dict[str, Any]:
    pair = comparison.pair
    return {
        "matching": pair.matching,
        "treatment": {**_arm(pair.treatment), "l0_total": pair.treatment_l0},
        "baseline": {
            **_arm(pair.baseline),
            "measured": [_known(known) for known in pair.known],
        },
        "interpolated": pair.interpolated,
        "metric": comparison.metric,
        "treatment_mean": comparison.treatment_mean,
        "baseline_mean": comparison.baseline_mean,
        "n_treatment": comparison.n_treatment,
        "n_baseline": comparison.n_baseline,
        "differences": {str(seed): d for seed, d in comparison.differences.items()},
        **asdict(comparison.judgement),
        "confidence": confidence,
        "note": pair.note,
    }


def _known(known: Known) -> dict[str, Any]:
    """Where a baseline's value is from: itself, or one end of its bracket."""
    return {"arm": known.arm.label, "k": known.k, "l0_total": known.l0_total}


def _arm(arm: Arm) -> dict[str, Any]:
    return {
        "architecture": arm.architecture,
        "arm": arm.label,
        "axes": dict(arm.axes),
    }
