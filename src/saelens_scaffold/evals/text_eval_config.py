"""The part of a configuration that evaluations on running text share."""

from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass
from sae_bench.evals.base_eval_output import BaseEvalConfig


@dataclass
class TextEvalConfig(BaseEvalConfig):
    """Which language model reads which text, and how sure the numbers shall be."""

    model_name: str = Field(
        default="",
        title="Model Name",
        description="Model of TransformerLens, directory of a local model, or py-neox for the embedded one.",
    )
    random_seed: int = Field(
        default=42,
        title="Random Seed",
        description="Seed of the bootstrap and of all random choices",
    )
    dataset: str = Field(
        default="Skylion007/openwebtext",
        title="Dataset",
        description="Text: a dataset on the Hub, a local directory or file (.parquet, .jsonl, .csv), or python-stdlib for the embedded text.",
    )
    dataset_split: str = Field(
        default="train",
        title="Dataset Split",
        description="Split of the dataset. Take one that the SAEs were not trained on, if there is one.",
    )
    text_column: str = Field(
        default="text",
        title="Text Column",
        description="Column of the dataset with the text.",
    )
    context_size: int | None = Field(
        default=None,
        title="Context Size",
        description="Tokens per sequence. If None, what the SAEs were trained with, else 128.",
    )
    prepend_bos: bool | None = Field(
        default=None,
        title="Prepend BOS",
        description="Whether each sequence begins with BOS. If None, as the SAEs were trained, else True.",
    )
    n_tokens: int = Field(
        default=1_000_000,
        title="Number of Tokens",
        description="Tokens to evaluate on. BOS, EOS and padding do not count.",
    )
    llm_batch_size: int = Field(
        default=32,
        title="LLM Batch Size",
        description="LLM batch size, in sequences.",
    )
    llm_dtype: str = Field(
        default="float32",
        title="LLM Data Type",
        description="LLM data type, also that of the SAEs.",
    )
    n_bootstrap: int = Field(
        default=500,
        title="Bootstrap Replicates",
        description="Replicates of the bootstrap over sequences.",
    )
    confidence: float = Field(
        default=0.95,
        title="Confidence",
        description="Confidence of the intervals.",
    )

    @field_validator("n_tokens", "llm_batch_size", "n_bootstrap")
    @classmethod
    def ensure_positive(cls, value: int) -> int:
        if value < 1:
            raise ValueError("must be at least 1")
        return value

    @field_validator("context_size")
    @classmethod
    def ensure_room_for_a_prediction(cls, value: int | None) -> int | None:
        if value is not None and value < 3:
            raise ValueError("must be at least 3: BOS, a token and one to predict")
        return value

    @field_validator("confidence")
    @classmethod
    def ensure_share(cls, value: float) -> float:
        if not 0 < value < 1:
            raise ValueError("must lie between 0 and 1, as in 0.95")
        return value

    @field_validator("llm_dtype")
    @classmethod
    def ensure_dtype(cls, value: str) -> str:
        allowed = ("float32", "float64", "float16", "bfloat16")
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return value
