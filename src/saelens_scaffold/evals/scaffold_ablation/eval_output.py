from typing import Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from sae_bench.evals.base_eval_output import (
    DEFAULT_DISPLAY,
    BaseEvalOutput,
    BaseMetricCategories,
    BaseMetrics,
    BaseResultDetail,
)

from saelens_scaffold.evals.overlap import TextSeenInTraining
from saelens_scaffold.evals.scaffold_ablation.eval_config import (
    ScaffoldAblationEvalConfig,
)
from saelens_scaffold.evals.scaffold_ablation.special_token_output import (
    SpecialTokenMetrics,
)
from saelens_scaffold.evals.scaffold_ablation.topic_output import (
    TopicAccuracy,
    TopicMetrics,
)

EVAL_TYPE_ID_SCAFFOLD_ABLATION = "scaffold_ablation"


def _low(title: str, default: Any = None) -> Any:
    return Field(
        default=default,
        title=f"{title} (low)",
        description="Lower end of its bootstrap interval over sequences",
    )


def _high(title: str, default: Any = None) -> Any:
    return Field(
        default=default,
        title=f"{title} (high)",
        description="Upper end of its bootstrap interval over sequences",
    )


@dataclass(kw_only=True)
class CrossEntropyMetrics(BaseMetrics):
    """
    What the language model loses, as multiples of its clean cross-entropy.

    Like stands beside like: mean-ablated scaffold and principal directions first, then
    both projected out. Were the scaffold the projection on those directions, the figures
    of each pair would be equal.

    No figure depends on the gauge, that is on how a constant of the scaffold's span is
    divided between s(x) and b_dec. (The detail `scaffold_subtracted` does.)
    """

    ce_clean: float = Field(
        title="Clean CE",
        description="Next-token cross-entropy of the language model, nothing changed, in nats",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    ce_loss_score: float = Field(
        title="CE Loss Score",
        description="SAEBench's: 1 if the model predicts as well from the SAE's reconstruction, 0 if as badly as from zeros",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    ce_ratio_reconstruction: float = Field(
        title="CE Ratio, Reconstruction",
        description="CE with the SAE's reconstruction in place, as a multiple of the clean CE",
    )
    ce_ratio_scaffold_mean_ablated: float | None = Field(
        default=None,
        title="CE Ratio, Scaffold Mean-Ablated",
        description="CE with the scaffold's part of the reconstruction replaced by its mean, x - s(x) + E[s], as a multiple of the clean CE (the paper, whose way of removing the scaffold its abstract does not say: 7.5)",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    ce_ratio_scaffold_mean_ablated_ci_low: float | None = _low(
        "CE Ratio, Scaffold Mean-Ablated"
    )
    ce_ratio_scaffold_mean_ablated_ci_high: float | None = _high(
        "CE Ratio, Scaffold Mean-Ablated"
    )
    ce_ratio_pca_mean_ablated: float = Field(
        title="CE Ratio, PCA Mean-Ablated",
        description="CE with the coordinates along as many principal directions replaced by their mean, as a multiple of the clean CE (the paper: 2.8)",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    ce_ratio_pca_mean_ablated_ci_low: float = _low("CE Ratio, PCA Mean-Ablated", ...)
    ce_ratio_pca_mean_ablated_ci_high: float = _high("CE Ratio, PCA Mean-Ablated", ...)
    ce_ratio_random_mean_ablated: float = Field(
        title="CE Ratio, Random Mean-Ablated",
        description="CE with the coordinates along as many random directions replaced by their mean, as a multiple of the clean CE",
    )
    ce_ratio_scaffold_projected_out: float | None = Field(
        default=None,
        title="CE Ratio, Scaffold Projected Out",
        description="CE with the scaffold's subspace projected out, as a multiple of the clean CE",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    ce_ratio_scaffold_projected_out_ci_low: float | None = _low(
        "CE Ratio, Scaffold Projected Out"
    )
    ce_ratio_scaffold_projected_out_ci_high: float | None = _high(
        "CE Ratio, Scaffold Projected Out"
    )
    ce_ratio_pca_projected_out: float = Field(
        title="CE Ratio, PCA Projected Out",
        description="CE with as many principal directions projected out, as a multiple of the clean CE",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    ce_ratio_pca_projected_out_ci_low: float = _low("CE Ratio, PCA Projected Out", ...)
    ce_ratio_pca_projected_out_ci_high: float = _high(
        "CE Ratio, PCA Projected Out", ...
    )
    ce_ratio_random_projected_out: float = Field(
        title="CE Ratio, Random Projected Out",
        description="CE with as many random directions projected out, as a multiple of the clean CE",
    )
    ce_ratio_scaffold_subtracted_gauge_fixed: float | None = Field(
        default=None,
        title="CE Ratio, Scaffold Subtracted (Gauge Fixed)",
        description="CE of x - s(x), with s(x) as it is where b_dec is orthogonal to the scaffold's span, as a multiple of the clean CE. It stands beside the projections: equal to them were the scaffold one",
    )
    ce_ratio_scaffold_subtracted_gauge_fixed_ci_low: float | None = _low(
        "CE Ratio, Scaffold Subtracted (Gauge Fixed)"
    )
    ce_ratio_scaffold_subtracted_gauge_fixed_ci_high: float | None = _high(
        "CE Ratio, Scaffold Subtracted (Gauge Fixed)"
    )
    n_aligned_latents: int | None = Field(
        default=None,
        title="Aligned Latents",
        description="Number of latents of the next two figures: 787, the paper's, or else the largest asked for; None for a plain SAE",
    )
    ce_ratio_baseline_aligned_latents: float | None = Field(
        default=None,
        title="CE Ratio, Baseline's Aligned Latents",
        description="CE with as many sparse latents of the plain baseline, those most aligned with the scaffold, set to zero, as a multiple of the clean CE (the paper, of sparse dictionaries: 2.9 for 787)",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    ce_ratio_baseline_aligned_latents_ci_low: float | None = _low(
        "CE Ratio, Baseline's Aligned Latents"
    )
    ce_ratio_baseline_aligned_latents_ci_high: float | None = _high(
        "CE Ratio, Baseline's Aligned Latents"
    )
    baseline_aligned_latents_note: str | None = Field(
        default=None,
        title="Baseline's Aligned Latents, Note",
        description="Why there is no such figure, if fewer latents are alive",
    )
    ce_ratio_aligned_latents: float | None = Field(
        default=None,
        title="CE Ratio, Own Aligned Latents",
        description="CE with as many of the SAE's own sparse latents set to zero, as a multiple of the clean CE",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    ce_ratio_aligned_latents_ci_low: float | None = _low(
        "CE Ratio, Own Aligned Latents"
    )
    ce_ratio_aligned_latents_ci_high: float | None = _high(
        "CE Ratio, Own Aligned Latents"
    )
    aligned_latents_note: str | None = Field(
        default=None,
        title="Own Aligned Latents, Note",
        description="Why there is no such figure, if fewer latents are alive",
    )


@dataclass
class GeometryMetrics(BaseMetrics):
    pca_rank: int = Field(
        title="PCA Rank", description="Number of principal directions compared with"
    )
    variance_explained_by_pca: float = Field(
        title="Variance in PCA",
        description="Share that lies in the top PCA subspace",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    variance_explained_by_random: float = Field(
        title="Variance in Random",
        description="Share that lies in a random subspace of that rank, in expectation",
    )
    outlier_share_in_pca: float = Field(
        title="Outlier Share in PCA",
        description="Their mean squared cosine with the top PCA subspace",
    )
    outlier_share_in_random: float = Field(
        title="Outlier Share in Random",
        description="Their mean squared cosine with a random subspace of that rank, in expectation",
    )
    overlap_with_pca: float | None = Field(
        default=None,
        title="Overlap with PCA",
        description="Mean squared cosine of the principal angles between the scaffold's and the top PCA subspace; None for a plain SAE",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    overlap_of_random: float | None = Field(
        default=None,
        title="Overlap of Random Subspaces",
        description="What a random subspace of the scaffold's rank would have in expectation",
    )
    variance_explained_by_scaffold: float | None = Field(
        default=None,
        title="Variance in Scaffold",
        description="Share of the activations' variance that lies in the scaffold's subspace; None for a plain SAE",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    outlier_share_in_scaffold: float | None = Field(
        default=None,
        title="Outlier Share in Scaffold",
        description="Mean squared cosine with the scaffold's subspace of the dimensions of the residual stream with the largest root mean square, as many as the PCA rank; None for a plain SAE",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    outlier_share_of_random: float | None = Field(
        default=None,
        title="Outlier Share of Random Subspaces",
        description="What a random subspace of the scaffold's rank would have in expectation",
    )
    outlier_rms_ratio: float | None = Field(
        default=None,
        title="Outlier RMS Ratio",
        description="Smallest root mean square of these dimensions, as a multiple of the median dimension's: near 1, they are no outliers",
    )


@dataclass
class ScaffoldAblationMetricCategories(BaseMetricCategories):
    cross_entropy: CrossEntropyMetrics = Field(
        title="Cross-Entropy",
        description="What the interventions cost the language model",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    geometry: GeometryMetrics = Field(
        title="Geometry",
        description="Where the scaffold's subspace lies",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    topics: TopicMetrics = Field(
        title="Topics",
        description="Whether the topic of a text can still be read",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    special_tokens: SpecialTokenMetrics = Field(
        title="Special Tokens Included",
        description="The headline figures with BOS, EOS and padding ablated and fitted on, too",
        json_schema_extra=DEFAULT_DISPLAY,
    )


@dataclass
class ScaffoldAblationResultDetail(BaseResultDetail):
    intervention: str = Field(
        title="Intervention", description="Name of the intervention"
    )
    kind: str = Field(
        title="Kind",
        description="reference, scaffold, geometry or dictionary",
    )
    description: str = Field(title="Description", description="What it does")
    special_tokens: bool = Field(
        title="Special Tokens",
        description="Whether BOS, EOS and padding are ablated and fitted on, too",
    )
    size: int | None = Field(
        title="Size", description="Number of dimensions or latents it removes"
    )
    n_draws: int = Field(title="Draws", description="Draws that are averaged")
    ce: float = Field(title="CE", description="Next-token cross-entropy in nats")
    ce_ci_low: float = Field(
        title="CE (low)", description="Lower end of its bootstrap interval"
    )
    ce_ci_high: float = Field(
        title="CE (high)", description="Upper end of its bootstrap interval"
    )
    ce_ratio: float = Field(
        title="CE Ratio", description="CE as a multiple of the clean CE"
    )
    ce_ratio_ci_low: float = Field(
        title="CE Ratio (low)", description="Lower end of its paired interval"
    )
    ce_ratio_ci_high: float = Field(
        title="CE Ratio (high)", description="Upper end of its paired interval"
    )
    delta_ce: float = Field(
        title="CE Increase", description="CE minus the clean CE, in nats"
    )
    delta_ce_ci_low: float = Field(
        title="CE Increase (low)", description="Lower end of its paired interval"
    )
    delta_ce_ci_high: float = Field(
        title="CE Increase (high)", description="Upper end of its paired interval"
    )
    kl: float = Field(
        title="KL",
        description="KL divergence of the predictions from the clean ones, in nats",
    )
    kl_ci_low: float = Field(
        title="KL (low)", description="Lower end of its bootstrap interval"
    )
    kl_ci_high: float = Field(
        title="KL (high)", description="Upper end of its bootstrap interval"
    )


@dataclass
class PrincipalAngles:
    degrees: list[float] = Field(
        title="Degrees",
        description="Principal angles between the scaffold's and the top PCA subspace, smallest first",
    )


@dataclass
class DictionaryAlignment:
    dictionary: str = Field(
        title="Dictionary",
        description="own: the SAE's own sparse latents; baseline: those of the plain baseline",
    )
    sae: str = Field(title="SAE", description="Name of the SAE whose latents they are")
    n_alive: int = Field(
        title="Alive Latents", description="Number that fire on the text to fit on"
    )
    cosines: list[float] = Field(
        title="Cosines",
        description="Between decoder direction and the scaffold's subspace",
    )
    n_above: list[int] = Field(
        title="Latents Above", description="Alive latents above each of these cosines"
    )
    n_aligned_latents: list[int] = Field(
        title="Numbers of Aligned Latents",
        description="The N of the N most aligned latents",
    )
    cosine_of_last: list[float | None] = Field(
        title="Cosine of the Last",
        description="Cosine of the N-th most aligned latent, for each N; None where fewer are alive",
    )


@dataclass(config=ConfigDict(title="Scaffold Ablation"))
class ScaffoldAblationEvalOutput(
    BaseEvalOutput[
        ScaffoldAblationEvalConfig,
        ScaffoldAblationMetricCategories,
        ScaffoldAblationResultDetail,
    ]
):
    """
    Whether the language model needs the scaffold: cross-entropy, KL divergence and topic classification with the scaffold removed at the hook point, beside the removal of principal directions and of sparse latents aligned with it, its own and those of a plain SAE.
    """

    eval_config: ScaffoldAblationEvalConfig
    eval_id: str
    datetime_epoch_millis: int
    eval_result_metrics: ScaffoldAblationMetricCategories
    eval_result_details: list[ScaffoldAblationResultDetail] = Field(
        default_factory=list,
        title="Per-Intervention Results",
        description="Each object is one intervention, the clean run first.",
    )
    topic_accuracies: list[TopicAccuracy] = Field(
        default_factory=list,
        title="Topic Accuracies",
        description="Each object is one intervention and one place where the topic is read.",
    )
    principal_angles: PrincipalAngles | None = Field(
        default=None,
        title="Principal Angles",
        description="Between the scaffold's and the top PCA subspace; None for a plain SAE.",
    )
    dictionary_alignments: list[DictionaryAlignment] = Field(
        default_factory=list,
        title="Alignment with the Scaffold",
        description="Each object is one dictionary: how many of its latents are how well aligned with the scaffold's subspace. Empty for a plain SAE.",
    )
    n_predictions: int | None = Field(
        default=None,
        title="Predictions",
        description="Number of next-token predictions evaluated.",
    )
    text_seen_in_training: TextSeenInTraining | None = Field(
        default=None,
        title="Text Seen in Training",
        description="Whether the SAE was trained on text that it is evaluated on.",
    )
    judged_view: str = Field(
        default="whole",
        title="Judged View",
        description="The whole SAE, scaffold included.",
    )
    eval_type_id: str = Field(default=EVAL_TYPE_ID_SCAFFOLD_ABLATION)
