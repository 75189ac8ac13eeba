"""Text to evaluate on: where it comes from, and whether it was trained on."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from datasets import load_dataset

from saelens_scaffold._util.configs import documented
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.models import load_stdlib_chunks, load_stdlib_text
from saelens_scaffold.models.stdlib import CHUNK_CHARS, Passages

logger = logging.getLogger(__name__)

EMBEDDED_DATASET_NAME = "python-stdlib"
"""The standard library of the running Python, as a dataset for any evaluation."""

_EMBEDDED_SPLITS = ("train", "test")

# Builders of the datasets library by file suffix.
_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}

AnyDataset = datasets.Dataset | datasets.IterableDataset
_SPLIT_DATASETS = (datasets.DatasetDict, datasets.IterableDatasetDict)


def open_dataset(
    name: str, split: str, subset: str | None = None, *, chunked: bool = False
) -> AnyDataset:
    """
    Open one split of a dataset.

    Args:
        name: "python-stdlib" for the embedded text; a directory that `save_to_disk` of
            the datasets library wrote, or one of data files; a .parquet, .jsonl, .json or
            .csv file; else a dataset's name on the Hub, which is streamed.
        split: The split. A single file has none, and is all of any split.
        subset: The dataset's configuration on the Hub, as "all" of "cais/mmlu".
        chunked: Whether the embedded text is wanted in short labelled pieces.

    Raises:
        UserError: There is no such dataset, or no such split in it.
    """
    if name == EMBEDDED_DATASET_NAME:
        if split not in _EMBEDDED_SPLITS:
            raise UserError(f"{name} has the splits 'train' and 'test', not {split!r}")
        return (load_stdlib_chunks if chunked else load_stdlib_text)(split)  # type: ignore[arg-type]
    loaded = _load(name, subset)
    if not isinstance(loaded, _SPLIT_DATASETS):
        return loaded
    if split not in loaded:
        raise UserError(
            f"dataset {name!r} has no split {split!r}; it has {sorted(map(str, loaded))}"
        )
    return loaded[split]


def split_names(name: str, subset: str | None = None) -> list[str]:
    """
    The splits of a dataset that `open_dataset` opens; none if it is not split.

    Raises:
        UserError: There is no such dataset.
    """
    if name == EMBEDDED_DATASET_NAME:
        return [*_EMBEDDED_SPLITS]
    loaded = _load(name, subset)
    return [*map(str, loaded)] if isinstance(loaded, _SPLIT_DATASETS) else []


def _load(name: str, subset: str | None) -> Any:
    """A dataset with all its splits."""
    path = Path(name)
    looks_local = path.suffix in _BUILDERS or path.is_absolute() or name.startswith(".")
    if looks_local and not path.exists():
        raise UserError(f"dataset {name!r}: there is no such file or directory")
    if path.is_file() and path.suffix not in _BUILDERS:
        raise UserError(
            f"dataset {name!r} is a {path.suffix or 'nameless kind of'} file; allowed are "
            f"{', '.join(_BUILDERS)}"
        )
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"dataset {name!r} is empty")
    try:
        if path.is_file():
            return load_dataset(_BUILDERS[path.suffix], data_files=name, split="train")
        if not path.is_dir():
            return load_dataset(name, subset, streaming=True)
        saved_by_datasets = any(
            (path / f"dataset_{kind}.json").is_file() for kind in ("info", "dict")
        )
        return (datasets.load_from_disk if saved_by_datasets else load_dataset)(name)
    except Exception as error:  # the datasets library's own, and those of the network
        raise UserError(
            f"dataset {name!r} cannot be read: {type(error).__name__}: {error} "
            f"(allowed: a name on the Hub, a local directory or file, "
            f"{EMBEDDED_DATASET_NAME!r})"
        ) from error


def rows_with(
    dataset: AnyDataset, name: str, *columns: str
) -> Iterator[tuple[Any, ...]]:
    """
    The given columns of every row.

    Raises:
        UserError: The dataset is empty, or lacks a column. Raised when called, not later.
    """
    rows = iter(dataset)
    first = next(rows, None)
    if first is None:
        raise UserError(f"dataset {name!r} is empty")
    missing = [column for column in columns if column not in first]
    if missing:
        raise UserError(
            f"dataset {name!r} has no column {', '.join(map(repr, missing))}; "
            f"it has {sorted(first)}"
        )
    return (tuple(row[column] for column in columns) for row in chain([first], rows))


TRAINING_SPLIT = "train"
"""The only split that SAELens trains on (`ActivationsStore`), from its first row on."""

MAX_EVALUATED_CHARS = 1_000_000
MAX_TRAINING_CHARS = 100_000_000
"""How much of local text is compared: a few seconds, and 0.1 GB for the hashes."""


@documented
class TextSeenInTraining:
    seen: bool | None
    """Whether the SAE was trained on text that it is evaluated on; None where that cannot
    be known"""
    reason: str
    """The grounds for that"""


def text_seen_in_training(
    saes: Sequence[SelectedSAE], dataset: str, split: str, text_column: str
) -> dict[str, TextSeenInTraining]:
    """
    See which SAEs were trained on the text of an evaluation, and warn of it; warn also
    where local text repeats itself, since a bootstrap takes each row for a text of its own.

    The same split of the same dataset is known by name. Other text is compared where both
    are on this machine: passages of 512 characters, verbatim, within the first 1 M
    characters of the one and the first 100 M of the other. Text on the Hub is not fetched
    for that, and the answer is then unknown.

    Args:
        saes: Their metadata say what they were trained on (`dataset_path`).
        dataset: The text of the evaluation, as for `data.open_dataset`.
        split: Its split.
        text_column: Its column.

    Returns:
        The answer for each SAE, under its key.

    Raises:
        UserError: The text of the evaluation cannot be read.
    """
    _warn_of_repetitions(dataset, split, text_column)
    by_text: defaultdict[str | None, list[SelectedSAE]] = defaultdict(list)
    for sae in saes:
        by_text[sae.sae.cfg.metadata.dataset_path].append(sae)
    answers: dict[str, TextSeenInTraining] = {}
    for trained_on, group in by_text.items():
        answer = TextSeenInTraining(*_seen(trained_on, dataset, split, text_column))
        answers |= {sae.key: answer for sae in group}
        if answer.seen:
            labels = ", ".join(sae.label for sae in group)
            logger.warning(
                "%s trained on text of this evaluation: %s",
                f"{labels} {'was' if len(group) == 1 else 'were'}",
                answer.reason,
            )
    return answers


def _warn_of_repetitions(dataset: str, split: str, text_column: str) -> None:
    if dataset == EMBEDDED_DATASET_NAME or not _is_local(dataset):
        return
    texts = list(_texts(dataset, split, text_column, MAX_EVALUATED_CHARS))
    repeated = len(texts) - len(set(texts))
    if repeated:
        logger.warning(
            "dataset %r (%s): %d of the first %d texts repeat others; intervals over them "
            "are too narrow",
            *(dataset, split, repeated, len(texts)),
        )


def _seen(
    trained_on: str | None, dataset: str, split: str, text_column: str
) -> tuple[bool | None, str]:
    """Whether text was trained on, and the grounds for that."""
    text = f"{dataset} ({split})"
    if not trained_on:
        return None, "the SAE's metadata name no dataset_path that it was trained on"
    same = Path(trained_on).resolve() == Path(dataset).resolve()
    if same and (split == TRAINING_SPLIT or Path(dataset).is_file()):
        first = "and both begin with its first row"
        return True, f"{text} is what the SAE was trained on, {first}"
    if same and dataset == EMBEDDED_DATASET_NAME:
        unseen = f"no {CHUNK_CHARS} characters of {text} are in its training split"
        return False, unseen
    where = f"{trained_on} ({TRAINING_SPLIT})"
    for name in (trained_on, dataset):
        if not _is_local(name):
            missing = f"{name} is not on this machine"
            return None, f"{text} was not compared with {where}: {missing}"
    passages, n_training = Passages(CHUNK_CHARS), 0
    try:
        for known in _texts(trained_on, TRAINING_SPLIT, "text", MAX_TRAINING_CHARS):
            passages.add(known)
            n_training += len(known)
    except UserError as error:
        return None, f"the training text cannot be read: {error}"
    whole = n_training < MAX_TRAINING_CHARS
    if not whole:
        where = f"the first {n_training:,} characters of {where}"
    n_chars = n_repeated = 0
    for evaluated in _texts(dataset, split, text_column, MAX_EVALUATED_CHARS):
        n_chars += len(evaluated)
        n_repeated += sum(end - start for start, end in passages.repetitions(evaluated))
    of = f"the first {n_chars:,} characters of {text} are verbatim in {where}"
    if n_repeated:
        return True, f"{n_repeated / n_chars:.1%} of {of}"
    return False if whole else None, f"no {CHUNK_CHARS} characters of {of}"


def _texts(dataset: str, split: str, column: str, max_chars: int) -> Iterator[str]:
    """The first texts of a dataset, until they have so many characters."""
    n_chars = 0
    for (text,) in rows_with(open_dataset(dataset, split), dataset, column):
        if n_chars >= max_chars:
            return
        if text:
            n_chars += len(text)
            yield text


def _is_local(name: str) -> bool:
    return name == EMBEDDED_DATASET_NAME or Path(name).exists()
