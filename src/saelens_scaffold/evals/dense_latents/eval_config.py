from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass

from saelens_scaffold.evals.text_eval_config import TextEvalConfig


@dataclass
class DenseLatentsEvalConfig(TextEvalConfig):
    """Configuration of the dense-latent count."""

    thresholds: list[float] = Field(
        default_factory=lambda: [0.1, 0.2, 0.5],
        title="Thresholds",
        description="Firing frequencies above which a latent counts as dense. The first is the headline.",
    )
    baseline: str | None = Field(
        default=None,
        title="Baseline",
        description="Name of the SAE in the same call that the others' dense latents are compared with.",
    )
    pca_rank: int | None = Field(
        default=None,
        title="PCA Rank",
        description="Rank of the PCA subspace that dense latents are compared with. If None, the scaffold's own rank; for a plain SAE the largest rank in the call, else 24.",
    )

    @field_validator("thresholds")
    @classmethod
    def ensure_frequencies(cls, values: list[float]) -> list[float]:
        if not values or not all(0 < value < 1 for value in values):
            raise ValueError("must be frequencies between 0 and 1, as in [0.1, 0.2]")
        if len(set(values)) < len(values):
            raise ValueError("must not name a threshold twice")
        return values

    @field_validator("pca_rank")
    @classmethod
    def ensure_positive_rank(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError("must be at least 1, or None")
        return value
