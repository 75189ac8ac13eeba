"""Targeted probe perturbation (TPP): whether the latents that matter to one class's probe
matter to that one alone."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt
from sae_bench.evals.scr_and_tpp import eval_output as sae_bench_output
from sae_bench.evals.scr_and_tpp import main
from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
from sae_bench.sae_bench_utils import dataset_info

from saelens_scaffold._util.documented import documented
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.labelled_data import LabelledText
from saelens_scaffold.evals.model_config import LlmConfig
from saelens_scaffold.evals.saebench.over_seeds import (
    Distinct,
    OverSeedsEvalConfig,
    OverSeedsEvalOutput,
    ProbingEvaluation,
    SeedRun,
    check_set_sizes,
)
from saelens_scaffold.evals.saebench.replacements import (
    labelled_texts,
    lent_model,
    replaced,
)
from saelens_scaffold.evals.selected_saes import SelectedSAE

_DEFAULTS = ScrAndTppEvalConfig()

CAVEAT = (
    "TPP is noisy: at its canonical settings it fails several of the reliability checks of "
    "arXiv 2605.18229 (Are Sparse Autoencoder Benchmarks Reliable?). Run several seeds, and "
    "call no SAE better while the intervals overlap."
)


@documented
class TppEvalConfig(OverSeedsEvalConfig, LlmConfig, ScrAndTppEvalConfig):
    """SAEBench's configuration of TPP, with seeds and text of one's own."""

    perform_scr: Literal[False] = False
    """Always false: this is TPP. SCR is an evaluation of its own, `scr`."""
    dataset_names: list[str] = Field(
        default_factory=lambda: list(_DEFAULTS.dataset_names)
    )
    """SAEBench's names of its datasets, or any other labelled text: a dataset on the Hub, a
    local directory or file (.parquet, .jsonl, .csv), or python-stdlib for the embedded
    text."""
    context_length: PositiveInt = _DEFAULTS.context_length
    """Tokens of each text that are read; the rest is cut off."""
    sae_batch_size: PositiveInt = _DEFAULTS.sae_batch_size
    """Texts that an SAE encodes at a time."""
    n_values: Annotated[list[Literal[2, 5, 10, 20, 50, 100, 500]], *Distinct] = Field(
        default_factory=lambda: list(_DEFAULTS.n_values)
    )
    """Numbers of latents that are ablated."""


@documented(title="TPP")
class TppEvalOutput(OverSeedsEvalOutput, sae_bench_output.TppEvalOutput):
    """
    SAEBench's targeted probe perturbation over several seeds: how far ablating the latents that matter to one class's probe harms that probe, and that one alone. Metrics are means over the seeds.
    """

    eval_config: TppEvalConfig  # pyright: ignore[reportGeneralTypeIssues]
    """Configuration of the evaluation."""
    caveat: str = CAVEAT
    """What is known of this metric's reliability."""


def _check_text(config: TppEvalConfig, text: LabelledText) -> None:
    check_set_sizes(text, config, "train_set_size", "test_set_size")


def _check_sae(config: TppEvalConfig, sae: SelectedSAE) -> None:
    if max(config.n_values) > sae.sae.cfg.d_sae:
        raise UserError(
            f"n_values has {max(config.n_values)}, but SAE {sae.label!r} has no more than "
            f"{sae.sae.cfg.d_sae} sparse latents to ablate; give smaller n_values"
        )


def _run(run: SeedRun) -> None:
    with replaced([*labelled_texts(run.texts), *lent_model(main, run.model)]):
        main.run_eval(
            run.seed_config,
            run.saes,
            run.device,
            str(run.folder / "results"),
            artifacts_path=str(run.folder),
        )


IMPLEMENTATION = ProbingEvaluation(
    "tpp",
    ScrAndTppEvalConfig,
    _run,
    knows=dataset_info.chosen_classes_per_dataset.__contains__,
    check_text=_check_text,
    check_sae=_check_sae,
    # a drop of one accuracy, less the mean drop of others
    bounds=(-2.0, 2.0),
).implementation(TppEvalConfig, TppEvalOutput)
