"""What a model card says of an SAE, and where each number comes from."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saelens_scaffold.evals.registry import EVALUATIONS, Metric
from saelens_scaffold.evals.table import metric_cell
from saelens_scaffold.hub.evaluation_results import EvaluationResult
from saelens_scaffold.hub.sources import UploadedSAE

DENSE_THRESHOLD = 0.1
"""Share of the tokens above which a latent is dense, where no evaluation says another."""


@dataclass(frozen=True)
class Facts:
    """
    The numbers of an SAE's row in the card; None or "-" where one is not known.

    Attributes:
        l0_sparse: Sparse latents that fire per token.
        dense_latents: Sparse latents above the threshold, with the interval if there is
            one.
        reduction: How many fewer than the baseline's, as a share, with the interval.
        explained_variance: Of the whole SAE, with the interval.
        threshold: Share of the tokens above which a latent is dense.
        name: What the SAE was called in the evaluation.
        baseline: What the SAE was called that the reduction is against.
        frequencies: Firing frequencies of the sparse latents, shape (n,).
        counted_in: What the numbers were counted in, "evaluation" or "training".
    """

    l0_sparse: float | None = None
    dense_latents: str = "-"
    reduction: str = "-"
    explained_variance: str = "-"
    threshold: float = DENSE_THRESHOLD
    name: str | None = None
    baseline: str | None = None
    frequencies: NDArray[np.float64] | None = None
    counted_in: str | None = None


def facts_of(uploaded: UploadedSAE) -> Facts:
    """
    What is known of an SAE: by the `dense_latents` evaluation, else by its training.

    The trainer's counts are of the last feature sampling window, while weights still
    changed, so an evaluation goes before.
    """
    results = [r for r in uploaded.results if r.name == "dense_latents"]
    if results:
        facts = _evaluated(results[0])
        if uploaded.reduction is not None and facts.baseline is None:
            share, baseline = uploaded.reduction
            return replace(facts, reduction=shown(share, 2), baseline=baseline)
        return facts
    if uploaded.log_sparsity is None:
        return Facts()
    frequencies = 10 ** uploaded.log_sparsity[uploaded.rank :].double().numpy()
    return Facts(
        l0_sparse=float(frequencies.sum()),
        dense_latents=str(int((frequencies > DENSE_THRESHOLD).sum())),
        frequencies=frequencies,
        counted_in="training",
    )


def _evaluated(result: EvaluationResult) -> Facts:
    def cell(title: str) -> str:
        metrics = {metric.title: metric for metric in EVALUATIONS[result.name].metrics}
        return metric_cell(result.content, metrics[title])

    thresholds = result.config.get("thresholds") or [DENSE_THRESHOLD]
    return Facts(
        l0_sparse=Metric("", "sparsity.l0_sparse").value(result.content),
        dense_latents=cell("dense"),
        reduction=cell("reduction"),
        explained_variance=cell("whole SAE's expl. var."),
        threshold=float(thresholds[0]),
        name=result.label,
        baseline=result.config.get("baseline"),
        frequencies=_frequencies(result.content),
        counted_in="evaluation",
    )


def _frequencies(content: dict[str, Any]) -> NDArray[np.float64] | None:
    fired = (content.get("eval_result_unstructured") or {}).get("fired")
    n_tokens = Metric("", "token_stats.n_tokens").value(content)
    if not fired or not n_tokens:
        return None
    return np.asarray(fired, dtype=np.float64) / n_tokens


def shown(value: float | None, digits: int) -> str:
    """A number of a table, "-" if it is not known."""
    return "-" if value is None else f"{value:.{digits}f}"
