"""What is known of an SAE: results of evaluations and of `compare`, for the model card."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sae_lens.constants import DTYPE_MAP
from sae_lens.saes.sae import SAE

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.untrusted import check_own_file, read_json
from saelens_scaffold.evals.base import Metric
from saelens_scaffold.evals.registry import EVALUATIONS, known_evaluations
from saelens_scaffold.evals.store import StoredResult, stored_results
from saelens_scaffold.evals.table import metric_cell
from saelens_scaffold.saes.facts import DENSE_THRESHOLD, weights_sha256
from saelens_scaffold.saes.scaffold import ScaffoldMixin
from saelens_scaffold.training.measurement import Measurement

SAES_FOLDER = "saes"
"""Folder of the SAEs in a run of `compare`."""

_RUN_FILES = ("compare.yaml", "results.json", "report.html")
_LOCAL = re.compile(r"/|\./|\.\./|~|file:", re.IGNORECASE)
_RELATIVE = re.compile(r'[^/\\:"\n]+([/\\][^/\\:"\n]*){2,}')
_DENSE_LATENTS = "dense_latents.dense_latents.dense_latents"
_METRICS = {metric.path: metric for metric in EVALUATIONS["dense_latents"].metrics}
_N_TOKENS = Metric("", "token_stats.n_tokens")

Headline = tuple[Metric, float, tuple[float, float] | None]
"""A metric, its value, and the value's interval."""

Reduction = tuple[float, str]
"""1 minus the ratio of an SAE's dense latents to its baseline's; the baseline's name."""


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

    cells: Mapping[str, str]
    threshold: float = DENSE_THRESHOLD
    measured: str | None = None
    name: str | None = None
    baseline: str | None = None
    frequencies: Sequence[float] | None = None


def facts_of(
    results: Sequence[StoredResult],
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
        return Facts(dict.fromkeys(_METRICS, "not measured"))
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
    from saelens_scaffold.evals.saes import label_of

    content, config = result.content, config_of(result)
    release = str(content.get("sae_lens_release_id"))
    cells, baseline = _cells(content), config.get("baseline")
    if reduction is not None and baseline is None:
        share, baseline = reduction
        cells["dense_latents.reduction"] = f"{share:.2f}"
    text, n_tokens = dataset_of(result), _N_TOKENS.value(content)
    if n_tokens:
        text = f"{n_tokens:,.0f} tokens of {text}"
    if config.get("dataset_split"):
        text += f" ({config['dataset_split']})"
    unstructured = content.get("eval_result_unstructured")
    fired = unstructured.get("fired") if isinstance(unstructured, dict) else None
    return Facts(
        cells,
        float((config.get("thresholds") or [DENSE_THRESHOLD])[0]),
        f"by `saelens-scaffold eval dense_latents`, on {text}",
        label_of(release, str(content.get("sae_lens_id"))),
        baseline,
        [count / n_tokens for count in fired] if fired and n_tokens else None,
    )


def _cells(content: dict[str, Any]) -> dict[str, str]:
    return {path: metric_cell(content, metric) for path, metric in _METRICS.items()}


def read_results(folders: Sequence[Path]) -> list[StoredResult]:
    """
    All results of `saelens-scaffold eval` in these folders.

    Raises:
        UserError: A folder is missing, or a file cannot be read.
    """
    if not folders:
        return []
    return [result for folder in folders for result in stored_results(folder)]


def results_of(sae: SAE[Any], results: Sequence[StoredResult]) -> list[StoredResult]:
    """
    The results of this SAE, by the hash of its weights.

    Evaluations judge the whole SAE or its sparse dictionary, in the language model's
    dtype, so the hash is that of either view in that dtype.

    Args:
        sae: The SAE, in inference form.
        results: Results of any SAEs.
    """
    views = [sae, sae.sparse_sae()] if isinstance(sae, ScaffoldMixin) else [sae]
    names = {str(config_of(result).get("llm_dtype")) for result in results}
    dtypes = {sae.dtype, *(DTYPE_MAP[name] for name in names & set(DTYPE_MAP))}
    hashes = {weights_sha256(view, dtype) for view in views for dtype in dtypes}
    return [result for result in results if result.weights_sha256 in hashes]


def config_of(result: "StoredResult") -> dict[str, Any]:
    """The configuration of the evaluation."""
    return result.content.get("eval_config") or {}


def dataset_of(result: "StoredResult") -> str:
    """The data of the evaluation: datasets of the Hub, or names of local ones."""
    evaluation = known_evaluations().get(result.evaluation)
    named = config_of(result).get(evaluation.data_field if evaluation else "dataset")
    names = named if isinstance(named, list) else [named or result.evaluation]
    return ", ".join(without_directories(str(name)) for name in names)


def headline_metrics(result: "StoredResult") -> Iterator[Headline]:
    """The headline metrics that the result has, with their values and intervals."""
    evaluation = known_evaluations().get(result.evaluation)
    for metric in evaluation.metrics if evaluation else ():
        value = metric.value(result.content)
        if value is not None:
            yield metric, value, metric.interval(result.content)


def run_files(path: Path) -> dict[str, Path]:
    """
    Files of a `compare` run by name; none of any other directory.

    Raises:
        UserError: One is a link to a file elsewhere.
    """
    files = {name: path / name for name in _RUN_FILES if (path / name).is_file()}
    if not (path / SAES_FOLDER).is_dir() or _RUN_FILES[0] not in files:
        return {}
    return {name: check_own_file(file, path) for name, file in files.items()}


def reductions_in(path: Path) -> dict[str, Reduction]:
    """
    The reductions of a run's SAEs against baselines of the same k and seed, by the hashes
    of their weights.

    Raises:
        UserError: The run's results.json is not one of `compare`.
    """
    file = run_files(path).get("results.json")
    if file is None:
        return {}
    found: dict[str, Reduction] = {}
    try:
        results = read_json(file)
        compared = {
            comparison["treatment"]["arm"]: comparison
            for comparison in results["comparisons"]
            if comparison["metric"] == _DENSE_LATENTS and comparison["matching"] == "k"
        }
        for sae in [sae for sae in results["saes"] if sae["arm"] in compared]:
            comparison = compared[sae["arm"]]
            difference = comparison["differences"].get(str(sae["seed"]))
            count = sae["metrics"][_DENSE_LATENTS]["value"]
            if difference is not None and count is not None and count > difference:
                share = -difference / (count - difference)
                baseline = comparison["baseline"]["arm"]
                found[sae["weights_sha256"]] = share, baseline
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{file} is no result of `compare` ({reason})") from error
    return found


def without_directories(value: Any) -> Any:
    """
    A value as it may be published: without the directories of the user's disk.

    Args:
        value: A string, or JSON data of any depth.

    Returns:
        The same with only the last part of each local path: of those that are absolute or
        start with a dot, of file:// URLs, and of paths of three parts or more. Hub ids such
        as "user/model", other URLs and quoting text stay as they are.
    """
    if isinstance(value, dict):
        return {key: without_directories(content) for key, content in value.items()}
    if isinstance(value, list):
        return [without_directories(content) for content in value]
    if not isinstance(value, str):
        return value
    windows = PureWindowsPath(value)
    if (windows.drive and windows.root) or _RELATIVE.fullmatch(value):
        return windows.name or value
    if _LOCAL.match(value):
        return PurePosixPath(value).name or value
    return value
