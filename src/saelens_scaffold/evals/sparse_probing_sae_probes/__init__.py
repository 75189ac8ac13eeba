"""Sparse probing by sae-probes: many binary tasks, read from the last token."""

from saelens_scaffold.evals.sparse_probing_sae_probes.eval_config import (
    SparseProbingSaeProbesEvalConfig,
)
from saelens_scaffold.evals.sparse_probing_sae_probes.eval_output import (
    EVAL_TYPE_ID_SPARSE_PROBING_SAE_PROBES,
    SparseProbingSaeProbesEvalOutput,
)

__all__ = [
    "EVAL_TYPE_ID_SPARSE_PROBING_SAE_PROBES",
    "SparseProbingSaeProbesEvalConfig",
    "SparseProbingSaeProbesEvalOutput",
]
