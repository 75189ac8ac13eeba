"""`saelens-scaffold train` and `run`: other command lines, with scaffold SAEs."""

import io
import os
import runpy
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

import sae_lens
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.training._interruption import InterruptedException
from safetensors import SafetensorError
from wandb.errors import UsageError

from saelens_scaffold._util.errors import UserError, loading, one_line
from saelens_scaffold._util.files import is_disk_full
from saelens_scaffold.models import local as local_models
from saelens_scaffold.training.checks import check_runner_config
from saelens_scaffold.training.data import override_dataset
from saelens_scaffold.training.model import override_model
from saelens_scaffold.training.pretokenized import adopt_tokenization
from saelens_scaffold.training.processes import Processes
from saelens_scaffold.training.resuming import AUTO, resume_automatically
from saelens_scaffold.training.runner import ResumableTrainingRunner
from saelens_scaffold.training.sharded_runner import (
    ShardedTrainingRunner,
    check_sharded,
)

_N_CHECKPOINTS = 10


def train(args: Sequence[str]) -> str:
    """
    Run SAELens's training command line, which offers the scaffold architectures.

    The embedded model, and all model directories among the arguments, can be used in it
    by name. An interruption (Ctrl-C, SIGTERM) saves a checkpoint. Unless `--n_checkpoints`
    says otherwise, the last checkpoint is there until the SAE is saved.

    Several processes that torchrun has started train one SAE together.

    Args:
        args: What SAELens parses.

    Returns:
        What was measured of the SAE, as a sentence.

    Raises:
        UserError: The arguments make no sense, or name something that cannot be used.
        KeyboardInterrupt: There was an interruption; the message says how to resume.
        SystemExit: Help has been printed.
    """
    processes = Processes.of_torchrun()
    with nullcontext() if processes is None else processes.as_one():
        return _train(args, processes)


def _train(args: Sequence[str], processes: Processes | None) -> str:
    local_models.register_embedded_model()
    local_models.register_local_models_in(args)
    cfg = _parse(args)
    if processes is not None:
        check_sharded(cfg, processes)
        processes.connect(cfg.device)
    adopt_tokenization(cfg)
    by_default = not any(arg.startswith("--n_checkpoints") for arg in args)
    keep_last = by_default and cfg.checkpoint_path is not None
    keep_last = keep_last and not cfg.save_final_checkpoint
    if keep_last:
        cfg.n_checkpoints, cfg.save_final_checkpoint = _N_CHECKPOINTS, True
    goes_on = cfg.resume_from_checkpoint == AUTO
    if processes is None or processes.is_first:
        if goes_on:
            resume_automatically(cfg)
        check_runner_config(cfg)
    if processes is not None:
        decided = (cfg.checkpoint_path, cfg.resume_from_checkpoint)
        cfg.checkpoint_path, cfg.resume_from_checkpoint = processes.first(decided)
    runner = _runner(cfg, processes)
    runner.checkpoints_until_saved = keep_last
    if goes_on and cfg.resume_from_checkpoint is not None:
        runner.last_checkpoint = Path(cfg.resume_from_checkpoint)

    def hint() -> str:
        checkpoint = runner.last_checkpoint
        if checkpoint is None:
            return ""
        if goes_on:
            return f"To go on from {checkpoint}, repeat the command"
        return (
            f"To go on, repeat the command with --resume_from_checkpoint {checkpoint}"
        )

    if processes is not None:
        processes.hint = hint
    try:
        runner.run()
    except (KeyboardInterrupt, InterruptedException) as interruption:
        raise KeyboardInterrupt(f"{interruption} {hint()}".strip()) from None
    except UsageError as error:
        raise UserError(f"{one_line(error)} (or --log_to_wandb=False)") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        kept = runner.last_checkpoint
        if kept is None or not (isinstance(error, OSError) or is_disk_full(error)):
            raise
        raise UserError(f"{one_line(error)}; the last checkpoint is {kept}") from error
    if runner.measurement is not None:
        return f"{cfg.output_path}: {runner.measurement}"
    if runner.not_measured is not None:
        return f"{cfg.output_path}: nothing was measured; {runner.not_measured}."
    return ""


def _runner(
    cfg: LanguageModelSAERunnerConfig, processes: Processes | None
) -> ResumableTrainingRunner:
    # that what is handed over is not that of the configuration, which here it is
    sae_lens.logger.addFilter(lambda said: "You just passed in a" not in said.msg)
    dataset = override_dataset(cfg)
    with loading(cfg.model_name):
        overrides = (dataset, override_model(cfg))
        if processes is None:
            return ResumableTrainingRunner(cfg, *overrides)
        return ShardedTrainingRunner(cfg, processes, *overrides)


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
    # Registering has imported much of SAELens, and runpy warns that a module imported
    # before it runs as `__main__` exists twice. So it does under `python -m`, where
    # importing the package `sae_lens` comes first, too; SAELens's modules are fit for it.
    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
    # As `python -m` looks for it. The ImportError that run_module raises where there is
    # none looks like one that the module itself raises.
    try:
        runpy._get_module_details(module, UserError)  # type: ignore[attr-defined]
    except UserError as error:
        raise UserError(f"module {module!r}: {error}") from None
    local_models.register_embedded_model()
    local_models.register_local_models_in(args)
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
