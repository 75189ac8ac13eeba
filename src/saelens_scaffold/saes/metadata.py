"""The metadata of an SAE that are used: their types and ranges."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictBool, StrictInt, ValidationError
from sae_lens.saes.sae import SAEMetadata

from saelens_scaffold._util.errors import UserError

TokenId = Annotated[StrictInt, Field(ge=0)]

SequenceSeparator = TokenId | Literal["bos", "eos", "sep"] | None
"""Token between the texts of a sequence, by its id or its role."""

ExcludedTokens = StrictBool | list[TokenId]
"""Whether the tokenizer's special tokens do not count, or ids of tokens that do not."""

Positions = Annotated[list[StrictInt | None], Field(max_length=3)]
"""Positions in a sequence, as in slice(start, stop, step)."""

# without control characters, since they are shown in lines
_Text = Annotated[str, Field(strict=True, max_length=4096, pattern=r"^\P{C}*$")]
_Count = Annotated[StrictInt, Field(ge=0, lt=2**63)]


class InvalidSAEError(UserError):
    """An SAE's files or weights cannot be used, and why."""


class _Metadata(BaseModel):
    """What SAELens's runners, SAEBench and this package write, and read again."""

    sae_lens_version: _Text | None = None
    sae_lens_training_version: _Text | None = None
    model_name: _Text | None = None
    model_class_name: _Text | None = None
    model_from_pretrained_kwargs: dict[str, Any] | None = None
    hook_name: _Text | None = None
    hook_name_out: _Text | None = None
    hook_layer: _Count | None = None
    hook_head_index: _Count | None = None
    dataset_path: _Text | None = None
    dataset_trust_remote_code: StrictBool | None = None
    context_size: Annotated[_Count, Field(ge=1)] | None = None
    prepend_bos: StrictBool | None = None
    sequence_separator_token: SequenceSeparator = None
    disable_concat_sequences: StrictBool | None = None
    exclude_special_tokens: ExcludedTokens | None = None
    seqpos_slice: Positions | None = None
    training_architecture_details: dict[str, Any] | None = None
    k: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] | None = None
    threshold_calibration: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None
    n_sparsity_tokens: _Count | None = None
    scaffold_view: Literal["whole", "sparse"] | None = None
    scaffold_rank: _Count | None = None
    absorbed: dict[str, Any] | None = None
    n_dropped_latents: _Count | None = None
    weights_sha256: _Text | None = None


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """
    Check the metadata of an SAE that are used; what is unknown may be anything.

    Args:
        metadata: By name, as in cfg.json. None stands for what is not known.

    Raises:
        InvalidSAEError: One has a value of another type, or out of range.
    """
    # SAELens makes attributes of them, and some would replace methods.
    methods = [name for name in metadata if hasattr(SAEMetadata, name)]
    if methods:
        raise InvalidSAEError(f"metadata must not have the field {methods[0]!r:.100}")
    try:
        _Metadata.model_validate(dict(metadata))
    except ValidationError as error:
        wrong = error.errors()[0]
        name = str(wrong["loc"][0])
        raise InvalidSAEError(
            f"metadata.{name} is {metadata[name]!r:.100}: {wrong['msg']}"
        ) from error
