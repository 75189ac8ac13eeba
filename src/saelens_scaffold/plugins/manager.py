"""Plugins: found by name, chosen in an SAE's configuration, one instance for each SAE.

A plugin is a class, or any function that returns an object, whose methods are marked with
`hookimpl` (see `hookspecs`). The options that a configuration gives are its arguments:

    ScaffoldBatchTopKTrainingSAEConfig(
        ..., scaffold_plugins={"live_metrics": {"window": 200}}
    )

Those that come with this package are in `saelens_scaffold.plugins`; others are entry points of the
group "saelens_scaffold". Nothing of a plugin is imported before it is chosen.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import pluggy
import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from saelens_scaffold.plugins.hookspecs import (
    PROJECT_NAME,
    EvaluationSpecs,
    ScaffoldSpecs,
    ScaffoldStart,
    hookimpl,
    plugin_manager,
)

if TYPE_CHECKING:
    from saelens_scaffold.saes import ScaffoldBatchTopKTrainingSAE

__all__ = [
    "DEFAULT_PLUGINS",
    "available_plugins",
    "evaluation_plugins",
    "hookimpl",
    "load_plugin",
    "plugins_of",
]

logger = logging.getLogger(__name__)

DEFAULT_PLUGINS = {
    name: EntryPoint(
        name, f"saelens_scaffold.plugins.{module}:{attribute}", PROJECT_NAME
    )
    for name, module, attribute in (
        ("live_metrics", "live_metrics", "LiveMetrics"),
        ("schedule", "schedule", "ScaffoldSchedule"),
        ("orthonormal_decoder", "orthonormal_decoder", "OrthonormalDecoder"),
        ("decorrelation", "decorrelation", "Decorrelation"),
    )
}
"""The plugins that come with this package."""


def available_plugins() -> dict[str, EntryPoint]:
    """Every plugin that can be chosen, by name; nothing is imported."""
    installed = {entry.name: entry for entry in entry_points(group=PROJECT_NAME)}
    return {**installed, **DEFAULT_PLUGINS}


def load_plugin(name: str) -> Callable[..., Any]:
    """
    What makes a plugin, imported.

    Raises:
        ValueError: There is no plugin of that name, or it cannot be imported.
    """
    available = available_plugins()
    if name not in available:
        raise ValueError(
            f"there is no scaffold plugin {name!r}; there are {', '.join(sorted(available))} "
            "(is the package that has it installed?)"
        )
    entry = available[name]
    try:
        return entry.load()
    except Exception as error:  # whatever its module does when it is imported
        raise ValueError(
            f"the scaffold plugin {name!r} ({entry.value}) cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error


def _make(name: str, make: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """
    An instance of a plugin.

    Raises:
        ValueError: It does not take these options, or not values of their types.
    """
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        raise ValueError(
            f"the scaffold plugin {name!r} does not take the options {dict(options)}: {error}"
        ) from error
    try:
        return make(**options)
    except TypeError as error:  # of its own, or of an option's value
        raise ValueError(
            f"the scaffold plugin {name!r} fails with the options {dict(options)}: "
            f"TypeError: {error}"
        ) from error


def make_plugins(chosen: Mapping[str, Mapping[str, Any]]) -> pluggy.PluginManager:
    """
    A plugin manager with an instance of each plugin that is chosen.

    Args:
        chosen: For each plugin's name, its options.

    Raises:
        ValueError: There is no such plugin, it cannot be imported, does not take these
            options, or has a hook that does not exist.
    """
    manager = plugin_manager(ScaffoldSpecs, EvaluationSpecs)
    for name, options in chosen.items():
        plugin = _make(name, load_plugin(name), options)
        try:
            manager.register(plugin, name=name)
        except pluggy.PluginValidationError as error:
            raise ValueError(f"the scaffold plugin {name!r}: {error}") from error
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise ValueError(
            f"a scaffold plugin has a hook that is none: {error}"
        ) from error
    return manager


def evaluation_plugins() -> pluggy.PluginManager:
    """
    A plugin manager with every installed plugin that offers evaluations or metrics.

    They are made without options. One that cannot be is left out, and a warning names it.
    """
    manager = plugin_manager(EvaluationSpecs)
    for name in sorted(set(available_plugins()) - set(DEFAULT_PLUGINS)):
        try:
            make = load_plugin(name)
            # a class need not be made to see; what a function makes cannot be seen else
            if not inspect.isclass(make) or _offers_evaluations(make):
                plugin = _make(name, make, {})
                if _offers_evaluations(plugin):
                    manager.register(plugin, name=name)
        except Exception as error:  # whoever installed it may not even have chosen it
            logger.warning("no evaluations of the plugin %r: %s", name, error)
    return manager


def _offers_evaluations(plugin: Any) -> bool:
    return any(hasattr(plugin, hook) for hook in ("evaluations", "comparison_metrics"))


# ---- the plugins of each SAE
#
# Kept beside the SAEs, not in them: a copy of an SAE is another SAE, with plugins of its
# own, and plugins need not be copied, pickled or moved to a device with it.

_PLUGINS: "WeakKeyDictionary[ScaffoldBatchTopKTrainingSAE, pluggy.PluginManager]" = (
    WeakKeyDictionary()
)
_IN_TRAINING: "WeakKeyDictionary[ScaffoldBatchTopKTrainingSAE, int]" = (
    WeakKeyDictionary()
)
"""The number of the step that each SAE with plugins is in."""


def plugins_of(sae: "ScaffoldBatchTopKTrainingSAE") -> pluggy.PluginManager:
    """
    The plugin manager of an SAE, with the plugins that its configuration chooses.

    More can be registered there while the SAE lives, as in a notebook; what is to be in
    its checkpoints, or to start a scaffold whose scaffold_init is not "pca", belongs into
    the configuration.
    """
    if sae not in _PLUGINS:
        _PLUGINS[sae] = make_plugins(sae.cfg.scaffold_plugins)
        sae.has_plugins = True
    return _PLUGINS[sae]


# ---- where the architecture calls them


@torch.compiler.disable()
def start_of(
    sae: "ScaffoldBatchTopKTrainingSAE", sae_in: torch.Tensor
) -> ScaffoldStart | None:
    """
    The start that a plugin gives the scaffold.

    Raises:
        ValueError: It has not the scaffold's shape, or is not finite.
    """
    start = plugins_of(sae).hook.initialize_scaffold(sae=sae, sae_in=sae_in)
    if start is None:
        return None
    d_in, rank = sae.cfg.d_in, sae.cfg.scaffold_rank
    given: list[tuple[str, torch.Tensor, tuple[int, ...]]] = [
        ("A", start.A, (d_in, rank)),
        ("B", start.B, (rank, d_in)),
    ]
    if start.b_dec is not None:
        given.append(("b_dec", start.b_dec, (d_in,)))
    for name, value, shape in given:
        if tuple(value.shape) != shape or not value.isfinite().all():
            raise ValueError(
                f"a plugin's initialize_scaffold gave {name} of shape "
                f"{tuple(value.shape)}; it must be finite and of shape {shape}"
            )
    return start


@torch.compiler.disable()
def before_forward(
    sae: "ScaffoldBatchTopKTrainingSAE", step_input: TrainStepInput
) -> None:
    """Before a training forward pass."""
    _watch_optimizers()
    _IN_TRAINING[sae] = step_input.n_training_steps
    plugins_of(sae).hook.before_training_forward_pass(sae=sae, step_input=step_input)


@torch.compiler.disable()
def after_forward(
    sae: "ScaffoldBatchTopKTrainingSAE",
    step_input: TrainStepInput,
    output: TrainStepOutput,
) -> None:
    """
    After a training forward pass: add what the plugins have to add to its output.

    Raises:
        ValueError: A loss or a metric has a name that is taken.
    """
    hook = plugins_of(sae).hook
    arguments = {"sae": sae, "step_input": step_input, "output": output}
    for losses in hook.training_losses(**arguments):
        for name, loss in losses.items():
            _add(output.losses, "loss", name, loss)
            output.loss = output.loss + loss
    for metrics in hook.training_metrics(**arguments):
        for name, metric in metrics.items():
            _add(output.metrics, "metric", name, metric)


def _add(to: dict[str, Any], kind: str, name: str, value: Any) -> None:
    if name in to:
        raise ValueError(f"a plugin adds a {kind} {name!r}, which there is already")
    to[name] = value


def end_training(sae: "ScaffoldBatchTopKTrainingSAE") -> None:
    """Note that an SAE's training has ended, and tell its plugins if it was in training."""
    if _IN_TRAINING.pop(sae, None) is not None:
        plugins_of(sae).hook.training_ended(sae=sae)


def before_saving_inference(
    sae: "ScaffoldBatchTopKTrainingSAE", state_dict: dict[str, torch.Tensor]
) -> None:
    """Before the inference form is made."""
    plugins_of(sae).hook.before_saving_inference(sae=sae, state_dict=state_dict)


_watching = False


def _watch_optimizers() -> None:
    # PyTorch calls these for every optimizer's every step: so plugins hear of the steps
    # in any runner, at the very time, without a trainer of ours.
    global _watching
    if not _watching:
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        _watching = True


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for sae, step in _stepped_by(optimizer):
        plugins_of(sae).hook.before_optimizer_step(sae=sae, n_training_steps=step)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for sae, step in _stepped_by(optimizer):
        with torch.no_grad():
            plugins_of(sae).hook.after_optimizer_step(sae=sae, n_training_steps=step)


def _stepped_by(
    optimizer: torch.optim.Optimizer,
) -> Iterator[tuple["ScaffoldBatchTopKTrainingSAE", int]]:
    for sae, step in list(_IN_TRAINING.items()):
        if any(
            p is sae.W_dec for group in optimizer.param_groups for p in group["params"]
        ):
            yield sae, step
