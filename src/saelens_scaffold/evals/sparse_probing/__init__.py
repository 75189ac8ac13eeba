"""How well a probe on a few latents of the dictionary tells a concept."""

from saelens_scaffold.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from saelens_scaffold.evals.sparse_probing.eval_output import (
    EVAL_TYPE_ID_SPARSE_PROBING,
    SparseProbingEvalOutput,
)

__all__ = [
    "EVAL_TYPE_ID_SPARSE_PROBING",
    "SparseProbingEvalConfig",
    "SparseProbingEvalOutput",
]
