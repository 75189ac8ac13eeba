"""Evaluation results that go along: whose they are, and what the card says of them."""

import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sae_lens.constants import DTYPE_MAP
from sae_lens.saes.sae import SAE

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.base import Metric
from saelens_scaffold.evals.registry import known_evaluations
from saelens_scaffold.hub.local_paths import without_directories
from saelens_scaffold.saes.digest import weights_sha256
from saelens_scaffold.saes.scaffold import ScaffoldMixin

if TYPE_CHECKING:
    from saelens_scaffold.evals.store import StoredResult


def read_results(folders: Sequence[Path]) -> "list[StoredResult]":
    """
    All results of `saelens-scaffold eval` in these folders.

    Raises:
        UserError: A folder is missing, a file cannot be read, or SAEBench is missing.
    """
    if folders and find_spec("sae_bench") is None:
        raise UserError(
            f"whether the results in {folders[0]} are current depends on SAEBench; "
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
        dtypes = {sae.dtype, llm_dtype}
        return any(result.weights_sha256 in hashes(dtype) for dtype in dtypes)

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
) -> list[tuple[Metric, float, tuple[float, float] | None]]:
    """The headline metrics that the result has, with their values and intervals."""
    evaluation = known_evaluations().get(result.evaluation)
    values = [
        (metric, metric.value(result.content), metric.interval(result.content))
        for metric in (evaluation.metrics if evaluation else ())
    ]
    return [
        (metric, value, interval)
        for metric, value, interval in values
        if value is not None and math.isfinite(value)
    ]
