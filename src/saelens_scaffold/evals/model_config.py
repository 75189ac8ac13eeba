"""The parts of a configuration that say which language model, and how sure."""

from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass
from sae_bench.evals.base_eval_output import BaseEvalConfig


@dataclass
class ModelConfig(BaseEvalConfig):
    """Of every evaluation of this package."""

    model_name: str = Field(
        default="",
        title="Model Name",
        description="Model of TransformerLens, directory of a local model, or py-neox for the embedded one.",
    )
    confidence: float = Field(
        default=0.95,
        title="Confidence",
        description="Confidence of the intervals.",
    )

    @field_validator("confidence")
    @classmethod
    def ensure_share(cls, value: float) -> float:
        if not 0 < value < 1:
            raise ValueError("must lie between 0 and 1, as in 0.95")
        return value


@dataclass
class LlmConfig(ModelConfig):
    """Of those that load the language model themselves, or have SAEBench load it."""

    llm_batch_size: int = Field(
        default=32,
        title="LLM Batch Size",
        description="LLM batch size, in sequences or texts.",
    )
    llm_dtype: str = Field(
        default="float32",
        title="LLM Data Type",
        description="LLM data type, also that of the SAEs.",
    )

    @field_validator("llm_batch_size")
    @classmethod
    def ensure_positive_batch_size(cls, value: int) -> int:
        if value < 1:
            raise ValueError("must be at least 1")
        return value

    @field_validator("llm_dtype")
    @classmethod
    def ensure_dtype(cls, value: str) -> str:
        allowed = ("float32", "float64", "float16", "bfloat16")
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return value
