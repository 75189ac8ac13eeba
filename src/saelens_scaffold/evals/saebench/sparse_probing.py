"""Sparse probing: how well a probe on a few latents of the dictionary tells a concept."""

from pydantic import Field, PositiveInt
from sae_bench.evals.sparse_probing import eval_config as sae_bench_config
from sae_bench.evals.sparse_probing import eval_output as sae_bench_output
from sae_bench.evals.sparse_probing import main
from sae_bench.sae_bench_utils import dataset_info

from saelens_scaffold._util.documented import documented
from saelens_scaffold.evals.labelled_data import LabelledText
from saelens_scaffold.evals.model_config import LlmConfig
from saelens_scaffold.evals.saebench.over_seeds import (
    LatentCounts,
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

_DEFAULTS = sae_bench_config.SparseProbingEvalConfig()


@documented
class SparseProbingEvalConfig(
    OverSeedsEvalConfig, LlmConfig, sae_bench_config.SparseProbingEvalConfig
):
    """SAEBench's configuration of sparse probing, with seeds and text of one's own."""

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
    k_values: LatentCounts = Field(default_factory=lambda: list(_DEFAULTS.k_values))
    """Numbers of latents, or residual stream channels, that a probe reads."""


@documented(title="Sparse Probing")
class SparseProbingEvalOutput(
    OverSeedsEvalOutput, sae_bench_output.SparseProbingEvalOutput
):
    """
    SAEBench's sparse probing over several seeds: how well a few latents of the sparse dictionary, picked for each concept, let a linear probe tell the concept. Metrics are means over the seeds.
    """

    eval_config: SparseProbingEvalConfig  # pyright: ignore[reportGeneralTypeIssues]
    """Configuration of the evaluation."""


def _check_text(config: SparseProbingEvalConfig, text: LabelledText) -> None:
    check_set_sizes(text, config, "probe_train_set_size", "probe_test_set_size")


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
    "sparse_probing",
    sae_bench_config.SparseProbingEvalConfig,
    _run,
    knows=dataset_info.chosen_classes_per_dataset.__contains__,
    check_text=_check_text,
).implementation(SparseProbingEvalConfig, SparseProbingEvalOutput)
