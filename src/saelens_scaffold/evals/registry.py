"""Every evaluation that can be run by name: this package's own, and SAEBench's."""

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.bounds import (
    AT_MOST_ONE,
    NOT_NEGATIVE,
    SHARE,
    UNBOUNDED,
    Bounds,
)
from saelens_scaffold.plugins.manager import evaluation_plugins

# Whoever only asks for names and metrics needs no SAEBench.
if TYPE_CHECKING:
    from saelens_scaffold.evals.selected_saes import SelectedSAEs, View


class Metric(NamedTuple):
    """
    A column of a table.

    Attributes:
        title: Its head.
        path: Where it is in `eval_result_metrics`, as in "sparsity.l0". `PATH_ci_low` and
            `PATH_ci_high` are the ends of its interval, where it has one.
        digits: How many to show after the point; 0 for a count.
        better: Which direction is the better one, if either is.
        of_sae: Whether it says something of the SAE: not of language model and text alone,
            nor how many of its latents were changed.
        bounds: The least and the largest value that it can have, which intervals keep to.
        random: Path of the metric with its value for something random, of the same size
            and kind, if the evaluation has one.
        note: Where a text is that says why there is no value, if there is one.
    """

    title: str
    path: str
    digits: int = 3
    better: Literal["higher", "lower"] | None = None
    of_sae: bool = True
    bounds: Bounds = UNBOUNDED
    random: str | None = None
    note: str | None = None

    def value(self, result: Mapping[str, Any]) -> float | None:
        """Its value in an SAE's result; None if there is none."""
        value = _at(self.path, result)
        return value if isinstance(value, (int, float)) else None

    def of_random(self, result: Mapping[str, Any]) -> float | None:
        """Its value for something random, None if an SAE's result has none."""
        return Metric("", self.random).value(result) if self.random else None

    def said_instead(self, result: Mapping[str, Any]) -> str | None:
        """What an SAE's result says where there is no value; None if it says nothing."""
        said = _at(self.note, result) if self.note else None
        return said if isinstance(said, str) else None

    def interval(self, result: Mapping[str, Any]) -> tuple[float, float] | None:
        """Its interval: that beside it, or what is said over seeds, if either."""
        over_seeds = result.get("metrics_over_seeds", {})
        said = over_seeds.get(self.path.rpartition(".")[2], {})
        ends = [
            said.get(end, Metric("", f"{self.path}_{end}").value(result))
            for end in ("ci_low", "ci_high")
        ]
        low, high = ends
        if low is None or high is None or math.isnan(low) or math.isnan(high):
            return None
        return low, high


def _at(path: str, result: Mapping[str, Any]) -> Any:
    value: Any = result.get("eval_result_metrics", {})
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


@dataclass(frozen=True)
class RunSettings:
    """
    What an evaluation is told beside its configuration.

    Attributes:
        device: Where to compute.
        output_path: Folder for the results of this evaluation.
        artifacts_path: Folder for what SAEBench stores to compute it once.
        force_rerun: Whether to evaluate SAEs again that have a result.
        clean_up_activations: Whether to remove stored activations afterwards.
        save_activations: Whether to store activations.
        dataset_split: Split of a local dataset, for SAEBench, whose configurations name
            none.
        text_column: Its column, likewise.
        api_key: Of OpenAI.
    """

    device: str
    output_path: Path
    artifacts_path: Path = Path("artifacts")
    force_rerun: bool = False
    clean_up_activations: bool = False
    save_activations: bool = True
    dataset_split: str = "train"
    text_column: str = "text"
    api_key: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """
    An evaluation, which is imported only when it is used.

    Attributes:
        name: What it is called on the command line.
        package: Where its `eval_config` and `main` are.
        view: The form of a scaffold SAE that it judges: "sparse" if it asks about single
            dictionary latents, "whole" if it needs the reconstruction.
        metrics: Its headline metrics.
        data: What kind of dataset it takes, if it takes any.
        data_field: The field of its configuration with the dataset.
        defaults: Values that differ from its configuration's defaults.
        batch_divisor: How much smaller its batches are than those that SAEBench names for
            a language model.
    """

    name: str
    package: str
    view: "View"
    metrics: tuple[Metric, ...]
    data: Literal["text", "labelled", None] = None
    data_field: str = "dataset"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    batch_divisor: int = 1

    @property
    def is_sae_benchs(self) -> bool:
        """Whether SAEBench has it, and not this package."""
        return self.package.startswith("sae_bench.")

    def config_class(self) -> type:
        """The class of its configuration, which checks its fields."""
        from saelens_scaffold.evals.configs import validating

        module = importlib.import_module(f"{self.package}.eval_config")
        (found,) = (
            value
            for name, value in vars(module).items()
            if name.endswith("EvalConfig") and value.__module__ == module.__name__
        )
        return validating(found)

    def run(
        self, config: Any, selected_saes: "SelectedSAEs", settings: RunSettings
    ) -> dict[str, dict[str, Any]]:
        """
        Run it.

        Args:
            config: Of its `config_class`.
            selected_saes: (release, sae_id) or (name, SAE object) pairs. The objects may
                be changed.
            settings: What else it needs to know.

        Returns:
            The results as dictionaries, under the names that SAEBench gives the SAEs.
        """
        if self.is_sae_benchs:
            from saelens_scaffold.evals import sae_bench_evals

            return sae_bench_evals.run_eval(self, config, selected_saes, settings)
        main = importlib.import_module(f"{self.package}.main")
        return main.run_eval(
            config,
            selected_saes,
            settings.device,
            str(settings.output_path),
            force_rerun=settings.force_rerun,
            clean_up_activations=settings.clean_up_activations,
            save_activations=settings.save_activations,
            artifacts_path=str(settings.artifacts_path),
        )


def evaluations_named(names: str) -> list[Evaluation]:
    """
    The evaluations that a list of names means, each once.

    Args:
        names: With commas between them.

    Raises:
        UserError: There is no evaluation of such a name.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = known_evaluations()
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        said = ", ".join(map(repr, unknown)) or repr(names)
        raise UserError(
            f"there is no evaluation {said}; there are {', '.join(sorted(known))}"
        )
    return [known[name] for name in dict.fromkeys(wanted)]


def known_evaluations() -> dict[str, Evaluation]:
    """
    Every evaluation by name, those of installed plugins included.

    Raises:
        UserError: A plugin's evaluation has the name of another.
    """
    known = dict(EVALUATIONS)
    for offered in evaluation_plugins().hook.evaluations():
        for evaluation in offered:
            if evaluation.name in known:
                raise UserError(
                    f"a plugin offers an evaluation {evaluation.name!r}, which there is already"
                )
            known[evaluation.name] = evaluation
    return known


EVALUATIONS: dict[str, Evaluation] = {
    evaluation.name: evaluation
    for evaluation in (
        Evaluation(
            "dense_latents",
            "saelens_scaffold.evals.dense_latents",
            "sparse",
            (
                Metric(
                    "dense",
                    "dense_latents.dense_latents",
                    0,
                    better="lower",
                    bounds=NOT_NEGATIVE,
                ),
                Metric(
                    "reduction",
                    "dense_latents.reduction",
                    2,
                    better="higher",
                    bounds=AT_MOST_ONE,
                ),
                Metric("l0_sparse", "sparsity.l0_sparse", 1, bounds=NOT_NEGATIVE),
                Metric("l0_total", "sparsity.l0_total", 1, bounds=NOT_NEGATIVE),
                Metric(
                    "whole SAE's expl. var.",
                    "reconstruction_quality.explained_variance",
                    better="higher",
                    bounds=AT_MOST_ONE,
                ),
            ),
            data="text",
        ),
        Evaluation(
            "scaffold_ablation",
            "saelens_scaffold.evals.scaffold_ablation",
            "whole",
            (
                # Cross-entropy as a multiple of the clean one. Each way of removing the
                # scaffold stands beside the same way of removing principal directions,
                # and depends only on what the SAE computes, not on how its weights are
                # written down.
                Metric(
                    "CE x, scaffold mean-ablated",
                    "cross_entropy.ce_ratio_scaffold_mean_ablated",
                    2,
                    bounds=NOT_NEGATIVE,
                ),
                Metric(
                    "CE x, PCA mean-ablated",
                    "cross_entropy.ce_ratio_pca_mean_ablated",
                    2,
                    of_sae=False,
                    bounds=NOT_NEGATIVE,
                ),
                Metric(
                    "CE x, scaffold projected out",
                    "cross_entropy.ce_ratio_scaffold_projected_out",
                    2,
                    bounds=NOT_NEGATIVE,
                ),
                Metric(
                    "CE x, PCA projected out",
                    "cross_entropy.ce_ratio_pca_projected_out",
                    2,
                    of_sae=False,
                    bounds=NOT_NEGATIVE,
                ),
                Metric(
                    "CE x, no aligned latents of baseline",
                    "cross_entropy.ce_ratio_baseline_aligned_latents",
                    2,
                    bounds=NOT_NEGATIVE,
                    note="cross_entropy.baseline_aligned_latents_note",
                ),
                Metric(
                    "CE x, no aligned latents of its own",
                    "cross_entropy.ce_ratio_aligned_latents",
                    2,
                    bounds=NOT_NEGATIVE,
                    note="cross_entropy.aligned_latents_note",
                ),
                Metric(
                    "PCA overlap",
                    "geometry.overlap_with_pca",
                    2,
                    bounds=SHARE,
                    random="geometry.overlap_of_random",
                ),
                Metric(
                    "PCA overlap, random",
                    "geometry.overlap_of_random",
                    2,
                    bounds=SHARE,
                ),
                Metric(
                    "outlier share",
                    "geometry.outlier_share_in_scaffold",
                    2,
                    bounds=SHARE,
                    random="geometry.outlier_share_of_random",
                ),
                Metric(
                    "outlier share, random",
                    "geometry.outlier_share_of_random",
                    2,
                    bounds=SHARE,
                ),
                Metric(
                    "topic accuracy",
                    "topics.accuracy_clean",
                    2,
                    of_sae=False,
                    bounds=SHARE,
                ),
                Metric(
                    "topic accuracy, scaffold mean-ablated",
                    "topics.accuracy_scaffold_mean_ablated",
                    2,
                    bounds=SHARE,
                ),
                Metric(
                    "topic accuracy, scaffold mean-ablated, retrained",
                    "topics.accuracy_scaffold_mean_ablated_retrained",
                    2,
                    bounds=SHARE,
                ),
                Metric(
                    "topic accuracy, no topic latents",
                    "topics.accuracy_topic_latents_ablated",
                    2,
                    bounds=SHARE,
                ),
                # as many as asked for, or fewer if no more are alive
                Metric("topic latents", "topics.n_topic_latents", 0, of_sae=False),
                Metric(
                    "CE x, scaffold mean-ablated, special tokens too",
                    "special_tokens.ce_ratio_scaffold_mean_ablated_with_special_tokens",
                    2,
                    bounds=NOT_NEGATIVE,
                ),
                Metric(
                    "CE x, PCA mean-ablated, special tokens too",
                    "special_tokens.ce_ratio_pca_mean_ablated_with_special_tokens",
                    2,
                    of_sae=False,
                    bounds=NOT_NEGATIVE,
                ),
            ),
            data="text",
        ),
        Evaluation(
            "sparse_probing",
            "saelens_scaffold.evals.sparse_probing",
            "sparse",
            (
                Metric(
                    "top-1 accuracy",
                    "sae.sae_top_1_test_accuracy",
                    better="higher",
                    bounds=SHARE,
                ),
                Metric(
                    "top-5 accuracy",
                    "sae.sae_top_5_test_accuracy",
                    better="higher",
                    bounds=SHARE,
                ),
            ),
            data="labelled",
            data_field="dataset_names",
        ),
        Evaluation(
            "sparse_probing_sae_probes",
            "saelens_scaffold.evals.sparse_probing_sae_probes",
            "sparse",
            (
                Metric(
                    "top-1 AUC", "sae.sae_top_1_test_auc", better="higher", bounds=SHARE
                ),
                Metric(
                    "top-5 AUC", "sae.sae_top_5_test_auc", better="higher", bounds=SHARE
                ),
            ),
            data="labelled",
            data_field="dataset_names",
        ),
        Evaluation(
            "tpp",
            "saelens_scaffold.evals.tpp",
            "sparse",
            (
                Metric(
                    "top 10",
                    "tpp_metrics.tpp_threshold_10_total_metric",
                    better="higher",
                    bounds=(-2.0, 2.0),
                ),
            ),
            data="labelled",
            data_field="dataset_names",
        ),
        Evaluation(
            "absorption",
            "sae_bench.evals.absorption",
            "sparse",
            (
                Metric(
                    "absorbed",
                    "mean.mean_absorption_fraction_score",
                    better="lower",
                    bounds=SHARE,
                ),
                Metric(
                    "full absorption",
                    "mean.mean_full_absorption_score",
                    better="lower",
                    bounds=SHARE,
                ),
                Metric(
                    "split features",
                    "mean.mean_num_split_features",
                    2,
                    bounds=NOT_NEGATIVE,
                ),
            ),
        ),
        Evaluation(
            "autointerp",
            "sae_bench.evals.autointerp",
            "sparse",
            (
                Metric(
                    "score",
                    "autointerp.autointerp_score",
                    better="higher",
                    bounds=SHARE,
                ),
            ),
            data="text",
            data_field="dataset_name",
        ),
        Evaluation(
            "core",
            "sae_bench.evals.core",
            "whole",
            (
                Metric("l0", "sparsity.l0", 1, bounds=NOT_NEGATIVE),
                # SAEBench 0.6.0's `explained_variance` subtracts a squared second moment
                # where the squared mean belongs.
                Metric(
                    "expl. var.",
                    "reconstruction_quality.explained_variance_legacy",
                    better="higher",
                    bounds=AT_MOST_ONE,
                ),
                Metric(
                    "CE score",
                    "model_performance_preservation.ce_loss_score",
                    better="higher",
                ),
                Metric(
                    "KL score",
                    "model_behavior_preservation.kl_div_score",
                    better="higher",
                    bounds=AT_MOST_ONE,
                ),
            ),
            data="text",
            # SAEBench's core computes everything whatever it is told. By default it does
            # most of it on a single batch; its published results are of 200 batches and
            # 2000. These are 100,000 tokens where a context has 128.
            defaults={
                "n_eval_reconstruction_batches": 50,
                "n_eval_sparsity_variance_batches": 50,
                "exclude_special_tokens_from_reconstruction": True,
                "compute_kl": True,
                "compute_ce_loss": True,
                "compute_l2_norms": True,
                "compute_sparsity_metrics": True,
                "compute_variance_metrics": True,
                "compute_featurewise_density_statistics": True,
                "compute_featurewise_weight_based_metrics": True,
            },
        ),
        Evaluation(
            "mdl",
            "sae_bench.evals.mdl",
            # A description that leaves the scaffold out describes something else.
            "whole",
            (),
            data="text",
            data_field="dataset_name",
        ),
        Evaluation(
            "meta_structure",
            "sae_bench.evals.meta_structure",
            # It asks whether decoder rows of single latents are made of fewer directions.
            "sparse",
            (
                Metric(
                    "decoder expl. var.",
                    "meta_structure.decoder_fraction_variance_explained",
                    bounds=AT_MOST_ONE,
                ),
            ),
        ),
        Evaluation(
            "ravel",
            "sae_bench.evals.ravel",
            "whole",
            (
                Metric(
                    "disentanglement",
                    "ravel.disentanglement_score",
                    better="higher",
                    bounds=SHARE,
                ),
                Metric("cause", "ravel.cause_score", bounds=SHARE),
                Metric("isolation", "ravel.isolation_score", bounds=SHARE),
            ),
            batch_divisor=4,
        ),
        Evaluation(
            "scr",
            "sae_bench.evals.scr_and_tpp",
            "sparse",
            (
                Metric(
                    "top 10", "scr_metrics.scr_metric_threshold_10", better="higher"
                ),
                Metric(
                    "top 20", "scr_metrics.scr_metric_threshold_20", better="higher"
                ),
            ),
            defaults={"perform_scr": True},
        ),
        Evaluation(
            "unlearning",
            "sae_bench.evals.unlearning",
            "whole",
            (Metric("score", "unlearning.unlearning_score", better="higher"),),
            batch_divisor=8,
        ),
    )
}
