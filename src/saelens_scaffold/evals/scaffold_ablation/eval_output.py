from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from sae_bench.evals.base_eval_output import (
    DEFAULT_DISPLAY,
    BaseEvalOutput,
    BaseMetricCategories,
    BaseMetrics,
    BaseResultDetail,
)

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


@dataclass
class CrossEntropyMetrics(BaseMetrics):
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
    ce_ratio_pca_projected_out: float = Field(
        title="CE Ratio, PCA Projected Out",
        description="CE with as many principal directions projected out, as a multiple of the clean CE (the paper: 2.8)",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    ce_ratio_pca_projected_out_ci_low: float = Field(
        title="CE Ratio, PCA Projected Out (low)",
        description="Lower end of its bootstrap interval over sequences",
    )
    ce_ratio_pca_projected_out_ci_high: float = Field(
        title="CE Ratio, PCA Projected Out (high)",
        description="Upper end of its bootstrap interval over sequences",
    )
    ce_ratio_random_projected_out: float = Field(
        title="CE Ratio, Random Projected Out",
        description="CE with as many random directions projected out, as a multiple of the clean CE",
    )
    ce_ratio_scaffold_subtracted: float | None = Field(
        default=None,
        title="CE Ratio, Scaffold Subtracted",
        description="CE without the scaffold's part of the reconstruction, as a multiple of the clean CE (the paper: 7.5)",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    ce_ratio_scaffold_subtracted_ci_low: float | None = Field(
        default=None,
        title="CE Ratio, Scaffold Subtracted (low)",
        description="Lower end of its bootstrap interval over sequences",
    )
    ce_ratio_scaffold_subtracted_ci_high: float | None = Field(
        default=None,
        title="CE Ratio, Scaffold Subtracted (high)",
        description="Upper end of its bootstrap interval over sequences",
    )
    ce_ratio_scaffold_mean_ablated: float | None = Field(
        default=None,
        title="CE Ratio, Scaffold Mean-Ablated",
        description="CE with the scaffold's part replaced by its mean, as a multiple of the clean CE",
    )
    ce_ratio_scaffold_projected_out: float | None = Field(
        default=None,
        title="CE Ratio, Scaffold Projected Out",
        description="CE with the scaffold's subspace projected out, as a multiple of the clean CE",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    ce_ratio_scaffold_projected_out_ci_low: float | None = Field(
        default=None,
        title="CE Ratio, Scaffold Projected Out (low)",
        description="Lower end of its bootstrap interval over sequences",
    )
    ce_ratio_scaffold_projected_out_ci_high: float | None = Field(
        default=None,
        title="CE Ratio, Scaffold Projected Out (high)",
        description="Upper end of its bootstrap interval over sequences",
    )
    ce_ratio_aligned_latents: float | None = Field(
        default=None,
        title="CE Ratio, Aligned Latents",
        description="CE with the 787 sparse latents most aligned with the scaffold set to zero (or the largest number measured, if 787 is none of them), as a multiple of the clean CE (the paper: 2.9)",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    ce_ratio_aligned_latents_ci_low: float | None = Field(
        default=None,
        title="CE Ratio, Aligned Latents (low)",
        description="Lower end of its bootstrap interval over sequences",
    )
    ce_ratio_aligned_latents_ci_high: float | None = Field(
        default=None,
        title="CE Ratio, Aligned Latents (high)",
        description="Upper end of its bootstrap interval over sequences",
    )
    n_aligned_latents: int | None = Field(
        default=None,
        title="Aligned Latents",
        description="How many sparse latents that were",
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
        description="What a random subspace would have in expectation",
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


@dataclass(config=ConfigDict(title="Scaffold Ablation"))
class ScaffoldAblationEvalOutput(
    BaseEvalOutput[
        ScaffoldAblationEvalConfig,
        ScaffoldAblationMetricCategories,
        ScaffoldAblationResultDetail,
    ]
):
    """
    Whether the language model needs the scaffold: cross-entropy, KL divergence and topic classification with the scaffold removed at the hook point, beside the removal of principal directions and of sparse latents aligned with it.
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
    n_predictions: int | None = Field(
        default=None,
        title="Predictions",
        description="Number of next-token predictions evaluated.",
    )
    judged_view: str = Field(
        default="whole",
        title="Judged View",
        description="The whole SAE, scaffold included.",
    )
    eval_type_id: str = Field(default=EVAL_TYPE_ID_SCAFFOLD_ABLATION)
