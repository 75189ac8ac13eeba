"""The model card: a README with front matter, as the Hub shows it, and its figure."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from transformer_lens.loading_from_pretrained import get_official_model_name

from saelens_scaffold._util.plots import draw_firing_curve, finish_firing_axes
from saelens_scaffold.hub import findings
from saelens_scaffold.hub.sources import Upload, UploadedSAE
from saelens_scaffold.saes.sae_ids import PLAIN_FORM

FIGURE = "firing_frequencies.png"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_card(upload: Upload, remote_files: Iterable[str] = ()) -> str:
    """
    The card of a repository.

    Args:
        upload: The upload.
        remote_files: Files that are in the repository already.
    """
    # an SAE may have had another name in the evaluation
    ids = {sae.facts.name: sae.sae_id for sae in upload.saes}
    baselines = [sae.facts.baseline for sae in upload.saes if sae.facts.baseline]
    measured: dict[str | None, list[str]] = {}
    for sae in upload.saes:
        measured.setdefault(sae.facts.measured, []).append(sae.sae_id)
    return TEMPLATES.get_template("model_card.md.jinja").render(
        front_matter=_front_matter(upload).to_yaml(),
        upload=upload,
        baselines=[ids.get(name, name) for name in baselines],
        measured=measured,
        others=_other_saes(upload, remote_files),
        results=[
            (sae.sae_id, result.evaluation, findings.dataset_of(result), *headline)
            for sae in upload.saes
            for result in sae.results
            for headline in findings.headline_metrics(result)
        ],
    )


def _front_matter(upload: Upload) -> ModelCardData:
    metadata = [sae.cfg.metadata for sae in upload.saes]
    models = [_base_model(str(each.model_name)) for each in metadata]
    base_models = [upload.base_model] if upload.base_model else _distinct(models)
    datasets = upload.datasets
    if datasets is None:
        paths = [each.dataset_path for each in metadata]
        datasets = _distinct(path for path in paths if _is_hub_id(path))
    tags = ["saelens", "sparse-autoencoder", "mechanistic-interpretability"]
    if any(sae.in_scaffold_form for sae in upload.saes):
        tags += ["scaffold-sae", "arxiv:2606.14040"]
    entries = [entry for sae in upload.saes for entry in _model_index(sae)]
    return ModelCardData(
        library_name="saelens",
        license=upload.license,
        base_model=base_models[0] if len(base_models) == 1 else base_models or None,
        datasets=list(datasets) or None,
        tags=tags,
        model_name=upload.repo_id.partition("/")[2] if entries else None,
        eval_results=entries or None,
    )


def _model_index(sae: UploadedSAE) -> list[EvalResult]:
    """An SAE's headline metrics for the front matter."""
    return [
        EvalResult(
            task_type=result.evaluation,
            dataset_type=findings.dataset_of(result),
            dataset_name=findings.dataset_of(result),
            dataset_split=findings.config_of(result).get("dataset_split"),
            metric_type=metric.path,
            metric_name=f"{sae.sae_id}: {metric.title}",
            metric_value=value,
            metric_args={
                "sae_id": sae.sae_id,
                **dict(zip(("ci_low", "ci_high"), interval or (), strict=False)),
            },
        )
        for result in sae.results
        for metric, value, interval in findings.headline_metrics(result)
    ]


def _base_model(name: str) -> str | None:
    """Hub id of a language model, if it has one."""
    try:
        official = get_official_model_name(name)
    except ValueError:
        return name if _is_hub_id(name) else None
    # local models are known to TransformerLens by their paths
    return None if Path(official).is_absolute() else official


def _is_hub_id(name: object) -> bool:
    is_id = isinstance(name, str) and _HUB_ID.fullmatch(name) is not None
    return is_id and not Path(str(name)).exists()


def _distinct(names: Iterable[str | None]) -> list[str]:
    return [name for name in dict.fromkeys(names) if name]


def _other_saes(upload: Upload, remote_files: Iterable[str]) -> list[str]:
    """Ids of further SAEs in the repository, without plain forms."""
    paths = map(PurePosixPath, remote_files)
    found = {str(path.parent) for path in paths if path.name == SAE_WEIGHTS_FILENAME}
    plain_forms = {f"{sae_id}/{PLAIN_FORM}" for sae_id in found}
    return sorted(found - plain_forms - {sae.sae_id for sae in upload.saes})


def _code(values: Any) -> str:
    """One or several values as code, each once."""
    listed = values if isinstance(values, list) else [values]
    return ", ".join(dict.fromkeys(f"`{_text(value)}`" for value in listed))


def _plain(value: object) -> str:
    """A value as text, without the directories of a local path."""
    return _text(findings.without_directories(value))


def _text(value: object) -> str:
    """A value in one line, without Markdown."""
    text = "" if value is None else str(value)
    return re.sub(r"[`|<>\[\]\\\s]+", " ", text).strip()[:200] or "-"


# nothing is escaped: this is Markdown, whose special characters `plain` removes
TEMPLATES = Environment(
    trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False
)
TEMPLATES.loader = PackageLoader("saelens_scaffold", "hub")
TEMPLATES.filters |= {"code": _code, "plain": _plain}


def add_figure(upload: Upload, folder: Path) -> None:
    """
    Plot how often sparse latents fire, one curve for each SAE, if it is known of any.

    A point (x, y) of a curve: y sparse latents fire on more than x of the tokens.
    Scaffold SAEs have solid lines, plain ones dashed lines.

    Args:
        upload: The upload, of whose SAEs the first ten with known frequencies are drawn.
        folder: Where to write the PNG.
    """
    known = [sae for sae in upload.saes if sae.facts.frequencies is not None]
    if not known:
        return
    from matplotlib.figure import Figure  # not needed to load SAEs

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for sae in known[:10]:  # as many as can be told apart
        assert sae.facts.frequencies is not None
        style = "-" if sae.rank else "--"
        label = f"{sae.sae_id} (rank {sae.rank})" if sae.rank else sae.sae_id
        draw_firing_curve(axes, sae.facts.frequencies, style, label=label)
    finish_firing_axes(axes, known[0].facts.threshold)
    # no version and no date, so that the same plot is the same file
    figure.savefig(folder / FIGURE, dpi=150, metadata={"Software": None})
    upload.extra_files[FIGURE] = folder / FIGURE
