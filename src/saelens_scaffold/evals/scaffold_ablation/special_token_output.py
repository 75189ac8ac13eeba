from pydantic import Field
from pydantic.dataclasses import dataclass
from sae_bench.evals.base_eval_output import DEFAULT_DISPLAY, BaseMetrics


@dataclass
class SpecialTokenMetrics(BaseMetrics):
    """
    Headline figures with special tokens included: means, directions, scaffold means and
    firing frequencies are fitted on BOS, EOS and padding as well, and all of these tokens
    are ablated. Predictions count as they do elsewhere. All None if
    `include_special_tokens` is off.
    """

    ce_ratio_scaffold_mean_ablated_with_special_tokens: float | None = Field(
        default=None,
        title="CE Ratio, Scaffold Mean-Ablated, Special Tokens Included",
        description="CE with the scaffold's part replaced by its mean, as a multiple of the clean CE",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    ce_ratio_scaffold_mean_ablated_with_special_tokens_ci_low: float | None = Field(
        default=None,
        title="CE Ratio, Scaffold Mean-Ablated, Special Tokens Included (low)",
        description="Lower end of its bootstrap interval over sequences",
    )
    ce_ratio_scaffold_mean_ablated_with_special_tokens_ci_high: float | None = Field(
        default=None,
        title="CE Ratio, Scaffold Mean-Ablated, Special Tokens Included (high)",
        description="Upper end of its bootstrap interval over sequences",
    )
    ce_ratio_pca_mean_ablated_with_special_tokens: float | None = Field(
        default=None,
        title="CE Ratio, PCA Mean-Ablated, Special Tokens Included",
        description="CE with as many principal directions mean-ablated, as a multiple of the clean CE",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    ce_ratio_pca_mean_ablated_with_special_tokens_ci_low: float | None = Field(
        default=None,
        title="CE Ratio, PCA Mean-Ablated, Special Tokens Included (low)",
        description="Lower end of its bootstrap interval over sequences",
    )
    ce_ratio_pca_mean_ablated_with_special_tokens_ci_high: float | None = Field(
        default=None,
        title="CE Ratio, PCA Mean-Ablated, Special Tokens Included (high)",
        description="Upper end of its bootstrap interval over sequences",
    )
    ce_ratio_scaffold_projected_out_with_special_tokens: float | None = Field(
        default=None,
        title="CE Ratio, Scaffold Projected Out, Special Tokens Included",
        description="CE with the scaffold's subspace projected out, as a multiple of the clean CE",
    )
    ce_ratio_scaffold_projected_out_with_special_tokens_ci_low: float | None = Field(
        default=None,
        title="CE Ratio, Scaffold Projected Out, Special Tokens Included (low)",
        description="Lower end of its bootstrap interval over sequences",
    )
    ce_ratio_scaffold_projected_out_with_special_tokens_ci_high: float | None = Field(
        default=None,
        title="CE Ratio, Scaffold Projected Out, Special Tokens Included (high)",
        description="Upper end of its bootstrap interval over sequences",
    )
    ce_ratio_pca_projected_out_with_special_tokens: float | None = Field(
        default=None,
        title="CE Ratio, PCA Projected Out, Special Tokens Included",
        description="CE with as many principal directions projected out, as a multiple of the clean CE",
    )
    ce_ratio_pca_projected_out_with_special_tokens_ci_low: float | None = Field(
        default=None,
        title="CE Ratio, PCA Projected Out, Special Tokens Included (low)",
        description="Lower end of its bootstrap interval over sequences",
    )
    ce_ratio_pca_projected_out_with_special_tokens_ci_high: float | None = Field(
        default=None,
        title="CE Ratio, PCA Projected Out, Special Tokens Included (high)",
        description="Upper end of its bootstrap interval over sequences",
    )
    accuracy_scaffold_mean_ablated_with_special_tokens: float | None = Field(
        default=None,
        title="Topic Accuracy, Scaffold Mean-Ablated, Special Tokens Included",
        description="Accuracy of the clean-trained topic probe",
    )
    accuracy_scaffold_mean_ablated_with_special_tokens_ci_low: float | None = Field(
        default=None,
        title="Topic Accuracy, Scaffold Mean-Ablated, Special Tokens Included (low)",
        description="Lower end of its bootstrap interval over texts",
    )
    accuracy_scaffold_mean_ablated_with_special_tokens_ci_high: float | None = Field(
        default=None,
        title="Topic Accuracy, Scaffold Mean-Ablated, Special Tokens Included (high)",
        description="Upper end of its bootstrap interval over texts",
    )
    overlap_with_pca_with_special_tokens: float | None = Field(
        default=None,
        title="Overlap with PCA, Special Tokens Included",
        description="Mean squared cosine of the principal angles between the scaffold's and the top PCA subspace",
    )
    top_direction_variance_with_special_tokens: float | None = Field(
        default=None,
        title="Variance along the First Principal Direction, Special Tokens Included",
        description="Share of the activations' variance; near 1 where BOS has massive activations",
    )
    top_direction_variance: float | None = Field(
        default=None,
        title="Variance along the First Principal Direction",
        description="The same share without special tokens",
    )
