"""What a model card says of an SAE, and where each number comes from."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from saelens_scaffold.evals.registry import EVALUATIONS, Metric
from saelens_scaffold.evals.table import metric_cell
from saelens_scaffold.hub.evaluation_results import EvaluationResult
from saelens_scaffold.hub.sources import UploadedSAE
from saelens_scaffold.saes.firing import DENSE_THRESHOLD
from saelens_scaffold.training.measurement import Measurement

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Facts:
    """
    The cells of an SAE's row in the card, all of its inference form.

    Attributes:
        l0_sparse: Sparse latents that fire per token.
        l0_total: The same with the scaffold's.
        dense_latents: Sparse latents above the threshold, with the interval if there is
            one.
        reduction: How many fewer than the baseline's, as a share, with the interval; "-"
            without a baseline.
        explained_variance: Of the whole SAE, with the interval if there is one.
        threshold: Share of the tokens above which a latent is dense.
        measured_on: The tokens, in words.
        measured_by: What counted them; None if nothing did.
        name: What the SAE was called in the evaluation.
        baseline: What the SAE was called that the reduction is against.
        frequencies: Firing frequencies of the sparse latents, shape (n,).
    """

    l0_sparse: str = NOT_MEASURED
    l0_total: str = NOT_MEASURED
    dense_latents: str = NOT_MEASURED
    reduction: str = NOT_MEASURED
    explained_variance: str = NOT_MEASURED
    threshold: float = DENSE_THRESHOLD
    measured_on: str = ""
    measured_by: Literal["evaluation", "training", None] = None
    name: str | None = None
    baseline: str | None = None
    frequencies: NDArray[np.float64] | None = None


def facts_of(uploaded: UploadedSAE) -> Facts:
    """
    What was measured of an SAE: by the `dense_latents` evaluation, else when it was saved.

    The counts of the training itself (`sparsity.safetensors`, SAELens's `metadata.l0`)
    are no facts of the SAE: they are of weights that still changed, and of BatchTopK's
    selection, where the SAE has a threshold.
    """
    results = [r for r in uploaded.results if r.name == "dense_latents"]
    if results:
        facts = _evaluated(results[0])
        if uploaded.reduction is not None and facts.baseline is None:
            share, baseline = uploaded.reduction
            return replace(facts, reduction=f"{share:.2f}", baseline=baseline)
        return facts
    if uploaded.measurement is not None:
        return _measured(uploaded.measurement)
    return Facts()


def _evaluated(result: EvaluationResult) -> Facts:
    metrics = {metric.title: metric for metric in EVALUATIONS[result.name].metrics}

    def cell(title: str) -> str:
        # as in the evaluation's own table, to the digit
        return metric_cell(result.content, metrics[title])

    thresholds = result.config.get("thresholds") or [DENSE_THRESHOLD]
    n_tokens = _n_tokens(result.content)
    split = result.config.get("dataset_split")
    return Facts(
        l0_sparse=cell("l0_sparse"),
        l0_total=cell("l0_total"),
        dense_latents=cell("dense"),
        reduction=cell("reduction"),
        explained_variance=cell("whole SAE's expl. var."),
        threshold=float(thresholds[0]),
        measured_on=(
            f"{int(n_tokens):,} tokens of {result.dataset}"
            if n_tokens
            else result.dataset
        )
        + (f" ({split})" if split else ""),
        measured_by="evaluation",
        name=result.label,
        baseline=result.config.get("baseline"),
        frequencies=_frequencies(result.content),
    )


def _measured(measurement: Measurement) -> Facts:
    metrics = {m.path: m for m in EVALUATIONS["dense_latents"].metrics}

    def cell(value: float, path: str) -> str:
        return f"{value:.{metrics[path].digits}f}"

    return Facts(
        l0_sparse=cell(measurement.l0_sparse, "sparsity.l0_sparse"),
        l0_total=cell(measurement.l0_total, "sparsity.l0_total"),
        dense_latents=str(measurement.dense_latents),
        reduction="-",
        explained_variance=cell(
            measurement.explained_variance, "reconstruction_quality.explained_variance"
        ),
        threshold=measurement.threshold,
        measured_on=f"{measurement.n_tokens:,} tokens, {measurement.text}",
        measured_by="training",
    )


def _n_tokens(content: dict[str, Any]) -> float | None:
    return Metric("", "token_stats.n_tokens").value(content)


def _frequencies(content: dict[str, Any]) -> NDArray[np.float64] | None:
    fired = (content.get("eval_result_unstructured") or {}).get("fired")
    n_tokens = _n_tokens(content)
    if not fired or not n_tokens:
        return None
    return np.asarray(fired, dtype=np.float64) / n_tokens
