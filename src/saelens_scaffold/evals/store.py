"""Results of evaluations: which ones exist, whether they are current, and whose they are.

A result is SAEBench's JSON file, and beside it lies its key: everything that the numbers
depend on, and a hash of the result that it is of. A result is current if its key is the one
that is asked for.
"""

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, try_to_load_from_cache
from pydantic import TypeAdapter

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import new_file
from saelens_scaffold._util.provenance import versions
from saelens_scaffold._util.untrusted import check_own_file, file_name, read_json
from saelens_scaffold.evals.baselines import OTHER_SAES, named_for
from saelens_scaffold.evals.result_schema import (
    check_result,
    evaluation_name,
    is_key,
)
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.models.datasets import EMBEDDED_DATASET_NAME
from saelens_scaffold.models.language_models import transformers_name
from saelens_scaffold.models.stdlib import read_stdlib

Key = dict[str, dict[str, Any]]
"""What a result depends on, by kind, as plain JSON values."""

KEY_SUFFIX = ".key"
"""No .json, which SAEBench's tools would take for a result."""

# These change how fast a number comes, not the number.
_SPEED_ONLY = ("llm_batch_size", "sae_batch_size")

MAX_BYTES = 1 << 32
MAX_FILES = 10_000
"""Most that is hashed of a dataset or model that a result from anybody names."""

_DATASET_FIELDS = ("dataset", "dataset_name", "dataset_names", "topic_dataset")


def result_key(
    evaluation: str,
    config: Any,
    sae: SelectedSAE,
    others: Mapping[str, SelectedSAE],
    **more: Any,
) -> Key:
    """
    Everything that an SAE's result depends on.

    Args:
        evaluation: Name of the evaluation.
        config: Its configuration, a pydantic dataclass.
        sae: The SAE, in the form that is judged.
        others: SAEs of the call that it depends on as well, by what they are to it, as
            "baseline".
        more: Anything else, as a seed, or the text's column where the configuration does
            not have it.
    """
    fields = TypeAdapter(type(config)).dump_python(config_of(config, sae), mode="json")
    if "pca_rank" in fields:
        fields["pca_rank"] = fields["pca_rank"] or sae.subspace_rank
    weights = {
        role: of.sae.cfg.metadata.weights_sha256
        for role, of in {"sae": sae, **others}.items()
    }
    return {
        "evaluation": {"name": evaluation, "hook_name": sae.hook_name, **more},
        "eval_config": {k: v for k, v in fields.items() if k not in _SPEED_ONLY},
        "weights": weights,
        "fingerprints": fingerprints(fields),
        "versions": _current_versions(),
    }


def config_of(config: Any, sae: SelectedSAE) -> Any:
    """The configuration as it applies to one SAE, which may be the others' baseline."""
    own = {
        field: named_for(getattr(config, field), sae.label)
        for field in OTHER_SAES
        if hasattr(config, field)
    }
    return replace(config, **own) if own else config


def fingerprints(fields: Mapping[str, Any]) -> dict[str, str | None]:
    """Hashes of the datasets and of the language model that a configuration names."""
    return {named: look_up(name) for named, look_up, name in _named(fields)}


def _named(
    fields: Mapping[str, Any],
) -> Iterator[tuple[str, Callable[[str], str | None], str]]:
    """What a configuration names: in words, what finds its fingerprint, and its name."""
    for field in _DATASET_FIELDS:
        if field == "topic_dataset" and not fields.get("topics"):
            continue
        named = fields.get(field) or []
        for name in [named] if isinstance(named, str) else named:
            yield f"dataset {name}", dataset_fingerprint, name
    if name := fields.get("model_name"):
        yield f"model {name}", model_fingerprint, name


class ResultStore:
    """
    The results of one evaluation, in a folder.

    Args:
        folder: The folder, which need not exist yet.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def _file(self, name: str) -> Path:
        return self.folder / file_name(name)

    def find(self, name: str, key: Key) -> dict[str, Any] | None:
        """A current result; None if there is none, or what there is depends on else."""
        file = self._file(name)
        content = _read(file)
        stored = _key_of(file, content)
        if stored is None or differences(stored, key):
            return None
        with suppress(UserError):
            check_result(content, file)
            return content
        return None

    def why_stale(self, name: str, key: Key) -> str | None:
        """What a result of that name differs in; None if there is none, or it is current."""
        file = self._file(name)
        if not file.exists():
            return None
        return _reason(_key_of(file, _read(file)), key)

    def keep(self, name: str, key: Key, content: Mapping[str, Any]) -> Any:
        """Write a result and its key, in place of those of that name; return it as kept."""
        file = self._file(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        # A model has a fingerprint once it has been downloaded.
        known = {name: v for name, v in key.get("fingerprints", {}).items() if v}
        key = {**key, "fingerprints": {**fingerprints(key["eval_config"]), **known}}
        content = json.loads(json.dumps(_without_nan(content), default=str))
        # A result whose key is missing, or of another one, is none: after a crash in
        # between, or where another process keeps its own at the same time.
        _write(file, content)
        _write(_key_file(file), {**key, "result": _identity(content)})
        return content


class StoredResult(NamedTuple):
    """
    A result on disk.

    Attributes:
        evaluation: Name of the evaluation.
        file: The JSON file.
        content: Its content, as SAEBench's output classes write it.
        key: What it depends on; None for a file that this package has not written.
    """

    evaluation: str
    file: Path
    content: dict[str, Any]
    key: Key | None

    @property
    def weights_sha256(self) -> str | None:
        """Hash of the weights that were evaluated."""
        return self.key["weights"]["sae"] if self.key else None

    def why_stale(self) -> str | None:
        """
        What has changed since the result was written; None if nothing has.

        Datasets and models are taken to be the same if they are not on this machine, or
        too large to be read on the word of a result, which a warning says.
        """
        if self.key is None:
            return _reason(None, {})
        now: Key = {"fingerprints": {}, "versions": _current_versions()}
        for named, look_up, name in _named(self.key["eval_config"]):
            # of a model that is not known here, or a name that no disk has
            with suppress(ValueError, OSError):
                if not self.key["fingerprints"].get(named):
                    continue
                if is_small(Path(name)):
                    now["fingerprints"][named] = look_up(name)
                else:
                    warnings.warn(
                        f"{self.file}: the {named} has more than {MAX_BYTES >> 30} GiB or "
                        f"{MAX_FILES:,} files; whether it has changed was not checked",
                        stacklevel=2,
                    )
        return _reason(self.key, now)


def stored_results(folder: Path) -> Iterator[StoredResult]:
    """
    All results in a folder and below it.

    Raises:
        UserError: There is no such folder, or a JSON file in it cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder with evaluation results")
    for file in sorted(folder.rglob("*.json")):
        check_own_file(file, folder)
        try:
            content = read_json(file)
        except UserError as error:
            raise UserError(f"{error}; evaluate again, or remove it") from error
        if isinstance(content, dict) and "eval_result_metrics" in content:
            check_result(content, file)
            key = _key_of(file, content)
            key = key if is_key(key) else None
            name = key["evaluation"]["name"] if key else content.get("eval_type_id")
            yield StoredResult(evaluation_name(name, file), file, content, key)


def differences(stored: Key, wanted: Key) -> list[str]:
    """What differs between two keys, as far as both sides are known."""
    found: list[str] = []
    for kind, fields in wanted.items():
        then_fields = stored.get(kind, {})
        for name in dict.fromkeys([*fields, *then_fields]):
            then, now = then_fields.get(name), fields.get(name)
            if then == now or (kind == "fingerprints" and None in (then, now)):
                continue
            if kind == "weights":
                found.append(f"other weights of the {name.replace('sae', 'SAE')}")
            elif kind == "fingerprints":
                found.append(f"another {name} of the same name")
            else:
                found.append(f"{name} {then!r} (now {now!r})")
    return found


def _reason(stored: Key | None, wanted: Key) -> str | None:
    if stored is None:
        return "nothing says what it was measured with"
    differing = differences(stored, wanted)
    return f"measured with {', '.join(differing)}" if differing else None


def _current_versions() -> dict[str, str]:
    return {name: v for name, v in versions().items() if name != "python"}


def _key_file(file: Path) -> Path:
    return file.with_suffix(KEY_SUFFIX)


def _read(file: Path) -> Any:
    """JSON content; None if the file is missing or was not written to its end."""
    try:
        return read_json(file)
    except (FileNotFoundError, NotADirectoryError, UserError):
        return None


def _key_of(file: Path, content: Any) -> Key | None:
    """The key of a result with this content; None if there is none."""
    key = _read(_key_file(file))
    is_key = isinstance(key, dict) and all(isinstance(v, dict) for v in key.values())
    return key if is_key and key.get("result") == _identity(content) else None


def _identity(content: Any) -> dict[str, str]:
    """What tells a result from others of its name, as a kind of its key."""
    text = json.dumps(content, sort_keys=True)
    return {"sha256": sha256(text.encode()).hexdigest()}


def _write(file: Path, content: Any) -> None:
    with new_file(file) as temporary:
        text = json.dumps(content, indent=2, default=str)
        temporary.write_text(text, encoding="utf-8")


def _without_nan(content: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not have."""
    if isinstance(content, Mapping):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def dataset_fingerprint(name: str) -> str | None:
    """
    Hash of a dataset's content, or its revision on the Hub.

    Args:
        name: As for `datasets.open_dataset`.

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
        model_name: As for `model.load_language_model`.

    Returns:
        None for a model of the Hub that has not been downloaded.
    """
    name = transformers_name(model_name)
    if Path(name).is_dir():
        return content_hash(Path(name))
    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent.name if isinstance(config, str) else None


def is_small(path: Path) -> bool:
    """Whether what `content_hash` would read is not too much; a missing path is small."""
    n_bytes = 0
    for n_files, file in enumerate(chain([path], path.rglob("*"))):
        n_bytes += file.stat().st_size if file.is_file() else 0
        if n_bytes > MAX_BYTES or n_files > MAX_FILES:
            return False
    return True


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
        return HfApi().dataset_info(name, timeout=5.0).sha
    except Exception:  # no such name, no connection: either way it is not known
        return None
