"""Results of `saelens-scaffold eval`, and whose they are."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult
from sae_lens.constants import DTYPE_MAP
from sae_lens.saes.sae import SAE

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.registry import Evaluation, Metric, known_evaluations
from saelens_scaffold.hub.local_paths import without_directories
from saelens_scaffold.saes.digest import weights_sha256
from saelens_scaffold.saes.scaffold import ScaffoldMixin


@dataclass(frozen=True)
class EvaluationResult:
    """
    A result of one evaluation of one SAE.

    Attributes:
        name: The evaluation's, as `saelens-scaffold eval` knows it.
        file: Where it is.
        content: What SAEBench's output classes write.
    """

    name: str
    file: Path
    content: dict[str, Any]

    @property
    def evaluation(self) -> Evaluation | None:
        """The evaluation, if there is one of that name."""
        return known_evaluations().get(self.name)

    @property
    def label(self) -> str:
        """What the table of `saelens-scaffold eval` called the SAE."""
        release = str(self.content.get("sae_lens_release_id"))
        sae_id = self.content.get("sae_lens_id")
        return release if sae_id == "custom_sae" else f"{release}/{sae_id}"

    @property
    def weights_sha256(self) -> str | None:
        """The digest of the weights that were evaluated, if it is known."""
        digest = _dict(_dict(self.content.get("sae_cfg_dict")).get("metadata"))
        return digest.get("weights_sha256")

    @property
    def config(self) -> dict[str, Any]:
        """The evaluation's configuration."""
        return _dict(self.content.get("eval_config"))

    @property
    def dataset(self) -> str:
        """What it was evaluated on: a dataset of the Hub, or a local one's name."""
        field = self.evaluation.data_field if self.evaluation else "dataset"
        named = self.config.get(field)
        names = named if isinstance(named, list) else [named or self.name]
        return ", ".join(without_directories(str(name)) for name in names)

    def metrics(self) -> Iterator[tuple[Metric, float]]:
        """The headline metrics that it has a value for."""
        for metric in self.evaluation.metrics if self.evaluation else ():
            value = metric.value(self.content)
            if isinstance(value, (int, float)) and math.isfinite(value):
                yield metric, value


def read_results(folder: Path) -> list[EvaluationResult]:
    """
    Read all results in a folder and below it.

    Args:
        folder: The output folder of `saelens-scaffold eval`, which has one folder for each
            evaluation.

    Raises:
        UserError: There is no such folder.
        UserError: A JSON file in it cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder with evaluation results")
    found: list[EvaluationResult] = []
    for file in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{file} is not JSON ({error}); evaluate again, or remove it"
            ) from error
        if isinstance(content, dict) and "eval_result_metrics" in content:
            in_folder = file.parent.name if file.parent != folder else None
            known = in_folder in known_evaluations()
            name = in_folder if known else content.get("eval_type_id") or in_folder
            found.append(EvaluationResult(str(name), file, content))
    return found


def results_of(
    sae: SAE[Any], results: Sequence[EvaluationResult]
) -> list[EvaluationResult]:
    """
    Those results that are of this SAE, by the digest of its weights.

    Evaluations judge the whole SAE or its sparse dictionary, in the language model's
    dtype, so the digest is that of either view in that dtype.

    Args:
        sae: The SAE, in inference form.
        results: Results of any SAEs.
    """
    if not results:  # digests of large SAEs take a while
        return []
    views = [sae, *([sae.sparse_sae()] if isinstance(sae, ScaffoldMixin) else [])]
    digests: dict[torch.dtype, set[str]] = {}

    def is_of_sae(result: EvaluationResult) -> bool:
        for dtype in {DTYPE_MAP.get(str(result.config.get("llm_dtype"))), sae.dtype}:
            if dtype is None:
                continue
            if dtype not in digests:
                digests[dtype] = {weights_sha256(view, dtype) for view in views}
            if result.weights_sha256 in digests[dtype]:
                return True
        return False

    return [result for result in results if is_of_sae(result)]


def file_names(results: Sequence[EvaluationResult]) -> list[str]:
    """A file name for each of an SAE's results, after the evaluation."""
    names: list[str] = []
    for result in results:
        again = sum(other.name == result.name for other in results[: len(names)])
        names.append(f"{result.name}{f'-{again + 1}' if again else ''}.json")
    return names


def model_index_entries(
    sae_id: str, results: Sequence[EvaluationResult]
) -> list[EvalResult]:
    """An SAE's headline metrics for the card's front matter."""
    entries: list[EvalResult] = []
    for result in results:
        for metric, value in result.metrics():
            ends = metric.interval(result.content)
            interval = {"ci_low": ends[0], "ci_high": ends[1]} if ends else {}
            entries.append(
                EvalResult(
                    task_type=result.name,
                    dataset_type=result.dataset,
                    dataset_name=result.dataset,
                    dataset_split=result.config.get("dataset_split"),
                    metric_type=metric.path,
                    metric_name=f"{sae_id}: {metric.title}",
                    metric_value=value,
                    metric_args={"sae_id": sae_id, **interval},
                )
            )
    return entries


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
