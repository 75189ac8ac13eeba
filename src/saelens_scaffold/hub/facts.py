"""What is known of an SAE: its evaluation results, and its numbers in the model card."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sae_lens.constants import DTYPE_MAP
from sae_lens.saes.sae import SAE

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.base import Metric
from saelens_scaffold.evals.registry import EVALUATIONS, known_evaluations
from saelens_scaffold.evals.table import metric_cell
from saelens_scaffold.hub.compare_runs import Reduction
from saelens_scaffold.hub.local_paths import without_directories
from saelens_scaffold.saes.facts import weights_sha256
from saelens_scaffold.saes.firing import DENSE_THRESHOLD
from saelens_scaffold.saes.scaffold import ScaffoldMixin
from saelens_scaffold.training.measurement import Measurement

if TYPE_CHECKING:
    from saelens_scaffold.evals.store import StoredResult

_METRICS = {metric.path: metric for metric in EVALUATIONS["dense_latents"].metrics}
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

    @property
    def has_interval(self) -> bool:
        """Whether the dense latents have a bootstrap interval."""
        return "[" in self.cells["dense_latents.dense_latents"]


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
        cells["dense_latents.reduction"] = f"{reduction.share:.2f}"
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


def read_results(folders: Sequence[Path]) -> "list[StoredResult]":
    """
    All results of `saelens-scaffold eval` in these folders.

    Raises:
        UserError: A folder is missing, a file cannot be read, or SAEBench is missing.
    """
    if not folders:
        return []
    if find_spec("sae_bench") is None:
        raise UserError(
            f"the results in {folders[0]} cannot be checked without SAEBench; "
            'pip install "saelens-scaffold[bench]"'
        )
    from saelens_scaffold.evals.store import stored_results

    return [result for folder in folders for result in stored_results(folder)]


def results_of(
    sae: SAE[Any], results: "Sequence[StoredResult]"
) -> "list[StoredResult]":
    """
    The results of this SAE, by the hash of its weights.

    Evaluations judge the whole SAE or its sparse dictionary, in the language model's
    dtype, so the hash is that of either view in that dtype.

    Args:
        sae: The SAE, in inference form.
        results: Results of any SAEs.
    """
    views = [sae, sae.sparse_sae()] if isinstance(sae, ScaffoldMixin) else [sae]

    @cache
    def hashes(dtype: torch.dtype) -> set[str]:
        return {weights_sha256(view, dtype) for view in views}

    def is_of_sae(result: "StoredResult") -> bool:
        llm_dtype = DTYPE_MAP.get(str(config_of(result).get("llm_dtype")), sae.dtype)
        return result.weights_sha256 in hashes(sae.dtype) | hashes(llm_dtype)

    return [result for result in results if is_of_sae(result)]


def config_of(result: "StoredResult") -> dict[str, Any]:
    """The configuration of the evaluation."""
    return result.content.get("eval_config") or {}


def dataset_of(result: "StoredResult") -> str:
    """The data of the evaluation: datasets of the Hub, or names of local ones."""
    evaluation = known_evaluations().get(result.evaluation)
    named = config_of(result).get(evaluation.data_field if evaluation else "dataset")
    names = named if isinstance(named, list) else [named or result.evaluation]
    return ", ".join(without_directories(str(name)) for name in names)


def headline_metrics(
    result: "StoredResult",
) -> Iterator[tuple[Metric, float, tuple[float, float] | None]]:
    """The headline metrics that the result has, with their values and intervals."""
    evaluation = known_evaluations().get(result.evaluation)
    for metric in evaluation.metrics if evaluation else ():
        value = metric.value(result.content)
        if value is not None and math.isfinite(value):
            yield metric, value, metric.interval(result.content)
