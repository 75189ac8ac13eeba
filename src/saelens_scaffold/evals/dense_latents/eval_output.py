from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from sae_bench.evals.base_eval_output import (
    DEFAULT_DISPLAY,
    BaseEvalOutput,
    BaseMetricCategories,
    BaseMetrics,
    BaseResultDetail,
)

from saelens_scaffold.evals.dense_latents.eval_config import DenseLatentsEvalConfig
from saelens_scaffold.evals.overlap import TextSeenInTraining

EVAL_TYPE_ID_DENSE_LATENTS = "dense_latents"


@dataclass
class DenseLatentMetrics(BaseMetrics):
    dense_latents: int = Field(
        title="Dense Latents",
        description="Number of sparse latents that fire more often than the first threshold",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    dense_latents_ci_low: float = Field(
        title="Dense Latents (low)",
        description="Lower end of its bootstrap interval over sequences",
    )
    dense_latents_ci_high: float = Field(
        title="Dense Latents (high)",
        description="Upper end of its bootstrap interval over sequences",
    )
    reduction: float | None = Field(
        default=None,
        title="Reduction",
        description="1 minus the ratio to the baseline's dense latents: 0.84 where it has 84 % fewer. None without a baseline, or if it has none",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    reduction_ci_low: float | None = Field(
        default=None,
        title="Reduction (low)",
        description="Lower end of its interval, of replicates paired with the baseline's",
    )
    reduction_ci_high: float | None = Field(
        default=None,
        title="Reduction (high)",
        description="Upper end of its interval, of replicates paired with the baseline's",
    )


@dataclass
class SparsityMetrics(BaseMetrics):
    l0_sparse: float = Field(
        title="L0 (sparse)",
        description="Sparse latents that fire per token",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    l0_total: float = Field(
        title="L0 (total)",
        description="Sparse latents that fire per token, plus the rank of the scaffold",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    scaffold_rank: int = Field(
        title="Scaffold Rank",
        description="Number of linear latents, which fire on every token and are not counted; 0 for a plain SAE",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    alive_latents: int = Field(
        title="Alive Latents",
        description="Number of sparse latents that fired at all",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    alive_latents_ci_low: float = Field(
        title="Alive Latents (low)",
        description="Lower end of its bootstrap interval; a replicate misses sequences, so it lies low",
    )
    alive_latents_ci_high: float = Field(
        title="Alive Latents (high)",
        description="Upper end of its bootstrap interval; a replicate misses sequences, so it lies low",
    )
    dead_latents: int = Field(
        title="Dead Latents",
        description="Number of sparse latents that never fired",
    )
    dead_latents_ci_low: float = Field(
        title="Dead Latents (low)",
        description="Lower end of its bootstrap interval; a replicate misses sequences, so it lies high",
    )
    dead_latents_ci_high: float = Field(
        title="Dead Latents (high)",
        description="Upper end of its bootstrap interval; a replicate misses sequences, so it lies high",
    )


@dataclass
class ReconstructionQualityMetrics(BaseMetrics):
    explained_variance: float = Field(
        title="Explained Variance",
        description="1 - E|x - x̂|² / E|x - E[x]|², of the whole SAE",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    explained_variance_ci_low: float = Field(
        title="Explained Variance (low)",
        description="Lower end of its bootstrap interval over sequences",
    )
    explained_variance_ci_high: float = Field(
        title="Explained Variance (high)",
        description="Upper end of its bootstrap interval over sequences",
    )


@dataclass
class TokenMetrics(BaseMetrics):
    n_tokens: int = Field(
        title="Tokens",
        description="Tokens evaluated on, without BOS, EOS and padding",
    )
    n_sequences: int = Field(
        title="Sequences", description="Sequences evaluated on, which are resampled"
    )


@dataclass
class DenseLatentsMetricCategories(BaseMetricCategories):
    dense_latents: DenseLatentMetrics = Field(
        title="Dense Latents",
        description="Dense latents at the first threshold",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    sparsity: SparsityMetrics = Field(
        title="Sparsity",
        description="Sparsity of the whole SAE",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    reconstruction_quality: ReconstructionQualityMetrics = Field(
        title="Reconstruction Quality",
        description="How well the whole SAE reconstructs",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    token_stats: TokenMetrics = Field(
        title="Tokens", description="What it was measured on"
    )


@dataclass
class DenseLatentsResultDetail(BaseResultDetail):
    threshold: float = Field(title="Threshold", description="Firing frequency")
    count: int = Field(
        title="Count", description="Number of sparse latents that fire more often"
    )
    count_ci_low: float = Field(
        title="Count (low)", description="Lower end of its bootstrap interval"
    )
    count_ci_high: float = Field(
        title="Count (high)", description="Upper end of its bootstrap interval"
    )
    reduction: float | None = Field(
        default=None,
        title="Reduction",
        description="1 minus the ratio to the baseline's count",
    )
    reduction_ci_low: float | None = Field(
        default=None,
        title="Reduction (low)",
        description="Lower end of its paired bootstrap interval",
    )
    reduction_ci_high: float | None = Field(
        default=None,
        title="Reduction (high)",
        description="Upper end of its paired bootstrap interval",
    )


@dataclass
class DenseLatent:
    index: int = Field(title="Index", description="Index of the latent in the SAE")
    frequency: float = Field(
        title="Frequency", description="Share of the tokens on which it fires"
    )
    mean_activation: float = Field(
        title="Mean Activation", description="Mean activation where it fires"
    )
    antipodality: float = Field(
        title="Antipodality",
        description="Largest product of encoder and decoder cosines with a latent that is opposite in both: 1 for one half of an antipodal pair (arXiv 2506.15679)",
    )
    antipode: int | None = Field(
        title="Antipode", description="Index of that other latent, if there is one"
    )
    share_in_scaffold: float | None = Field(
        title="Share in Scaffold",
        description="Squared cosine of its decoder direction with the scaffold's subspace; None for a plain SAE",
    )
    share_in_pca: float = Field(
        title="Share in PCA Subspace",
        description="Squared cosine of its decoder direction with the top PCA subspace",
    )


@dataclass
class FiringHistogram:
    log10_edges: list[float] = Field(
        title="Edges",
        description="Edges of the bins, in log10 of the firing frequency",
    )
    counts: list[int] = Field(
        title="Counts", description="Number of alive sparse latents in each bin"
    )


@dataclass(config=ConfigDict(title="Dense Latents"))
class DenseLatentsEvalOutput(
    BaseEvalOutput[
        DenseLatentsEvalConfig, DenseLatentsMetricCategories, DenseLatentsResultDetail
    ]
):
    """
    Counts the latents of the sparse dictionary that fire on a large share of all tokens. Dense latents are what a scaffold is to take over; its own linear latents are not counted, and its rank is stated beside the count.
    """

    eval_config: DenseLatentsEvalConfig
    eval_id: str
    datetime_epoch_millis: int
    eval_result_metrics: DenseLatentsMetricCategories
    eval_result_details: list[DenseLatentsResultDetail] = Field(
        default_factory=list,
        title="Per-Threshold Results",
        description="Each object is the count at one threshold.",
    )
    dense_latents: list[DenseLatent] = Field(
        default_factory=list,
        title="Dense Latents",
        description="Every sparse latent above the lowest threshold, most frequent first.",
    )
    firing_histogram: FiringHistogram | None = Field(
        default=None,
        title="Firing Histogram",
        description="Distribution of the firing frequencies of the alive sparse latents.",
    )
    pca_rank: int | None = Field(
        default=None,
        title="PCA Rank",
        description="Rank of the PCA subspace that the dense latents were compared with.",
    )
    text_seen_in_training: TextSeenInTraining | None = Field(
        default=None,
        title="Text Seen in Training",
        description="Whether the SAE was trained on text that it is evaluated on.",
    )
    judged_view: str = Field(
        default="sparse",
        title="Judged View",
        description="Counts are of the sparse dictionary (`sparse_sae()`); explained variance and l0_total are of the whole SAE.",
    )
    eval_type_id: str = Field(default=EVAL_TYPE_ID_DENSE_LATENTS)
