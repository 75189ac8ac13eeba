"""The model card: a README with front matter, as the Hub shows it."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from transformer_lens.loading_from_pretrained import get_official_model_name

from saelens_scaffold.evals.base import Metric
from saelens_scaffold.hub.facts import config_of, dataset_of, headline_metrics
from saelens_scaffold.hub.local_paths import without_directories
from saelens_scaffold.hub.plan import FIGURE, UploadPlan
from saelens_scaffold.hub.sources import UploadedSAE
from saelens_scaffold.saes.sae_ids import PLAIN_FORM

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_card(plan: UploadPlan, remote_files: Iterable[str] = ()) -> str:
    """
    The card of a repository.

    Args:
        plan: The upload.
        remote_files: Files that are in the repository already.
    """
    # an SAE may have had another name in the evaluation
    ids = {sae.facts.name: sae.sae_id for sae in plan.saes}
    baselines = [sae.facts.baseline for sae in plan.saes if sae.facts.baseline]
    measured: dict[str | None, list[str]] = {}
    for sae in plan.saes:
        measured.setdefault(sae.facts.measured, []).append(sae.sae_id)
    return _ENVIRONMENT.get_template("model_card.md.jinja").render(
        front_matter=_front_matter(plan).to_yaml(),
        plan=plan,
        saes=plan.saes,
        figure=FIGURE if FIGURE in plan.extra_files else None,
        baselines=[ids.get(name, name) for name in baselines],
        measured=measured,
        others=_other_saes(plan, remote_files),
        results=[
            (sae.sae_id, result.evaluation, dataset_of(result), *headline)
            for sae in plan.saes
            for result in sae.results
            for headline in headline_metrics(result)
        ],
    )


def _front_matter(plan: UploadPlan) -> ModelCardData:
    base_models = [plan.base_model] if plan.base_model else _base_models(plan.saes)
    datasets = plan.datasets
    if datasets is None:
        paths = [sae.cfg.metadata.dataset_path for sae in plan.saes]
        datasets = [path for path in dict.fromkeys(paths) if _is_hub_id(path)]
    tags = ["saelens", "sparse-autoencoder", "mechanistic-interpretability"]
    if any(sae.in_scaffold_form for sae in plan.saes):
        tags += ["scaffold-sae", "arxiv:2606.14040"]
    entries = [entry for sae in plan.saes for entry in _model_index(sae)]
    return ModelCardData(
        library_name="saelens",
        license=plan.license,
        base_model=base_models[0] if len(base_models) == 1 else base_models or None,
        datasets=list(datasets) or None,
        tags=tags,
        model_name=plan.repo_id.partition("/")[2] if entries else None,
        eval_results=entries or None,
    )


def _model_index(sae: UploadedSAE) -> list[EvalResult]:
    """An SAE's headline metrics for the front matter."""
    return [
        EvalResult(
            task_type=result.evaluation,
            dataset_type=dataset_of(result),
            dataset_name=dataset_of(result),
            dataset_split=config_of(result).get("dataset_split"),
            metric_type=metric.path,
            metric_name=f"{sae.sae_id}: {metric.title}",
            metric_value=value,
            metric_args={
                "sae_id": sae.sae_id,
                **dict(zip(("ci_low", "ci_high"), interval or (), strict=False)),
            },
        )
        for result in sae.results
        for metric, value, interval in headline_metrics(result)
    ]


def _base_models(saes: Sequence[UploadedSAE]) -> list[str]:
    """Hub ids of the language models, of those that have one."""
    found: list[str] = []
    for sae in saes:
        name = str(sae.cfg.metadata.model_name)
        try:
            official = get_official_model_name(name)
        except ValueError:
            official = name if _is_hub_id(name) else None
        # local models are known to TransformerLens by their paths
        if official and not Path(official).is_absolute() and official not in found:
            found.append(official)
    return found


def _is_hub_id(name: object) -> bool:
    if not isinstance(name, str) or _HUB_ID.fullmatch(name) is None:
        return False
    return not Path(name).exists()


def _other_saes(plan: UploadPlan, remote_files: Iterable[str]) -> list[str]:
    """Ids of further SAEs in the repository, without plain forms."""
    paths = map(PurePosixPath, remote_files)
    found = {str(path.parent) for path in paths if path.name == SAE_WEIGHTS_FILENAME}
    plain_forms = {f"{sae_id}/{PLAIN_FORM}" for sae_id in found}
    return sorted(found - plain_forms - {sae.sae_id for sae in plan.saes})


def _code(values: Any) -> str:
    """One or several values as code, each once."""
    listed = values if isinstance(values, list) else [values]
    return ", ".join(dict.fromkeys(f"`{_plain(value)}`" for value in listed))


def _plain(value: object) -> str:
    """A value in one line, without Markdown and without the directories of a local path."""
    if value is None:
        return "-"
    text = str(without_directories(value))
    return re.sub(r"[`|<>\[\]\\\s]+", " ", text).strip()[:200] or "-"


def _digits(value: float, metric: Metric) -> str:
    return f"{value:.{metric.digits}f}"


_ENVIRONMENT = Environment(
    loader=PackageLoader("saelens_scaffold", "hub"),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
    autoescape=False,  # Markdown, whose special characters `plain` removes
)
_ENVIRONMENT.filters |= {"code": _code, "plain": _plain, "digits": _digits}
