from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass
from sae_bench.evals.sparse_probing_sae_probes import eval_config as sae_bench_config

from saelens_scaffold.evals.over_seeds import (
    DATASETS_DESCRIPTION,
    OverSeedsEvalConfig,
    check_counts,
)
from saelens_scaffold.evals.sparse_probing.eval_config import K_VALUES

MIN_TASK_SIZE = 200


@dataclass
class SparseProbingSaeProbesEvalConfig(
    OverSeedsEvalConfig, sae_bench_config.SparseProbingSaeProbesEvalConfig
):
    """SAEBench's configuration of sparse probing by sae-probes, with seeds and text of
    one's own."""

    dataset_names: list[str] = Field(
        default_factory=lambda: (
            sae_bench_config.SparseProbingSaeProbesEvalConfig().dataset_names
        ),
        title="Dataset Names",
        description=DATASETS_DESCRIPTION.replace("SAEBench", "sae-probes"),
    )
    task_size: int = Field(
        default=2000,
        title="Task Size",
        description="Texts of the task that is made of each class of a dataset that sae-probes does not know: half of that class, half of the others.",
    )
    results_path: str = Field(
        default="",
        title="sae-probes Results Root",
        description="Not used: what sae-probes writes is below artifacts_path.",
    )
    model_cache_path: str | None = Field(
        default=None,
        title="Model Activations Cache",
        description="Not used: what sae-probes writes is below artifacts_path.",
    )

    @field_validator("ks")
    @classmethod
    def ensure_known_ks(cls, values: list[int]) -> list[int]:
        return check_counts(values, K_VALUES)

    @field_validator("task_size")
    @classmethod
    def ensure_task_size(cls, value: int) -> int:
        if value < MIN_TASK_SIZE or value % 2:
            raise ValueError(f"must be even, and at least {MIN_TASK_SIZE}")
        return value

    @field_validator("reg_type")
    @classmethod
    def ensure_reg_type(cls, value: str) -> str:
        if value not in ("l1", "l2"):
            raise ValueError("must be l1 or l2")
        return value

    @field_validator("setting")
    @classmethod
    def ensure_normal_setting(cls, value: str) -> str:
        if value != "normal":
            raise ValueError("must be normal, the one that SAEBench collects")
        return value

    @field_validator("binarize")
    @classmethod
    def ensure_not_binarized(cls, value: bool) -> bool:
        if value:
            raise ValueError(
                "must be False: SAEBench 0.6 does not find sae-probes' binarised results"
            )
        return value
