"""The SAEs of an experiment: every combination of what the grid names."""

import copy
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from sae_lens import TrainingSAE
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.compare.config import (
    AXIS_FIELDS,
    CompareConfig,
    did_you_mean,
)

MAX_NAME = 150
"""Characters of an SAE's name: files that have it in theirs may have 255."""


@dataclass(frozen=True)
class Arm:
    """
    SAEs that differ in their seeds only.

    Attributes:
        architecture: Their architecture.
        axes: Their values of the grid's other axes, those that their architecture has.
    """

    architecture: str
    axes: Mapping[str, Any] = field(hash=False)

    def agrees_with(self, other: "Arm") -> bool:
        """Whether they have the same values on all axes that both have."""
        shared = set(self.axes) & set(other.axes)
        return all(self.axes[axis] == other.axes[axis] for axis in shared)

    @property
    def label(self) -> str:
        """What a table calls them."""
        values = [f"{axis}={_shown(value)}" for axis, value in self.axes.items()]
        return " ".join([self.architecture, *values])

    def without(self, axis: str) -> "Arm":
        """The same arm, said without one of its axes."""
        others = {name: value for name, value in self.axes.items() if name != axis}
        return Arm(self.architecture, others)

    def __hash__(self) -> int:
        return hash(self.label)


@dataclass(frozen=True)
class Run:
    """
    One SAE of an experiment.

    Attributes:
        name: Its name, that of its directory as well.
        arm: What it shares with SAEs of other seeds.
        seed: Of its initial weights.
        config: Its configuration.
        hook_name: Where it reads the language model.
        training: Values of the runner's fields that the grid gives.
        centre_b_dec: Whether its b_dec is to be started at the activations' mean; a
            scaffold with scaffold_init="pca" starts it there itself.
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
    The SAEs that a configuration means, each once, ordered by seed.

    An axis that an architecture does not have, as `scaffold_rank` for batchtopk, is left
    out for it.

    Args:
        config: The experiment.
        device: Where the SAEs will be trained.

    Raises:
        UserError: There is no such architecture, no architecture has such a field, or a
            combination makes no SAE.
    """
    for architecture in config.grid["architecture"]:
        if architecture not in SAE_TRAINING_CLASS_REGISTRY:
            known = sorted(SAE_TRAINING_CLASS_REGISTRY)
            raise UserError(
                f"grid: there is no training architecture {architecture!r}"
                f"{did_you_mean(str(architecture), known)}; there are {', '.join(known)}"
            )
    _check_fields(config)
    axes = {"seed": [0], **config.grid}
    runs: dict[str, Run] = {}
    for values in itertools.product(*axes.values()):
        run = _run(config, dict(zip(axes, values, strict=True)), device)
        if runs.setdefault(run.name, run).arm.label != run.arm.label:
            raise UserError(
                f"grid: {run.arm.label} and {runs[run.name].arm.label} would both be "
                f"called {run.name}"
            )
    return sorted(runs.values(), key=lambda run: run.seed)


def _run(config: CompareConfig, values: dict[str, Any], device: str) -> Run:
    architecture, seed = values.pop("architecture"), values.pop("seed")
    fields = _fields_of(architecture)
    b_dec_init = values.get("b_dec_init", config.b_dec_init)
    sae = {
        name: value
        for name, value in {"device": device, **config.sae, **values}.items()
        if name in fields
    }
    centres_itself = _value(architecture, sae, "scaffold_init") == "pca" and bool(
        _value(architecture, sae, "scaffold_rank")
    )
    axes = {
        axis: value
        for axis, value in values.items()
        if axis in fields
        or axis in ("hook_name", *AXIS_FIELDS)
        or (axis == "b_dec_init" and not centres_itself)
    }
    arm = Arm(architecture, axes)
    name = _file_name("-".join([*arm.label.split(" "), f"seed={seed}"]))
    try:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise UserError(f"seed must be an int, got {seed!r}")
        if b_dec_init not in ("mean", "zeros"):
            raise UserError(f"b_dec_init must be 'mean' or 'zeros', got {b_dec_init!r}")
        sae_config = get_sae_training_class(architecture)[1](**copy.deepcopy(sae))
        # what SAELens finds out only when it makes the SAE, as a wrong type
        TrainingSAE.from_dict({**sae_config.to_dict(), "device": "meta"})
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{arm.label}: {error}") from error
    return Run(
        name=name,
        arm=arm,
        seed=seed,
        config=sae_config,
        hook_name=str(axes.get("hook_name", config.hook_name)),
        training={name: axes[name] for name in axes if name in AXIS_FIELDS},
        centre_b_dec=b_dec_init == "mean" and not centres_itself,
    )


def _check_fields(config: CompareConfig) -> None:
    """See that every field means something to some architecture."""
    of_saes = sorted(
        set().union(*(_fields_of(name) for name in config.grid["architecture"]))
        - {"device", "metadata"}
    )
    of_grid = [
        *of_saes,
        *AXIS_FIELDS,
        "architecture",
        "seed",
        "hook_name",
        "b_dec_init",
    ]
    for where, named, known in (
        ("sae", config.sae, of_saes),
        ("grid", config.grid, of_grid),
    ):
        for name in named:
            if name not in known:
                raise UserError(
                    f"{where}: none of the architectures has a field {name!r}"
                    f"{did_you_mean(str(name), known)}; there are {', '.join(sorted(known))}"
                )


def _fields_of(architecture: str) -> set[str]:
    return set(get_sae_training_class(architecture)[1].__dataclass_fields__)


def _value(architecture: str, sae: Mapping[str, Any], name: str) -> Any:
    """What a field of an SAE's configuration will be; None if there is no such field."""
    field = get_sae_training_class(architecture)[1].__dataclass_fields__.get(name)
    return sae.get(name, field and field.default)


def _shown(value: Any) -> str:
    """A value in a label: without spaces."""
    return value if isinstance(value, str) else re.sub(r"\s", "", json.dumps(value))


def _file_name(text: str) -> str:
    # Without "=" or brackets, which shells and SAEBench's file names take amiss.
    name = re.sub(r"[^\w.+-]+", "_", text.replace("=", "_")).strip("_")
    if len(name) > MAX_NAME:
        name = f"{name[:MAX_NAME]}-{sha256(text.encode()).hexdigest()[:8]}"
    return name
