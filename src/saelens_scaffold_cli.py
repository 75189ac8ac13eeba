"""The command `saelens-scaffold`: what can be typed, and what it leads to.

`import saelens_scaffold` registers the architectures, so it imports SAELens and PyTorch,
which takes seconds. This module stands beside the package, not in it, so that help, the
version and complaints about the command line come at once.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

_EPILOG = """\
examples:
  compare scaffold SAEs with their plain twins, offline
    saelens-scaffold demo --quick
  see the training options of an architecture, then train on a local model and text
    saelens-scaffold train --architecture scaffold_batchtopk --help
    saelens-scaffold train --architecture scaffold_batchtopk --scaffold_rank 24 --k 32 \\
        --d_in 768 --d_sae 16384 --model_name ./my-model --dataset_path ./my-dataset \\
        --hook_name blocks.6.hook_resid_post --training_tokens 100000000 \\
        --output_path ./my-sae
  run an evaluation of SAEBench on scaffold SAEs
    saelens-scaffold run -m sae_bench.evals.core.main --help
"""

_RUN = """\
Run a module as `python -m MODULE ARGS...` does, with the scaffold architectures
registered, so that its SAEs can be scaffold SAEs. Model directories among ARGS are made
known to TransformerLens under the path given, and the embedded model as py-neox. All that
follows MODULE is the module's own.
"""
_RUN_EPILOG = """\
example: evaluate an SAE with SAELens's own evaluator
  saelens-scaffold run -m sae_lens.evals --help
"""

_DEMO = """\
Train scaffold SAEs and their plain twins on planted data and on the embedded language
model, offline, and compare them in one table and one picture.
"""
_DEMO_EPILOG = """\
example: three seeds, with mean and spread
  saelens-scaffold demo --seeds 3
"""


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command.

    Args:
        argv: The command line after the command's name; `sys.argv[1:]` if None.

    Returns:
        The exit status.

    Raises:
        SystemExit: Help and the version have been printed, the command line makes no
            sense, or the module that was run exits by itself.
    """
    argv = list(sys.argv[1:] if argv is None else argv)

    # What these two pass on never meets argparse, which would take parts of it for ours.
    if argv[:1] == ["train"]:
        from saelens_scaffold import cli

        return cli.train(argv[1:])
    if argv[:2] == ["run", "-m"] and len(argv) > 2:
        from saelens_scaffold import cli

        return cli.run_module(argv[2], argv[3:])

    parser, demo_parser = _build_parsers()
    if argv[:1] == ["demo"]:
        from saelens_scaffold import demo

        demo.add_arguments(demo_parser)
        return demo.run(parser.parse_args(argv))

    # What is left asks for help or the version, or is wrong: either way it ends here.
    if argv[:1] == ["run"]:
        parser.parse_args(argv)
        parser.error("write `run -m MODULE`, in two words and before everything else")
    parser.parse_args(argv or ["--help"])
    return 0


def _build_parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The whole command's parser, and that of `demo`, whose options are the demo's own."""
    parser = argparse.ArgumentParser(
        prog="saelens-scaffold",
        description="Scaffold SAEs in SAELens and SAEBench.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {version('saelens-scaffold')}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    run = commands.add_parser(
        "run",
        help="run any module with the scaffold architectures registered",
        usage="saelens-scaffold run -m MODULE ARGS...",
        description=_RUN,
        epilog=_RUN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("-m", metavar="MODULE", required=True, help="the module to run")
    commands.add_parser(
        "train", help="SAELens's training command line, with the scaffold architectures"
    )
    demo = commands.add_parser(
        "demo",
        help="train scaffold SAEs and their plain twins, and compare",
        description=_DEMO,
        epilog=_DEMO_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser, demo


if __name__ == "__main__":
    sys.exit(main())
