from typing import Annotated

from pydantic import Field, PositiveInt

from saelens_scaffold._util.configs import documented
from saelens_scaffold.evals.eval_configs import DISTINCT, OpenShare, TextEvalConfig


@documented
class DenseLatentsEvalConfig(TextEvalConfig):
    """Configuration of the dense-latent count."""

    thresholds: Annotated[list[OpenShare], Field(min_length=1), DISTINCT] = Field(
        default_factory=[0.1, 0.2, 0.5].copy
    )
    """Firing frequencies above which a latent counts as dense. The first is the headline."""
    baseline: str | None = None
    """Name of the SAE in the same call that the others' dense latents are compared with."""
    pca_rank: PositiveInt | None = None
    """Rank of the PCA subspace that dense latents are compared with. If None, the rank of
    the scaffold; for a plain SAE the largest rank in the call, else 24."""
