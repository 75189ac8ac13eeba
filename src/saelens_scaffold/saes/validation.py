"""Checks of an SAE's files before they are used.

The files may come from anybody. They are read as data, within limits, and nothing in them
decides how much memory is allocated: the sizes in the configuration are compared with the
header of the weights, and the header with the length of the file.
"""

import json
import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import torch
from pydantic import BaseModel, Field, ValidationError, create_model
from sae_lens import constants
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEConfig
from sae_lens.saes.temporal_sae import TemporalSAE
from safetensors import SafetensorError, safe_open

from saelens_scaffold._util.errors import one_line
from saelens_scaffold.saes.metadata import InvalidSAEError, check_metadata

MAX_CFG_BYTES = 1 << 20
"""Largest cfg.json; a usual one has a few thousand bytes."""

MAX_CFG_DEPTH = 32
"""Deepest nesting in a cfg.json; SAELens copies the metadata by recursion."""

MAX_HEADER_BYTES = 1 << 20
"""Largest header of a weights file; the format allows 100 MB of JSON."""

MAX_DIMENSION = 1 << 28
"""Largest d_in and d_sae; the largest SAEs have some 2**24 latents."""

ESTIMATED_SCALES = ("expected_average_only_in", "covariance_whitening")
"""Values of `normalize_activations` for which SAELens estimates the scale of the
activations before it trains, and folds it into the weights only when training ends."""

EXPORT = "make an SAE of it: saelens-scaffold export CHECKPOINT OUTPUT"
"""What to do with a checkpoint."""

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MAX_CHUNK_BYTES = 1 << 24
# Version 6 or newer, and nothing that SAELens cannot parse.
_SUPPORTED_VERSIONS = re.compile(
    r"([6-9]|[1-9]\d{1,3})(\.\d{1,9}){0,5}([.-]?(a|b|rc)[.-]?\d{1,9})?"
    r"(\.?post\d{1,9})?(\.?dev\d{1,9})?(\+[a-z\d]{1,50}(\.[a-z\d]{1,50}){0,5})?",
    re.ASCII,
)
# SAELens's loaders add these to a configuration beside its fields.
_NO_FIELDS = {"architecture", "finetuning_scaling_factor"}

TensorShapes = dict[str, tuple[tuple[int, ...], torch.dtype | None]]
"""Shape and dtype of tensors by name; None for a dtype that is no float."""


def check_sae_directory(directory: str | Path) -> dict[str, Any]:
    """
    Check that a directory holds a sound SAE that SAELens can load.

    Args:
        directory: What `save_model` or `save_inference_model` wrote.

    Returns:
        Its configuration.

    Raises:
        InvalidSAEError: A file is missing, unreadable or too large, a field is missing,
            unknown or has a bad value, tensors do not fit the configuration, or weights
            are not finite.
    """
    directory = Path(directory)
    cfg = read_config(directory / constants.SAE_CFG_FILENAME)
    check_weights_file(directory / constants.SAE_WEIGHTS_FILENAME, cfg)
    sparsity_file = directory / constants.SPARSITY_FILENAME
    if sparsity_file.exists():
        check_sparsity_file(sparsity_file, cfg["d_sae"])
    return cfg


def read_config(path: str | Path) -> dict[str, Any]:
    """
    Read an SAE's cfg.json.

    Returns:
        The configuration, of an architecture that is registered with SAELens.

    Raises:
        InvalidSAEError: It cannot be read, or makes no SAE.
    """
    cfg = read_json_object(path, MAX_CFG_BYTES)
    with named(path):
        check_config(cfg)
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
        raise InvalidSAEError(f"{path} has more than {max_bytes} bytes")
    try:
        # SAELens reads UTF-8, where json.loads takes bytes in UTF-16 as well
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidSAEError(f"{path} is not JSON: {str(error):.200}") from error
    if not isinstance(found, dict):
        raise InvalidSAEError(f"{path} holds no JSON object, but {found!r:.50}")
    level: list[Any] = [found]
    for _ in range(MAX_CFG_DEPTH):
        values = chain(*(v.values() if isinstance(v, dict) else v for v in level))
        level = [value for value in values if isinstance(value, (dict, list))]
    if level:
        raise InvalidSAEError(f"{path} is nested more than {MAX_CFG_DEPTH} deep")
    return found


def check_config(cfg: Mapping[str, Any]) -> None:
    """
    Check that the content of a cfg.json configures a registered architecture.

    Unknown fields are an error: whatever wrote them may mean something by them, and an SAE
    that is loaded without them may compute something else.

    Raises:
        InvalidSAEError: A field is missing, unknown or has a value that is not allowed.
    """
    architecture = cfg.get("architecture")
    if is_checkpoint(cfg):
        raise InvalidSAEError(
            f"a training checkpoint of architecture {architecture!r}; {EXPORT}"
        )
    if architecture not in list(SAE_CLASS_REGISTRY):
        raise InvalidSAEError(
            f"architecture must be one of {sorted(SAE_CLASS_REGISTRY)}, got "
            f"{architecture!r:.100}"
        )
    cfg_class = SAE_CLASS_REGISTRY[architecture][1]
    known = {field.name for field in fields(cfg_class)}
    unknown = sorted(set(cfg) - known - _NO_FIELDS)
    if unknown:
        raise InvalidSAEError(
            f"unknown fields {_shown(unknown)}; {architecture!r} has {sorted(known)}. "
            "For files of newer versions: pip install -U sae-lens saelens-scaffold"
        )
    values = {name: cfg[name] for name in known & set(cfg)}
    try:
        _schema(cfg_class).model_validate(values)
    except ValidationError as error:
        wrong = error.errors()[0]
        name = str(wrong["loc"][0])
        message = f"{name}: {wrong['msg']}, got {cfg.get(name)!r:.100}"
        raise InvalidSAEError(message) from error
    check_scale_is_known(cfg.get("normalize_activations"))
    metadata = values.pop("metadata")
    check_metadata(metadata)
    version = metadata.get("sae_lens_version")
    if version is None or not _SUPPORTED_VERSIONS.fullmatch(version):
        raise InvalidSAEError(
            f"metadata.sae_lens_version is {version!r:.100}, not 6 or newer; load the SAE "
            "with SAE.load_from_disk, and save it again"
        )
    if values.get("k", 0) > cfg["d_sae"]:
        raise InvalidSAEError(f"k is {cfg['k']}, more than d_sae={cfg['d_sae']}")
    try:
        cfg_class(**values)  # the class's own checks
    except (ValueError, TypeError) as error:
        raise InvalidSAEError(str(error)) from error


def is_checkpoint(cfg: Mapping[str, Any]) -> bool:
    """Whether a cfg.json is that of a training SAE, as a training's checkpoints have it."""
    architecture = cfg.get("architecture")
    return architecture in list(SAE_TRAINING_CLASS_REGISTRY) and (
        # some architectures have one name for both forms; all training SAEs, and no
        # others, have this field
        architecture not in SAE_CLASS_REGISTRY or "decoder_init_norm" in cfg
    )


def check_scale_is_known(normalize_activations: object) -> None:
    """
    Check that an SAE reads activations as they are, or can scale them by itself.

    Raises:
        InvalidSAEError: It was trained on activations of another scale, which neither its
            weights nor its configuration have.
    """
    if normalize_activations in ESTIMATED_SCALES:
        raise InvalidSAEError(
            f"normalize_activations is {normalize_activations!r}, whose scale is folded "
            f"into the weights when training ends, and is missing here; if this is of a "
            f"checkpoint, {EXPORT} (or fold a scale that you know: "
            "sae.fold_activation_norm_scaling_factor)"
        )


def expected_tensors(cfg: Mapping[str, Any]) -> TensorShapes:
    """
    The tensors of an SAE of a checked configuration, found without allocating them.

    Raises:
        InvalidSAEError: SAELens makes no SAE of it.
    """
    sae_class, _ = SAE_CLASS_REGISTRY[cfg["architecture"]]
    config = SAEConfig.from_dict({**cfg, "device": "meta"})
    with warnings.catch_warnings():
        # SAELens warns of model_from_pretrained_kwargs again on loading
        warnings.simplefilter("ignore", UserWarning)
        try:
            sae = sae_class(config)
        except (ValueError, TypeError, AssertionError, ArithmeticError) as error:
            # it calls the hook point of reshape_activations="hook_z" a wrong call
            at = f"(hook_name is {config.metadata.hook_name!r:.100})"
            raise InvalidSAEError(f"{one_line(error)} {at}") from error
    return _shapes_of(sae.state_dict())


def max_weights_bytes(cfg: Mapping[str, Any]) -> int:
    """The largest size of a weights file of a checked configuration."""
    return MAX_HEADER_BYTES + sum(
        math.prod(shape) * dtype.itemsize
        for shape, dtype in expected_tensors(cfg).values()
        if dtype is not None
    )


def check_weights_file(path: str | Path, cfg: Mapping[str, Any]) -> None:
    """
    Check that a file's tensors are those of a checked configuration, and finite.

    Raises:
        InvalidSAEError: They are not, or it is no safetensors file.
    """
    _check_is_file(path)
    size = Path(path).stat().st_size
    # This comes first, because the expected tensors are found by making an SAE without
    # memory for its weights, which is safe with sizes that a file has room for.
    if size < cfg["d_in"] * cfg["d_sae"] or size > max_weights_bytes(cfg):
        raise InvalidSAEError(
            f"{path} has {size} bytes, which cannot be for d_in={cfg['d_in']} and "
            f"d_sae={cfg['d_sae']}; download it again if it was cut off"
        )
    with _opened(path) as file, named(path):
        _check_shapes(_shapes_in(file), expected_tensors(cfg))
        for name in file.keys():  # noqa: SIM118
            for start, rows in _chunks(file.get_slice(name)):
                _check_values(name, rows, start, cfg)


def check_sparsity_file(path: str | Path, d_sae: int) -> None:
    """
    Check that a file holds one number for each latent, as SAELens's runner writes it.

    Args:
        path: A safetensors file with the log10 of firing frequencies, shape (d_sae,).
        d_sae: Number of latents.

    Raises:
        InvalidSAEError: It does not.
    """
    with _opened(path) as file, named(path):
        found = _shapes_in(file)
        dtype = found.get("sparsity", ((), None))[1] or torch.float32
        _check_shapes(found, {"sparsity": ((d_sae,), dtype)})
        _check_values("sparsity", file.get_tensor("sparsity"), 0, {})


def check_weights(
    cfg: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]
) -> None:
    """
    Check that the weights of an SAE object fit its configuration, and are finite.

    Raises:
        InvalidSAEError: They do not, or are not.
    """
    _check_shapes(_shapes_of(state_dict), expected_tensors(cfg))
    for name, tensor in state_dict.items():
        _check_values(name, tensor, 0, cfg)


def check_can_be_used(sae: SAE[Any]) -> None:
    """
    Check that an SAE is an autoencoder, and says what is needed to use it.

    Raises:
        InvalidSAEError: It is a transcoder, or reads several tokens together; or the model
            or the hook point is missing, or the scale of the activations; or metadata
            have values that cannot be.
    """
    check_metadata(vars(sae.cfg.metadata))
    check_is_autoencoder(sae)
    for name in ("model_name", "hook_name"):
        value = sae.cfg.metadata.get(name)
        if not isinstance(value, str) or not value.strip():
            raise InvalidSAEError(f"metadata.{name} is {value!r}; set it in cfg.json")
    check_scale_is_known(sae.cfg.normalize_activations)


def check_is_autoencoder(sae: SAE[Any]) -> None:
    """See that `decode(encode(x))` is the reconstruction of x, token by token."""
    architecture, metadata = sae.cfg.architecture(), sae.cfg.metadata
    read, written = metadata.hook_name, metadata.hook_name_out
    # SAELens's transcoders have d_out, also where it equals d_in.
    if hasattr(sae.cfg, "d_out") or written not in (None, "", read):
        route = f", from {read} to {written}" if written else ""
        raise InvalidSAEError(
            f"it is a transcoder (architecture {architecture!r}{route}), whose output is not "
            "its input; this is for autoencoders only"
        )
    if isinstance(sae, TemporalSAE):
        raise InvalidSAEError(
            f"it is a temporal SAE (architecture {architecture!r}), which reads a token "
            "together with those before it; this is for SAEs that read single tokens only"
        )


@cache
def _schema(cfg_class: type[SAEConfig]) -> type[BaseModel]:
    """Types of the fields in JSON. Sizes, and what the class adds, are required."""
    hints = get_type_hints(cfg_class)
    # SAELens allows this value, but does not annotate it
    scalings = (*get_args(hints["normalize_activations"]), "constant_norm_rescale")
    size = Annotated[int, Field(ge=1, le=MAX_DIMENSION)]
    hints |= {
        "normalize_activations": Literal[scalings],
        "dtype": Literal[tuple(sorted(constants.DTYPE_MAP))],
        "metadata": dict,
        "d_in": size,
        "d_sae": size,
    }
    number = Annotated[int, Field(ge=0, le=MAX_DIMENSION)]
    hints |= {name: number for name, hint in hints.items() if hint is int}
    # SAELens's temporal SAEs: as many modules are made before weights are looked at
    if "n_attn_layers" in hints:
        hints |= {"n_heads": size, "n_attn_layers": Annotated[int, Field(ge=1, le=256)]}
    # kernels: how it is computed, not what
    optional = {field.name for field in fields(SAEConfig)} | {"kernels"}
    optional -= {"d_in", "d_sae", "dtype", "metadata"}
    defaults: Any = {name: None if name in optional else ... for name in hints}
    types: Any = {name: (hint, defaults[name]) for name, hint in hints.items()}
    return create_model("Config", __config__={"strict": True}, **types)


def _check_is_file(path: str | Path) -> None:
    if not Path(path).is_file():
        raise InvalidSAEError(
            f"{path} is missing, or is no file (SAELens's save_model writes it)"
        )


def _opened(path: str | Path) -> Any:
    """A safetensors file, opened once its header is known to be small."""
    _check_is_file(path)
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


@contextmanager
def named(name: object) -> Iterator[None]:
    """Let errors name the file or the SAE that they are of."""
    try:
        yield
    except InvalidSAEError as error:
        raise InvalidSAEError(f"{name}: {error}") from error


def _shapes_of(state_dict: Mapping[str, torch.Tensor]) -> TensorShapes:
    return {name: (tuple(t.shape), t.dtype) for name, t in state_dict.items()}


def _shapes_in(file: Any) -> TensorShapes:
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    return {
        name: (tuple(t.get_shape()), _SAFETENSORS_DTYPES.get(t.get_dtype()))
        for name, t in slices.items()
    }


def _check_shapes(found: TensorShapes, expected: TensorShapes) -> None:
    missing, extra = sorted(expected.keys() - found), sorted(found.keys() - expected)
    if missing or extra:
        raise InvalidSAEError(f"tensors missing: {missing}, unknown: [{_shown(extra)}]")
    for name, (shape, dtype) in expected.items():
        if found[name] != (shape, dtype):
            raise InvalidSAEError(
                f"{name} has the shape {found[name][0]} and "
                f"{found[name][1] or 'no float dtype'}, not {shape} and {dtype}"
            )


def _chunks(tensor: Any) -> Iterator[tuple[int, torch.Tensor]]:
    """Slices of rows of a file's tensor, none of which needs much memory."""
    size, *row_shape = tensor.get_shape()
    n_rows = max(1, _MAX_CHUNK_BYTES // (8 * math.prod(row_shape)))
    for start in range(0, size, n_rows):
        yield start, tensor[start : start + n_rows]


def _check_values(
    name: str, rows: torch.Tensor, start: int, cfg: Mapping[str, Any]
) -> None:
    """Check the values in the rows of a tensor from row `start` on."""
    # A scaffold's linear latents, and no others, have the threshold minus infinity.
    rank = cfg.get("scaffold_rank", 0) if name == "threshold" else 0
    linear, others = rows.tensor_split([max(0, rank - start)])
    if not torch.isneginf(linear).all():
        raise InvalidSAEError(
            f"threshold[:{rank}] must be minus infinity for scaffold_rank={rank}"
        )
    if not torch.isfinite(others).all():
        raise InvalidSAEError(f"{name} has values that are not finite")


def _shown(names: Collection[str]) -> str:
    """Names from a file, which may be many, and long."""
    listed = [f"{name!r:.60}" for name in list(names)[:5]]
    return ", ".join(listed) + (", ..." if len(names) > 5 else "")
