"""The command `saelens-scaffold`, and how its errors end.

`import saelens_scaffold` imports SAELens and PyTorch, which takes seconds. This package
stands beside it, so that help, the version and errors in the options come at once.
"""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from saelens_scaffold_cli.commands import COMMANDS, Command, Output
from saelens_scaffold_cli.parsing import CommandParser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a command.

    Args:
        argv: The command line after `saelens-scaffold`; `sys.argv[1:]` if None.

    Returns:
        The exit status: 0, 1 if part of the work failed, 2 if the input is wrong, 130
        after an interruption.

    Raises:
        SystemExit: Help or the version has been printed, the options are wrong, or a
            module that was run exits by itself.
    """
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    if argv is None:
        sys.argv[0] = "saelens-scaffold"  # as results state it, without a path
        argv = sys.argv[1:]
    argv = list(argv)
    _wait_briefly()
    _use_large_pages()
    if not sys.stderr.isatty():
        # progress bars in a log; tqdm reads these when it is imported
        for variable in ("TQDM_MININTERVAL", "TQDM_MAXINTERVAL"):
            os.environ.setdefault(variable, "60")
    if not argv or argv[0] not in COMMANDS:
        _parser().parse_args(argv[:1] or ["--help"])
    prog = f"saelens-scaffold {argv[0]}"
    command = COMMANDS[argv[0]].parse(argv[1:])
    try:
        output = _run(command, prog)
    except KeyboardInterrupt as interruption:
        return _interrupted(command, prog, interruption)
    except Exception as error:
        return _told(command, prog, error)
    _show(output)
    return output.status


def _wait_briefly() -> None:
    """
    Have OpenMP's threads sleep soon, rather than spin, where they wait for each other.

    Beside other work, a spinning thread keeps the one that it waits for off the core: a
    training step then takes many times as long instead of twice (benchmarks/bench_busy.py).
    libgomp, which PyTorch brings on Linux, reads this when it is loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _use_large_pages() -> None:
    """
    Have PyTorch ask Linux for pages of 2 MiB.

    What a large tensor gets from the system is cleared page by page. In pages of 4 KiB,
    SAELens's core evaluation takes a fifth longer (benchmarks/README.md). PyTorch reads this
    when it first needs memory.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _told(command: Command, prog: str, error: Exception) -> int:
    from saelens_scaffold._util.files import is_disk_full

    message = " ".join(str(error).split())
    # What sets UserError apart. All else is a defect, unless there is no more room.
    status = getattr(error, "exit_status", None)
    if status is None:
        if not is_disk_full(error):
            raise error
        status, message = 1, f"the disk is full: {message}"
    if command.debug:
        traceback.print_exc()
    _show(Output(getattr(error, "text", ""), getattr(error, "lines", ())))
    return _failed(prog, message, status)


def _run(command: Command, prog: str) -> Output:
    from saelens_scaffold._util.interruption import hold_interruptions, interruptible

    if command.interrupts_itself:
        return command.run()
    with interruptible():
        try:
            with interruptible():
                return _run_quietly(command)
        except KeyboardInterrupt as interruption:
            hold_interruptions()  # one more signal must not cost the hint
            return Output(status=_interrupted(command, prog, interruption))


def _run_quietly(command: Command) -> Output:
    if command.forwards:
        return command.run()
    # notices that no user of a command can act upon
    for message in (
        # many SAEs have them, and neither SAEBench nor this package reads them
        r"\s*This SAE has non-empty",
        "Dataset is not tokenized",
        ".*fewer samples than context size",
        "All samples in the training dataset",
    ):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("sae_lens", "transformer_lens"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr):
        return command.run()


def _interrupted(command: Command, prog: str, interruption: KeyboardInterrupt) -> int:
    hint = str(interruption) or command.if_interrupted.format(**vars(command))
    print(f"\n{prog}: interrupted. {hint}".rstrip(), file=sys.stderr)
    return 130


def _show(output: Output) -> None:
    if output.text:
        print(output.text)
    for note in output.notes:
        print(note, file=sys.stderr)


def _failed(prog: str, message: str, status: int) -> int:
    print(f"{prog}: error: {message}", file=sys.stderr)
    return status


def _complete() -> NoReturn:
    """Answer a shell that asks what a command line can go on with."""
    import argcomplete

    parser = CommandParser("saelens-scaffold", "")
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        commands.choices[name] = command.parser()
    argcomplete.autocomplete(parser)
    sys.exit(1)


def _parser() -> CommandParser:
    """The parser of what comes without a known command."""
    summaries = [
        f"  {name:<9}{(command.__doc__ or '').strip().splitlines()[0]}"
        for name, command in COMMANDS.items()
    ]
    text = Path(__file__).with_name("help.txt").read_text(encoding="utf-8")
    text = text.format(commands="\n".join(summaries))
    parser = CommandParser("saelens-scaffold", text)
    shown = f"%(prog)s {version('saelens-scaffold')}"
    parser.add_argument("--version", action="version", version=shown)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    return parser
