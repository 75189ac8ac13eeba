from pydantic import Field

from saelens_scaffold._util.configs import documented
from saelens_scaffold.evals.data import TextSeenInTraining
from saelens_scaffold.evals.dense_latents.eval_config import DenseLatentsEvalConfig
from saelens_scaffold.evals.eval_output import EvalOutput
from saelens_scaffold.evals.intervals import Shown, WithInterval, with_intervals
from saelens_scaffold.evals.tokens import TokenSelection


@documented
@with_intervals
class DenseLatentMetrics:
    dense_latents: Shown[WithInterval[int]]
    """Number of sparse latents that fire more often than the first threshold"""
    reduction: Shown[WithInterval[float | None]] = None
    """1 minus the ratio to the baseline's dense latents: 0.84 where it has 84 % fewer. Its
    interval is of replicates paired with the baseline's. None without a baseline, or if the
    baseline has none"""


@documented
@with_intervals
class SparsityMetrics:
    l0_sparse: Shown[float]
    """Sparse latents that fire per token"""
    l0_total: Shown[float]
    """Sparse latents that fire per token, plus the rank of the scaffold"""
    scaffold_rank: Shown[int]
    """Number of linear latents, which fire on every token and are not counted; 0 for a
    plain SAE"""
    alive_latents: Shown[WithInterval[int]]
    """Number of sparse latents that fired at all. A replicate misses sequences, so the
    interval lies low"""
    dead_latents: WithInterval[int]
    """Number of sparse latents that never fired. A replicate misses sequences, so the
    interval lies high"""


@documented
@with_intervals
class ReconstructionQualityMetrics:
    explained_variance: Shown[WithInterval[float]]
    """1 - E|x - x̂|² / E|x - E[x]|², of the whole SAE"""


@documented
class TokenMetrics:
    n_tokens: int
    """Tokens evaluated on, without BOS, EOS and padding"""
    n_sequences: int
    """Sequences evaluated on, which are resampled"""


@documented
class DenseLatentsMetricCategories:
    dense_latents: Shown[DenseLatentMetrics]
    """Dense latents at the first threshold"""
    sparsity: Shown[SparsityMetrics]
    """Sparsity of the whole SAE"""
    reconstruction_quality: Shown[ReconstructionQualityMetrics]
    """How well the whole SAE reconstructs"""
    token_stats: TokenMetrics
    """What it was measured on"""


@documented
@with_intervals
class DenseLatentsResultDetail:
    threshold: float
    """Firing frequency"""
    count: WithInterval[int]
    """Number of sparse latents that fire more often"""
    reduction: WithInterval[float | None] = None
    """1 minus the ratio to the baseline's count"""


@documented
class DenseLatent:
    index: int
    """Index of the latent in the SAE"""
    frequency: float
    """Share of the tokens on which it fires"""
    mean_activation: float
    """Mean activation where it fires"""
    antipodality: float
    """Largest product of encoder and decoder cosines with a latent that is opposite in
    both: 1 for one half of an antipodal pair (arXiv 2506.15679)"""
    antipode: int | None
    """Index of that other latent, if there is one"""
    share_in_scaffold: float | None
    """Squared cosine of its decoder direction with the scaffold's subspace; None for a
    plain SAE"""
    share_in_pca: float
    """Squared cosine of its decoder direction with the top PCA subspace"""


@documented
class FiringHistogram:
    log10_edges: list[float]
    """Edges of the bins, in log10 of the firing frequency"""
    counts: list[int]
    """Number of alive sparse latents in each bin"""


@documented(title="Dense Latents")
class DenseLatentsEvalOutput(EvalOutput):
    """
    Number of latents of the sparse dictionary that fire on a large share of all tokens. A scaffold should take over dense latents; its own linear latents are not counted, and its rank stands beside the count.
    """

    eval_config: DenseLatentsEvalConfig
    eval_result_metrics: DenseLatentsMetricCategories
    eval_result_details: list[DenseLatentsResultDetail] = Field(default_factory=list)
    """Each object is the count at one threshold."""
    dense_latents: list[DenseLatent] = Field(default_factory=list)
    """Every sparse latent above the lowest threshold, most frequent first."""
    firing_histogram: FiringHistogram | None = None
    """Distribution of the firing frequencies of the alive sparse latents."""
    pca_rank: int | None = None
    """Rank of the PCA subspace that the dense latents were compared with."""
    tokens: TokenSelection | None = None
    """How the text became sequences, and which of their tokens count."""
    text_seen_in_training: TextSeenInTraining | None = None
    """Whether the SAE was trained on text that it is evaluated on."""
    judged_view: str = "sparse"
    """Counts are of the sparse dictionary (`sparse_sae()`); explained variance and l0_total
    are of the whole SAE."""
    eval_type_id: str = "dense_latents"
