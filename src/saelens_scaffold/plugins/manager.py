"""Plugins: found by name, chosen in an SAE's configuration, one instance per SAE.

A plugin is a class, or any function that returns an object, with methods marked `hookimpl`
(see `hookspecs`). Its arguments are the options in the configuration:

    ScaffoldBatchTopKTrainingSAEConfig(
        ..., scaffold_plugins={"live_metrics": {"window": 200}}
    )

The package's own plugins are in `saelens_scaffold.plugins`; others are entry points of the
group "saelens_scaffold". A plugin is imported when it is chosen.
"""

import inspect
import json
import logging
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import pluggy
import torch
import torch.optim.optimizer as optimizers
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

from saelens_scaffold._util.errors import UserError, one_line
from saelens_scaffold.plugins import hookspecs
from saelens_scaffold.plugins.hookspecs import PROJECT_NAME

if TYPE_CHECKING:
    from saelens_scaffold.saes import ScaffoldBatchTopKTrainingSAE as ScaffoldSAE

logger = logging.getLogger(__name__)

Offered = TypeVar("Offered")

_OWN_CLASSES = {
    "live_metrics": "LiveMetrics",
    "schedule": "ScaffoldSchedule",
    "orthonormal_decoder": "OrthonormalDecoder",
    "decorrelation": "Decorrelation",
}
"""Class of each plugin of this package, in the module of the plugin's name."""


def available_plugins() -> dict[str, list[EntryPoint]]:
    """
    All plugins that can be chosen, by name; none is imported.

    Returns:
        An entry point for each name; several where several packages use the same name.
    """
    found: dict[str, list[EntryPoint]] = {}
    for name, class_name in _OWN_CLASSES.items():
        place = f"{__package__}.{name}:{class_name}"
        found[name] = [EntryPoint(name, place, PROJECT_NAME)]
    for entry in entry_points(group=PROJECT_NAME):
        found.setdefault(entry.name, []).append(entry)
    return found


def load_plugin(name: str) -> Callable[..., Any]:
    """
    A plugin's class or factory, imported.

    Raises:
        ValueError: There is no plugin of that name, there are several, or it cannot be
            imported.
    """
    available = available_plugins()
    if name not in available:
        names = ", ".join(sorted(available))
        raise ValueError(f"there is no scaffold plugin {name!r}; there are {names}")
    entry, *more = available[name]
    if more:
        packages = " and ".join(sorted(map(_package_of, available[name])))
        raise ValueError(
            f"several packages have a scaffold plugin {name!r}: {packages}; uninstall "
            "all but one"
        )
    try:
        return entry.load()
    except (Exception, SystemExit) as error:  # importing a module can raise anything
        raise ValueError(
            f"the scaffold plugin {name!r} ({entry.value}) cannot be imported: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error


def _package_of(entry: EntryPoint) -> str:
    package = entry.dist.name if entry.dist else "saelens-scaffold"
    return f"{package} ({entry.value})"


def make_plugins(chosen: Mapping[str, Mapping[str, Any]]) -> pluggy.PluginManager:
    """
    A plugin manager with an instance of each chosen plugin.

    Args:
        chosen: Options of each plugin, by name.

    Raises:
        ValueError: A plugin does not exist, cannot be imported, does not take its options,
            or has a hook that does not exist.
    """
    if not isinstance(chosen, Mapping):
        raise ValueError(f"scaffold_plugins must map names to options, got {chosen!r}")
    manager = _manager()
    for name, options in chosen.items():
        plugin = _make(name, load_plugin(name), options)
        try:
            manager.register(plugin, name=name)
            manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise ValueError(f"the scaffold plugin {name!r}: {error}") from error
    return manager


def check_fit_for_shards(chosen: Mapping[str, Mapping[str, Any]]) -> None:
    """
    See that plugins do the same where several processes each train a part of an SAE.

    Those that do have an attribute `fit_for_shards` that is true (see docs/plugins.md).

    Raises:
        UserError: One does not.
    """
    for name, plugin in make_plugins(chosen).list_name_plugin():
        if not getattr(plugin, "fit_for_shards", False):
            raise UserError(
                f"scaffold_plugins has {name!r}, which does not say that it is fit for an "
                "SAE of which each process trains a part; train in one process, or without "
                "it"
            )


def offered_by_plugins(hook: str, kind: type[Offered]) -> dict[str, list[Offered]]:
    """
    What the installed plugins, chosen or not, offer to an evaluation or a comparison.

    They are made without options. A plugin that fails is left out, with a warning.

    Args:
        hook: Name of the hook, "evaluations" or "comparison_metrics".
        kind: Class of what it returns.

    Returns:
        The plugins' offers, by the plugin's name.
    """
    offered: dict[str, list[Offered]] = {}
    for name in sorted(set(available_plugins()) - set(_OWN_CLASSES)):
        try:
            make = load_plugin(name)
            # a class shows its hooks without being made; a function does not
            if inspect.isclass(make) and not hasattr(make, hook):
                continue
            manager = _manager()
            manager.register(_make(name, make, {}), name=name)
            found = [each for some in getattr(manager.hook, hook)() for each in some]
            if wrong := [each for each in found if not isinstance(each, kind)]:
                raise TypeError(f"{hook} has {wrong[0]!r:.100}, no {kind.__name__}")
        except (Exception, SystemExit) as error:  # it must not disturb other work
            leave_out(name, f"{type(error).__name__}: {one_line(error)}")
        else:
            offered[name] = found
    return offered


@cache
def leave_out(name: str, reason: str) -> None:
    """Warn, once, of a plugin's offer that is not used."""
    logger.warning("plugin %r is left out: %.500s", name, reason)


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(PROJECT_NAME)
    manager.add_hookspecs(hookspecs)
    return manager


def _make(name: str, make: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    try:
        json.dumps(options, default=str, allow_nan=False)
    except ValueError:
        raise ValueError(
            f"the scaffold plugin {name!r} has the options {options}; numbers must be finite"
        ) from None
    try:
        return make(**options)
    # unknown or missing options, or values of wrong types
    except (TypeError, SystemExit) as error:
        raise ValueError(
            f"the scaffold plugin {name!r} fails with the options {options}: "
            f"{type(error).__name__}: {error}"
        ) from error


# ---- the plugins of each SAE
#
# Kept beside the SAEs, not in them: a copy of an SAE gets plugins of its own, and plugins
# need not be copied, pickled or moved to a device with it.

_PLUGINS: "WeakKeyDictionary[ScaffoldSAE, pluggy.PluginManager]" = WeakKeyDictionary()
_IN_TRAINING: "WeakKeyDictionary[ScaffoldSAE, int]" = WeakKeyDictionary()
"""Current step of each SAE with plugins."""


def plugins_of(sae: "ScaffoldSAE") -> pluggy.PluginManager:
    """
    The plugin manager of an SAE, with the plugins that its configuration chooses.

    More plugins can be registered there while the SAE lives, as in a notebook. Only those
    of the configuration are saved in checkpoints.
    """
    if sae not in _PLUGINS:
        _PLUGINS[sae] = make_plugins(sae.cfg.scaffold_plugins)
        sae.has_plugins = True
    return _PLUGINS[sae]


def share(sae: "ScaffoldSAE", other: "ScaffoldSAE") -> None:
    """Give an SAE the plugins of another, as they are."""
    if sae.has_plugins:
        _PLUGINS[other], other.has_plugins = plugins_of(sae), True


# ---- called by the architecture


@torch.compiler.disable()
def before_forward(sae: "ScaffoldSAE", step_input: TrainStepInput) -> None:
    """Called before a training forward pass."""
    _watch_optimizers()
    _IN_TRAINING[sae] = step_input.n_training_steps
    plugins_of(sae).hook.before_training_forward_pass(sae=sae, step_input=step_input)


@torch.compiler.disable()
def after_forward(
    sae: "ScaffoldSAE", step_input: TrainStepInput, output: TrainStepOutput
) -> None:
    """
    Add the plugins' losses and metrics to the output of a training forward pass.

    Raises:
        ValueError: The name of a loss or a metric is taken.
    """
    hook = plugins_of(sae).hook
    step = {"sae": sae, "step_input": step_input, "output": output}
    for losses in hook.training_losses(**step):
        _add(losses, output.losses, "loss")
        for loss in losses.values():
            output.loss = output.loss + loss
    for metrics in hook.training_metrics(**step):
        _add(metrics, output.metrics, "metric")


def _add(named: Mapping[str, Any], to: dict[str, Any], kind: str) -> None:
    for name, value in named.items():
        if name in to:
            raise ValueError(f"a plugin adds a {kind} {name!r}, which there is already")
        to[name] = value


def end_training(sae: "ScaffoldSAE") -> None:
    """Tell the plugins that training has ended, once per training."""
    if _IN_TRAINING.pop(sae, None) is not None:
        plugins_of(sae).hook.training_ended(sae=sae)


@cache
def _watch_optimizers() -> None:
    # PyTorch calls these at every step of every optimizer, so plugins learn of the steps
    # in any runner, at the exact time, without a trainer of our own.
    optimizers.register_optimizer_step_pre_hook(_before_step)
    optimizers.register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for sae, step in _stepped_by(optimizer):
        plugins_of(sae).hook.before_optimizer_step(sae=sae, n_training_steps=step)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for sae, step in _stepped_by(optimizer):
        with torch.no_grad():
            plugins_of(sae).hook.after_optimizer_step(sae=sae, n_training_steps=step)


def _stepped_by(optimizer: torch.optim.Optimizer) -> list[tuple["ScaffoldSAE", int]]:
    """The SAEs that an optimizer trains, with their steps."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [(sae, n) for sae, n in _IN_TRAINING.items() if id(sae.W_dec) in stepped]
