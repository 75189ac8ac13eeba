"""The configuration file of `saelens-scaffold compare`."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import AfterValidator, ConfigDict, Field, PositiveInt, create_model
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.util import str_to_dtype

from saelens_scaffold._util.configs import config_fields, documented, make_config
from saelens_scaffold._util.errors import UserError, shown
from saelens_scaffold._util.files import new_file
from saelens_scaffold._util.yaml_files import read_yaml
from saelens_scaffold.evals.base import Evaluation
from saelens_scaffold.evals.json_schemas import metric_descriptions
from saelens_scaffold.evals.registry import known_evaluations
from saelens_scaffold.training.cached_activations import (
    CachedMultiSAETrainingRunnerConfig,
)

_TABLE = yaml.safe_load(Path(__file__).with_name("training_fields.yaml").read_text())
_TYPES = {
    name: annotation
    for name, annotation in get_type_hints(CachedMultiSAETrainingRunnerConfig).items()
    if name not in _TABLE["own"] and not name.startswith("_")
}
TRAINING_FIELDS = sorted(_TYPES)
"""Fields of SAELens's `MultiSAETrainingRunnerConfig`, and those of cached activations, that
an experiment may set."""

AXIS_FIELDS = sorted(set(TRAINING_FIELDS) - set(_TABLE["shared"]))
"""Fields of the runner that can be axes of the grid."""

TRAINING_DEFAULTS: dict[str, Any] = _TABLE["defaults"]
"""Defaults of an experiment that SAELens has others of."""


_PACKAGED = {
    f"paper/{file.stem}": file
    for file in sorted(Path(__file__).with_name("paper").glob("*.yaml"))
}
"""Experiments that come with this package, by name."""


def _dtype_name(name: str) -> str:
    str_to_dtype(name)  # raises for an unknown one
    return name


_FIELDS: dict[str, Any] = {
    name: (Annotated[annotation, Field(**_TABLE["allowed"].get(name, {}))], None)
    for name, annotation in _TYPES.items()
}
_FIELDS["dtype"] = (Annotated[str, AfterValidator(_dtype_name)], None)
_STRICT = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())
_Training: Any = create_model("Training", __config__=_STRICT, **_FIELDS)


def check_known(kind: str, name: Any, known: Collection[str]) -> None:
    """
    Check a name against those that exist.

    Raises:
        UserError: It is not one of them; the message suggests the nearest.
    """
    if not isinstance(name, str) or name not in known:
        close = difflib.get_close_matches(shown(name).strip("'"), known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        names = ", ".join(sorted(known))
        raise UserError(f"there is no {kind} {shown(name)}{hint}; there are {names}")


def _known_architecture(name: str) -> str:
    check_known("training architecture", name, SAE_TRAINING_CLASS_REGISTRY)
    return name


def _distinct(values: list[Any]) -> list[Any]:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"it has the value {shown(value)} twice")
    return values


Architecture = Annotated[str, AfterValidator(_known_architecture)]
MAX_SAES = 1000
"""Most combinations of a grid."""

Axis = Annotated[
    list[Any], Field(min_length=1, max_length=MAX_SAES), AfterValidator(_distinct)
]
Text = Annotated[str, Field(min_length=1)]

BASELINES = {
    "scaffold_batchtopk": "batchtopk",
    "scaffold_matryoshka": "matryoshka_batchtopk",
}


@documented(extra="forbid")
class EvaluationData:
    """Data of the evaluations, as the options of `saelens-scaffold eval`."""

    dataset: str | None = None
    """Text: a dataset on the Hub, a local file or directory, or python-stdlib; by default that of each evaluation"""
    dataset_split: str | None = None
    """Split of the text"""
    text_column: str | None = None
    """Column of the text"""
    labelled_dataset: str | None = None
    """Text with labels, for probing and for topics"""
    label_column: str | None = None
    """Column of the labels"""
    llm_batch_size: int | None = None
    """Sequences per forward pass of the language model"""
    llm_dtype: Literal["float32", "float64", "float16", "bfloat16"] | None = None
    """Data type of the language model"""
    sae_batch_size: int | None = None
    """Tokens per forward pass of an SAE"""


@documented(extra="forbid")
class ReferenceFigure:
    """
    A published figure, to stand beside ours.

    Both have the same definition unless `differs` or `not_stated` says otherwise.
    """

    what: str
    """The figure in words"""
    value: str
    """Its value, as it was published"""
    source: str
    """Where it was published"""
    definition: str
    """How the source says that it is measured"""
    differs: Text | None = None
    """How the definition of our figure differs from the source's"""
    not_stated: Text | None = None
    """What the source leaves open of the definition"""
    architecture: Architecture | None = None
    """Architecture of our SAEs to stand beside it; by default all, or all with a baseline"""
    metric: str | None = None
    """EVALUATION.PATH of our figure in the evaluation's results, as in scaffold_ablation.cross_entropy.ce_ratio_scaffold_mean_ablated"""
    where: dict[str, Any] = Field(default_factory=dict)
    """Values of our SAEs on axes of the grid, as in k: 4; by default SAEs of all values are shown"""
    against_baseline: Literal["ratio", "difference"] | None = None
    """Whether our figure is the change against the plain SAE of the same k and seed: as a share of its value, or as a difference"""


@documented(extra="forbid")
class CompareConfig:
    """
    An experiment: SAEs that differ in what the grid names and in nothing else.

    Raises:
        UserError: A field has a value that makes no sense.
    """

    model_name: str
    """Language model: a name of TransformerLens, the directory of a local model, or py-neox"""
    hook_name: str
    """Hook point, as in blocks.12.hook_resid_post"""
    dataset_path: str
    """Text to train on: a dataset on the Hub, a local file or directory, or python-stdlib"""
    sae: dict[str, Any]
    """Fields of the configurations of all SAEs; an architecture without such a field leaves it out"""
    grid: dict[str, Axis]
    """Every combination is trained: architecture, seed, and any field of the SAEs' configurations or of the runner's"""
    evaluations: Annotated[dict[str, dict[str, Any] | None], Field(min_length=1)]
    """Names of evaluations, each with fields of its configuration"""
    title: str = ""
    """Title of the report"""
    training: dict[str, Any] = Field(default_factory=dict)
    """Fields of SAELens's MultiSAETrainingRunnerConfig, use_cached_activations and cached_activations_path"""
    saes_per_wave: PositiveInt | None = None
    """SAEs that are trained together, on one pass of the language model; by default as many as memory holds"""
    wandb_project: str | None = None
    """Project of Weights & Biases that the training is logged to, with a run for each wave; by default none"""
    log_metrics: bool = False
    """Whether the metrics of the training are written to training.csv while it runs, every 10 steps"""
    data_seed: int = 42
    """Seed of the order of the activations, which is the same for all SAEs"""
    b_dec_init: Literal["mean", "zeros"] = "mean"
    """Initial b_dec of SAEs that do not initialise it themselves, as a scaffold with scaffold_init="pca" does: the activations' mean, as there, or zero, as in SAELens"""
    calibrate_thresholds: bool = True
    """Whether all BatchTopK SAEs, plain ones too, get the threshold at which k sparse latents fire per token; otherwise SAELens's running average, which is too low after a short training"""
    baselines: dict[Architecture, Architecture] = Field(BASELINES)
    """For each architecture that is judged, the one it is compared with"""
    evaluation_data: EvaluationData = Field(default_factory=EvaluationData)
    """Data of the evaluations"""
    evaluation_seeds: Annotated[list[int], Field(min_length=1)] = Field([42, 43, 44])
    """Seeds of evaluations that take several; the others take the first"""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Confidence of the intervals over seeds"""
    max_bracket: Annotated[float, Field(ge=1)] = 2.0
    """Largest ratio of the l0_total of two SAEs between which the baseline is interpolated"""
    reference: list[ReferenceFigure] = Field(default_factory=list)
    """Published figures to stand beside ours"""

    def __post_init__(self) -> None:
        if "architecture" not in self.grid:
            raise UserError("grid names no architecture (architecture: [batchtopk])")
        if prod(map(len, self.grid.values())) > MAX_SAES:
            raise UserError(
                f"grid has more than {MAX_SAES:,} combinations; divide it into several "
                "experiments"
            )
        for architecture in self.grid["architecture"]:
            _known_architecture(architecture)
        for name in self.training:
            check_known("field of training", name, TRAINING_FIELDS)
        twice = sorted((set(self.sae) | set(self.training)) & set(self.grid))
        if twice:
            raise UserError(f"{twice[0]} is in the grid and fixed as well")
        for judged, baseline in self.baselines.items():
            if judged == baseline:
                raise UserError(f"baselines: {judged} cannot be its own baseline")
        for name in ("dark_matter", "dense_latents", "scaffold_ablation"):
            if "baseline" in (self.evaluations.get(name) or {}):
                raise UserError(f"{name} must have no baseline but that of `baselines`")
        known = known_evaluations() if self.reference else {}
        for figure in self.reference:
            _check_reference(figure, self, known)


def _check_reference(
    figure: ReferenceFigure, config: CompareConfig, known: Mapping[str, Evaluation]
) -> None:
    """
    Raises:
        UserError: It names what does not exist. What exists, and the experiment leaves
            out, is only not measured.
    """
    for axis in figure.where:
        check_known("axis of the grid", axis, config.grid)
    if figure.metric is not None:
        evaluation, _, path = figure.metric.partition(".")
        check_known("evaluation", evaluation, known)
        described = metric_descriptions(known[evaluation])
        if described:  # a plugin's evaluation need not describe its metrics
            check_known(f"metric of {evaluation}", path, described)
    if figure.against_baseline and (
        figure.metric is None or figure.architecture not in (None, *config.baselines)
    ):
        needed = f"a metric, and an architecture of {', '.join(config.baselines)}"
        raise UserError(
            f"reference {shown(figure.what)}: against_baseline needs {needed}"
        )


def read_config(path: str | Path) -> CompareConfig:
    """
    Read an experiment.

    Args:
        path: A YAML file, or the name of one that comes with this package, as in
            "paper/py-neox".

    Raises:
        UserError: There is no such file, it is not YAML, or a field is missing, unknown or
            has a wrong value.
    """
    path = Path(path)
    packaged = _PACKAGED.get(path.as_posix())
    if packaged and not path.exists():
        path = packaged
    if not path.is_file():
        raise UserError(
            f"there is no configuration {path}; this package has {', '.join(_PACKAGED)}"
        )
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a mapping of fields to values")
    fields = config_fields(CompareConfig)
    try:
        for name in content:
            check_known("field", name, fields)
        for name, field in fields.items():
            if field.is_required() and name not in content:
                raise UserError(f"the field {name} is missing")
        return make_config(CompareConfig, content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def yaml_text(values: Mapping[str, Any]) -> str:
    """Values as YAML, in their order."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def keep_config(config: CompareConfig, file: Path) -> None:
    """Write the configuration of an experiment, defaults included."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with new_file(file) as temporary:
        temporary.write_text(yaml_text(asdict(config)), encoding="utf-8")


class ConfigChanged(UserError):
    """The SAEs in a folder were trained with another configuration."""


def check_unchanged(config: CompareConfig, file: Path) -> None:
    """
    Check that an experiment still trains the SAEs that it was begun with.

    Whatever else a configuration says can change at any time.

    Args:
        config: The experiment.
        file: The configuration that `keep_config` wrote.

    Raises:
        ConfigChanged: It does not; the message is the difference.
    """
    then, now = (_training_yaml(each) for each in (read_config(file), config))
    if then != now:
        diff = difflib.unified_diff(
            then.splitlines(), now.splitlines(), str(file), "now", n=1, lineterm=""
        )
        raise ConfigChanged(
            f"SAEs in {file.parent} were trained with another configuration; choose "
            "another --output_path, or undo the change:\n" + "\n".join(diff)
        )


def _training_yaml(config: CompareConfig) -> str:
    """The part of a configuration that decides what is trained, in a normal form."""
    values = {name: getattr(config, name) for name in _TABLE["decides_training"]}
    # in order: SAEs are named and ordered by the axes
    # what it holds decides, wherever it lies
    values["training"] = dict(config.training)
    values["training"].pop("cached_activations_path", None)
    values["grid"] = [{axis: of_axis} for axis, of_axis in config.grid.items()]
    return yaml.safe_dump(values, allow_unicode=True)


def checked_training(values: Mapping[str, Any]) -> dict[str, Any]:
    """
    Check values of the runner's fields.

    Raises:
        UserError: A value has the wrong type, or is out of range.
    """
    return make_config(_Training, values).model_dump(exclude_unset=True)
