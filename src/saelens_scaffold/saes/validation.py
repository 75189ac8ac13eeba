"""What is wrong with an SAE's files, said before they are used.

The files may be anybody's. They are read as data, within limits, and nothing in them
decides how much memory is allocated: the configuration's sizes are held against the
weights' header, and the header against the file's length.
"""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from packaging.version import InvalidVersion, Version
from sae_lens.constants import (
    DTYPE_MAP,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEConfig, SAEMetadata
from safetensors import SafetensorError, safe_open

from saelens_scaffold._util.errors import UserError

MAX_CFG_BYTES = 1 << 20
"""An SAE's cfg.json has a few thousand bytes."""

MAX_HEADER_BYTES = 1 << 20
"""So has the header of its weights; the format allows 100 MB of JSON."""

MAX_DIMENSION = 1 << 28
"""Of d_in and d_sae: the largest SAEs have some 2**24 latents."""

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MAX_CHUNK_BYTES = 1 << 24
# What SAELens's loaders add to a configuration beside its fields.
_NO_FIELDS = {"architecture", "finetuning_scaling_factor"}

TensorShapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of tensors by name."""


class InvalidSAEError(UserError):
    """An SAE's files or weights cannot be used, and why."""


def check_sae_directory(directory: str | Path) -> dict[str, Any]:
    """
    See that a directory holds an SAE that SAELens can load, and a sound one.

    Args:
        directory: What `save_model` or `save_inference_model` wrote.

    Returns:
        The configuration in it.

    Raises:
        InvalidSAEError: A file is missing, unreadable or too large, a field is missing,
            unknown or has a bad value, tensors do not fit the configuration, or weights
            are not finite.
    """
    directory = Path(directory)
    cfg = read_config(directory / SAE_CFG_FILENAME)
    check_weights_file(directory / SAE_WEIGHTS_FILENAME, cfg)
    if (directory / SPARSITY_FILENAME).exists():
        check_sparsity_file(directory / SPARSITY_FILENAME, cfg["d_sae"])
    return cfg


def read_config(path: str | Path) -> dict[str, Any]:
    """
    Read an SAE's configuration.

    Args:
        path: Its cfg.json.

    Returns:
        The configuration, of an architecture that is registered with SAELens.

    Raises:
        InvalidSAEError: It cannot be read, or makes no SAE.
    """
    cfg = read_json_object(path, MAX_CFG_BYTES)
    try:
        check_config(cfg)
    except InvalidSAEError as error:
        raise InvalidSAEError(f"{path}: {error}") from error
    return cfg


def read_json_object(path: str | Path, max_bytes: int) -> dict[str, Any]:
    """
    Read a JSON object from a file of limited size.

    Raises:
        InvalidSAEError: There is none.
    """
    _check_is_file(path)
    with open(path, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise InvalidSAEError(
            f"{path} has more than {max_bytes} bytes, which no such file needs"
        )
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidSAEError(f"{path} is not JSON: {str(error):.200}") from error
    if not isinstance(found, dict):
        raise InvalidSAEError(f"{path} holds no JSON object, but {found!r:.50}")
    return found


def check_config(cfg: Mapping[str, Any]) -> None:
    """
    See that a configuration is one of a registered architecture.

    Unknown fields are an error: what wrote them may mean something by them, and an SAE
    that is loaded without them may compute something else.

    Args:
        cfg: The content of a cfg.json.

    Raises:
        InvalidSAEError: A field is missing, unknown or has a value that is not allowed.
    """
    architecture = cfg.get("architecture")
    cfg_class = _config_class(architecture)
    hints = get_type_hints(cfg_class)
    # SAELens allows this one, and does not annotate it
    of_saelens = get_args(hints["normalize_activations"])
    hints["normalize_activations"] = Literal[(*of_saelens, "constant_norm_rescale")]
    known = {field.name for field in fields(cfg_class)}
    unknown = sorted(set(cfg) - known - _NO_FIELDS)
    if unknown:
        raise InvalidSAEError(
            f"unknown fields {_shown(unknown)}; {architecture!r} has {sorted(known)}. If "
            "the file is of a newer SAELens or saelens-scaffold, upgrade: "
            "pip install -U sae-lens saelens-scaffold"
        )
    required = {"d_in", "d_sae", "dtype", "metadata", *_own_fields(cfg_class)}
    missing = sorted(required - set(cfg))
    if missing:
        raise InvalidSAEError(f"the fields {missing} are missing")
    for name in sorted(known & set(cfg) - {"metadata"}):
        if not _is_of(cfg[name], hints[name]):
            raise InvalidSAEError(
                f"{name} must be {_type_name(hints[name])}, got {cfg[name]!r:.100}"
            )
    for name in ("d_in", "d_sae"):
        if not 0 < cfg[name] <= MAX_DIMENSION:
            raise InvalidSAEError(
                f"{name} must be from 1 to {MAX_DIMENSION}, got {cfg[name]!r:.100}"
            )
    if cfg["dtype"] not in DTYPE_MAP:
        raise InvalidSAEError(
            f"dtype must be one of {sorted(DTYPE_MAP)}, got {cfg['dtype']!r:.100}"
        )
    _check_metadata(cfg["metadata"])
    try:
        # what remains is the class's own business
        cfg_class(**{name: cfg[name] for name in known & set(cfg) - {"metadata"}})
    except (ValueError, TypeError) as error:
        raise InvalidSAEError(str(error)) from error


def expected_tensors(cfg: Mapping[str, Any]) -> TensorShapes:
    """
    The tensors that an SAE of this configuration has, found without allocating them.

    Args:
        cfg: A configuration that `check_config` passes.
    """
    sae_class, _ = SAE_CLASS_REGISTRY[cfg["architecture"]]
    config = SAEConfig.from_dict({**cfg, "device": "meta"})
    with warnings.catch_warnings():
        # what SAELens has to say of model_from_pretrained_kwargs, it says on loading
        warnings.simplefilter("ignore", UserWarning)
        sae = sae_class(config)
    return {name: (tuple(t.shape), t.dtype) for name, t in sae.state_dict().items()}


def max_weights_bytes(cfg: Mapping[str, Any]) -> int:
    """The size that a weights file of this configuration cannot exceed."""
    return MAX_HEADER_BYTES + sum(
        math.prod(shape) * dtype.itemsize
        for shape, dtype in expected_tensors(cfg).values()
    )


def check_weights_file(path: str | Path, cfg: Mapping[str, Any]) -> None:
    """
    See that a file's tensors are those of the configuration, and finite.

    Args:
        path: A safetensors file.
        cfg: A configuration that `check_config` passes.

    Raises:
        InvalidSAEError: They are not, or it is no such file.
    """
    _check_is_file(path)
    size = Path(path).stat().st_size
    # First, as the tensors are found by making the SAE without memory for its weights,
    # which is no more than sums with sizes that a file has room for.
    if size < cfg["d_in"] * cfg["d_sae"] or size > max_weights_bytes(cfg):
        raise InvalidSAEError(
            f"{path} has {size} bytes, which cannot be for d_in={cfg['d_in']} and "
            f"d_sae={cfg['d_sae']}; download it again if it was cut off"
        )
    with _header_checked(path) as file:
        try:
            _check_shapes(_header(file), expected_tensors(cfg))
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_slice(name)
                for start, rows in _chunks(tensor):
                    _check_values(name, rows, start, cfg)
        except InvalidSAEError as error:
            raise InvalidSAEError(f"{path}: {error}") from error


def check_sparsity_file(path: str | Path, d_sae: int) -> None:
    """
    See that a file holds one number for each latent, as SAELens's runner writes it.

    Args:
        path: A safetensors file with the log10 of firing frequencies, shape (d_sae,).
        d_sae: How many latents there are.

    Raises:
        InvalidSAEError: It does not.
    """
    _check_is_file(path)
    with _header_checked(path) as file:
        found = _header(file)
        shape, dtype = found.get("sparsity", ((), None))
        if list(found) != ["sparsity"] or shape != (d_sae,) or dtype is None:
            raise InvalidSAEError(
                f"{path} must hold one tensor, 'sparsity', of {d_sae} floats; it has "
                f"{_shown(found)}"
            )
        if not torch.isfinite(file.get_tensor("sparsity")).all():
            raise InvalidSAEError(f"{path}: sparsity is not finite")


def check_weights(
    cfg: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]
) -> None:
    """
    See that weights fit a configuration, and are finite.

    Args:
        cfg: A configuration that `check_config` passes, or that of an SAE object.
        state_dict: The weights by name.

    Raises:
        InvalidSAEError: They do not, or are not.
    """
    found = {name: (tuple(t.shape), t.dtype) for name, t in state_dict.items()}
    _check_shapes(found, expected_tensors(cfg))
    for name, tensor in state_dict.items():
        _check_values(name, tensor, 0, cfg)


def check_can_be_used(sae: SAE[Any]) -> None:
    """
    See that an SAE says what is needed to use it, which the weights do not tell.

    Raises:
        InvalidSAEError: The model or the hook point is missing, or activations would have
            to be scaled by a factor that is nowhere.
    """
    for name in ("model_name", "hook_name"):
        value = sae.cfg.metadata.get(name)
        if not isinstance(value, str) or not value.strip():
            raise InvalidSAEError(
                f"metadata.{name} is {value!r}, so nobody could tell what the SAE is of; "
                f"set sae.cfg.metadata.{name}, or metadata.{name} in cfg.json"
            )
    if sae.cfg.normalize_activations == "expected_average_only_in":
        raise InvalidSAEError(
            "normalize_activations is 'expected_average_only_in', but the factor is not "
            "saved with the SAE; upload what the runner saved at the end of the training, "
            "or call sae.fold_activation_norm_scaling_factor(FACTOR)"
        )


def _config_class(architecture: object) -> type[SAEConfig]:
    if isinstance(architecture, str) and architecture in SAE_CLASS_REGISTRY:
        return SAE_CLASS_REGISTRY[architecture][1]
    if isinstance(architecture, str) and architecture in SAE_TRAINING_CLASS_REGISTRY:
        raise InvalidSAEError(
            f"architecture {architecture!r} is one for training, as checkpoints have it; "
            "load it as a TrainingSAE, and save it with save_inference_model"
        )
    raise InvalidSAEError(
        f"architecture must be one of {sorted(SAE_CLASS_REGISTRY)}, got "
        f"{architecture!r:.100}"
    )


def _own_fields(cfg_class: type[SAEConfig]) -> set[str]:
    """Fields that an architecture adds to SAELens's: what they say is nowhere else."""
    of_all = {field.name for field in fields(SAEConfig)}
    # how it is computed changes nothing of what is
    return {field.name for field in fields(cfg_class)} - of_all - {"kernels"}


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict):
        raise InvalidSAEError(f"metadata must be an object, got {metadata!r:.100}")
    # SAELens makes attributes of them, some of which would take the place of methods.
    methods = sorted(name for name in metadata if hasattr(SAEMetadata, name))
    if methods:
        raise InvalidSAEError(f"metadata must not have the fields {_shown(methods)}")
    version = metadata.get("sae_lens_version")
    try:
        is_current = Version(version).major >= 6  # type: ignore[arg-type]
    except (InvalidVersion, TypeError) as error:
        raise InvalidSAEError(
            f"metadata.sae_lens_version must be a version, got {version!r:.100}"
        ) from error
    if not is_current:
        raise InvalidSAEError(
            f"saved by SAELens {version}; load it with SAE.load_from_disk and save it "
            "again with save_model"
        )


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of the type that a configuration's field has."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_is_of(value, option) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint is type(None):
        return value is None
    if isinstance(value, bool):  # which to Python is an int
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float))
    return not isinstance(origin or hint, type) or isinstance(value, origin or hint)


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    return getattr(hint, "__name__", str(hint))


def _check_is_file(path: str | Path) -> None:
    if not Path(path).is_file():
        raise InvalidSAEError(
            f"{path} is missing, or is no file (SAELens's save_model writes it)"
        )


def _header_checked(path: str | Path) -> Any:
    """A safetensors file, opened once its header is known to be small."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise InvalidSAEError(
            f"{path} is no safetensors file of an SAE: its header would have {length} bytes"
        )
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidSAEError(
            f"{path} is no safetensors file, or was cut off: {str(error):.200}"
        ) from error


def _header(file: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    found: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    for name in file.keys():  # noqa: SIM118
        tensor = file.get_slice(name)
        dtype = _SAFETENSORS_DTYPES.get(tensor.get_dtype())
        found[name] = (tuple(tensor.get_shape()), dtype)
    return found


def _check_shapes(
    found: Mapping[str, tuple[tuple[int, ...], torch.dtype | None]],
    expected: TensorShapes,
) -> None:
    missing, extra = (
        sorted(set(expected) - set(found)),
        sorted(set(found) - set(expected)),
    )
    if missing or extra:
        said = [f"lack {missing}"] * bool(missing)
        said += [f"have {_shown(extra)} too many"] * bool(extra)
        raise InvalidSAEError(f"the weights {' and '.join(said)}")
    for name, (shape, dtype) in expected.items():
        if found[name][0] != shape:
            raise InvalidSAEError(
                f"{name} has the shape {found[name][0]}; by the configuration it is {shape}"
            )
        if found[name][1] != dtype:
            raise InvalidSAEError(
                f"{name} is of {found[name][1] or 'no float dtype'}; by the configuration "
                f"it is of {dtype}"
            )


def _chunks(tensor: Any) -> Iterator[tuple[int, torch.Tensor]]:
    """A file's tensor in slices of rows, none of which needs much memory."""
    shape = tensor.get_shape()
    n_rows = max(1, _MAX_CHUNK_BYTES // (8 * math.prod(shape[1:])))
    for start in range(0, shape[0], n_rows):
        yield start, tensor[start : start + n_rows]


def _check_values(
    name: str, rows: torch.Tensor, start: int, cfg: Mapping[str, Any]
) -> None:
    """See that rows `start` and following of a tensor have values that are allowed."""
    # A scaffold's linear latents have the threshold minus infinity, and no other does.
    rank = cfg.get("scaffold_rank", 0) if name == "threshold" else 0
    linear, others = rows.tensor_split([max(0, rank - start)])
    if not torch.isneginf(linear).all():
        raise InvalidSAEError(
            f"threshold[:{rank}] must be minus infinity for scaffold_rank={rank}"
        )
    if not torch.isfinite(others).all():
        raise InvalidSAEError(
            f"{name} has values that are not finite; such an SAE comes of a training that "
            "diverged, or of a damaged file"
        )


def _shown(names: Any) -> str:
    """Names from a file, of which there may be many, and long ones."""
    listed = [f"{name!r:.60}" for name in list(names)[:5]]
    return ", ".join(listed) + (", ..." if len(names) > 5 else "")
