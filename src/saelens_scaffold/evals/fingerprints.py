"""Hashes of what a number depends on: texts, labelled data, and language models."""

from functools import cache
from hashlib import sha256
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from transformer_lens.loading_from_pretrained import get_official_model_name

from saelens_scaffold.evals.language_model import known_model_name
from saelens_scaffold.evals.text_data import EMBEDDED_DATASET_NAME
from saelens_scaffold.models.stdlib import read_stdlib

_REVISION_TIMEOUT = 5.0  # seconds


def dataset_fingerprint(name: str) -> str | None:
    """
    Hash of a dataset's content, or its revision on the Hub.

    Args:
        name: As for `text_data.open_dataset`.

    Returns:
        None where it cannot be known: a dataset on the Hub without a connection, or one
        that SAEBench knows by a name of its own.
    """
    if name == EMBEDDED_DATASET_NAME:
        return _stdlib_fingerprint()
    if Path(name).exists():
        return content_hash(Path(name))
    return _hub_revision(name)


def model_fingerprint(model_name: str) -> str | None:
    """
    Hash of a local model's files, or the revision of a downloaded one.

    Args:
        model_name: As for `language_model.load_language_model`.

    Returns:
        None for a model of the Hub that has not been downloaded.
    """
    official = get_official_model_name(known_model_name(model_name))
    if Path(official).is_dir():
        return content_hash(Path(official))
    config = try_to_load_from_cache(official, "config.json")
    return Path(config).parent.name if isinstance(config, str) else None


def content_hash(path: Path) -> str:
    """Hash of a file's content, or of all visible files in a directory, with their names."""
    if path.is_file():
        status = path.stat()
        return _file_hash(path.resolve(), status.st_size, status.st_mtime_ns)
    found = sha256()
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in relative.parts):
            found.update(f"{relative.as_posix()}\0{content_hash(file)}\0".encode())
    return found.hexdigest()


@cache
def _file_hash(path: Path, size: int, mtime_ns: int) -> str:  # noqa: ARG001
    found = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            found.update(block)
    return found.hexdigest()


@cache
def _stdlib_fingerprint() -> str:
    found = sha256()
    for source in read_stdlib():
        found.update(f"{source.path}\0{source.text}\0".encode("utf-8", "surrogatepass"))
    return found.hexdigest()


@cache
def _hub_revision(name: str) -> str | None:
    try:
        return HfApi().dataset_info(name, timeout=_REVISION_TIMEOUT).sha
    except Exception:  # no such name, no connection: either way it is not known
        return None
