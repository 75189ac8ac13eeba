from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from sae_bench.evals.scr_and_tpp import eval_output as sae_bench_output
from sae_bench.evals.scr_and_tpp.eval_output import EVAL_TYPE_ID_TPP

from saelens_scaffold.evals.over_seeds import OverSeedsEvalOutput
from saelens_scaffold.evals.tpp.eval_config import TppEvalConfig

__all__ = ["CAVEAT", "EVAL_TYPE_ID_TPP", "TppEvalOutput"]

CAVEAT = (
    "TPP is noisy: at its canonical settings it fails several of the reliability checks of "
    "arXiv 2605.18229 (Are Sparse Autoencoder Benchmarks Reliable?). Run several seeds, and "
    "call no SAE better while the intervals overlap."
)


@dataclass(config=ConfigDict(title="TPP"))
class TppEvalOutput(OverSeedsEvalOutput, sae_bench_output.TppEvalOutput):
    """
    SAEBench's targeted probe perturbation over several seeds: how far ablating the latents that matter to one class's probe harms that probe, and that one alone. Metrics are means over the seeds.
    """

    eval_config: TppEvalConfig  # pyright: ignore[reportGeneralTypeIssues]
    caveat: str = Field(
        default=CAVEAT,
        title="Caveat",
        description="What is known of this metric's reliability",
    )
