"""Every evaluation that can be run by name: this package's own, SAEBench's, and plugins'."""

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.base import (
    AT_MOST_ONE,
    NOT_NEGATIVE,
    SHARE,
    Evaluation,
    Metric,
    View,
)
from saelens_scaffold.plugins.manager import evaluation_plugins

_OURS = "saelens_scaffold.evals"


def evaluations_named(names: str) -> list[Evaluation]:
    """
    The evaluations of a list of names, each once.

    Args:
        names: Separated by commas.

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


_DENSE_LATENTS = (
    Metric("dense", "dense_latents.dense_latents", 0, "lower", NOT_NEGATIVE),
    Metric("reduction", "dense_latents.reduction", 2, "higher", AT_MOST_ONE),
    Metric("l0_sparse", "sparsity.l0_sparse", 1, bounds=NOT_NEGATIVE),
    Metric("l0_total", "sparsity.l0_total", 1, bounds=NOT_NEGATIVE),
    Metric(
        "whole SAE's expl. var.",
        "reconstruction_quality.explained_variance",
        better="higher",
        bounds=AT_MOST_ONE,
    ),
)


def _ce_ratio(
    title: str, name: str, where: str = "cross_entropy", note: str | None = None
) -> Metric:
    """Cross-entropy under an intervention, as a multiple of the clean cross-entropy."""
    return Metric(
        f"CE x, {title}",
        f"{where}.ce_ratio_{name}",
        2,
        bounds=NOT_NEGATIVE,
        note=note and f"{where}.{note}",
        of_sae="pca" not in name,
    )


def _share(title: str, path: str, random: str | None = None) -> Metric:
    return Metric(title, path, 2, bounds=SHARE, random=random)


# Each way of removing the scaffold stands beside the same way of removing principal
# directions, and depends only on what the SAE computes, not on the gauge of its weights.
_SCAFFOLD_ABLATION = (
    _ce_ratio("scaffold mean-ablated", "scaffold_mean_ablated"),
    _ce_ratio("PCA mean-ablated", "pca_mean_ablated"),
    _ce_ratio("scaffold projected out", "scaffold_projected_out"),
    _ce_ratio("PCA projected out", "pca_projected_out"),
    _ce_ratio(
        "no aligned latents of baseline",
        "baseline_aligned_latents",
        note="baseline_aligned_latents_note",
    ),
    _ce_ratio(
        "no aligned latents of its own", "aligned_latents", note="aligned_latents_note"
    ),
    _share("PCA overlap", "geometry.overlap_with_pca", "geometry.overlap_of_random"),
    _share("PCA overlap, random", "geometry.overlap_of_random"),
    _share(
        "outlier share",
        "geometry.outlier_share_in_scaffold",
        "geometry.outlier_share_of_random",
    ),
    _share("outlier share, random", "geometry.outlier_share_of_random"),
    _share("topic accuracy", "topics.accuracy_clean")._replace(of_sae=False),
    _share(
        "topic accuracy, scaffold mean-ablated", "topics.accuracy_scaffold_mean_ablated"
    ),
    _share(
        "topic accuracy, scaffold mean-ablated, retrained",
        "topics.accuracy_scaffold_mean_ablated_retrained",
    ),
    _share("topic accuracy, no topic latents", "topics.accuracy_topic_latents_ablated"),
    # as many as asked for, or fewer if no more are alive
    Metric("topic latents", "topics.n_topic_latents", 0, of_sae=False),
    _ce_ratio(
        "scaffold mean-ablated, special tokens too",
        "scaffold_mean_ablated_with_special_tokens",
        "special_tokens",
    ),
    _ce_ratio(
        "PCA mean-ablated, special tokens too",
        "pca_mean_ablated_with_special_tokens",
        "special_tokens",
    ),
)


def _higher_share(title: str, path: str) -> Metric:
    return Metric(title, path, better="higher", bounds=SHARE)


def _sae_benchs(
    name: str, view: View, metrics: tuple[Metric, ...] = (), **more: object
) -> Evaluation:
    """An evaluation of SAEBench's own."""
    implementation = f"{_OURS}.saebench.passthrough:{name.upper()}"
    return Evaluation(name, view, implementation, metrics, **more)  # type: ignore[arg-type]


# SAEBench's core computes everything whatever it is told, by default most of it on a single
# batch; its published results are of 200 and 2,000 batches. These are 100,000 tokens where a
# context has 128.
_CORE_DEFAULTS = {
    "n_eval_reconstruction_batches": 50,
    "n_eval_sparsity_variance_batches": 50,
    "exclude_special_tokens_from_reconstruction": True,
    **dict.fromkeys(
        (
            "compute_kl",
            "compute_ce_loss",
            "compute_l2_norms",
            "compute_sparsity_metrics",
            "compute_variance_metrics",
            "compute_featurewise_density_statistics",
            "compute_featurewise_weight_based_metrics",
        ),
        True,
    ),
}

_PROBING = {"data": "labelled", "data_field": "dataset_names"}

EVALUATIONS: dict[str, Evaluation] = {
    evaluation.name: evaluation
    for evaluation in (
        Evaluation(
            "dense_latents",
            "sparse",
            f"{_OURS}.dense_latents.main:IMPLEMENTATION",
            _DENSE_LATENTS,
            data="text",
        ),
        Evaluation(
            "scaffold_ablation",
            "whole",
            f"{_OURS}.scaffold_ablation.main:IMPLEMENTATION",
            _SCAFFOLD_ABLATION,
            data="text",
        ),
        Evaluation(
            "sparse_probing",
            "sparse",
            f"{_OURS}.saebench.probing:SPARSE_PROBING",
            (
                _higher_share("top-1 accuracy", "sae.sae_top_1_test_accuracy"),
                _higher_share("top-5 accuracy", "sae.sae_top_5_test_accuracy"),
            ),
            **_PROBING,  # type: ignore[arg-type]
        ),
        Evaluation(
            "sparse_probing_sae_probes",
            "sparse",
            f"{_OURS}.saebench.probing:SPARSE_PROBING_SAE_PROBES",
            (
                _higher_share("top-1 AUC", "sae.sae_top_1_test_auc"),
                _higher_share("top-5 AUC", "sae.sae_top_5_test_auc"),
            ),
            **_PROBING,  # type: ignore[arg-type]
        ),
        Evaluation(
            "tpp",
            "sparse",
            f"{_OURS}.saebench.probing:TPP",
            (
                # a drop of one accuracy, less the mean drop of others
                Metric(
                    "top 10",
                    "tpp_metrics.tpp_threshold_10_total_metric",
                    better="higher",
                    bounds=(-2.0, 2.0),
                ),
            ),
            **_PROBING,  # type: ignore[arg-type]
        ),
        _sae_benchs(
            "absorption",
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
        _sae_benchs(
            "autointerp",
            "sparse",
            (_higher_share("score", "autointerp.autointerp_score"),),
            data="text",
            data_field="dataset_name",
        ),
        _sae_benchs(
            "core",
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
            defaults=_CORE_DEFAULTS,
        ),
        # A description that leaves the scaffold out describes something else.
        _sae_benchs("mdl", "whole", data="text", data_field="dataset_name"),
        # It asks whether decoder rows of single latents are made of fewer directions.
        _sae_benchs(
            "meta_structure",
            "sparse",
            (
                Metric(
                    "decoder expl. var.",
                    "meta_structure.decoder_fraction_variance_explained",
                    bounds=AT_MOST_ONE,
                ),
            ),
        ),
        _sae_benchs(
            "ravel",
            "whole",
            (
                _higher_share("disentanglement", "ravel.disentanglement_score"),
                Metric("cause", "ravel.cause_score", bounds=SHARE),
                Metric("isolation", "ravel.isolation_score", bounds=SHARE),
            ),
            batch_divisor=4,
        ),
        _sae_benchs(
            "scr",
            "sparse",
            tuple(
                Metric(f"top {n}", f"scr_metrics.scr_metric_threshold_{n}", 3, "higher")
                for n in (10, 20)
            ),
            defaults={"perform_scr": True},
        ),
        _sae_benchs(
            "unlearning",
            "whole",
            (Metric("score", "unlearning.unlearning_score", better="higher"),),
            batch_divisor=8,
        ),
    )
}
