"""SAEBench's sparse probing and targeted probe perturbation (TPP), over several seeds.

Sparse probing asks how well a probe on a few latents tells a concept; TPP, whether the
latents that matter to one class's probe matter to that one alone.
"""

from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import Field
from sae_bench.evals.scr_and_tpp import main as tpp
from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
from sae_bench.evals.scr_and_tpp.eval_output import TppEvalOutput as SaeBenchTppOutput
from sae_bench.evals.sparse_probing import eval_config as sparse_probing_config
from sae_bench.evals.sparse_probing import eval_output as sparse_probing_output
from sae_bench.evals.sparse_probing import main as sparse_probing
from sae_bench.sae_bench_utils import dataset_info

from saelens_scaffold._util.configs import documented
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.eval_configs import LlmConfig
from saelens_scaffold.evals.saebench import over_seeds, replacements
from saelens_scaffold.evals.saebench.shared_runs import SharedRuns
from saelens_scaffold.evals.saes import SelectedSAE

_CACHED_LATENTS = 2**21
"""Latents of a batch on a processor: 8 MiB of them."""

CAVEAT = (
    "TPP is noisy: at its canonical settings it fails several of the reliability checks of "
    "arXiv 2605.18229 (Are Sparse Autoencoder Benchmarks Reliable?). Run several seeds, and "
    "call no SAE better while the intervals overlap."
)


@documented
class SparseProbingEvalConfig(
    over_seeds.OverSeedsEvalConfig,
    LlmConfig,
    sparse_probing_config.SparseProbingEvalConfig,
):
    """SAEBench's configuration of sparse probing, with seeds and other text."""

    k_values: over_seeds.LatentCounts = Field(default_factory=lambda: [1, 2, 5])
    """Numbers of latents, or residual stream channels, that a probe reads."""


@documented(title="Sparse Probing")
class SparseProbingEvalOutput(
    over_seeds.OverSeedsEvalOutput, sparse_probing_output.SparseProbingEvalOutput
):
    """
    SAEBench's sparse probing over several seeds: how well a few latents of the sparse dictionary, picked for each concept, let a linear probe tell the concept. Metrics are means over the seeds.
    """

    eval_config: SparseProbingEvalConfig  # pyright: ignore[reportGeneralTypeIssues]
    """Configuration of the evaluation."""


@documented
class TppEvalConfig(over_seeds.OverSeedsEvalConfig, LlmConfig, ScrAndTppEvalConfig):
    """SAEBench's configuration of TPP, with seeds and other text."""

    perform_scr: Literal[False] = False
    """Always false: this is TPP. SCR is an evaluation of its own, `scr`."""
    n_values: Annotated[
        list[Literal[2, 5, 10, 20, 50, 100, 500]], over_seeds.Distinct
    ] = Field(default_factory=lambda: [2, 5, 10, 20, 50, 100, 500])
    """Numbers of latents that are ablated."""


@documented(title="TPP")
class TppEvalOutput(over_seeds.OverSeedsEvalOutput, SaeBenchTppOutput):
    """
    SAEBench's targeted probe perturbation over several seeds: how far ablating the latents that matter to one class's probe harms that probe, and that one alone. Metrics are means over the seeds.
    """

    eval_config: TppEvalConfig  # pyright: ignore[reportGeneralTypeIssues]
    """Configuration of the evaluation."""
    caveat: str = CAVEAT
    """What is known of this metric's reliability."""


def _check_width(config: TppEvalConfig, sae: SelectedSAE) -> None:
    largest, d_sae = max(config.n_values), sae.sae.cfg.d_sae
    if largest > d_sae:
        raise UserError(
            f"n_values has {largest}, but SAE {sae.label!r} has {d_sae} sparse latents"
        )


def _run(main: ModuleType, run: over_seeds.SeedRun, saes: over_seeds.NamedSAEs) -> None:
    texts, config, device = run.texts, run.config, run.call.device
    model: Any = SharedRuns(run.model, run.call.kept)
    if device == "cpu":
        config = replace(config, sae_batch_size=_cached_batch_size(config, saes))
    with replacements.labelled_texts(texts), replacements.lent_model(main, model):
        results, artifacts = str(run.folder / "results"), str(run.folder)
        main.run_eval(config, saes, device, results, artifacts_path=artifacts)


def _cached_batch_size(config: Any, saes: over_seeds.NamedSAEs) -> int:
    """
    Number of texts, at most the configured one, whose latents a processor can cache.

    SAEBench's default makes tensors that the system has to hand out and to clear anew each
    time, which takes as long as the SAE does.
    """
    width = max(sae.cfg.d_sae for _, sae in saes)
    n_texts = _CACHED_LATENTS // (width * config.context_length)
    return min(config.sae_batch_size, max(1, n_texts))


SPARSE_PROBING = over_seeds.ProbingEvaluation(
    "sparse_probing",
    dataset_info.chosen_classes_per_dataset.__contains__,
    partial(over_seeds.check_set_sizes, "probe_train_set_size", "probe_test_set_size"),
    partial(_run, sparse_probing),
).implementation(SparseProbingEvalConfig, SparseProbingEvalOutput)

TPP = over_seeds.ProbingEvaluation(
    "tpp",
    dataset_info.chosen_classes_per_dataset.__contains__,
    partial(over_seeds.check_set_sizes, "train_set_size", "test_set_size"),
    partial(_run, tpp),
    _check_width,
    of_stand_in={"n_values": [2]},
    bounds=(-2.0, 2.0),  # a drop of one accuracy, less the mean drop of others
).implementation(TppEvalConfig, TppEvalOutput)
