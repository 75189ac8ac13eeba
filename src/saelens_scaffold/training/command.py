"""`saelens-scaffold train` and `run`: other command lines, with scaffold SAEs."""

import importlib.util
import io
import os
import runpy
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from contextlib import redirect_stderr
from importlib.machinery import ModuleSpec

from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.training._interruption import InterruptedException
from wandb.errors import UsageError

from saelens_scaffold._util.errors import UserError, one_line
from saelens_scaffold.models import register_embedded_model
from saelens_scaffold.models.local import register_local_models_in
from saelens_scaffold.training.checks import check_runner_config
from saelens_scaffold.training.runner import ResumableTrainingRunner


def train(args: Sequence[str]) -> str:
    """
    Run SAELens's training command line, which offers the scaffold architectures.

    The embedded model, and all model directories among the arguments, can be used in it
    by name. An interruption (Ctrl-C, SIGTERM) saves a checkpoint.

    Args:
        args: What SAELens parses.

    Returns:
        What was measured of the SAE, as a sentence.

    Raises:
        UserError: The arguments make no sense, or name something that cannot be used.
        KeyboardInterrupt: There was an interruption; the message says how to resume.
        SystemExit: Help has been printed.
    """
    register_embedded_model()
    register_local_models_in(args)
    cfg = _parse(args)
    check_runner_config(cfg)
    runner = ResumableTrainingRunner(cfg)
    try:
        runner.run()
    except (KeyboardInterrupt, InterruptedException):
        checkpoint = runner.interruption_checkpoint
        hint = "repeat the command with --resume_from_checkpoint"
        text = "" if checkpoint is None else f"To go on, {hint} {checkpoint}"
        raise KeyboardInterrupt(text) from None
    except UsageError as error:
        raise UserError(f"{one_line(error)} (or --log_to_wandb=False)") from error
    if runner.measurement is not None:
        return f"{cfg.output_path}: {runner.measurement}"
    if runner.not_measured is not None:
        return f"{cfg.output_path}: nothing was measured; {runner.not_measured}."
    return ""


def _parse(args: Sequence[str]) -> LanguageModelSAERunnerConfig:
    """SAELens's configuration; its parser's complaint as one line, without the usage."""
    sys.argv = ["saelens-scaffold train", *args]  # the name that SAELens's help shows
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            cfg = _parse_cfg_args(args)
    except SystemExit as exit:
        if not exit.code:
            raise
        raise UserError(said.getvalue().rpartition("error: ")[2].strip()) from None
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(one_line(error)) from error
    sys.stderr.write(said.getvalue())
    return cfg


def run_module(module: str, args: Sequence[str]) -> None:
    """
    Run a module as `python -m` does, with the scaffold architectures registered.

    The embedded model, and all model directories among the arguments, can be used in it
    by name. The module becomes the main program of this process: `sys.argv` and
    `sys.path` are set for it, and not set back.

    Args:
        module: The module's name, or that of a package with a `__main__` module.
        args: What the module finds in `sys.argv[1:]`.

    Raises:
        UserError: There is no such module.
    """
    if not getattr(sys.flags, "safe_path", False):  # new in Python 3.11
        sys.path.insert(0, os.getcwd())
    _check_runnable(module)
    register_embedded_model()
    register_local_models_in(args)

    # Registering has imported much of SAELens, and runpy warns that a module imported
    # before it runs as `__main__` exists twice. So it does under `python -m`, where
    # importing the package `sae_lens` comes first, too; SAELens's modules are fit for it.
    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _check_runnable(module: str) -> None:
    """
    See that there is a module. The ImportError that runpy raises looks like one that the
    module itself raises.

    Raises:
        UserError: There is none.
    """
    if module.startswith("."):
        raise UserError(f"the name {module!r} is relative; give the whole name")
    spec = _find(module)
    if spec is None:
        hint = " (give its name, not its file)" if module.endswith(".py") else ""
        raise UserError(f"there is no module {module!r}{hint}")
    is_package = spec.submodule_search_locations is not None
    if is_package and _find(f"{module}.__main__") is None:
        raise UserError(f"{module!r} is a package without a __main__ module")


def _find(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except ValueError:  # no name of a module, such as ""
        return None
    except ModuleNotFoundError as error:
        # One of the parents is missing, or is no package. Any other missing module is
        # one that a parent needs, and worth its traceback.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        return None
