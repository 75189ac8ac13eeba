"""The command `saelens-scaffold`: what can be typed, and what it leads to.

`import saelens_scaffold` registers the architectures, so it imports SAELens and PyTorch,
which takes seconds. This module stands beside the package, not in it, so that help, the
version and complaints about the command line come at once.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec

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
  evaluate SAEs with evaluations of this package and of SAEBench, in one table
    saelens-scaffold eval core,dense_latents --sae_path ./my-sae --dataset python-stdlib
  compare SAEs at matched sparsity over several seeds, in a table and a page
    saelens-scaffold compare experiment.yaml
  publish SAEs so that everybody can load them
    saelens-scaffold upload ./my-sae --repo_id user/my-saes --license mit --dry-run
  run any other command line with scaffold SAEs
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

_RANK = """\
Read a language model's activations and suggest a scaffold's rank, with reasons: outlier
dimensions, the knee and the participation ratio of the PCA spectrum, parallel analysis,
and the dense latents that a plain SAE already has. Prints a table, and draws the spectrum.
"""
_RANK_EPILOG = """\
example, offline:
  saelens-scaffold rank --model py-neox --hook_name blocks.2.hook_resid_post \\
      --dataset python-stdlib
and after `saelens-scaffold demo`, with the dense latents of a plain SAE:
  saelens-scaffold rank --dataset python-stdlib \\
      --sae_path demo-output/saes/language_model/seed-0/BatchTopK
"""

_COMPARE = """\
Train SAEs that differ in what a configuration names (architecture, k, rank, seed, ...) on
the same activations, evaluate them, and compare each with its baseline at matched sparsity,
with intervals over seeds. Prints the comparisons, and writes results.json, results.csv and
a page to look at, report.html. What is finished is kept: repeat the command to go on after
an interruption.
"""
_COMPARE_EPILOG = """\
example, offline; then see what it needs with Gemma-2-2B on a GPU with 80 GB:
  saelens-scaffold compare benchmarks/paper/py-neox.yaml
  saelens-scaffold compare benchmarks/paper/gemma-2-2b-layer-12.yaml --plan --memory_gb 80
and show the paper's figures beside those of the first again:
  saelens-scaffold compare benchmarks/paper/py-neox.yaml --reference

a configuration:
  model_name: py-neox
  hook_name: blocks.2.hook_resid_post
  dataset_path: python-stdlib
  sae: {d_in: 256, d_sae: 2048}
  grid:
    architecture: [batchtopk, scaffold_batchtopk]
    k: [4, 12]
    scaffold_rank: [8]
    seed: [0, 1, 2]
  training: {training_tokens: 400000, context_size: 256, lr: 1.0e-3}
  evaluations:
    dense_latents: {n_tokens: 100000}
  evaluation_data: {dataset: python-stdlib}
"""

_UPLOAD = """\
Upload SAEs to the Hugging Face Hub. Under each SAE's id goes the SAE itself; under
ID/jumprelu the exact plain form of a scaffold SAE, which SAELens loads alone. Sparsity,
runner configuration and evaluation results go along, and a model card is written.
Everything is checked before anything is sent. An SAE is one commit: it is there whole or
not at all. After an interruption, repeat the command.
"""
_UPLOAD_EPILOG = """\
example: see what would go where, and the card, without network or token
  saelens-scaffold upload layer_12=./my-sae --repo_id user/my-saes --dry-run
then log in (`hf auth login`), and
  saelens-scaffold upload layer_12=./my-sae --repo_id user/my-saes --license mit
"""

_DEMO = """\
Train scaffold SAEs and their plain twins on planted data and on the embedded language
model, offline, and compare them in one table and one picture.
"""
_DEMO_EPILOG = """\
example: three seeds, with mean and spread
  saelens-scaffold demo --seeds 3
"""

# The registry knows them too, but knows SAELens as well, which takes seconds to import.
EVALUATIONS = {
    "of this package": (
        "dense_latents",
        "scaffold_ablation",
        "sparse_probing",
        "sparse_probing_sae_probes",
        "tpp",
    ),
    "of SAEBench": (
        "absorption",
        "autointerp",
        "core",
        "mdl",
        "meta_structure",
        "ravel",
        "scr",
        "unlearning",
    ),
}
"""What `saelens-scaffold eval` can be asked for."""

_EVAL = """\
Run evaluations of this package and of SAEBench on SAEs, and print one table: SAEs as
rows, headline metrics as columns. Each SAE's result is a JSON file of SAEBench's kind in
OUTPUT_FOLDER/NAME; a result that is there already is not computed again. The table alone
goes to the standard output. An evaluation that fails is reported as failed and makes the
exit status 1; the others are kept.
"""
_EVAL_EPILOG = """\
evaluations:
{names}

Where an evaluation asks about single dictionary latents, the sparse part of a scaffold
SAE is judged; where it needs the reconstruction, all of it.

example, offline, after `saelens-scaffold demo`:
  saelens-scaffold eval core,dense_latents --dataset python-stdlib \\
      --sae_path demo-output/saes/language_model/seed-0/*BatchTopK \\
      --set core.n_eval_reconstruction_batches=10 \\
      --set core.n_eval_sparsity_variance_batches=10
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
        from saelens_scaffold.training import command as cli

        return cli.train(argv[1:])
    if argv[:2] == ["run", "-m"] and len(argv) > 2:
        from saelens_scaffold.training import command as cli

        return cli.run_module(argv[2], argv[3:])

    parser, demo_parser = _build_parsers()
    if argv[:1] == ["eval"]:
        options = parser.parse_args(argv)
        _need_sae_bench(parser, "eval")
        from saelens_scaffold.evals import command

        return command.run(options)
    if argv[:1] == ["rank"]:
        options = parser.parse_args(argv)
        _need_sae_bench(parser, "rank")
        from saelens_scaffold.evals.rank import command as rank_command

        return rank_command.run(options)
    if argv[:1] == ["compare"]:
        options = parser.parse_args(argv)
        _need_sae_bench(parser, "compare")
        from saelens_scaffold.compare import command as compare_command

        return compare_command.run(options)
    if argv[:1] == ["upload"]:
        options = parser.parse_args(argv)
        from saelens_scaffold._util.errors import UserError, one_line
        from saelens_scaffold.hub import upload

        try:
            text, notes = upload.run(**vars(options))
        except UserError as error:
            print(f"saelens-scaffold upload: error: {one_line(error)}", file=sys.stderr)
            return error.exit_status
        print("\n".join(notes), file=sys.stderr)
        print(text)
        return 0
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


def _need_sae_bench(parser: argparse.ArgumentParser, command: str) -> None:
    if find_spec("sae_bench") is None:
        parser.exit(
            2,
            f"saelens-scaffold {command}: error: SAEBench is not installed; "
            'pip install "saelens-scaffold[bench]"\n',
        )


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
    _add_eval_arguments(
        commands.add_parser(
            "eval",
            help="evaluate SAEs, with one table of the results",
            description=_EVAL,
            epilog=_EVAL_EPILOG.format(
                names="\n".join(
                    f"  {whose}: {', '.join(names)}"
                    for whose, names in EVALUATIONS.items()
                )
            ),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _add_rank_arguments(
        commands.add_parser(
            "rank",
            help="suggest a scaffold's rank, from activations",
            description=_RANK,
            epilog=_RANK_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _add_compare_arguments(
        commands.add_parser(
            "compare",
            help="train and evaluate SAEs, and compare them at matched sparsity",
            description=_COMPARE,
            epilog=_COMPARE_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _add_upload_arguments(
        commands.add_parser(
            "upload",
            help="upload SAEs to the Hugging Face Hub, with a model card",
            description=_UPLOAD,
            epilog=_UPLOAD_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    demo = commands.add_parser(
        "demo",
        help="train scaffold SAEs and their plain twins, and compare",
        description=_DEMO,
        epilog=_DEMO_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser, demo


def add_evaluation_arguments(
    parser: argparse.ArgumentParser, output_folder: str
) -> None:
    """
    Add what every evaluation is told: which SAEs, and where and how to run.

    Args:
        parser: The parser of a command that runs evaluations.
        output_folder: Where results go if nothing else is said.
    """
    saes = parser.add_argument_group("SAEs")
    saes.add_argument(
        "--sae_path",
        nargs="+",
        metavar="DIR",
        help="directories of SAEs on disk; a name in the table is as much of the path's "
        "end as tells them apart",
    )
    saes.add_argument(
        "--sae_regex_pattern",
        metavar="REGEX",
        help="SAELens releases to take SAEs from; needs --sae_block_pattern",
    )
    saes.add_argument(
        "--sae_block_pattern", metavar="REGEX", help="ids of the SAEs in these releases"
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--output_folder",
        default=output_folder,
        metavar="DIR",
        help="folder for the results (default: %(default)s)",
    )
    run.add_argument(
        "--artifacts_path",
        default="artifacts",
        metavar="DIR",
        help="folder for stored activations, probes and texts (default: %(default)s)",
    )
    run.add_argument(
        "--force_rerun",
        action="store_true",
        help="evaluate again, and replace what is in the output folder",
    )
    run.add_argument(
        "--clean_up_activations",
        action="store_true",
        help="remove stored activations afterwards",
    )
    # As in SAEBench, whose flag of this name switches off what is on without it.
    run.add_argument(
        "--save_activations",
        action="store_false",
        help="do NOT store the language model's activations (SAEBench's flag, and its "
        "meaning: they are stored without it)",
    )
    run.add_argument(
        "--device",
        help="device to compute on (default: a GPU where there is one)",
    )


def _add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        "--model_name",
        dest="model_name",
        metavar="MODEL",
        help="language model: a name of TransformerLens, the directory of a local model, "
        "or py-neox (default: what the SAE was trained on)",
    )
    parser.add_argument(
        "--hook_name",
        metavar="HOOK",
        help="hook point, as blocks.12.hook_resid_post (default: that of the SAE)",
    )
    parser.add_argument(
        "--sae_path",
        metavar="DIR",
        help="a plain SAE that was trained there, whose dense latents count",
    )
    parser.add_argument(
        "--dataset",
        default="Skylion007/openwebtext",
        help="text: a dataset on the Hub, a local file or directory, or python-stdlib "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--dataset_split",
        metavar="SPLIT",
        help="its split (default: test of python-stdlib, else train)",
    )
    parser.add_argument("--text_column", default="text", metavar="COLUMN")
    parser.add_argument("--n_tokens", type=int, default=100_000, metavar="N")
    parser.add_argument("--context_size", type=int, metavar="N")
    parser.add_argument("--llm_batch_size", type=int, default=32, metavar="N")
    parser.add_argument(
        "--llm_dtype",
        default="float32",
        choices=["float32", "float64", "float16", "bfloat16"],
        help="dtype of the language model and of the SAE",
    )
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument(
        "--out",
        default="rank-output",
        metavar="DIR",
        help="folder for rank.json and rank.png (default: %(default)s)",
    )


def _add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="the experiment")
    parser.add_argument(
        "--output_path",
        metavar="DIR",
        help="folder for everything (default: CONFIG-output)",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="only say what would be trained, and what that needs",
    )
    parser.add_argument(
        "--reference",
        action="store_true",
        help="only show the published figures that the experiment names beside the results "
        "there are, with the definition of each; computes nothing",
    )
    parser.add_argument(
        "--memory_gb",
        type=float,
        metavar="GB",
        help="memory that training may use, in 10^9 bytes (default: 90 %% of what is free)",
    )
    parser.add_argument(
        "--tflops",
        type=float,
        metavar="N",
        help="with --plan: TFLOP/s that the device attains, to estimate the time",
    )
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error"
    )


def _add_upload_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "saes",
        nargs="+",
        metavar="[ID=]DIR",
        help="directory of an SAE, of a run of `compare`, or any with SAEs below it; without "
        "ID, ids are the SAEs' names or paths",
    )
    parser.add_argument(
        "--repo_id",
        required=True,
        metavar="USER/REPO",
        help="the repository, which is made if there is none",
    )
    parser.add_argument(
        "--dry-run",
        "--dry_run",
        action="store_true",
        help="only check, and show the files, the card, and what it changes in an existing "
        "README; needs no network and no token",
    )
    parser.add_argument(
        "--eval_results",
        nargs="+",
        metavar="DIR",
        help="output folders of `saelens-scaffold eval` (default: eval_results in each DIR)",
    )
    parser.add_argument(
        "--no_jumprelu",
        action="store_true",
        help="leave out the plain form of scaffold SAEs",
    )
    parser.add_argument(
        "--private", action="store_true", help="make a new repository private"
    )
    parser.add_argument(
        "--create_pr",
        action="store_true",
        help="open a pull request, as with a repository that is not yours",
    )
    parser.add_argument(
        "--revision", default="main", metavar="BRANCH", help="default: %(default)s"
    )
    parser.add_argument(
        "--overwrite_readme",
        action="store_true",
        help="replace a README that is in the repository",
    )
    card = parser.add_argument_group("model card")
    card.add_argument(
        "--license", metavar="ID", help="as the Hub calls it: mit, apache-2.0, ..."
    )
    card.add_argument(
        "--base_model",
        metavar="ID",
        help="the language model on the Hub (default: found by its name)",
    )
    card.add_argument(
        "--datasets",
        nargs="+",
        metavar="ID",
        help="the training data on the Hub (default: found by its name)",
    )


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names",
        metavar="NAME[,NAME...]",
        help="the evaluations; an unknown name lists them",
    )
    add_evaluation_arguments(parser, output_folder="eval_results")
    config = parser.add_argument_group(
        "configuration", "What is left out has the evaluation's own default."
    )
    config.add_argument(
        "--model",
        "--model_name",
        dest="model_name",
        metavar="MODEL",
        help="language model: a name of TransformerLens, the directory of a local model, "
        "or py-neox (default: what the SAEs were trained on)",
    )
    config.add_argument(
        "--dataset",
        help="text: a dataset on the Hub, a local file or directory, or python-stdlib",
    )
    config.add_argument(
        "--dataset_split",
        metavar="SPLIT",
        help="its split (default: test of python-stdlib, else the evaluation's own)",
    )
    config.add_argument(
        "--labelled_dataset",
        metavar="DATASET",
        help="text with labels, for the probing evaluations (default: --dataset) and for "
        "the topics of scaffold_ablation (default: --dataset if that is python-stdlib)",
    )
    config.add_argument("--text_column", metavar="COLUMN", help="column with the text")
    config.add_argument("--label_column", metavar="COLUMN", help="column with labels")
    config.add_argument(
        "--random_seeds",
        nargs="+",
        type=int,
        metavar="SEED",
        help="seeds; an evaluation that has only one takes the first",
    )
    config.add_argument("--llm_batch_size", type=int, metavar="N")
    config.add_argument(
        "--llm_dtype",
        choices=["float32", "float64", "float16", "bfloat16"],
        help="dtype of the language model and of the SAEs",
    )
    config.add_argument("--sae_batch_size", type=int, metavar="N")
    config.add_argument(
        "--baseline",
        metavar="SAE",
        help="name of the SAE that dense_latents compares the others with",
    )
    config.add_argument(
        "--api_key_file",
        metavar="FILE",
        help="file with the OpenAI key of autointerp (default: $OPENAI_API_KEY)",
    )
    config.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="NAME.FIELD=VALUE",
        help="any other field of an evaluation's configuration, its value as JSON or "
        "text; an unknown field lists them; can be given several times",
    )
    parser.add_argument(
        "--debug", action="store_true", help="show the tracebacks of what failed"
    )


if __name__ == "__main__":
    sys.exit(main())
