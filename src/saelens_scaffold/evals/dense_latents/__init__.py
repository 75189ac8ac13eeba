"""How many latents of the dictionary fire on a large share of all tokens."""

from saelens_scaffold.evals.dense_latents.eval_config import DenseLatentsEvalConfig
from saelens_scaffold.evals.dense_latents.eval_output import (
    EVAL_TYPE_ID_DENSE_LATENTS,
    DenseLatentsEvalOutput,
)

__all__ = [
    "EVAL_TYPE_ID_DENSE_LATENTS",
    "DenseLatentsEvalConfig",
    "DenseLatentsEvalOutput",
]
