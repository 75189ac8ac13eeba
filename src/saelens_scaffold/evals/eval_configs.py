"""What configurations of evaluations share: language model, text and kinds of values."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt

from saelens_scaffold._util.configs import documented
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.models.language_models import ModelClass
from saelens_scaffold.saes.metadata import TokenId


def _ascending(values: list[float]) -> list[float]:
    return sorted(_check_distinct(values))


def _check_distinct(values: list[float]) -> list[float]:
    if len(set(values)) < len(values):
        raise ValueError(f"must not name a value twice, but is {values}")
    return values


OpenShare = Annotated[float, Field(gt=0, lt=1)]
"""A share that is neither nothing nor everything."""

DISTINCT = AfterValidator(_check_distinct)
"""Of a list: no value occurs twice."""

ASCENDING = AfterValidator(_ascending)
"""Of a list: no value occurs twice, and the smallest comes first."""


@documented
class ModelConfig:
    """Language model and confidence, for every evaluation of this package."""

    model_name: str = ""
    """Model of TransformerLens, directory of a local model, or py-neox for the embedded
    one."""
    confidence: OpenShare = 0.95
    """Confidence level of the intervals."""


@documented
class LlmConfig(ModelConfig):
    """For evaluations that load the language model themselves, or have SAEBench load it."""

    llm_batch_size: PositiveInt = 32
    """LLM batch size, in sequences or texts."""
    llm_dtype: Literal["float32", "float64", "float16", "bfloat16"] = "float32"
    """LLM data type, also that of the SAEs."""
    model_class_name: ModelClass = "HookedTransformer"
    """Class of the language model, as in SAELens; TransformerBridge for TransformerLens's.
    By default that which the SAEs were trained on."""


@documented
class TextEvalConfig(LlmConfig):
    """For evaluations on running text: which text, and how often it is resampled."""

    random_seed: int = 42
    """Seed of the bootstrap and of all random choices."""
    dataset: str = "Skylion007/openwebtext"
    """Text: a dataset on the Hub, a local directory or file (.parquet, .jsonl, .csv), or
    python-stdlib for the embedded text."""
    dataset_split: str = "train"
    """Split of the dataset. Choose one that the SAEs were not trained on, if there is one."""
    text_column: str = "text"
    """Column of the dataset with the text."""
    context_size: Annotated[int, Field(ge=3)] | None = None
    """Tokens per sequence, at least 3: BOS, a token, and one to predict. If None, as the
    SAEs were trained, else 128."""
    prepend_bos: bool | None = None
    """Whether each sequence begins with BOS. If None, as the SAEs were trained, else True."""
    sequence_separator_token: TokenId | Literal["bos", "eos", "sep", "none"] | None = (
        None
    )
    """Token between the texts of a sequence, or none. If None, as the SAEs were trained,
    else bos."""
    disable_concat_sequences: bool | None = None
    """Whether a sequence is the beginning of one text, and shorter texts are left out. If
    None, as the SAEs were trained, else False."""
    exclude_special_tokens: bool | list[TokenId] | None = None
    """Whether the tokenizer's special tokens do not count, or ids of tokens that do not.
    BOS, EOS and padding never count. If None, as the SAEs were trained, else False."""
    seqpos_slice: list[int | None] | None = None
    """Positions in the sequence that count, as in slice(start, stop, step). If None, as the
    SAEs were trained, else all."""
    n_tokens: PositiveInt = 1_000_000
    """Tokens to evaluate on. BOS, EOS and padding do not count."""
    n_bootstrap: PositiveInt = 500
    """Replicates of the bootstrap over sequences."""


@documented
class TwinsEvalConfig(TextEvalConfig):
    """For evaluations that compare each scaffold SAE with a plain twin."""

    baseline: str | dict[str, str] | None = None
    """Name of the plain SAE in the same call that the scaffold SAEs are compared with; or a
    name for each scaffold SAE, by its name."""


def check_baseline(name: str, labels: list[str], field: str = "baseline") -> None:
    """
    Raises:
        UserError: The baseline, or other SAE, that a configuration names is none of the
            SAEs in the call.
    """
    if name not in labels:
        raise UserError(
            f"{field} is {name!r}; it must be one of the SAEs in the call: {labels}"
        )
