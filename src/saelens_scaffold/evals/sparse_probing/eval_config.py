from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass
from sae_bench.evals.sparse_probing import eval_config as sae_bench_config

from saelens_scaffold.evals.eval_configs import LlmConfig
from saelens_scaffold.evals.over_seeds import (
    DATASETS_DESCRIPTION,
    OverSeedsEvalConfig,
    check_counts,
)

K_VALUES = (1, 2, 5, 10, 20, 50, 100)
"""Numbers of latents that SAEBench's output has a metric for."""


@dataclass
class SparseProbingEvalConfig(
    OverSeedsEvalConfig, LlmConfig, sae_bench_config.SparseProbingEvalConfig
):
    """SAEBench's configuration of sparse probing, with seeds and text of one's own."""

    dataset_names: list[str] = Field(
        default_factory=lambda: (
            sae_bench_config.SparseProbingEvalConfig().dataset_names
        ),
        title="Dataset Names",
        description=DATASETS_DESCRIPTION,
    )

    @field_validator("k_values")
    @classmethod
    def ensure_known_k_values(cls, values: list[int]) -> list[int]:
        return check_counts(values, K_VALUES)
