"""What an inspection finds, as plain data; its JSON schema comes from these classes."""

import torch
from pydantic import Field

from saelens_scaffold._util.configs import documented
from saelens_scaffold.evals.tokens import TokenSelection

Weighted = list[tuple[int, float]]
"""Pairs of an index and a number."""


def weighted(indices: torch.Tensor, weights: torch.Tensor) -> Weighted:
    """Pairs of an index and its weight, of shape (n,) each."""
    return [*zip(indices.tolist(), weights.tolist(), strict=True)]


@documented
class Context:
    sequence: int
    """Number of the sequence, counted from the first that was inspected"""
    position: int
    """Position in it of the token on which the activation is strongest"""
    peak: int
    """Index of this token in `tokens`"""
    tokens: list[int]
    """Ids of the tokens around it"""
    values: list[int]
    """Activation at each of them, from -127 to 127, in units of scale / 127"""


@documented
class Removal:
    cross_entropy: float
    """Cross-entropy of the next token without the direction or latent, in nats"""
    increase: float
    """By how much that is more than with it"""
    kl: float
    """KL divergence from the clean prediction, in nats"""
    tokens: list[tuple[int, int, float]]
    """Next tokens that become most expensive in total: id, number of its predictions, mean
    increase of its loss in nats"""


@documented
class Direction:
    vector: list[float]
    """The direction, of unit norm, as `steering` takes it"""
    variance: float
    """Variance of the coordinate"""
    share_of_variance: float
    """Its share of the activations' variance"""
    label: str
    """What explains the coordinate, in one line; "unexplained" if nothing does"""
    r_squared: dict[str, float]
    """Held-out R² of the coordinate, by predictor"""
    removal: Removal
    """What the language model loses without it"""
    principal_component: int
    """Principal component of the activations that is nearest, from 0"""
    cosine: float
    """|cosine| with it"""
    dimensions: Weighted
    """Dimensions of the activations that it writes to most, and its components there"""
    promoted: Weighted
    """Tokens that its positive end promotes, and their logits"""
    suppressed: Weighted
    """Tokens that its negative end promotes, with the positive end's logits"""
    histogram: list[int]
    """Number of tokens with the coordinate in each bin, of `DIRECTION_BIN` standard
    deviations of the first tokens; the middle edge is their mean"""
    scale: float
    """Coordinate that a value of 127 stands for in the contexts"""
    high: list[Context]
    """Contexts with the highest coordinates, one a sequence"""
    low: list[Context]
    """Contexts with the lowest"""
    share_of_scaffold: float = 1.0
    """Share of the scaffold's variance"""


@documented
class Positions:
    n: list[int]
    """Number of tokens at each position; special tokens, as BOS at position 0, included"""
    share_of_variance: list[float]
    """|s - E[s]|² / |x - E[x]|² of the tokens there"""
    share_of_squares: list[float]
    """|s|² / |x|² of the tokens there, s with b_dec's part in its subspace"""
    share_of_total: list[float]
    """Share of all positions' |s|² that is there"""


@documented
class Scaffold:
    rank: int
    """Rank"""
    share_of_variance: float
    """Variance of s as a share of the activations' variance"""
    overlap_with_pca: float
    """Overlap of its subspace with the first principal components, from 0 to 1"""
    overlap_of_random: float
    """The same for a random subspace, in expectation"""
    dimensions: Weighted
    """Dimensions of the activations that lie most in its subspace, and how far (0 to 1)"""
    outlier_dimensions: Weighted
    """Outlier dimensions of the activations, and how far they lie in its subspace"""
    positions: Positions
    """What it carries at each position"""
    directions: list[Direction]
    """The principal axes of s, largest variance first"""


@documented
class Antipode:
    latent: int
    """Index of the latent that is most opposite"""
    cosine_encoder: float
    """Cosine of the encoder directions"""
    cosine_decoder: float
    """Cosine of the decoder directions"""
    both_fire: float
    """Share of the tokens on which both fire"""
    both_if_independent: float
    """The same if they fired independently"""
    either_fires: float
    """Share of the tokens on which one of them or both fire"""


@documented
class Successor:
    sae: int
    """Index of the SAE"""
    direction: int
    """Index of its scaffold direction"""
    cosine: float
    """Cosine of the latent's decoder direction with it"""
    correlation: float
    """Correlation of the latent's activation with its coordinate"""


@documented
class DenseLatent:
    latent: int
    """Index of the latent"""
    label: str
    """What explains its activation, in one line"""
    r_squared: dict[str, float]
    """Held-out R² of its activation, by predictor"""
    removal: Removal
    """What the language model loses without it"""
    antipode: Antipode | None
    """Its antipodal partner, if a latent is opposite at all"""
    successor: Successor | None
    """The scaffold direction, of any SAE in the call, that follows it most closely"""


@documented
class Latents:
    """Columns with one entry for each sparse latent."""

    index: list[int]
    """Index in the SAE, from its rank on"""
    frequency: list[float]
    """Share of the tokens on which it fires; 0 if it is dead, and has no contexts"""
    mean: list[float]
    """Mean activation where it fires"""
    scale: list[float]
    """Activation that a value of 127 stands for in the contexts: its largest"""
    share_in_scaffold: list[float] | None
    """Squared cosine of the decoder direction with the scaffold's subspace; of a plain SAE,
    with that of the first SAE in the call that has one"""
    first_bin: list[int]
    """Number of the first bin of the histogram, whose lower edge is 2 ** (bin / 2)"""
    histogram: list[list[int]]
    """Number of tokens with the activation in each bin, of half an octave; what is beyond
    the last bins is in these"""
    promoted: list[Weighted]
    """Tokens that it promotes, and their logits"""
    suppressed: list[Weighted]
    """Tokens that it suppresses, and their logits"""
    contexts: list[list[Context]]
    """Strongest contexts, one a sequence"""


@documented
class InspectedSAE:
    name: str
    """Name"""
    architecture: str
    """Architecture, in the form that was inspected"""
    d_sae: int
    """Number of all latents, linear ones included"""
    l0_sparse: float
    """Sparse latents that fire per token"""
    scaffold: Scaffold | None
    """The scaffold; None for a plain SAE"""
    n_dense: int
    """Number of dense latents"""
    dense: list[DenseLatent]
    """Those of them that are explained, most frequent first: the `MAX_DENSE` that fired most
    often on the first tokens, if on more than `MAY_BE_DENSE` of these"""
    latents: Latents
    """The dictionary"""


@documented
class Pair:
    """Two SAEs side by side: columns with one entry for each sparse latent of the first."""

    first: int
    """Index of the one SAE"""
    second: int
    """Index of the other"""
    nearest: list[int]
    """Index of the latent of the second SAE with the largest cosine of decoder
    directions"""
    cosine: list[float]
    """That cosine"""
    correlation: list[float]
    """Correlation of both activations"""
    matched: list[bool]
    """Whether both are alive, each is the other's nearest, and the cosine is at least
    `MATCHED_COSINE`"""
    gone: list[int]
    """Alive latents of the first SAE without a match"""
    new: list[int]
    """Alive latents of the second SAE without a match"""


@documented
class Inspection:
    """What is in some SAEs of one hook point."""

    model_name: str
    """Language model"""
    hook_name: str
    """Hook point"""
    dataset: str
    """Text"""
    dataset_split: str
    """Its split"""
    selection: TokenSelection
    """How the text became sequences, and which of their tokens count"""
    n_tokens: int
    """Tokens that were inspected: without BOS, EOS and padding"""
    n_sequences: int
    """Their sequences"""
    n_sample_tokens: int
    """Tokens before these, which fix the axes and which latents may be dense"""
    n_removal_tokens: int
    """Predictions that the loss without a direction or latent is of"""
    cross_entropy: float
    """Clean cross-entropy of these, in nats"""
    variance_shares: list[float]
    """Share of the activations' variance along each principal component"""
    predictors: list[str]
    """Names of the predictors, the simplest first"""
    topics: list[str]
    """Labels of the text"""
    tokens: list[str]
    """Text of each id of a token; what is no whole character, as the tokenizer writes it"""
    saes: list[InspectedSAE]
    """The SAEs"""
    pairs: list[Pair]
    """Each SAE but the first beside the first"""
    key: dict[str, dict] = Field(default_factory=dict)
    """What all this depends on"""
