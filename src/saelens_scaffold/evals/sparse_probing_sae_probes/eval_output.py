from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from sae_bench.evals.sparse_probing_sae_probes import eval_output as sae_bench_output
from sae_bench.evals.sparse_probing_sae_probes.eval_output import (
    EVAL_TYPE_ID_SPARSE_PROBING_SAE_PROBES,
)

from saelens_scaffold.evals.over_seeds import OverSeedsEvalOutput
from saelens_scaffold.evals.sparse_probing_sae_probes.eval_config import (
    SparseProbingSaeProbesEvalConfig,
)

__all__ = [
    "EVAL_TYPE_ID_SPARSE_PROBING_SAE_PROBES",
    "SparseProbingSaeProbesEvalOutput",
]


@dataclass(config=ConfigDict(title="Sparse Probing (sae-probes)"))
class SparseProbingSaeProbesEvalOutput(
    OverSeedsEvalOutput, sae_bench_output.SparseProbingSaeProbesEvalOutput
):
    """
    SAEBench's sparse probing by sae-probes over several seeds: up to 113 binary tasks, whose probes read the last token, with cross-validated regularisation. Metrics are means over the seeds.
    """

    eval_config: SparseProbingSaeProbesEvalConfig  # pyright: ignore[reportGeneralTypeIssues]
