"""The SAEs of an experiment: every combination of the grid's values, and its training."""

import copy
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, get_args

from sae_lens import LoggingConfig, TrainingSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.util import str_to_dtype
from transformer_lens.HookedTransformer import DTYPE_FROM_STRING

from saelens_scaffold._util.errors import UserError, one_line, shown
from saelens_scaffold.compare import config as configs
from saelens_scaffold.compare.config import AXIS_FIELDS, CompareConfig
from saelens_scaffold.kernels.choice import Kernels
from saelens_scaffold.models.language_models import known_model_name
from saelens_scaffold.saes.validation import ESTIMATED_SCALES
from saelens_scaffold.training.cached_activations import (
    CachedMultiSAETrainingRunnerConfig,
    cache_fingerprint,
)
from saelens_scaffold.training.checks import check_language_model, check_steps
from saelens_scaffold.training.pretokenized import adopt_tokenization

MAX_NAME = 150
"""Most characters of an SAE's name; file names that contain it may have 255."""


@dataclass(frozen=True)
class Arm:
    """
    SAEs that differ in their seeds only.

    Attributes:
        architecture: Their architecture.
        axes: Their values on the other axes of the grid that their architecture has.
    """

    architecture: str
    axes: Mapping[str, Any]

    def agrees_with(self, other: "Arm") -> bool:
        """Whether they have the same values on all axes that both have."""
        shared = set(self.axes) & set(other.axes)
        return all(self.axes[axis] == other.axes[axis] for axis in shared)

    @property
    def label(self) -> str:
        """Their name in tables."""
        values = [f"{axis}={_shown(value)}" for axis, value in self.axes.items()]
        return " ".join([self.architecture, *values])

    @property
    def facts(self) -> dict[str, Any]:
        """The arm in results.json."""
        axes = dict(self.axes)
        return {"architecture": self.architecture, "arm": self.label, "axes": axes}

    def without(self, axis: str) -> "Arm":
        """The same arm without one of its axes."""
        others = {name: value for name, value in self.axes.items() if name != axis}
        return Arm(self.architecture, others)

    def __hash__(self) -> int:
        return hash(self.label)


@dataclass(frozen=True)
class Run:
    """
    One SAE of an experiment.

    Attributes:
        name: Name of the SAE and of its directory.
        arm: Architecture and axes, which it shares with SAEs of other seeds.
        seed: Seed of its initial weights.
        config: Its configuration.
        hook_name: Hook point.
        training: Fields of the runner that are axes of the grid.
        centre_b_dec: Whether the runner initialises b_dec at the activations' mean; a
            scaffold with scaffold_init="pca" does so itself.
    """

    name: str
    arm: Arm
    seed: int
    config: TrainingSAEConfig
    hook_name: str
    training: Mapping[str, Any]
    centre_b_dec: bool

    @property
    def scaffold_rank(self) -> int:
        """Rank of its scaffold, 0 for a plain SAE."""
        return int(getattr(self.config, "scaffold_rank", 0))

    @property
    def nominal_l0_total(self) -> float | None:
        """k, and the scaffold's rank; None for architectures without a k."""
        k = getattr(self.config, "k", None)
        return None if k is None else float(k) + self.scaffold_rank


def runs_of(config: CompareConfig, device: str = "cpu") -> list[Run]:
    """
    All SAEs of an experiment, ordered by seed.

    An architecture leaves out the axes that it does not have, as batchtopk leaves out
    `scaffold_rank`; combinations that are then the same are one SAE.

    Args:
        config: The experiment.
        device: Where the SAEs will be trained.

    Raises:
        UserError: No architecture has such a field, or a combination makes no SAE.
    """
    _check_fields(config)
    axes = {"seed": [0], **config.grid}
    runs: dict[str, Run] = {}
    for values in itertools.product(*axes.values()):
        run = _run(config, dict(zip(axes, values, strict=True)), device)
        if runs.setdefault(run.name, run).arm.label != run.arm.label:
            labels = f"{run.arm.label:.200} and {runs[run.name].arm.label:.200}"
            raise UserError(f"grid: {labels} would both be called {run.name}")
    return sorted(runs.values(), key=lambda run: run.seed)


@dataclass
class WaveConfig(CachedMultiSAETrainingRunnerConfig):
    """
    SAELens's configuration of a wave, with what its training does beyond SAELens's.

    Attributes:
        calibrate_thresholds: Whether the runner calibrates the threshold, by SAE.
        b_dec_init: "mean" if the runner starts b_dec at the activations' mean, by SAE.
        scales: Whether any SAE of the experiment estimates the scale of its activations:
            a wave without one reads as much text.
        cached_activations: Hash of the cached activations, if they are used and there.
    """

    calibrate_thresholds: dict[str, bool] = field(default_factory=dict)
    b_dec_init: dict[str, str] = field(default_factory=dict)
    scales: bool = False
    cached_activations: str | None = None


def weight_bytes(runs: Sequence[Run]) -> int:
    """Memory that the encoders and decoders of these SAEs take."""
    return sum(
        2 * cfg.d_in * cfg.d_sae * str_to_dtype(cfg.dtype).itemsize
        for cfg in (run.config for run in runs)
    )


def estimates_scale(runs: Sequence[Run]) -> bool:
    """Whether any of these SAEs estimates the scale of its activations."""
    return any(run.config.normalize_activations in ESTIMATED_SCALES for run in runs)


def runner_config(
    config: CompareConfig,
    wave: Sequence[Run],
    device: str = "cpu",
    scales: bool = False,
) -> WaveConfig:
    """
    The runner's configuration of a wave.

    Raises:
        UserError: A field of `training` has a value that makes no sense.
    """
    training = {**configs.TRAINING_DEFAULTS, **config.training, **wave[0].training}
    try:
        cfg = WaveConfig(
            saes={run.name: run.config for run in wave},
            hook_names={run.name: run.hook_name for run in wave},
            model_name=_model_name(config, training),
            dataset_path=config.dataset_path,
            device=device,
            seed=config.data_seed,
            checkpoint_path=None,
            output_path=None,
            logger=_logger(config, wave),
            calibrate_thresholds={
                run.name: config.calibrate_thresholds
                and isinstance(run.config, BatchTopKTrainingSAEConfig)
                and getattr(run.config, "calibrate_threshold", True)
                for run in wave
            },
            b_dec_init={
                run.name: "mean" if run.centre_b_dec else "zeros" for run in wave
            },
            scales=scales,
            **configs.checked_training(training),
        )
        adopt_tokenization(cfg)
        check_steps(cfg)
        if cfg.use_cached_activations:
            cfg.cached_activations = cache_fingerprint(cfg.cached_activations_path)
    except (TypeError, ValueError) as error:
        raise UserError(f"training: {one_line(error):.500}") from error
    return cfg


def _logger(config: CompareConfig, wave: Sequence[Run]) -> LoggingConfig:
    """What is logged of each SAE under its name: SAELens's metrics, and no weights."""
    if config.wandb_project is None:
        return LoggingConfig(log_to_wandb=False)
    others = f" and {len(wave) - 1} more" if len(wave) > 1 else ""
    return LoggingConfig(
        wandb_project=config.wandb_project,
        run_name=f"{config.hook_name} {wave[0].name}{others}",
        log_weights_to_wandb=False,
    )


def _model_name(config: CompareConfig, training: Mapping[str, Any]) -> str:
    """The model's name for SAELens: by other classes a local one is loaded by its path."""
    model_class = training.get("model_class_name", "HookedTransformer")
    if model_class == "HookedTransformer":
        return known_model_name(config.model_name)
    return config.model_name


def check_training(config: CompareConfig, runs: Sequence[Run]) -> None:
    """
    Check that every SAE can be trained, without text and without the weights of the
    language model.

    Raises:
        UserError: One cannot be trained.
    """
    for run in runs:
        cfg = runner_config(config, [run])
        try:
            # SAELens checks a schedule only when it makes a trainer
            sae = TrainingSAE.from_dict({**run.config.to_dict(), "device": "meta"})
            MultiSAETrainer(
                replace(cfg.to_sae_trainer_config(), device="meta", autocast=False),
                saes={run.name: sae},
                hook_names={run.name: run.hook_name},
                data_provider=iter(()),
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"{run.arm.label:.200}: {one_line(error):.500}") from error
        dtype = (cfg.model_from_pretrained_kwargs or {}).get("dtype", "float32")
        if dtype not in DTYPE_FROM_STRING:
            problem = f"model_from_pretrained_kwargs has the dtype {shown(dtype)}"
            raise UserError(f"{problem}; allowed are {', '.join(DTYPE_FROM_STRING)}")
        of_modules = cfg.model_class_name == "AutoModelForCausalLM"
        if not of_modules and re.match(r"blocks\.\d+\.", run.hook_name) is None:
            problem = "must be a hook point of a layer, blocks.N.NAME"
            raise UserError(f"hook_name {shown(run.hook_name)} {problem}")
    alike = {(r.hook_name, r.config.d_in, repr(r.training)): r for r in runs}
    for run in alike.values():
        cfg = runner_config(config, [run])
        head_index = cfg.hook_head_indices_per_sae[run.name]
        check_language_model(cfg, run.hook_name, run.config.d_in, head_index)


def _check_fields(config: CompareConfig) -> None:
    """Check that every field means something to some architecture."""
    of_saes = set().union(*map(_fields_of, config.grid["architecture"]))
    of_saes -= {"device", "metadata"}
    for name in config.sae:
        # plain SAEs have no field for the kernels that they, too, are trained in
        known = of_saes | {"kernels"}
        configs.check_known("field of these architectures", name, known)
    if (kernels := config.sae.get("kernels", "auto")) not in get_args(Kernels):
        known = ", ".join(map(repr, get_args(Kernels)))
        raise UserError(f"kernels must be one of {known}, got {shown(kernels)}")
    axes = {"architecture", "seed", "hook_name", "b_dec_init", *AXIS_FIELDS, *of_saes}
    for name in config.grid:
        configs.check_known("axis of the grid", name, axes)


def _run(config: CompareConfig, values: dict[str, Any], device: str) -> Run:
    architecture, seed = values.pop("architecture"), values.pop("seed")
    fields = _fields_of(architecture)
    sae = {"device": device, **config.sae, **values}
    sae = {name: value for name, value in sae.items() if name in fields}
    start = {name: sae.get(name, field.default) for name, field in fields.items()}
    is_centred = start.get("scaffold_init") == "pca" and bool(start["scaffold_rank"])
    own = {"hook_name", *AXIS_FIELDS, *fields}
    if not is_centred:
        own.add("b_dec_init")
    axes = {axis: value for axis, value in values.items() if axis in own}
    arm = Arm(architecture, axes)
    b_dec_init = values.get("b_dec_init", config.b_dec_init)
    try:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise UserError(f"seed must be an int, got {shown(seed)}")
        if b_dec_init not in ("mean", "zeros"):
            got = shown(b_dec_init)
            raise UserError(f"b_dec_init must be 'mean' or 'zeros', got {got}")
        sae_config = get_sae_training_class(architecture)[1](**copy.deepcopy(sae))
        # SAELens notices a wrong type only when it makes the SAE
        TrainingSAE.from_dict({**sae_config.to_dict(), "device": "meta"})
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{arm.label:.200}: {one_line(error):.500}") from error
    return Run(
        name=_file_name("-".join([*arm.label.split(" "), f"seed={seed}"])),
        arm=arm,
        seed=seed,
        config=sae_config,
        hook_name=str(axes.get("hook_name", config.hook_name)),
        training={name: axes[name] for name in axes if name in AXIS_FIELDS},
        centre_b_dec=b_dec_init == "mean" and not is_centred,
    )


def _fields_of(architecture: str) -> dict[str, Any]:
    return get_sae_training_class(architecture)[1].__dataclass_fields__


def _shown(value: Any) -> str:
    """A value in a label, without spaces."""
    return value if isinstance(value, str) else re.sub(r"\s", "", json.dumps(value))


def _file_name(text: str) -> str:
    # without "=" and brackets, which shells and SAEBench's file names do not take well
    name = re.sub(r"[^\w.+-]+", "_", text.replace("=", "_")).strip("_")
    if len(name) > MAX_NAME:
        name = f"{name[:MAX_NAME]}-{sha256(text.encode()).hexdigest()[:8]}"
    return name
