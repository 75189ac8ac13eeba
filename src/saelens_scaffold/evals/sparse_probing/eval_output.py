from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from sae_bench.evals.sparse_probing import eval_output as sae_bench_output
from sae_bench.evals.sparse_probing.eval_output import EVAL_TYPE_ID_SPARSE_PROBING

from saelens_scaffold.evals.over_seeds import OverSeedsEvalOutput
from saelens_scaffold.evals.sparse_probing.eval_config import SparseProbingEvalConfig

__all__ = ["EVAL_TYPE_ID_SPARSE_PROBING", "SparseProbingEvalOutput"]


@dataclass(config=ConfigDict(title="Sparse Probing"))
class SparseProbingEvalOutput(
    OverSeedsEvalOutput, sae_bench_output.SparseProbingEvalOutput
):
    """
    SAEBench's sparse probing over several seeds: how well a few latents of the sparse dictionary, picked for each concept, let a linear probe tell the concept. Metrics are means over the seeds.
    """

    eval_config: SparseProbingEvalConfig  # pyright: ignore[reportGeneralTypeIssues]
