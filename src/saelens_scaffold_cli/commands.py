"""The commands: options, help, and the function of the package that each one calls.

The docstrings are what `--help` shows: a summary, a description, and an example.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from saelens_scaffold_cli.parsing import CommandParser, Count, option, parser_of

Dtype = Literal["float32", "float64", "float16", "bfloat16"]
ModelClass = Literal["HookedTransformer", "TransformerBridge", "AutoModelForCausalLM"]


class Output(NamedTuple):
    """What a command shows."""

    text: str = ""
    """For the standard output."""
    notes: Sequence[str] = ()
    """Lines for the standard error."""
    status: int = 0
    """Exit status."""


@dataclass
class Command:
    """What all commands have."""

    debug: bool = field(default=False, kw_only=True)
    """Show the traceback of an error, also of a mistake in the input."""

    forwards: ClassVar[bool] = False
    """Whether it runs another command line, whose output is left as it is."""
    interrupts_itself: ClassVar[bool] = False
    """Whether that deals with interruptions, too."""
    if_interrupted: ClassVar[str] = (
        "What is finished is in {output_path}; repeat the command to go on."
    )

    @classmethod
    def parser(cls) -> CommandParser:
        """The command's parser."""
        return parser_of(cls, prog=f"saelens-scaffold {cls.__name__.lower()}")

    @classmethod
    def parse(cls, argv: list[str]) -> "Command":
        """
        Read the options.

        Raises:
            SystemExit: Help has been printed (0), or the options are wrong (2).
        """
        return cls(**vars(cls.parser().parse_args(argv)))

    def arguments(self) -> dict[str, Any]:
        """The options as keyword arguments, without those of all commands."""
        names = [each.name for each in fields(self) if each.name != "debug"]
        return {name: getattr(self, name) for name in names}

    def run(self) -> Output:
        """Do it."""
        raise NotImplementedError


@dataclass
class Shareable(Command):
    """What the machines of a cluster can share."""

    ray: str | None = option(
        None, metavar="ADDRESS", nargs="?", const="local", kw_only=True
    )
    """Share the work among the machines of a Ray cluster (auto, HOST:PORT or
    ray://HOST:PORT), or, without an address, among this machine's GPUs or cores."""
    cpus_per_task: Count | None = option(None, kw_only=True)
    """With --ray, CPU cores of each training or evaluation (default: $OMP_NUM_THREADS,
    else 1, or a GPU's share)."""


@dataclass
class Forwarding(Command):
    """What runs another command line, whose output is its own."""

    args: list[str]

    forwards = True
    if_interrupted = ""


@dataclass
class Train(Forwarding):
    """
    Train an SAE: SAELens's training command line, with the scaffold architectures.
    """

    @classmethod
    def parse(cls, argv: list[str]) -> "Train":
        # All else, help included, is SAELens's.
        args = [arg for arg in argv if arg != "--debug"]
        return cls(args, debug="--debug" in argv)

    def run(self) -> Output:
        from saelens_scaffold.training.command import train

        return Output(train(self.args))


@dataclass
class Run(Forwarding):
    """
    Run any module with the scaffold architectures registered.

    Runs it as `python -m MODULE ARGS...` does. Model directories among ARGS are made
    known to TransformerLens under the path given, and the embedded model as py-neox.
    All that follows MODULE is the module's own.

    example: evaluate an SAE with SAELens's own evaluator
      saelens-scaffold run -m sae_lens.evals --help
    """

    module: str = option(MISSING, "-m", kw_only=True)
    """The module."""

    interrupts_itself = True

    @classmethod
    def parse(cls, argv: list[str]) -> "Run":
        parser = cls.parser()
        parser.usage = "saelens-scaffold run [--debug] -m MODULE ARGS..."
        end = argv.index("-m") + 2 if "-m" in argv else len(argv)
        options = parser.parse_args(argv[:end])
        if "-m" not in argv:
            parser.error("write -m MODULE in two words")
        return cls(argv[end:], **vars(options))

    def run(self) -> Output:
        from saelens_scaffold.training.command import run_module

        run_module(self.module, self.args)
        return Output()


@dataclass
class Eval(Shareable):
    """
    Evaluate SAEs, with one table of the results.

    Runs evaluations of this package and of SAEBench on SAEs, and prints one table: SAEs
    as rows, headline metrics as columns. Each SAE's result is a JSON file in SAEBench's
    format in OUTPUT_PATH/NAME; a result that is there already is not computed again.
    Only the table goes to the standard output. If an evaluation fails, its reason is
    printed, the others are kept, and the exit status is 1.

    evaluations:
      of this package: dark_matter, dense_latents, scaffold_ablation,
        sparse_probing, sparse_probing_sae_probes, tpp
      of SAEBench: absorption, autointerp, core, mdl, meta_structure, ravel, scr,
        unlearning

    Evaluations that ask about single dictionary latents judge the sparse part of a
    scaffold SAE; those that need the reconstruction judge all of it.

    example, offline, after `saelens-scaffold demo`:
      saelens-scaffold eval core,dense_latents --dataset python-stdlib \\
          --sae_path demo-output/language_model/saes/*batchtopk* \\
          --set core.n_eval_reconstruction_batches=10 \\
          --set core.n_eval_sparsity_variance_batches=10
    """

    names: str = option(metavar="NAME[,NAME...]")
    """The evaluations; an unknown name lists them."""
    sae_path: list[str] | None = None
    """Directories of SAEs on disk; in the table an SAE's name is as much of the end of
    its path as tells it apart."""
    sae_regex_pattern: str | None = None
    """SAELens releases to take SAEs from; needs --sae_block_pattern."""
    sae_block_pattern: str | None = None
    """Ids of the SAEs in these releases."""
    output_path: str = "eval_results"
    """Folder for the results."""
    artifacts_path: str = "artifacts"
    """Folder for activations, probes and texts while an evaluation runs."""
    force_rerun: bool = False
    """Evaluate again, and replace the results in the output folder."""
    device: str | None = None
    """Device to compute on (default: a GPU if there is one)."""
    model_name: str | None = option(None, "--model", "--model_name", metavar="MODEL")
    """Language model: a name in TransformerLens, the directory of a local model, or
    py-neox (default: the one the SAEs were trained on)."""
    model_class_name: ModelClass | None = None
    """Its class (default: that which the SAEs were trained on)."""
    dataset: str | None = None
    """Text: a dataset on the Hub, a local file or directory, or python-stdlib."""
    dataset_split: str | None = None
    """Its split (default: test of python-stdlib, else the evaluation's own)."""
    labelled_dataset: str | None = None
    """Text with labels, for the probing evaluations (default: --dataset) and for the
    topics of scaffold_ablation (default: --dataset if that is python-stdlib)."""
    text_column: str | None = None
    """Column with the text."""
    label_column: str | None = None
    """Column with the labels."""
    random_seeds: list[int] | None = option(None, metavar="SEED")
    """Seeds; an evaluation that has only one takes the first."""
    llm_batch_size: Count | None = None
    """Batch size of the language model."""
    llm_dtype: Dtype | None = None
    """Data type of the language model and of the SAEs."""
    sae_batch_size: Count | None = None
    """Batch size of the SAEs."""
    baseline: str | None = option(None, metavar="SAE")
    """Name of the SAE in the call that the others are compared with."""
    api_key_file: str | None = None
    """File with the OpenAI key of autointerp (default: $OPENAI_API_KEY)."""
    settings: list[str] | None = option(
        None, "--set", metavar="NAME.FIELD=VALUE", action="append", nargs=None
    )
    """Any other field of an evaluation's configuration, its value as JSON or text; an
    unknown field lists them; can be given several times."""

    def run(self) -> Output:
        from saelens_scaffold.evals import runner

        arguments = self.arguments()
        arguments.update(sae_path=self.sae_path or [], settings=self.settings or [])
        report = runner.evaluate(**arguments, debug=self.debug)
        return Output(report.text, report.failures, 1 if report.failures else 0)


@dataclass
class Rank(Command):
    """
    Suggest a scaffold's rank, from activations.

    Reads a language model's activations and suggests a rank, with reasons: outlier
    dimensions, the knee and the participation ratio of the PCA spectrum, parallel
    analysis, and the dense latents that a plain SAE already has. Prints a table, and
    draws the spectrum.

    example, offline:
      saelens-scaffold rank --model py-neox --hook_name blocks.2.hook_resid_post \\
          --dataset python-stdlib
    and after `saelens-scaffold demo`, with the dense latents of a plain SAE:
      saelens-scaffold rank --dataset python-stdlib \\
          --sae_path demo-output/language_model/saes/batchtopk-b_dec_init_mean-seed_0
    """

    model_name: str | None = option(None, "--model", "--model_name", metavar="MODEL")
    """Language model: a name in TransformerLens, the directory of a local model, or
    py-neox (default: the one the SAE was trained on)."""
    hook_name: str | None = option(None, metavar="HOOK")
    """Hook point, as in blocks.12.hook_resid_post (default: that of the SAE)."""
    sae_path: str | None = None
    """A plain SAE that was trained there, whose dense latents count."""
    model_class_name: ModelClass | None = None
    """Its class (default: the SAE's, else HookedTransformer)."""
    dataset: str = "Skylion007/openwebtext"
    """Text: a dataset on the Hub, a local file or directory, or python-stdlib."""
    dataset_split: str | None = None
    """Its split (default: test of python-stdlib, else train)."""
    text_column: str = "text"
    """Column with the text."""
    n_tokens: Count = 100_000
    """Number of tokens to read."""
    context_size: Count | None = None
    """Tokens per context (default: the SAE's, else 128)."""
    llm_batch_size: Count = 32
    """Batch size of the language model."""
    llm_dtype: Dtype = "float32"
    """Data type of the language model and of the SAE."""
    device: str | None = None
    """Device to compute on (default: a GPU if there is one)."""
    output_path: str = "rank-output"
    """Folder for rank.json and rank.png."""

    if_interrupted = ""

    def run(self) -> Output:
        from saelens_scaffold.evals.rank import suggest_rank

        return Output(suggest_rank(**self.arguments()))


@dataclass
class Compare(Shareable):
    """
    Train and evaluate SAEs, and compare them at matched sparsity.

    Trains SAEs that differ in what a configuration names (architecture, k, rank, seed,
    ...) on the same activations, evaluates them, and compares each with its baseline at
    matched sparsity, with intervals over seeds. Prints the comparisons, and writes
    results.json, results.csv and a page, report.html. What is finished is kept: repeat
    the command to go on after an interruption.

    example, offline; then see what would be trained with Gemma-2-2B:
      saelens-scaffold compare paper/py-neox
      saelens-scaffold compare paper/gemma-2-2b-layer-12 --plan
    and show the paper's figures beside those of the first again:
      saelens-scaffold compare paper/py-neox --reference

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

    config: str = option(metavar="CONFIG")
    """The experiment: a file, or the name of one in this package, as paper/py-neox."""
    output_path: str | None = None
    """Folder for everything (default: CONFIG-output)."""
    plan: bool = False
    """Only check the experiment, and say what would be trained and compared."""
    reference: bool = False
    """Only show the published figures that the experiment names beside the results so
    far, with the definition of each; computes nothing."""
    saes_per_wave: Count | None = None
    """Number of SAEs that are trained together (default: as many as memory holds)."""
    device: str | None = None
    """Device to compute on (default: a GPU if there is one)."""

    def __post_init__(self):
        if self.output_path is None:
            self.output_path = f"{Path(self.config).stem}-output"

    def run(self) -> Output:
        from saelens_scaffold import compare

        return Output(compare.run(**self.arguments(), command=self._command_line()))

    def _command_line(self) -> str:
        """The command, as far as results depend on it."""
        words = ["saelens-scaffold", "compare", self.config]
        for name in ("output_path", "saes_per_wave", "device"):
            value = getattr(self, name)
            words += [] if value is None else [f"--{name}", str(value)]
        return shlex.join(words)


@dataclass
class Upload(Command):
    """
    Upload SAEs to the Hugging Face Hub, with a model card.

    The SAE itself goes under its id; the exact plain form of a scaffold SAE, which
    SAELens loads alone, under ID/jumprelu. Sparsity, runner configuration and
    evaluation results go along, and a model card is written. Everything is checked
    before anything is sent. An SAE is one commit: it is there whole or not at all.
    After an interruption, repeat the command.

    example: see what would go where, and the card, without network or token
      saelens-scaffold upload layer_12=./my-sae --repo_id user/my-saes --dry-run
    then log in (`hf auth login`), and
      saelens-scaffold upload layer_12=./my-sae --repo_id user/my-saes --license mit
    """

    saes: list[str] = option(metavar="[ID=]DIR")
    """Directory of an SAE, of a run of `compare`, or any with SAEs below it; without
    ID, ids are the SAEs' names or paths. Both may contain =, as in k=4,rank=8=./my-sae:
    DIR is what is a directory."""
    repo_id: str = option(kw_only=True, metavar="USER/REPO")
    """The repository, which is created if there is none."""
    dry_run: bool = option(False, "--dry-run", "--dry_run")
    """Only check, and show the files, the card, and what it changes in an existing
    README; needs no network and no token."""
    eval_results: list[str] | None = option(None, metavar="DIR")
    """Output folders of `saelens-scaffold eval` (default: eval_results in each DIR)."""
    no_jumprelu: bool = False
    """Leave out the plain form of scaffold SAEs."""
    private: bool = False
    """Make a new repository private."""
    create_pr: bool = False
    """Open a pull request, as with a repository that is not yours."""
    revision: str = option("main", metavar="BRANCH")
    """Branch to commit to."""
    overwrite_readme: bool = False
    """Replace the repository's README."""
    license: str | None = option(None, metavar="ID")
    """Licence on the card, as the Hub calls it: mit, apache-2.0, ..."""
    base_model: str | None = option(None, metavar="ID")
    """The language model on the Hub (default: found by its name)."""
    datasets: list[str] | None = option(None, metavar="ID")
    """The training data on the Hub (default: found by its name)."""

    if_interrupted = "SAEs are complete or not there; repeat the command to go on."

    def run(self) -> Output:
        from saelens_scaffold.hub import upload

        show_progress = sys.stderr.isatty()
        return Output(*upload.run(**self.arguments(), show_progress=show_progress))


@dataclass
class Export(Command):
    """
    Make an SAE of a training's checkpoint, or a plain one of a scaffold SAE.

    A checkpoint's weights are those of a training SAE, for activations at the scale of
    the training. Saves the SAE in the form in which SAEs are used, with the scale folded
    into the weights and all metadata. Says which threshold it has: the running average
    of a BatchTopK training lags in its first steps.

    With --form, makes a plain SAE of a checkpoint or of a saved SAE, for programs that
    know no scaffold, as sae-dashboard and Neuronpedia's exporter.

    example: evaluate a checkpoint of `saelens-scaffold train`
      saelens-scaffold export checkpoints/abc123/500000 my-sae
      saelens-scaffold eval dense_latents --sae_path my-sae --dataset python-stdlib
    """

    checkpoint: str = option(metavar="CHECKPOINT")
    """Directory of an SAE in a checkpoint of SAELens or of `saelens-scaffold train`; with
    --form, that of a saved SAE too."""
    output_path: str = option(metavar="OUTPUT")
    """Directory to make for the SAE."""
    form: Literal["jumprelu", "sparse"] | None = None
    """Plain form of a scaffold SAE, which SAELens loads alone: the whole SAE, with the
    same outputs, or its sparse dictionary (default: the scaffold SAE itself)."""

    if_interrupted = "There is no {output_path}."

    def run(self) -> Output:
        from saelens_scaffold.training import export

        return Output(*export.run(**self.arguments()))


@dataclass
class Absorb(Command):
    """
    Give an SAE that exists a scaffold, in one pass and without training.

    The scaffold is the low-rank linear map that best predicts the SAE's error from its
    input, by least squares. The dictionary stays as it is. Prints how much of the
    variance of held-out text is explained with each rank, and saves the SAE with the
    scaffold as a scaffold_jumprelu SAE, with the curve in absorb.json. It never explains
    less of held-out text than the SAE did.

    Takes standard, jumprelu (BatchTopK is saved as that), gated and scaffold_jumprelu
    SAEs, whose latents fire as they did, and topk SAEs, whose k becomes the threshold at
    which k latents fire per token on average.

    example, offline, after `saelens-scaffold demo`:
      saelens-scaffold absorb \\
          demo-output/language_model/saes/batchtopk-b_dec_init_mean-seed_0 \\
          --dataset python-stdlib --output_path absorbed
    """

    sae: str = option(metavar="SAE")
    """Directory of an SAE, or RELEASE/SAE_ID of SAELens."""
    output_path: str = option(kw_only=True, metavar="DIR")
    """Directory to make for the SAE with the scaffold."""
    rank: int | None = None
    """Rank of the scaffold, smaller where that explains more (default: the knee of the
    curve up to d_in / 4)."""
    drop_dense: float | None = option(None, metavar="FREQUENCY")
    """First take out the latents that fire on more than this share of the tokens, as
    0.1, so that the scaffold absorbs what they wrote."""
    model_name: str | None = option(None, "--model", "--model_name", metavar="MODEL")
    """Language model: a name in TransformerLens, the directory of a local model, or
    py-neox (default: the one the SAE was trained on)."""
    model_class_name: ModelClass | None = None
    """Its class (default: that which the SAE was trained on)."""
    dataset: str = "Skylion007/openwebtext"
    """Text: a dataset on the Hub, a local file or directory, or python-stdlib."""
    dataset_split: str = "train"
    """Its split."""
    held_out_split: str | None = None
    """Split of the held-out text (default: test of python-stdlib, else the text that
    follows)."""
    text_column: str = "text"
    """Column with the text."""
    n_tokens: Count = 300_000
    """Number of tokens to fit the scaffold on."""
    held_out_tokens: Count = 100_000
    """Number of held-out tokens to choose the rank on."""
    context_size: Count | None = None
    """Tokens per context (default: the SAE's, else 128)."""
    llm_batch_size: Count = 32
    """Batch size of the language model."""
    llm_dtype: Dtype = "float32"
    """Data type of the language model."""
    device: str | None = None
    """Device to compute on (default: a GPU if there is one)."""

    if_interrupted = "There is no {output_path}."

    def run(self) -> Output:
        from saelens_scaffold import absorb

        return Output(absorb.run(**self.arguments()))


@dataclass
class Inspect(Command):
    """
    Look inside scaffolds and dictionaries.

    Finds the principal axes of each scaffold's output, and says of each what explains its
    coordinate, in which contexts it is strongest, which tokens it promotes, and what the
    language model loses without it. Does the same for dense latents, lists the contexts
    and promoted tokens of all latents, and matches the latents of several SAEs. What is
    found already, for the same SAEs, model and text, is not computed again.

    example, offline, after `saelens-scaffold demo`: a scaffold SAE beside its plain twin
      saelens-scaffold inspect \\
          demo-output/language_model/saes/batchtopk-b_dec_init_mean-seed_0 \\
          demo-output/language_model/saes/scaffold_batchtopk-seed_0 \\
          --dataset python-stdlib
    """

    saes: list[str] = option(metavar="SAE")
    """Directories of SAEs of one hook point; the others are compared with the first."""
    output_path: str = option("inspect-output", "--output_path", "--out")
    """Folder for inspect.html, a page to look at, and inspect.json."""
    force_rerun: bool = False
    """Inspect again, and replace what is there."""
    model_name: str | None = option(None, "--model", "--model_name", metavar="MODEL")
    """Language model: a name in TransformerLens, the directory of a local model, or
    py-neox (default: the one the SAEs were trained on)."""
    model_class_name: ModelClass | None = None
    """Its class (default: that which the SAEs were trained on)."""
    dataset: str | None = option(None, "--dataset", "--text")
    """Text: a dataset on the Hub, a local file or directory, or python-stdlib (default:
    Skylion007/openwebtext)."""
    dataset_split: str | None = None
    """Its split (default: test of python-stdlib, else train)."""
    text_column: str = "text"
    """Column with the text."""
    label_column: str = "label"
    """Column with the topic of each text, if there is one."""
    n_tokens: Count = 200_000
    """Number of tokens to inspect."""
    n_removal_tokens: Count = 8_192
    """Number of these on which each direction and dense latent is removed."""
    context_size: Count | None = None
    """Tokens per context (default: the SAEs', else 128)."""
    llm_batch_size: Count = 32
    """Batch size of the language model."""
    llm_dtype: Dtype = "float32"
    """Data type of the language model and of the SAEs."""
    device: str | None = None
    """Device to compute on (default: a GPU if there is one)."""

    if_interrupted = ""

    def run(self) -> Output:
        from saelens_scaffold import inspect

        return Output(inspect.run(**self.arguments()))


@dataclass
class Demo(Shareable):
    """
    Train scaffold SAEs and their plain twins, and compare them.

    Trains on planted data and on the embedded language model, offline, and prints
    tables and draws a picture.

    example: three seeds, with mean and spread
      saelens-scaffold demo --seeds 3
    """

    seed: int = 0
    """First seed."""
    seeds: Count = 1
    """Number of seeds, over which mean and spread are shown."""
    quick: bool = False
    """Train for a fraction of the time: shows that everything works, not what scaffolds
    do."""
    output_path: str = "demo-output"
    """Folder for the SAEs, their results and demo.png; finished work is not done again."""

    def run(self) -> Output:
        from saelens_scaffold import demo

        return Output(demo.run(**self.arguments()))


COMMANDS: dict[str, type[Command]] = {
    command.__name__.lower(): command
    for command in (
        Train,
        Eval,
        Rank,
        Absorb,
        Compare,
        Inspect,
        Export,
        Upload,
        Demo,
        Run,
    )
}
"""All commands, by name."""
