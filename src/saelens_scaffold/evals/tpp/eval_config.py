from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass
from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig

from saelens_scaffold.evals.eval_configs import LlmConfig
from saelens_scaffold.evals.over_seeds import (
    DATASETS_DESCRIPTION,
    OverSeedsEvalConfig,
    check_counts,
)

N_VALUES = (2, 5, 10, 20, 50, 100, 500)
"""Numbers of ablated latents that SAEBench's output has a metric for."""


@dataclass
class TppEvalConfig(OverSeedsEvalConfig, LlmConfig, ScrAndTppEvalConfig):
    """SAEBench's configuration of TPP, with seeds and text of one's own."""

    perform_scr: bool = Field(
        default=False,
        title="Perform Spurious Correlation Removal",
        description="Always False here: this is TPP. SCR is SAEBench's own.",
    )
    dataset_names: list[str] = Field(
        default_factory=lambda: ScrAndTppEvalConfig().dataset_names,
        title="Dataset Names",
        description=DATASETS_DESCRIPTION,
    )

    @field_validator("n_values")
    @classmethod
    def ensure_known_n_values(cls, values: list[int]) -> list[int]:
        return check_counts(values, N_VALUES)

    @model_validator(mode="after")
    def ensure_tpp(self) -> "TppEvalConfig":
        if self.perform_scr:
            raise ValueError(
                "perform_scr is True; it must be False, since this is TPP (SAEBench's "
                "sae_bench.evals.scr_and_tpp.main has SCR)"
            )
        return self
