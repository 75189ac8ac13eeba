"""The findings of an experiment, beside published ones: results.json and results.csv."""

import csv
import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from sae_lens import SAE

from saelens_scaffold._util.provenance import versions
from saelens_scaffold.compare import comparisons
from saelens_scaffold.compare.config import CompareConfig, ReferenceFigure
from saelens_scaffold.compare.evaluating import EVAL_RESULTS, SAES
from saelens_scaffold.compare.grid import Arm, Run, runner_config
from saelens_scaffold.compare.metrics import ComparisonMetric, Results
from saelens_scaffold.evals.base import Metric
from saelens_scaffold.evals.json_schemas import metric_descriptions
from saelens_scaffold.evals.registry import known_evaluations
from saelens_scaffold.evals.saes import result_file_name
from saelens_scaffold.saes import ScaffoldJumpReLUSAE
from saelens_scaffold.saes.facts import weights_sha256
from saelens_scaffold.saes.subspaces import orthonormal_basis, share_in_subspace

logger = logging.getLogger(__name__)

N_ALIGNMENT_BINS = 100

Found = Mapping[str, Any]
"""An SAE of results.json."""

_FORMATS = {None: ".3g", "ratio": "+.0%", "difference": "+.3f"}
_CHANGES = {
    None: "",
    "ratio": "; the change against the plain SAE of the same k and seed, as a share of its value",
    "difference": "; minus that of the plain SAE of the same k and seed",
}
_METRIC_FIELDS = ("id", "evaluation", "title", "digits", "better", "random", "bounds")
_PUBLISHED_FIELDS = ("what", "value", "source", "definition", "metric")


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
    measured: list[comparisons.MeasuredSAE] = []
    for run, sae in zip(runs, saes, strict=True):
        values = {metric: cell["value"] for metric, cell in sae["metrics"].items()}
        measured.append(comparisons.MeasuredSAE(run, values, sae["l0_total"]))
    about = [{name: getattr(each, name) for name in _METRIC_FIELDS} for each in metrics]
    tokens = [runner_config(config, [run]).training_tokens for run in runs]
    hook_name = _common([run.hook_name for run in runs])
    at = f"at {hook_name} of" if hook_name else "of"
    return {
        "title": config.title or f"SAEs {at} {config.model_name}",
        "summary": {
            "model_name": config.model_name,
            # None where the grid has several
            "hook_name": hook_name,
            "training_tokens": _common(tokens),
            "seeds": sorted({run.seed for run in runs}),
            "n_saes": len(runs),
        },
        "config": asdict(config),
        "provenance": {
            **provenance,
            "versions": versions(),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "evaluation_seeds": config.evaluation_seeds,
        },
        "metrics": about,
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
        about = [sae["name"], sae["architecture"], *map(sae["axes"].get, axes)]
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
    found = {name: result["eval_result_metrics"] for name, result in results.items()}
    return {
        "name": run.name,
        "path": path,
        **run.arm.facts,
        "seed": run.seed,
        "scaffold_rank": run.scaffold_rank,
        "l0_nominal": run.nominal_l0_total,
        "l0_total": comparisons.l0_total(run, results),
        "metrics": {metric.id: _cell(metric, run, results) for metric in metrics},
        "evaluations": found,
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
    value, low, high = (n if math.isfinite(n) else None for n in numbers)
    file = None
    if metric.evaluation in results:
        file = f"{EVAL_RESULTS}/{metric.evaluation}/{result_file_name(run.name)}"
    return {"value": value, "ci_low": low, "ci_high": high, "file": file}


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


def references(
    config: CompareConfig, saes: Sequence[Found], command: str
) -> list[dict[str, Any]]:
    """
    The published figures of an experiment beside ours.

    Args:
        config: The experiment.
        saes: Its SAEs, as in results.json.
        command: The command that measured them.

    Returns:
        For each figure its words, both definitions, their relation (`mark`), and our
        values (`ours`): one entry for each kind of SAE, none if it was not measured.
    """
    return [
        {
            **{name: getattr(figure, name) for name in _PUBLISHED_FIELDS},
            "our_definition": _our_definition(figure),
            "mark": _mark(figure),
            "ours": _ours(figure, config, saes),
            "command": command,
        }
        for figure in config.reference
    ]


def _our_definition(figure: ReferenceFigure) -> str:
    """Definition of our figure, in the words of its evaluation."""
    if figure.metric is None:
        return ""
    name, _, path = figure.metric.partition(".")
    described = metric_descriptions(known_evaluations()[name]).get(path, "")
    return described + _CHANGES[figure.against_baseline]


def _mark(figure: ReferenceFigure) -> str:
    """Relation of the two definitions, as far as the source states its own."""
    parts = {"differs": figure.differs, "not stated": figure.not_stated}
    said = [f"{state}: {reason}" for state, reason in parts.items() if reason]
    return "; ".join(said) or "same definition"


def _ours(
    figure: ReferenceFigure, config: CompareConfig, saes: Sequence[Found]
) -> list[dict[str, Any]]:
    """Our values, for each kind of SAE that the figure is about."""
    by_arm: dict[str, list[float | None]] = {}
    for sae in saes:
        if _is_about(figure, config, sae):
            by_arm.setdefault(sae["arm"], []).extend(_values(figure, config, sae, saes))
    form = _FORMATS[figure.against_baseline]
    return [_of_arm(arm, values, form) for arm, values in by_arm.items() if values]


def _is_about(figure: ReferenceFigure, config: CompareConfig, sae: Found) -> bool:
    about, architecture = {**sae["axes"], "seed": sae["seed"]}, sae["architecture"]
    has_meaning = not figure.against_baseline or architecture in config.baselines
    is_meant = figure.architecture in (None, architecture)
    return has_meaning and is_meant and figure.where.items() <= about.items()


def _values(
    figure: ReferenceFigure, config: CompareConfig, sae: Found, saes: Sequence[Found]
) -> list[float | None]:
    """An SAE's values, one for each baseline; None where a ratio's baseline is 0."""
    value = _value(figure, sae)
    if value is None or figure.against_baseline is None:
        return [] if value is None else [value]
    twins = [_value(figure, other) for other in saes if _are_twins(config, sae, other)]
    known = [theirs for theirs in twins if theirs is not None]
    if figure.against_baseline == "difference":
        return [value - theirs for theirs in known]
    return [value / theirs - 1 if theirs else None for theirs in known]


def _value(figure: ReferenceFigure, sae: Found) -> float | None:
    evaluation, _, path = (figure.metric or "").partition(".")
    found = sae["evaluations"].get(evaluation) or {}
    return Metric("", path).value({"eval_result_metrics": found})


def _are_twins(config: CompareConfig, sae: Found, other: Found) -> bool:
    """Whether the other is the baseline of an SAE, of the same seed and axes."""
    judged, rival = (Arm(each["architecture"], each["axes"]) for each in (sae, other))
    is_baseline = config.baselines.get(judged.architecture) == rival.architecture
    return is_baseline and sae["seed"] == other["seed"] and judged.agrees_with(rival)


def _of_arm(arm: str, values: Sequence[float | None], form: str) -> dict[str, Any]:
    """Mean and range of an arm's values."""
    known = [value for value in values if value is not None]
    left_out = len(values) - len(known)
    mean = fmean(known) if known else None
    shown = "-" if mean is None else f"{mean:{form}}"
    if len(known) > 1:
        ends = f"{min(known):{form}} to {max(known):{form}}"
        shown += f" ({ends}, {len(known)} SAEs)"
    if left_out:
        shown += f"; {left_out} with a baseline of 0 left out"
    return {
        "arm": arm,
        "shown": shown,
        "mean": mean,
        "min": min(known, default=None),
        "max": max(known, default=None),
        "n_saes": len(known),
        "n_without_baseline": left_out,
    }
