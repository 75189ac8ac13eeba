"""This package's results in SAEBench's graphs.

SAEBench's `graphing_utils` decides by words in a file's path which evaluation a result is
of ("tpp", "scr", "core", ...), and raises where it finds none that it knows. Results of
`sparse_probing` and `tpp` it reads as they are; for those of evaluations that SAEBench
does not have, two of its functions are replaced by ones that ask the file.
"""

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saelens_scaffold.evals.registry import EVALUATIONS

OWN_EVAL_TYPES = ("dense_latents", "scaffold_ablation")
"""Evaluations that SAEBench does not know."""


def register_with_graphing_utils() -> None:
    """
    Have `sae_bench.sae_bench_utils.graphing_utils` load this package's results too.

    Replaces its `get_eval_results` and `get_custom_metric_key_and_name`; names that were
    imported from it before keep the old ones. Calling it again does nothing. It imports
    plotly and seaborn, which nothing else in this package does.
    """
    from sae_bench.sae_bench_utils import graphing_utils

    if hasattr(graphing_utils.get_eval_results, "__wrapped__"):
        return
    native_results = graphing_utils.get_eval_results
    native_metric = graphing_utils.get_custom_metric_key_and_name

    @functools.wraps(native_results)
    def get_eval_results(eval_filenames: Sequence[str]) -> dict[str, dict[str, Any]]:
        results: dict[str, dict[str, Any]] = {}
        for filename in eval_filenames:
            content = _own_result(filename)
            if content is None:
                results |= native_results([filename])
            else:
                key = os.path.basename(filename).replace("_eval_results.json", "")
                results[key] = _flat(content, graphing_utils.get_d_sae_string)
        return results

    @functools.wraps(native_metric)
    def get_custom_metric_key_and_name(
        eval_path: str, k: int | None = None
    ) -> tuple[str, str]:
        name = _own_eval_type(eval_path)
        if name is None:
            return native_metric(eval_path, k)
        headline = EVALUATIONS[name].metrics[0]
        key = headline.path.rpartition(".")[2]
        return key, key.replace("_", " ").title()

    graphing_utils.get_eval_results = get_eval_results
    graphing_utils.get_custom_metric_key_and_name = get_custom_metric_key_and_name


def _own_result(filename: str) -> dict[str, Any] | None:
    """The content of a result file, if SAEBench does not know its evaluation."""
    try:
        content = json.loads(Path(filename).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None  # SAEBench says so
    own = isinstance(content, dict) and content.get("eval_type_id") in OWN_EVAL_TYPES
    return content if own else None


def _own_eval_type(eval_path: str) -> str | None:
    if os.path.isfile(eval_path):
        content = _own_result(eval_path)
        return content["eval_type_id"] if content else None
    parts = Path(eval_path).parts
    return next((name for name in OWN_EVAL_TYPES if name in parts), None)


def _flat(content: dict[str, Any], d_sae_string: Any) -> dict[str, Any]:
    """What SAEBench makes of core's results: the metrics without their categories."""
    sae_cfg = content["sae_cfg_dict"]
    metrics = {
        name: value
        for category in content["eval_result_metrics"].values()
        for name, value in category.items()
    }
    return {
        **metrics,
        "eval_config": content["eval_config"],
        "sae_class": sae_cfg["architecture"],
        "d_sae": d_sae_string(sae_cfg["d_sae"]),
        "train_tokens": sae_cfg.get("training_tokens", 1e-6),
    }
