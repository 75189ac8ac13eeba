"""The part of a configuration that evaluations on running text share."""

from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass

from saelens_scaffold.evals.model_config import LlmConfig


@dataclass
class TextEvalConfig(LlmConfig):
    """Which text the language model reads, and how often it is resampled."""

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
    n_bootstrap: int = Field(
        default=500,
        title="Bootstrap Replicates",
        description="Replicates of the bootstrap over sequences.",
    )

    @field_validator("n_tokens", "n_bootstrap")
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
