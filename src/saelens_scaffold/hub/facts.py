"""The numbers of an SAE in the model card, and where they come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from saelens_scaffold.evals.base import Metric
from saelens_scaffold.evals.registry import EVALUATIONS
from saelens_scaffold.evals.table import metric_cell
from saelens_scaffold.hub.comparisons import Reduction
from saelens_scaffold.hub.results import config_of, dataset_of
from saelens_scaffold.saes.firing import DENSE_THRESHOLD
from saelens_scaffold.training.measurement import Measurement

if TYPE_CHECKING:
    from saelens_scaffold.evals.store import StoredResult

_METRICS = {metric.path: metric for metric in EVALUATIONS["dense_latents"].metrics}
_REDUCTION = "dense_latents.reduction"
_N_TOKENS = Metric("", "token_stats.n_tokens")


@dataclass(frozen=True)
class Facts:
    """
    What was measured of an SAE's inference form.

    Attributes:
        cells: Cells of the headline metrics of `dense_latents`, by path.
        threshold: Share of the tokens above which a latent is dense.
        measured: How and on which tokens; None if nothing was measured.
        name: Name of the SAE in the evaluation.
        baseline: Name of the SAE that the reduction is against.
        frequencies: Firing frequencies of the sparse latents.
    """

    cells: Mapping[str, str] = field(
        default_factory=lambda: dict.fromkeys(_METRICS, "not measured")
    )
    threshold: float = DENSE_THRESHOLD
    measured: str | None = None
    name: str | None = None
    baseline: str | None = None
    frequencies: Sequence[float] | None = None


def facts_of(
    results: "Sequence[StoredResult]",
    measurement: Measurement | None,
    reduction: Reduction | None,
) -> Facts:
    """
    The numbers of the `dense_latents` evaluation, else those measured after training.

    The trainer's own counts (`sparsity.safetensors`, SAELens's `metadata.l0`) are not used:
    they are of weights that still changed, and of BatchTopK's selection, where the SAE has
    a threshold.

    Args:
        results: The SAE's evaluation results.
        measurement: What was measured when the SAE was saved.
        reduction: The SAE's reduction in a `compare` run.
    """
    for result in results:
        if result.evaluation == "dense_latents":
            return _evaluated(result, reduction)
    if measurement is None:
        return Facts()
    metrics = {
        "sparsity": measurement.to_metadata(),
        "dense_latents": {"dense_latents": measurement.dense_latents},
        "reconstruction_quality": measurement.to_metadata(),
    }
    return Facts(
        _cells({"eval_result_metrics": metrics}),
        measurement.threshold,
        f"when the training ended, on {measurement.n_tokens:,} tokens, {measurement.text}",
    )


def _evaluated(result: "StoredResult", reduction: Reduction | None) -> Facts:
    content, config = result.content, config_of(result)
    cells, baseline = _cells(content), config.get("baseline")
    if reduction is not None and baseline is None:
        cells[_REDUCTION] = f"{reduction.share:.2f}"
        baseline = reduction.baseline
    text, n_tokens = dataset_of(result), _N_TOKENS.value(content)
    if n_tokens:
        text = f"{n_tokens:,.0f} tokens of {text}"
    if config.get("dataset_split"):
        text += f" ({config['dataset_split']})"
    fired = (content.get("eval_result_unstructured") or {}).get("fired")
    return Facts(
        cells,
        float((config.get("thresholds") or [DENSE_THRESHOLD])[0]),
        f"by `saelens-scaffold eval dense_latents`, on {text}",
        _label(content),
        baseline,
        [count / n_tokens for count in fired] if fired and n_tokens else None,
    )


def _cells(content: dict[str, Any]) -> dict[str, str]:
    return {path: metric_cell(content, metric) for path, metric in _METRICS.items()}


def _label(content: Mapping[str, Any]) -> str:
    """Name of the SAE in the table of `saelens-scaffold eval`."""
    release, sae_id = content.get("sae_lens_release_id"), content.get("sae_lens_id")
    return str(release) if sae_id == "custom_sae" else f"{release}/{sae_id}"
