"""The model card: a README with front matter, as the Hub shows it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from rich.box import MARKDOWN
from rich.markup import escape
from rich.table import Table
from transformer_lens.loading_from_pretrained import get_official_model_name

from saelens_scaffold._util.tables import markdown
from saelens_scaffold.hub.evaluation_results import model_index_entries
from saelens_scaffold.hub.facts import Facts, facts_of
from saelens_scaffold.hub.local_paths import without_directories
from saelens_scaffold.hub.sources import UploadedSAE
from saelens_scaffold.saes.sae_ids import PLAIN_FORM

FIGURE_NAME = "firing_frequencies.png"

PAPER_URL = "https://arxiv.org/abs/2606.14040"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_WHAT_IT_IS = f"""\
A *scaffold SAE* ([arXiv 2606.14040]({PAPER_URL})) is a sparse autoencoder with a rank-r linear
bottleneck, the *computational scaffold*, in parallel to its sparse dictionary. Its first r latents
are linear: signed, dense coordinates that absorb the low-rank part of the activations, which in a
plain SAE comes out as latents that fire on a large share of all tokens. `decode(encode(x))` is the
whole reconstruction: scaffold, dictionary and bias. Sparsity is two numbers: `l0_sparse`, the sparse
latents that fire per token, and `l0_total = l0_sparse + r`.
"""

_CITATION = """\
```bibtex
@misc{scaffold2606.14040,
  title         = {Decompose Sparsely Where You Should, Absorb Densely Where You Should Not},
  year          = {2026},
  eprint        = {2606.14040},
  archivePrefix = {arXiv},
  url           = {https://arxiv.org/abs/2606.14040}
}
```
"""


@dataclass(frozen=True)
class CardSettings:
    """
    What only whoever uploads can say.

    Attributes:
        license: An id of the Hub's, as "mit"; None leaves it out.
        base_model: The language model's id on the Hub; None finds it by the SAEs'.
        datasets: Ids on the Hub of the training data; None finds them by the SAEs'.
    """

    license: str | None = None
    base_model: str | None = None
    datasets: Sequence[str] | None = None


def model_card(
    saes: Sequence[UploadedSAE],
    hf_repo_id: str,
    settings: CardSettings,
    jumprelu: bool,
    has_figure: bool,
    others: Sequence[str] = (),
) -> ModelCard:
    """
    Write a repository's card.

    Args:
        saes: The SAEs that are uploaded.
        hf_repo_id: The repository.
        settings: What the SAEs do not say.
        jumprelu: Whether scaffold SAEs go along in their plain form.
        has_figure: Whether there is a figure to show.
        others: Ids of SAEs that are in the repository already.
    """
    name = hf_repo_id.partition("/")[2]
    facts = {sae.sae_id: facts_of(sae) for sae in saes}
    scaffold = [sae for sae in saes if sae.in_scaffold_form]
    parts = [f"# {name}", _introduction(saes), _WHAT_IT_IS if scaffold else ""]
    if has_figure:
        parts.append(_figure(facts))
    parts += ["## SAEs", _overview(saes, facts), _notes(facts, others)]
    parts += ["## Load", _load_scaffold(scaffold, hf_repo_id, jumprelu)]
    parts.append(_load_plain(saes, hf_repo_id, jumprelu))
    results = _results(saes)
    if results:
        parts += ["## Evaluation results", results]
    parts += ["## Training", _training(saes)]
    if scaffold:
        parts += ["## Citation", _CITATION]
    body = "\n\n".join(part.strip("\n") for part in parts if part)
    data = _front_matter(saes, hf_repo_id, settings)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _front_matter(
    saes: Sequence[UploadedSAE], hf_repo_id: str, settings: CardSettings
) -> ModelCardData:
    base_models = [settings.base_model] if settings.base_model else _base_models(saes)
    datasets = (
        list(settings.datasets) if settings.datasets is not None else _datasets(saes)
    )
    has_scaffold = any(sae.in_scaffold_form for sae in saes)
    entries = [
        entry for sae in saes for entry in model_index_entries(sae.sae_id, sae.results)
    ]
    return ModelCardData(
        library_name="saelens",
        license=settings.license,
        base_model=base_models[0] if len(base_models) == 1 else base_models or None,
        datasets=datasets or None,
        tags=[
            "saelens",
            "sparse-autoencoder",
            "mechanistic-interpretability",
            *(["scaffold-sae", "arxiv:2606.14040"] if has_scaffold else []),
        ],
        model_name=hf_repo_id.partition("/")[2] if entries else None,
        eval_results=entries or None,
    )


def _base_models(saes: Sequence[UploadedSAE]) -> list[str]:
    """The models' ids on the Hub, of those that have one."""
    found: list[str] = []
    for sae in saes:
        model_name = str(sae.cfg.metadata.model_name)
        try:
            official = get_official_model_name(model_name)
        except ValueError:
            if _is_hub_id(model_name):
                found.append(model_name)
        else:
            # TransformerLens knows the Hub's models, and local ones by their paths
            if not Path(official).is_absolute():
                found.append(official)
    return list(dict.fromkeys(found))


def _datasets(saes: Sequence[UploadedSAE]) -> list[str]:
    paths = (sae.cfg.metadata.dataset_path for sae in saes)
    return list(dict.fromkeys(path for path in paths if _is_hub_id(path)))


def _is_hub_id(name: object) -> bool:
    return (
        isinstance(name, str)
        and _HUB_ID.fullmatch(name) is not None
        and not Path(name).exists()
    )


def _introduction(saes: Sequence[UploadedSAE]) -> str:
    n_scaffold = sum(bool(sae.rank) for sae in saes)
    kinds = [f"{n_scaffold} with a scaffold"] * bool(n_scaffold)
    kinds += [f"{len(saes) - n_scaffold} plain"] * (n_scaffold < len(saes))
    models = dict.fromkeys(
        without_directories(str(sae.cfg.metadata.model_name)) for sae in saes
    )
    return (
        f"Sparse autoencoders (SAEs) of {_code(models)}, for "
        f"[SAELens](https://github.com/decoderesearch/SAELens): {' and '.join(kinds)}."
    )


def _figure(facts: Mapping[str, Facts]) -> str:
    threshold = next(iter(facts.values())).threshold
    return (
        f"![Firing-frequency distributions]({FIGURE_NAME})\n\n*How many sparse latents (y) "
        "fire more often than x, by `saelens-scaffold eval dense_latents`; scaffold SAEs "
        f"solid, plain SAEs dashed. Right of the grey line, at {threshold:.0%} of the "
        "tokens, latents are dense.*"
    )


def _overview(saes: Sequence[UploadedSAE], facts: Mapping[str, Facts]) -> str:
    table = _table(
        "id",
        "model",
        "hook point",
        "d_in",
        "d_sae",
        "rank r",
        "l0_sparse",
        "l0_total",
        "dense latents",
        "reduction",
        "expl. var.",
        n_text=3,
    )
    for sae in saes:
        known, metadata = facts[sae.sae_id], sae.cfg.metadata
        table.add_row(
            _code([sae.sae_id]),
            _code([without_directories(metadata.model_name)]),
            _code([metadata.hook_name]),
            str(sae.cfg.d_in),
            str(sae.cfg.d_sae),
            str(sae.rank) if sae.in_scaffold_form else "-",
            escape(known.l0_sparse),
            escape(known.l0_total),
            escape(known.dense_latents),
            escape(known.reduction),
            escape(known.explained_variance),
        )
    return markdown(table)


def _notes(facts: Mapping[str, Facts], others: Sequence[str]) -> str:
    known = list(facts.values())
    notes = [
        "`d_sae` counts all latents, those of the scaffold included. Dense latents are "
        f"sparse latents that fire on more than {known[0].threshold:.0%} of the tokens; "
        "the scaffold's own are not counted."
    ]
    # In the evaluation, SAEs may have had other names than here.
    ids = {f.name: sae_id for sae_id, f in facts.items() if f.name}
    baselines = dict.fromkeys(
        ids.get(f.baseline, f.baseline) for f in known if f.baseline
    )
    if baselines:
        notes.append(
            f"The reduction is 1 minus the ratio to the dense latents of {_code(baselines)}."
        )
    if any("[" in f.dense_latents for f in known):
        notes.append("In brackets are bootstrap intervals over sequences.")
    notes += _where_measured(facts)
    if others:
        notes.append(f"Also in this repository: {_code(others)}.")
    return " ".join(notes)


def _where_measured(facts: Mapping[str, Facts]) -> list[str]:
    """A sentence for all SAEs that were measured in the same way, or not at all."""
    ways: dict[tuple[str | None, str], list[str]] = {}
    for sae_id, known in facts.items():
        ways.setdefault((known.measured_by, known.measured_on), []).append(sae_id)
    said: list[str] = []
    for (by, on), sae_ids in ways.items():
        if by is None:
            said.append(
                f"Nothing was measured of {_code(sae_ids)}: run `saelens-scaffold eval "
                "dense_latents` first."
            )
            continue
        how = {
            "evaluation": "by `saelens-scaffold eval dense_latents`",
            "training": "when the training ended",
        }[by]
        said.append(
            f"The numbers of {_code(sae_ids)} were measured in inference form {how}, on "
            f"{_plain(on)}."
        )
    return said


def _load_scaffold(
    scaffold: Sequence[UploadedSAE], hf_repo_id: str, jumprelu: bool
) -> str:
    if not scaffold:
        return ""
    first = scaffold[0].sae_id
    ways = [
        "`pip install saelens-scaffold`, and `import saelens_scaffold` before loading"
    ]
    if jumprelu:
        ways.append(f"or load the plain form: add `/{PLAIN_FORM}` to the id, as below")
    return f"""\
The scaffold form, with `scaffold(x)`, `sparse_sae()` and `to_jumprelu()`, needs the package
saelens-scaffold:

```python
# pip install saelens-scaffold
import saelens_scaffold  # registers the architecture scaffold_jumprelu
from sae_lens import SAE

sae = SAE.from_pretrained("{hf_repo_id}", "{first}")
```

**`KeyError: 'scaffold_jumprelu'`** means that SAELens does not know the architecture:
{", ".join(ways)}.

Where a file need not be trusted, `saelens_scaffold.load_scaffold_sae("{hf_repo_id}", "{first}")`
checks it before it is loaded."""


def _load_plain(saes: Sequence[UploadedSAE], hf_repo_id: str, jumprelu: bool) -> str:
    scaffold = [sae for sae in saes if sae.in_scaffold_form]
    plain = [sae for sae in saes if not sae.in_scaffold_form]
    if scaffold and jumprelu:
        rank = scaffold[0].rank
        said = (
            "The plain form computes the same in SAELens alone, and wherever `jumprelu` SAEs "
            "are read: a linear latent u is there as a pair of opposite latents, u = relu(u) − "
            f"relu(−u). Its latents are r scaffold latents, their r opposites (r = {rank} in "
            f"`{scaffold[0].sae_id}`), then the dictionary."
        )
        sae_id = f"{scaffold[0].sae_id}/{PLAIN_FORM}"
    elif plain:
        said, sae_id = "Plain SAEs load with SAELens alone:", plain[0].sae_id
    else:
        return ""
    return f"""\
{said}

```python
# pip install sae-lens
from sae_lens import SAE

sae = SAE.from_pretrained("{hf_repo_id}", "{sae_id}")
```"""


def _results(saes: Sequence[UploadedSAE]) -> str:
    """A table of all headline metrics, a row for each."""
    table = _table(
        "id", "evaluation", "dataset", "metric", "value", "interval", n_text=4
    )
    for sae in saes:
        for result in sae.results:
            for metric, value in result.metrics():
                ends = metric.interval(result.content)
                shown_ends = [f"{end:.{metric.digits}f}" for end in ends or ()]
                table.add_row(
                    _code([sae.sae_id]),
                    result.name,
                    _plain(result.dataset),
                    metric.title,
                    f"{value:.{metric.digits}f}",
                    " to ".join(shown_ends) or "-",
                )
    if not table.row_count:
        return ""
    return (
        f"{markdown(table)}\nBy `saelens-scaffold eval`; the whole results, with their "
        "configurations, are in each SAE's folder `eval_results`."
    )


def _training(saes: Sequence[UploadedSAE]) -> str:
    table = _table("id", "trained as", "k", "text", "context", "dtype", n_text=2)
    for sae in saes:
        metadata = sae.cfg.metadata
        details = metadata.training_architecture_details or {}
        table.add_row(
            _code([sae.sae_id]),
            _plain(metadata.training_architecture or sae.cfg.architecture()),
            _plain(details.get("k") if isinstance(details, dict) else None),
            _plain(without_directories(metadata.dataset_path)),
            _plain(metadata.context_size),
            sae.cfg.dtype,
        )
    said = markdown(table)
    if any(sae.log_sparsity is not None for sae in saes):
        said += (
            "\n`sparsity.safetensors` has the trainer's own firing frequencies, of the last "
            "feature-sampling window of the training. They are of weights that still "
            "changed, and are not used above."
        )
    return said


def _table(*columns: str, n_text: int) -> Table:
    table = Table(box=MARKDOWN)
    for i, column in enumerate(columns):
        justify = "left" if i < n_text else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    return table


def _code(values: object) -> str:
    """Values as code, which Markdown leaves as they are."""
    listed = values if isinstance(values, (list, tuple, dict)) else [values]
    return ", ".join(f"`{_plain(value)}`" for value in listed)


def _plain(value: object) -> str:
    """A value for a table's cell: one line, with nothing that Markdown or rich reads."""
    if value is None:
        return "-"
    return re.sub(r"[`|<>\[\]\\\s]+", " ", str(value)).strip()[:200] or "-"
