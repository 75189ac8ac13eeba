"""What the commands do that run other people's command lines."""

import importlib.util
import os
import runpy
import sys
import warnings
from collections.abc import Sequence

from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.training._interruption import InterruptedException

from saelens_scaffold.models import register_embedded_model
from saelens_scaffold.models.local import register_local_models_in
from saelens_scaffold.training.runner import ResumableTrainingRunner


def train(args: Sequence[str]) -> int:
    """
    Run SAELens's training command line, which offers the scaffold architectures.

    The embedded model, and all model directories among the arguments, can be used in it
    by name. An interruption (Ctrl-C, SIGTERM) saves a checkpoint, and says how to resume.

    Args:
        args: What SAELens parses.

    Returns:
        The exit status: 0 after the training, 130 after an interruption.

    Raises:
        SystemExit: Help has been printed, or SAELens cannot parse the arguments.
    """
    register_embedded_model()
    register_local_models_in(args)
    sys.argv = ["saelens-scaffold train", *args]  # the name that SAELens's help shows
    runner = ResumableTrainingRunner(_parse_cfg_args(args))
    try:
        runner.run()
    except (KeyboardInterrupt, InterruptedException):
        print("\nsaelens-scaffold train: interrupted.", file=sys.stderr)
        if runner.interruption_checkpoint is not None:
            print(
                "To go on, repeat the command with "
                f"--resume_from_checkpoint {runner.interruption_checkpoint}",
                file=sys.stderr,
            )
        return 130
    if runner.measurement is not None:
        print(f"{runner.cfg.output_path}: {runner.measurement}")
    elif runner.not_measured is not None:
        print(f"{runner.cfg.output_path}: nothing was measured; {runner.not_measured}.")
    return 0


def run_module(module: str, args: Sequence[str]) -> int:
    """
    Run a module as `python -m` does, with the scaffold architectures registered.

    The embedded model, and all model directories among the arguments, can be used in it
    by name. The module becomes the main program of this process: `sys.argv` and
    `sys.path` are set for it, and not set back.

    Args:
        module: The module's name, or that of a package with a `__main__` module.
        args: What the module finds in `sys.argv[1:]`.

    Returns:
        The exit status: 0 after the module's last line, 2 if there is no such module.
        A module that exits by itself does so here, with a status of its own.
    """
    if not getattr(sys.flags, "safe_path", False):  # new in Python 3.11
        sys.path.insert(0, os.getcwd())
    problem = _why_not_runnable(module)
    if problem is not None:
        print(f"saelens-scaffold run: error: {problem}", file=sys.stderr)
        return 2

    register_embedded_model()
    register_local_models_in(args)

    # Registering has imported much of SAELens, and runpy warns that a module imported
    # before it runs as `__main__` exists twice. So it does under `python -m`, where
    # importing the package `sae_lens` comes first, too; SAELens's modules are fit for it.
    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def _why_not_runnable(module: str) -> str | None:
    if module.startswith("."):
        return f"the name {module!r} is relative; give the whole name"
    # Found out beforehand, since the ImportError that runpy raises looks like one that
    # the module itself raises.
    try:
        spec = importlib.util.find_spec(module)
        is_package = spec is not None and spec.submodule_search_locations is not None
        if is_package and importlib.util.find_spec(f"{module}.__main__") is None:
            return f"{module!r} is a package without a __main__ module"
    except ModuleNotFoundError as error:
        # One of the parents is missing, or is no package. Any other missing module is
        # one that a parent needs, and worth its traceback.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        spec = None
    except ValueError:  # no name of a module at all, such as ""
        spec = None
    if spec is None:
        hint = " (give its name, not its file)" if module.endswith(".py") else ""
        return f"there is no module {module!r}{hint}"
    return None
