"""Local models and the embedded one in TransformerLens, and so in SAELens and SAEBench.

TransformerLens can read configuration and weights from a local directory, but first looks
up every model in a fixed list of names. `register_local_model` adds a directory to it.
"""

import atexit
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformer_lens import HookedTransformer
from transformer_lens import loading_from_pretrained as loading
from transformers import utils
from transformers.utils import CONFIG_NAME

from saelens_scaffold._util.errors import UserError

EMBEDDED_MODEL_NAME = "py-neox"
"""GPT-NeoX, 5.2 M parameters, trained on Python's library."""

# Those of transformer_lens.supported_models, which versions before 3 do not have.
MODEL_ALIASES: dict[str, list[str]] = loading.MODEL_ALIASES  # pyright: ignore[reportPrivateImportUsage]
OFFICIAL_MODEL_NAMES: list[str] = loading.OFFICIAL_MODEL_NAMES  # pyright: ignore[reportPrivateImportUsage]

logger = logging.getLogger(__name__)

_WEIGHT_FILES = (utils.SAFE_WEIGHTS_NAME, utils.WEIGHTS_NAME)
_WEIGHT_INDEX_FILES = (utils.SAFE_WEIGHTS_INDEX_NAME, utils.WEIGHTS_INDEX_NAME)
_TOKENIZERS = ("tokenizer.*", "vocab.*", "spiece.model", "tekken.json", "*.tiktoken")

# TransformerLens takes the architecture, the weight loader or the kind of tokenizer from
# these words anywhere in a path: it reads "/home/robert/model" as BERT, and
# "/models/Llama-3.2-1B" as a Llama whose config.json it never opens.
_ALWAYS_MISREAD = ("llama", "gemma")
_MISREAD_UNLESS_TRUE = ("bert", "t5", "wav2vec2", "phi")


def register_local_model(path: str | os.PathLike[str], name: str | None = None) -> str:
    """Make a local Hugging Face model directory known to TransformerLens.

    Afterwards `HookedTransformer.from_pretrained_no_processing`, SAELens's runners
    (`model_name=...`) and SAEBench accept the returned name in this process. The directory
    is not changed. Registering twice does no harm.

    Only TransformerLens knows the name. Code that calls transformers directly (SAELens
    with `model_class_name="AutoModelForCausalLM"`, its pre-tokenization, SAEBench's RAVEL)
    takes the path.

    Args:
        path: Directory with config.json, the weights (safetensors or bin, in one file or
            in shards) and a tokenizer.
        name: Short name of the model. Saved SAEs and SAEBench's result files contain the
            model's name, and a short one is the same on every machine.

    Returns:
        The `model_name` to use: `name` if given, else `path` as it was given.

    Raises:
        UserError: The directory, or a file that a model needs, is missing;
            TransformerLens does not support the model; or the name belongs to another
            model.
    """
    text = os.fspath(path)
    directory = Path(text)
    config = _read_config(directory)
    _check_weights(directory)
    if not any(any(directory.glob(pattern)) for pattern in _TOKENIZERS):
        raise UserError(
            f"{directory} has no tokenizer; its save_pretrained writes one of {_TOKENIZERS}"
        )
    if name is not None and not name.strip():
        raise UserError(f"name is {name!r}; it must not be blank (or leave it out)")

    official = _readable_path(directory.resolve(), config)
    aliases = [alias for alias in (text, name) if alias not in (None, official)]
    # TransformerLens compares names in lower case, and the last one registered wins.
    known = loading.make_model_alias_map()
    for alias in (*aliases, official):
        if known.get(alias.lower(), official) != official:
            raise UserError(
                f"{alias!r} already means {known[alias.lower()]} in TransformerLens; "
                "choose another name, or write the path differently (./DIR for DIR)"
            )
    try:
        loading.convert_hf_model_config(official)
    except Exception as error:  # a config.json can fail in any way
        raise UserError(
            f"TransformerLens cannot read the model in {text}: {error} "
            "(it reads Gemma by its Hub name only; any model can be read on the modules of "
            "transformers: --model_class_name TransformerBridge, or AutoModelForCausalLM)"
        ) from error

    if official not in OFFICIAL_MODEL_NAMES:
        OFFICIAL_MODEL_NAMES.append(official)
    known_aliases = MODEL_ALIASES.setdefault(official, [])
    known_aliases.extend(alias for alias in aliases if alias not in known_aliases)
    return text if name is None else name


def register_local_models_in(args: Sequence[str]) -> list[str]:
    """Register all model directories among the arguments of a command line.

    An argument, or the value of `--flag=value`, counts if it is a directory with the
    config.json of a Hugging Face model. Everything else is ignored: other directories (an
    SAE has a cfg.json), files, names on the Hub. If a model directory cannot be
    registered, a warning says why: it may be there for its tokenizer alone.

    Args:
        args: The command line, as in `sys.argv[1:]`.

    Returns:
        The registered names, exactly as on the command line.
    """
    registered: list[str] = []
    for arg in args:
        text = arg.partition("=")[2] if arg.startswith("-") and "=" in arg else arg
        # os.path.isfile, unlike Path.is_file, returns False for any text, however long.
        if text in registered or not os.path.isfile(os.path.join(text, CONFIG_NAME)):
            continue
        try:
            _read_config(Path(text))
        except (OSError, ValueError):
            continue  # not a model's
        try:
            registered.append(register_local_model(text))
        except (OSError, ValueError) as error:
            logger.warning("Not registered as a local model: %s", error)
    return registered


def official_name(model_name: str) -> str:
    """
    TransformerLens's own name of a model, found without loading it.

    Raises:
        UserError: There is no such model.
    """
    try:
        return loading.get_official_model_name(model_name)
    except ValueError:
        # TransformerLens's own message lists the hundreds of models that it knows.
        raise UserError(
            f"there is no language model {model_name!r}; give the name of a model in "
            f"TransformerLens, the directory of a local one, or {EMBEDDED_MODEL_NAME!r}"
        ) from None


def _read_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; a local model is one")
    file = directory / CONFIG_NAME
    if not file.is_file():
        raise UserError(f"{directory} has no {CONFIG_NAME}; a local model needs one")
    config = _read_json(file)
    for field, kind, example in (
        ("model_type", str, "gpt2"),
        ("architectures", list, ["GPT2LMHeadModel"]),
    ):
        value = config.get(field)
        if not isinstance(value, kind) or not value:
            raise UserError(
                f"{file}: {field} is {value!r}; save_pretrained of a language model writes "
                f"one such as {example!r}"
            )
    return config


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not readable as JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _check_weights(directory: Path) -> None:
    if any((directory / file).is_file() for file in _WEIGHT_FILES):
        return
    indices = (directory / name for name in _WEIGHT_INDEX_FILES)
    index = next(filter(Path.is_file, indices), None)
    if index is None:
        needed = _WEIGHT_FILES + _WEIGHT_INDEX_FILES
        raise UserError(f"{directory} has no weights; one of {needed} is needed")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} is not a readable index of weight files")
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not (directory / shard).is_file()]:
        raise UserError(f"{directory} lacks weight files of its index: {missing}")


def _readable_path(directory: Path, config: dict[str, Any]) -> str:
    """Path under which TransformerLens reads a model correctly.

    Args:
        directory: The model's directory, absolute.
        config: Its config.json.

    Returns:
        The directory itself, or that of a view of it.
    """
    # TransformerLens reads n_ctx, which transformers no longer writes for GPT-2.
    lacks_n_ctx = config["model_type"] == "gpt2" and "n_ctx" not in config
    if lacks_n_ctx:
        config = {**config, "n_ctx": config.get("n_positions", 1024)}
    # TransformerLens names the model after the last "/", on Windows too.
    if lacks_n_ctx or _is_misread(directory.as_posix(), config["model_type"]):
        return _view(directory, config).as_posix()
    return directory.as_posix()


def _is_misread(path: str, model_type: str) -> bool:
    path = path.lower()
    return any(word in path for word in _ALWAYS_MISREAD) or any(
        word in path and word not in model_type for word in _MISREAD_UNLESS_TRUE
    )


def _view(directory: Path, config: dict[str, Any]) -> Path:
    """A temporary directory of links to a model's files, with a config.json of its own."""
    # A hash contains none of the misread words, and is the same in every run: SAEBench
    # names its stored probes by the last part of this path.
    view = _views_root() / f"model-{sha256(str(directory).encode()).hexdigest()[:12]}"
    shutil.rmtree(view, ignore_errors=True)
    view.mkdir()
    for file in directory.iterdir():
        if file.name == CONFIG_NAME:
            continue
        try:
            (view / file.name).symlink_to(file, target_is_directory=file.is_dir())
        except OSError:  # Windows allows links to developers only
            if file.is_file():
                shutil.copy2(file, view / file.name)
    (view / CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return view


@cache
def _views_root() -> Path:
    # hexadecimal digits, since mkdtemp's letters may make one of the misread words
    name = f"saelens-scaffold-{secrets.token_hex(8)}"
    root = Path(tempfile.gettempdir(), name).resolve()
    if _is_misread(root.as_posix(), model_type=""):
        raise UserError(
            f"TransformerLens misreads any path that contains one of "
            f"{_ALWAYS_MISREAD + _MISREAD_UNLESS_TRUE}, as the directory for temporary "
            f"files does; set TMPDIR to another than {root.parent}"
        )
    root.mkdir(mode=0o700)
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def embedded_model_path() -> Path:
    """The model's Hugging Face directory inside the installed package."""
    return Path(__file__).with_name(EMBEDDED_MODEL_NAME)


def register_embedded_model() -> str:
    """Make the embedded model known to TransformerLens, SAELens and SAEBench.

    Returns:
        Its name, "py-neox". Saved SAEs contain the name, and no path of this machine.

    Raises:
        UserError: Another model is registered under that name.
    """
    return register_local_model(embedded_model_path(), name=EMBEDDED_MODEL_NAME)


def load_embedded_model(device: str | torch.device = "cpu") -> HookedTransformer:
    """Load the embedded model as SAELens does: float32, weights unprocessed.

    Args:
        device: Device of the model.

    Returns:
        The model: 4 layers, d_model 256, context 512 (trained at 256), 4,096 tokens;
        `<|endoftext|>` (id 0) is BOS, EOS and padding.
    """
    name = register_embedded_model()
    return HookedTransformer.from_pretrained_no_processing(name, device=device)
