"""What an experiment is: the file that `saelens-scaffold compare` reads."""

import difflib
import re
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import new_file
from saelens_scaffold.evals.configs import config_fields, make_config
from saelens_scaffold.evals.metric_descriptions import metric_descriptions
from saelens_scaffold.evals.registry import known_evaluations

# What the experiment itself decides of SAELens's runner.
_NOT_FOR_TRAINING = {
    "saes",
    "hook_names",
    "model_name",
    "dataset_path",
    "seed",
    "device",
    "evaluator",
    "checkpoint_path",
    "output_path",
    "save_final_checkpoint",
    "resume_from_checkpoint",
    "prefetch_llm_batches",
    "logger",
    "sae_lens_version",
    "sae_lens_training_version",
}
TRAINING_FIELDS = sorted(
    {
        name
        for name in MultiSAETrainingRunnerConfig.__dataclass_fields__
        if not name.startswith("_")
    }
    - _NOT_FOR_TRAINING
)
"""Fields of SAELens's `MultiSAETrainingRunnerConfig` that an experiment may set."""

# Of these, what all SAEs of an experiment share: the language model, and what it reads.
SHARED_FIELDS = {
    "model_class_name",
    "model_from_pretrained_kwargs",
    "model_kwargs",
    "llm_device",
    "compile_llm",
    "llm_compilation_mode",
    "context_size",
    "prepend_bos",
}
AXIS_FIELDS = sorted(set(TRAINING_FIELDS) - SHARED_FIELDS)
"""Fields of the runner that can be axes of the grid."""

# Fields of an experiment's configuration that decide what is trained.
_DECIDES_TRAINING = (
    "model_name",
    "hook_name",
    "dataset_path",
    "sae",
    "grid",
    "training",
    "data_seed",
    "b_dec_init",
    "calibrate_thresholds",
)

_STRICT = ConfigDict(extra="forbid")


@dataclass(config=_STRICT)
class EvaluationData:
    """What evaluations read, as the flags of `saelens-scaffold eval`."""

    dataset: str | None = Field(
        default=None,
        title="Dataset",
        description="Text: a dataset on the Hub, a local file or directory, or python-stdlib; by default that of each evaluation",
    )
    dataset_split: str | None = Field(default=None, title="Dataset Split")
    text_column: str | None = Field(default=None, title="Text Column")
    labelled_dataset: str | None = Field(
        default=None,
        title="Labelled Dataset",
        description="Text with labels, for probing and for topics",
    )
    label_column: str | None = Field(default=None, title="Label Column")
    llm_batch_size: int | None = Field(default=None, title="LLM Batch Size")
    llm_dtype: Literal["float32", "float64", "float16", "bfloat16"] | None = Field(
        default=None, title="LLM Data Type"
    )
    sae_batch_size: int | None = Field(default=None, title="SAE Batch Size")


@dataclass(config=_STRICT)
class ReferenceFigure:
    """
    A figure that somebody else has published, to stand beside ours.

    The two have the same definition unless `differs` or `not_stated` says otherwise.
    """

    what: str = Field(title="What", description="In words")
    value: str = Field(title="Value", description="As it was published")
    source: str = Field(title="Source")
    definition: str = Field(
        title="Definition",
        description="What the source says of how the figure is measured",
    )
    differs: str | None = Field(
        default=None,
        min_length=1,
        title="Differs",
        description="How our figure's definition differs from the source's",
    )
    not_stated: str | None = Field(
        default=None,
        min_length=1,
        title="Not Stated",
        description="What the source leaves open of the definition",
    )
    architecture: str | None = Field(
        default=None,
        title="Architecture",
        description="Of our SAEs to stand beside it; by default all, or all with a baseline",
    )
    metric: str | None = Field(
        default=None,
        title="Metric",
        description="EVALUATION.PATH of our figure in the evaluation's results, as in scaffold_ablation.cross_entropy.ce_ratio_scaffold_mean_ablated",
    )
    where: dict[str, Any] = Field(
        default_factory=dict,
        title="Where",
        description="Axes of the grid with the value that our SAEs have on each, as in k: 4; by default SAEs of all values are shown",
    )
    against_baseline: Literal["ratio", "difference"] | None = Field(
        default=None,
        title="Against Baseline",
        description="Whether our figure is the change against the plain SAE of the same k and seed: as a share of its value, or as a difference",
    )


@dataclass(config=_STRICT)
class CompareConfig:
    """
    An experiment: SAEs that differ in what the grid names and in nothing else.

    Raises:
        UserError: A field has a value that makes no sense.
    """

    model_name: str = Field(
        title="Model Name",
        description="Language model: a name of TransformerLens, the directory of a local model, or py-neox",
    )
    hook_name: str = Field(
        title="Hook Name", description="Hook point, as in blocks.12.hook_resid_post"
    )
    dataset_path: str = Field(
        title="Dataset Path",
        description="Text to train on: a dataset on the Hub, a local file or directory, or python-stdlib",
    )
    sae: dict[str, Any] = Field(
        title="SAE",
        description="Fields of the SAEs' configurations that all share; one that an architecture does not have is left out there",
    )
    grid: dict[str, list[Any]] = Field(
        title="Grid",
        description="Every combination is trained: architecture, seed, and any field of the SAEs' configurations or of the runner's",
    )
    evaluations: dict[str, dict[str, Any] | None] = Field(
        title="Evaluations",
        description="Names of evaluations, each with fields of its configuration",
    )
    title: str = Field(default="", title="Title", description="Of the report")
    training: dict[str, Any] = Field(
        default_factory=dict,
        title="Training",
        description="Fields of SAELens's MultiSAETrainingRunnerConfig",
    )
    data_seed: int = Field(
        default=42,
        title="Data Seed",
        description="Of the order of the activations, which is the same for all SAEs",
    )
    b_dec_init: Literal["mean", "zeros"] = Field(
        default="mean",
        title="b_dec Initialisation",
        description="Where b_dec of SAEs starts that do not start it themselves, as a scaffold does that starts by PCA: at the activations' mean, as there, or at zero, as in SAELens",
    )
    calibrate_thresholds: bool = Field(
        default=True,
        title="Calibrate Thresholds",
        description="Whether all BatchTopK SAEs, plain ones too, get the threshold at which k sparse latents fire per token; otherwise SAELens's running average, which is too low after a short training",
    )
    baselines: dict[str, str] = Field(
        default_factory=lambda: {
            "scaffold_batchtopk": "batchtopk",
            "scaffold_matryoshka": "matryoshka_batchtopk",
        },
        title="Baselines",
        description="For each architecture that is judged, the one it is compared with",
    )
    evaluation_data: EvaluationData = Field(
        default_factory=EvaluationData, title="Evaluation Data"
    )
    evaluation_seeds: list[int] = Field(
        default_factory=lambda: [42, 43, 44],
        title="Evaluation Seeds",
        description="Of evaluations that have several; the others take the first",
    )
    confidence: float = Field(
        default=0.95,
        gt=0,
        lt=1,
        title="Confidence",
        description="Of the intervals over seeds",
    )
    max_bracket: float = Field(
        default=2.0,
        ge=1,
        title="Maximum Bracket",
        description="Where the baseline is interpolated: ratio of the l0_total of the two SAEs on either side, at most. Wider ones are refused",
    )
    reference: list[ReferenceFigure] = Field(
        default_factory=list,
        title="Reference",
        description="Published figures to stand beside ours",
    )

    def __post_init__(self) -> None:
        if not self.grid.get("architecture"):
            raise ValueError(
                "grid must name at least one architecture, as in architecture: "
                "[batchtopk, scaffold_batchtopk]"
            )
        empty = [axis for axis, values in self.grid.items() if not values]
        if empty:
            raise ValueError(f"grid: {empty[0]} has no values")
        for axis, values in self.grid.items():
            for i, value in enumerate(values):
                if value in values[:i]:
                    raise ValueError(f"grid: {axis} has the value {value!r} twice")
        unknown = sorted(set(self.training) - set(TRAINING_FIELDS))
        if unknown:
            raise ValueError(
                f"training has no field {unknown[0]!r}{did_you_mean(unknown[0], TRAINING_FIELDS)}; "
                f"it has {', '.join(TRAINING_FIELDS)}"
            )
        twice = sorted((set(self.sae) | set(self.training)) & set(self.grid))
        if twice:
            raise ValueError(
                f"{twice[0]} is in the grid and fixed as well; name it once"
            )
        for judged, baseline in self.baselines.items():
            for name in (judged, baseline):
                if name not in SAE_TRAINING_CLASS_REGISTRY:
                    known = sorted(SAE_TRAINING_CLASS_REGISTRY)
                    raise ValueError(
                        f"baselines: there is no training architecture {name!r}"
                        f"{did_you_mean(name, known)}; there are {', '.join(known)}"
                    )
            if judged == baseline:
                raise ValueError(
                    f"baselines: {judged} cannot be its own baseline; its variants differ "
                    "in axes of the grid, of which only seeds are paired"
                )
        for name in ("dense_latents", "scaffold_ablation"):
            if "baseline" in (self.evaluations.get(name) or {}):
                raise ValueError(
                    f"evaluations: {name} must have no baseline here; SAEs are compared "
                    "with those of `baselines`"
                )
        if not self.evaluations:
            raise ValueError("evaluations must name at least one, as in dense_latents:")
        if not self.evaluation_seeds:
            raise ValueError("evaluation_seeds must name at least one seed")
        for figure in self.reference:
            _check_reference(figure, self)


def _check_reference(figure: ReferenceFigure, config: CompareConfig) -> None:
    """
    Raises:
        UserError: It names what there is not. What there is, and the experiment leaves
            out, is only not measured.
    """

    def check(field: str, value: str, known: Collection[str]) -> None:
        if value not in known:
            raise UserError(
                f"reference {figure.what!r}: there is no {field} {value!r}"
                f"{did_you_mean(value, sorted(known))}; there are {', '.join(known)}"
            )

    if figure.architecture is not None:
        check("architecture", figure.architecture, SAE_TRAINING_CLASS_REGISTRY)
    for axis in figure.where:
        check("axis of the grid", axis, config.grid)
    if figure.metric is not None:
        evaluation, _, path = figure.metric.partition(".")
        check("evaluation", evaluation, known_evaluations())
        described = metric_descriptions(known_evaluations()[evaluation])
        # a plugin's evaluation need not describe its metrics
        if described:
            check(f"metric of {evaluation}", path, described)
    if figure.against_baseline and (
        figure.metric is None or figure.architecture not in (None, *config.baselines)
    ):
        raise UserError(
            f"reference {figure.what!r}: against_baseline needs a metric, and an "
            f"architecture that has a baseline: {', '.join(config.baselines)}; the "
            f"architecture is {figure.architecture!r}, the metric {figure.metric!r}"
        )


def did_you_mean(name: str, known: list[str]) -> str:
    """A hint in parentheses, if something known looks like the name."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 does; to YAML 1.1 it is text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def read_config(path: str | Path) -> CompareConfig:
    """
    Read an experiment from a YAML file.

    Raises:
        UserError: There is no such file.
        UserError: It is no YAML, or a field is missing, unknown or has a wrong value.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no configuration {path}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must be a mapping of fields to values")
    known = list(config_fields(CompareConfig))
    unknown = [name for name in map(str, content) if name not in known]
    if unknown:
        raise UserError(
            f"{path}: there is no field {unknown[0]!r}{did_you_mean(unknown[0], known)}; "
            f"there are {', '.join(known)}"
        )
    missing = [
        name
        for name, field in config_fields(CompareConfig).items()
        if field.is_required() and name not in content
    ]
    if missing:
        raise UserError(f"{path}: the field {missing[0]} is missing")
    try:
        return make_config(CompareConfig, content)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def config_yaml(config: CompareConfig) -> str:
    """The whole configuration, defaults included, as YAML."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def check_unchanged(config: CompareConfig, file: Path) -> None:
    """
    See that SAEs are still those with which an experiment was begun.

    Whatever else a configuration says can change at any time: what follows from it is
    done anew.

    Args:
        config: The experiment.
        file: What `keep_config` wrote of it.

    Raises:
        ConfigChanged: They are not.
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


def keep_config(config: CompareConfig, file: Path) -> None:
    """Write the configuration of an experiment."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with new_file(file) as temporary:
        temporary.write_text(config_yaml(config), encoding="utf-8")


def _training_yaml(config: CompareConfig) -> str:
    """All of a configuration that decides what is trained, the same if it means the same."""
    values = {name: getattr(config, name) for name in _DECIDES_TRAINING}
    # in order: SAEs are named and ordered by the axes
    values["grid"] = [{axis: of_axis} for axis, of_axis in config.grid.items()]
    return yaml.safe_dump(values, allow_unicode=True)


class ConfigChanged(ValueError):
    """SAEs are not those with which the experiment was begun."""
