"""Schema of the results and keys on disk, as far as their content is used."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import Required, TypedDict

from saelens_scaffold._util.errors import UserError, one_line
from saelens_scaffold._util.untrusted import file_name

_STRICT = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

_Name = Annotated[str, Field(max_length=1000)]
_Dataset = Annotated[str, Field(min_length=1, max_length=1000)]
_Names = _Dataset | Annotated[list[_Dataset], Field(max_length=100)] | None
_Number = Annotated[float, Field(ge=-1e300, le=1e300)]
_Counts = list[Annotated[int, Field(ge=0, lt=1 << 63)]]


class _Config(TypedDict, total=False):
    """Configuration of an evaluation."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]
    model_name: _Name | None
    llm_dtype: _Name | None
    dataset: _Names
    dataset_name: _Names
    dataset_names: _Names
    topic_dataset: _Names
    dataset_split: _Name | None
    baseline: _Name | None
    thresholds: list[Annotated[float, Field(ge=0, le=1)]] | None


class _Unstructured(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    fired: _Counts | None


class _Interval(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    ci_low: _Number | None
    ci_high: _Number | None


class _Result(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    eval_type_id: _Name
    eval_config: _Config | None
    eval_result_metrics: dict[str, Any]
    eval_result_unstructured: _Unstructured | list[Any] | str | None
    metrics_over_seeds: dict[str, _Interval]
    sae_lens_release_id: _Name | None
    sae_lens_id: _Name | None


class _Evaluated(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    name: _Name


class _Weights(TypedDict, total=False):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    sae: Required[_Name]
    baseline: _Name


class _Key(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    evaluation: _Evaluated
    eval_config: _Config
    weights: _Weights
    fingerprints: dict[str, _Name | None]
    versions: dict[str, _Name]


_RESULT, _KEY = TypeAdapter(_Result), TypeAdapter(_Key)


def check_result(content: Any, file: object) -> None:
    """
    Check the content of a result.

    Raises:
        UserError: A field of it has another type or range; with the file's name.
    """
    try:
        _RESULT.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "it"
        said = f"{file} is no evaluation result ({field:.100}: {first['msg']:.200})"
        raise UserError(said) from error


def is_key(content: Any) -> bool:
    """Whether this is a whole key, of an evaluation whose name can name a file."""
    try:
        _KEY.validate_python(content)
        file_name(f"{content['evaluation']['name']}.json")
    except ValueError:
        return False
    return True


def evaluation_name(name: object, file: object) -> str:
    """
    The name of an evaluation, as its result tells it.

    Raises:
        UserError: It cannot name a file.
    """
    try:
        file_name(f"{name}.json")
    except UserError as error:
        raise UserError(f"{file}: eval_type_id {one_line(error)}") from error
    return str(name)
