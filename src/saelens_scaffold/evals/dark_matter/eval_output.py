# Where fields have intervals, required ones may follow optional ones: see with_intervals.
# pyright: reportGeneralTypeIssues=false

from pydantic import Field

from saelens_scaffold._util.configs import documented
from saelens_scaffold.evals.dark_matter.eval_config import DarkMatterEvalConfig
from saelens_scaffold.evals.data import TextSeenInTraining
from saelens_scaffold.evals.eval_output import EvalOutput
from saelens_scaffold.evals.intervals import (
    OptionalEstimate,
    Shown,
    WithInterval,
    with_intervals,
)
from saelens_scaffold.evals.tokens import TokenSelection


@documented
@with_intervals
class ReconstructionMetrics:
    """Fractions of the activations' variance, |x - E[x]|², on tokens not fitted on."""

    fvu: Shown[WithInterval[float]]
    """Fraction of variance unexplained by x̂: |e|² with the error e = x - x̂"""
    fvu_linear: Shown[WithInterval[float]]
    """The part of it that a linear map of x takes away, fvu - fvu_nonlinear"""
    fvu_nonlinear: Shown[WithInterval[float]]
    """Fraction unexplained by x̂ + xW, with W the least-squares map from x to e, without
    intercept (arXiv 2410.14670)"""
    fvu_nonlinear_with_intercept: WithInterval[float]
    """The same with an intercept"""
    fvu_in_sample: float
    """fvu on the tokens fitted on"""
    fvu_nonlinear_in_sample: float
    """fvu_nonlinear on the tokens fitted on"""
    l0_sparse: Shown[float]
    """Sparse latents active per token"""
    l0_total: Shown[float]
    """Sparse latents active per token, plus the rank of the scaffold"""


@documented
@with_intervals
class LinearErrorMetrics:
    """How well the error e is predicted from x by W, on tokens not fitted on."""

    r_squared: Shown[WithInterval[float]]
    """R² of e, the mean over its dimensions (the paper's code, arXiv 2410.14670)"""
    r_squared_pooled: Shown[WithInterval[float]]
    """R² of e, of all dimensions together"""
    r_squared_with_intercept: WithInterval[float]
    """r_squared with an intercept"""
    r_squared_pooled_with_intercept: WithInterval[float]
    """r_squared_pooled with an intercept"""
    r_squared_in_sample: float
    """r_squared on the tokens fitted on"""
    r_squared_pooled_in_sample: float
    """r_squared_pooled on the tokens fitted on"""
    share_linear: Shown[WithInterval[float]]
    """|xW|² / |e|²"""
    share_nonlinear: Shown[WithInterval[float]]
    """|e - xW|² / |e|²"""


@documented
@with_intervals
class NormMetrics:
    """R² of norms, on tokens not fitted on. From x, squared norms are predicted without an
    intercept and |e| with one, as in the code of arXiv 2410.14670."""

    r_squared_squared_error: Shown[WithInterval[float]]
    """R² of |e|² from x"""
    r_squared_error: Shown[WithInterval[float]]
    """R² of |e| from x"""
    r_squared_error_from_norm: Shown[WithInterval[float]]
    """R² of |e| from |x|"""
    r_squared_error_from_l0: WithInterval[float]
    """R² of |e| from the number of active sparse latents"""
    r_squared_error_from_loss: WithInterval[float]
    """R² of |e| from the language model's loss on the next token"""
    r_squared_error_from_token: WithInterval[float]
    """R² of |e| from its mean over the tokens of the same id"""
    r_squared_squared_nonlinear_error: Shown[WithInterval[float]]
    """R² of |e - xW|² from x"""
    r_squared_squared_activation: WithInterval[float]
    """R² of |x|² from x"""
    r_squared_squared_reconstruction: WithInterval[float]
    """R² of |x̂|² from x"""


@documented
@with_intervals
class CrossEntropyMetrics:
    """
    Next-token cross-entropy with something else in place of x, in nats, and the share of
    what x̂ loses that is recovered, beside the share of FVU that is.
    """

    ce_clean: float
    """Nothing changed"""
    ce_reconstruction: WithInterval[float]
    """With x̂"""
    ce_with_linear_error: WithInterval[float]
    """With x̂ + xW"""
    ce_with_nonlinear_error: WithInterval[float]
    """With x̂ + (e - xW)"""
    ce_recovered_by_linear_error: Shown[WithInterval[float]]
    """Share recovered of the cross-entropy lost by x̂, with x̂ + xW"""
    fvu_recovered_by_linear_error: Shown[WithInterval[float]]
    """Share recovered of the FVU of x̂, with x̂ + xW"""
    ce_recovered_by_nonlinear_error: Shown[WithInterval[float]]
    """Share recovered of the cross-entropy lost by x̂, with x̂ + (e - xW)"""
    fvu_recovered_by_nonlinear_error: Shown[WithInterval[float]]
    """Share recovered of the FVU of x̂, with x̂ + (e - xW)"""


@documented
@with_intervals
class ScaffoldMetrics:
    """What a scaffold has taken of the error of its plain twin, on the same tokens. All None
    without a scaffold or a twin."""

    linear_error_taken: Shown[OptionalEstimate] = None
    """1 minus the ratio of fvu_linear to the twin's"""
    nonlinear_error_taken: Shown[OptionalEstimate] = None
    """1 minus the ratio of fvu_nonlinear to the twin's"""
    fvu_linear_difference: OptionalEstimate = None
    """fvu_linear minus the twin's"""
    fvu_nonlinear_difference: OptionalEstimate = None
    """fvu_nonlinear minus the twin's"""
    share_of_linear_error: Shown[float | None] = None
    """Share of the variance of the twin's linear error xW that lies in the scaffold's
    subspace"""
    share_of_linear_error_random: float | None = None
    """What a random subspace of that rank would have in expectation"""
    share_of_linear_error_best: float | None = None
    """The most that a subspace of that rank can have"""


@documented
@with_intervals
class EarlierMetrics:
    """Linear maps from the SAE at an earlier hook point. All None without one."""

    fvu_nonlinear_with_reconstruction: Shown[OptionalEstimate] = None
    """Fraction unexplained by x̂ and a linear map of x and the earlier x̂"""
    fvu_nonlinear_with_reconstruction_and_error: Shown[OptionalEstimate] = None
    """The same, with the earlier error as a further input"""
    nonlinear_error_explained: OptionalEstimate = None
    """Share of fvu_nonlinear that the first of them takes away"""
    nonlinear_error_explained_with_error: OptionalEstimate = None
    """Share of fvu_nonlinear that the second takes away"""


@documented
@with_intervals
class PursuitMetrics:
    """With activations by gradient pursuit, as many on each token as the SAE's own. All None
    if `pursuit` is off."""

    fvu_pursuit: Shown[OptionalEstimate] = None
    """fvu"""
    fvu_nonlinear_pursuit: Shown[OptionalEstimate] = None
    """fvu_nonlinear, with a W of its own"""


@documented
class TokenMetrics:
    n_tokens: int
    """Tokens tested on"""
    n_sequences: int
    """Sequences that they are in, which are resampled"""
    n_fit_tokens: int
    """Tokens fitted on"""


@documented
class DarkMatterMetricCategories:
    reconstruction: Shown[ReconstructionMetrics]
    """What x̂ leaves unexplained"""
    linear_error: Shown[LinearErrorMetrics]
    """How much of the error is linear in x"""
    norms: Shown[NormMetrics]
    """How well the error's norm is predicted"""
    cross_entropy: Shown[CrossEntropyMetrics]
    """What the parts of the error cost the language model"""
    scaffold: Shown[ScaffoldMetrics]
    """What the scaffold has taken of a plain twin's error"""
    earlier: Shown[EarlierMetrics]
    """Linear maps from an SAE at an earlier hook point"""
    pursuit: Shown[PursuitMetrics]
    """Activations by gradient pursuit"""
    token_stats: TokenMetrics
    """What it was measured on"""


@documented
@with_intervals
class NormPrediction:
    target: str
    """The norm"""
    predictor: str
    """What it is predicted from by least squares; for token, its mean over the tokens of the
    same id"""
    intercept: bool
    """Whether the linear map has an intercept"""
    r_squared: WithInterval[float]
    """R² on tokens not fitted on"""
    r_squared_in_sample: float
    """R² on the tokens fitted on"""


@documented
@with_intervals
class ErrorScaling:
    predictor: str
    """Another SAE at the same hook point"""
    r_squared: WithInterval[float]
    """R² of this SAE's error norm from the other's, on tokens not fitted on"""
    r_squared_with_nonlinear: WithInterval[float]
    """The same from the other's error norm and norm of the nonlinear error"""
    explained_by_nonlinear: WithInterval[float]
    """Share of the rest that the second explains more than the first"""


@documented
class ScaffoldOverlap:
    """
    Overlaps of the scaffold's subspace: mean squared cosines of principal angles.
    """

    rank: int
    """Number of directions that it is compared with"""
    with_singular_vectors: float
    """Overlap with the leading right singular vectors of the twin's W"""
    with_linear_error: float
    """Overlap with the leading principal directions of the twin's linear error xW"""
    of_random: float
    """What a random subspace would have in expectation"""


@documented(title="Dark Matter")
class DarkMatterEvalOutput(EvalOutput):
    """
    What an SAE leaves of the activations, how much of that a linear map of the activations predicts, what both parts cost the language model (arXiv 2410.14670), and how much of them a scaffold takes.
    """

    eval_config: DarkMatterEvalConfig
    eval_result_metrics: DarkMatterMetricCategories
    eval_result_details: list[NormPrediction] = Field(default_factory=list)
    """Each object is the prediction of one norm from one thing."""
    error_scaling: list[ErrorScaling] = Field(default_factory=list)
    """How well the error norm is predicted from that of each other SAE of the call."""
    scaffold_overlaps: list[ScaffoldOverlap] = Field(default_factory=list)
    """Overlap of the scaffold with what is largest of the plain twin's linear error, by rank."""
    tokens: TokenSelection | None = None
    """How the text became sequences, and which of their tokens count."""
    text_seen_in_training: TextSeenInTraining | None = None
    """Whether the SAE was trained on text that it is evaluated on."""
    judged_view: str = "whole"
    """The whole SAE, with its scaffold."""
    eval_type_id: str = "dark_matter"
