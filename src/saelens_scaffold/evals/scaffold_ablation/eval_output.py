# Where fields have intervals, required ones may follow optional ones: see with_intervals.
# pyright: reportGeneralTypeIssues=false

from pydantic import Field

from saelens_scaffold._util.configs import documented
from saelens_scaffold.evals.data import TextSeenInTraining
from saelens_scaffold.evals.eval_output import EvalOutput
from saelens_scaffold.evals.intervals import (
    OptionalEstimate,
    Shown,
    WithInterval,
    with_intervals,
)
from saelens_scaffold.evals.scaffold_ablation.eval_config import (
    ScaffoldAblationEvalConfig,
)
from saelens_scaffold.evals.tokens import TokenSelection

EVAL_TYPE_ID_SCAFFOLD_ABLATION = "scaffold_ablation"


@documented
@with_intervals
class CrossEntropyMetrics:
    """
    What the language model loses, as multiples of its clean cross-entropy.

    Each removal of the scaffold stands beside the same removal of principal directions.
    Were the scaffold the projection on those directions, the figures of each pair would be
    equal.

    No figure depends on the gauge, that is on how a constant of the scaffold's span is
    divided between s(x) and b_dec. (The detail `scaffold_subtracted` does.)
    """

    ce_clean: Shown[float]
    """Next-token cross-entropy of the language model, nothing changed, in nats"""
    ce_loss_score: Shown[float]
    """SAEBench's: 1 if the model predicts as well from the SAE's reconstruction, 0 if as
    badly as from zeros"""
    ce_ratio_reconstruction: float
    """CE with the SAE's reconstruction in place, as a multiple of the clean CE"""
    ce_ratio_scaffold_mean_ablated: Shown[OptionalEstimate] = None
    """CE with the scaffold's part of the reconstruction replaced by its mean, x - s(x) +
    E[s], as a multiple of the clean CE (the paper, whose way of removing the scaffold its
    abstract does not say: 7.5)"""
    ce_ratio_pca_mean_ablated: Shown[WithInterval[float]]
    """CE with the coordinates along as many principal directions replaced by their mean, as
    a multiple of the clean CE (the paper: 2.8)"""
    ce_ratio_random_mean_ablated: float
    """CE with the coordinates along as many random directions replaced by their mean, as a
    multiple of the clean CE"""
    ce_ratio_scaffold_projected_out: Shown[OptionalEstimate] = None
    """CE with the scaffold's subspace projected out, as a multiple of the clean CE"""
    ce_ratio_pca_projected_out: Shown[WithInterval[float]]
    """CE with as many principal directions projected out, as a multiple of the clean CE"""
    ce_ratio_random_projected_out: float
    """CE with as many random directions projected out, as a multiple of the clean CE"""
    ce_ratio_scaffold_subtracted_gauge_fixed: OptionalEstimate = None
    """CE of x - s(x), with s(x) as it is where b_dec is orthogonal to the scaffold's span,
    as a multiple of the clean CE. It stands beside the projections: equal to them were the
    scaffold one"""
    n_aligned_latents: int | None = None
    """Number of latents of the next two figures: 787, the paper's, or else the largest
    asked for; None for a plain SAE"""
    ce_ratio_baseline_aligned_latents: Shown[OptionalEstimate] = None
    """CE with as many sparse latents of the plain baseline, those most aligned with the
    scaffold, set to zero, as a multiple of the clean CE (the paper, of sparse dictionaries:
    2.9 for 787)"""
    baseline_aligned_latents_note: str | None = None
    """Why there is no such figure, if fewer latents are alive"""
    ce_ratio_aligned_latents: Shown[OptionalEstimate] = None
    """CE with as many of the SAE's own sparse latents set to zero, as a multiple of the
    clean CE"""
    aligned_latents_note: str | None = None
    """Why there is no such figure, if fewer latents are alive"""


@documented
class GeometryMetrics:
    pca_rank: int
    """Number of principal directions compared with"""
    variance_explained_by_pca: Shown[float]
    """Share of the activations' variance that lies in the top PCA subspace"""
    variance_explained_by_random: float
    """Share that lies in a random subspace of that rank, in expectation"""
    outlier_share_in_pca: float
    """Mean squared cosine of the outlier dimensions with the top PCA subspace"""
    outlier_share_in_random: float
    """Their mean squared cosine with a random subspace of that rank, in expectation"""
    overlap_with_pca: Shown[float | None] = None
    """Mean squared cosine of the principal angles between the scaffold's and the top PCA
    subspace; None for a plain SAE"""
    overlap_of_random: float | None = None
    """What a random subspace of the scaffold's rank would have in expectation"""
    variance_explained_by_scaffold: Shown[float | None] = None
    """Share of the activations' variance that lies in the scaffold's subspace; None for a
    plain SAE"""
    outlier_share_in_scaffold: Shown[float | None] = None
    """Mean squared cosine with the scaffold's subspace of the dimensions of the residual
    stream with the largest root mean square, as many as the PCA rank; None for a plain SAE"""
    outlier_share_of_random: float | None = None
    """What a random subspace of the scaffold's rank would have in expectation"""
    outlier_rms_ratio: float | None = None
    """Smallest root mean square of these dimensions, as a multiple of the median
    dimension's: near 1, they are no outliers"""


@documented
@with_intervals
class TopicMetrics:
    """
    Headline accuracies of probes after the last layer. Removing the scaffold means mean
    ablation: s(x) by itself depends on the gauge of an SAE's weights, s(x) - E[s] does not.
    """

    chance: float | None = None
    """Accuracy of always naming the most frequent topic"""
    n_topics: int | None = None
    """Number of topics"""
    accuracy_clean: Shown[float | None] = None
    """Accuracy of a linear probe after the last layer, nothing changed (the paper: 0.987)"""
    accuracy_scaffold_mean_ablated: Shown[OptionalEstimate] = None
    """Accuracy of the same probe, with the scaffold's part replaced by its mean at the hook
    point (the paper removes the scaffold: chance)"""
    accuracy_scaffold_mean_ablated_retrained: Shown[OptionalEstimate] = None
    """Accuracy of a probe trained on the changed activations: high if the topic has moved,
    chance if it is gone"""
    accuracy_topic_latents_ablated: Shown[OptionalEstimate] = None
    """Accuracy of the clean-trained probe, with the sparse latents most aligned with the
    topics set to zero (the paper: virtually unchanged, for 2048)"""
    accuracy_topic_latents_ablated_retrained: OptionalEstimate = None
    """Accuracy of a probe trained on the changed activations"""
    n_topic_latents: int | None = None
    """How many latents that were: as many as asked for, or all that are alive"""
    n_topic_latents_alive: int | None = None
    """How many sparse latents fire on the text fitted on"""


@documented
@with_intervals
class SpecialTokenMetrics:
    """
    Headline figures with special tokens included: means, directions, scaffold means and
    firing frequencies are fitted on BOS, EOS and padding as well, and all of these tokens
    are ablated. Predictions count as they do elsewhere. All None if
    `include_special_tokens` is off.
    """

    ce_ratio_scaffold_mean_ablated_with_special_tokens: Shown[OptionalEstimate] = None
    """CE with the scaffold's part replaced by its mean, as a multiple of the clean CE"""
    ce_ratio_pca_mean_ablated_with_special_tokens: Shown[OptionalEstimate] = None
    """CE with as many principal directions mean-ablated, as a multiple of the clean CE"""
    ce_ratio_scaffold_projected_out_with_special_tokens: OptionalEstimate = None
    """CE with the scaffold's subspace projected out, as a multiple of the clean CE"""
    ce_ratio_pca_projected_out_with_special_tokens: OptionalEstimate = None
    """CE with as many principal directions projected out, as a multiple of the clean CE"""
    accuracy_scaffold_mean_ablated_with_special_tokens: OptionalEstimate = None
    """Accuracy of the clean-trained topic probe"""
    overlap_with_pca_with_special_tokens: float | None = None
    """Mean squared cosine of the principal angles between the scaffold's and the top PCA
    subspace"""
    top_direction_variance_with_special_tokens: float | None = None
    """Share of the activations' variance along the first principal direction; near 1 where
    BOS has massive activations"""
    top_direction_variance: float | None = None
    """The same share without special tokens"""


@documented
class ScaffoldAblationMetricCategories:
    cross_entropy: Shown[CrossEntropyMetrics]
    """What the interventions cost the language model"""
    geometry: Shown[GeometryMetrics]
    """Where the scaffold's subspace lies"""
    topics: Shown[TopicMetrics]
    """Whether the topic of a text can still be read"""
    special_tokens: Shown[SpecialTokenMetrics]
    """The headline figures with BOS, EOS and padding ablated and fitted on, too"""


@documented
@with_intervals
class ScaffoldAblationResultDetail:
    intervention: str
    """Name of the intervention"""
    kind: str
    """reference, scaffold, geometry or dictionary"""
    description: str
    """What it does"""
    special_tokens: bool
    """Whether BOS, EOS and padding are ablated and fitted on, too"""
    size: int | None
    """Number of dimensions or latents it removes"""
    n_draws: int
    """Draws that are averaged"""
    ce: WithInterval[float]
    """Next-token cross-entropy in nats"""
    ce_ratio: WithInterval[float]
    """CE as a multiple of the clean CE. The interval is of paired replicates"""
    delta_ce: WithInterval[float]
    """CE minus the clean CE, in nats. The interval is of paired replicates"""
    kl: WithInterval[float]
    """KL divergence of the predictions from the clean ones, in nats"""


@documented
@with_intervals
class TopicAccuracy:
    intervention: str
    """What was removed at the hook point"""
    description: str
    """What it does"""
    read_at: str
    """Where the topic is read: hook_point or last_layer"""
    special_tokens: bool
    """Whether BOS, EOS and padding are ablated and fitted on, too"""
    size: int | None
    """Number of dimensions or latents it removes"""
    accuracy: WithInterval[float]
    """Accuracy of a probe trained on clean activations"""
    accuracy_retrained: WithInterval[float]
    """Accuracy of a probe trained on the changed activations: high if the topic has moved,
    chance if it is gone"""


@documented
class PrincipalAngles:
    degrees: list[float]
    """Principal angles between the scaffold's and the top PCA subspace, smallest first"""


@documented
class DictionaryAlignment:
    dictionary: str
    """own: the SAE's own sparse latents; baseline: those of the plain baseline"""
    sae: str
    """Name of the SAE whose latents they are"""
    n_alive: int
    """Number of latents that fire on the text to fit on"""
    cosines: list[float]
    """Between decoder direction and the scaffold's subspace"""
    n_above: list[int]
    """Alive latents above each of these cosines"""
    n_aligned_latents: list[int]
    """The N of the N most aligned latents"""
    cosine_of_last: list[float | None]
    """Cosine of the N-th most aligned latent, for each N; None where fewer are alive"""


@documented(title="Scaffold Ablation")
class ScaffoldAblationEvalOutput(EvalOutput):
    """
    Whether the language model needs the scaffold: cross-entropy, KL divergence and topic classification with the scaffold removed at the hook point, beside the removal of principal directions and of sparse latents aligned with it, its own and those of a plain SAE.
    """

    eval_config: ScaffoldAblationEvalConfig
    eval_result_metrics: ScaffoldAblationMetricCategories
    eval_result_details: list[ScaffoldAblationResultDetail] = Field(
        default_factory=list
    )
    """Each object is one intervention, the clean run first."""
    topic_accuracies: list[TopicAccuracy] = Field(default_factory=list)
    """Each object is one intervention and one place where the topic is read."""
    principal_angles: PrincipalAngles | None = None
    """Between the scaffold's and the top PCA subspace; None for a plain SAE."""
    dictionary_alignments: list[DictionaryAlignment] = Field(default_factory=list)
    """Each object is one dictionary: how many of its latents are how well aligned with the
    scaffold's subspace. Empty for a plain SAE."""
    n_predictions: int | None = None
    """Number of next-token predictions evaluated."""
    tokens: TokenSelection | None = None
    """How the text became sequences, and which of their tokens count."""
    text_seen_in_training: TextSeenInTraining | None = None
    """Whether the SAE was trained on text that it is evaluated on."""
    judged_view: str = "whole"
    """The whole SAE, scaffold included."""
    eval_type_id: str = EVAL_TYPE_ID_SCAFFOLD_ABLATION
