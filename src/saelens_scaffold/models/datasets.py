"""Datasets by name: the embedded text, local files and folders, and those of the Hub."""

import glob
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from datasets import load_dataset

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.models.stdlib import load_stdlib_chunks, load_stdlib_text

EMBEDDED_DATASET_NAME = "python-stdlib"
"""The standard library of the running Python, as a dataset for any evaluation."""

_EMBEDDED_SPLITS = ("train", "test")

# Builders of the datasets library by file suffix.
_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}

AnyDataset = datasets.Dataset | datasets.IterableDataset
_SPLIT_DATASETS = (datasets.DatasetDict, datasets.IterableDatasetDict)


def open_dataset(
    name: str,
    split: str,
    subset: str | None = None,
    *,
    chunked: bool = False,
    streaming: bool | None = None,
) -> AnyDataset:
    """
    Open one split of a dataset.

    Args:
        name: "python-stdlib" for the embedded text; a directory that `save_to_disk` of
            the datasets library wrote, or one of data files; a .parquet, .jsonl, .json or
            .csv file; else a dataset's name on the Hub.
        split: The split. A single file is the split "train".
        subset: The dataset's configuration on the Hub, as "all" of "cais/mmlu".
        chunked: Whether the embedded text is wanted in short labelled pieces.
        streaming: Whether data files are read row by row; by default those of the Hub.

    Raises:
        UserError: There is no such dataset, or no such split in it.
    """
    if name == EMBEDDED_DATASET_NAME:
        if split not in _EMBEDDED_SPLITS:
            raise UserError(f"{name} has the splits 'train' and 'test', not {split!r}")
        return (load_stdlib_chunks if chunked else load_stdlib_text)(split)  # type: ignore[arg-type]
    loaded = _load(name, subset, streaming)
    if not isinstance(loaded, _SPLIT_DATASETS):
        if Path(name).is_file() and split != "train":
            raise UserError(
                f"dataset {name!r} has no split {split!r}; a single file is the split 'train'"
            )
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


def _load(name: str, subset: str | None, streaming: bool | None = None) -> Any:
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
            return load_dataset(
                _BUILDERS[path.suffix],
                data_files=glob.escape(name),
                split="train",
                streaming=bool(streaming),
            )
        if not path.is_dir():
            return load_dataset(name, subset, streaming=streaming is not False)
        saved_by_datasets = any(
            (path / f"dataset_{kind}.json").is_file() for kind in ("info", "dict")
        )
        if not saved_by_datasets:
            if glob.has_magic(str(path.resolve())):
                raise ValueError(
                    "the datasets library takes *, ? and [ in a folder's path for a "
                    "pattern; rename the folder, or name its files"
                )
            return load_dataset(name, streaming=bool(streaming))
        # Rows as plain Python values, however they were when they were saved. datasets 3.6
        # makes no PyTorch tensors beside a torchvision (as 0.29) without a VideoReader.
        return datasets.load_from_disk(name).with_format(None)
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
    first = _next_row(rows, name)
    missing = [column for column in columns if column not in first]
    if missing:
        raise UserError(
            f"dataset {name!r} has no column {', '.join(map(repr, missing))}; "
            f"it has {sorted(first)}"
        )
    return (tuple(row[column] for column in columns) for row in chain([first], rows))


def first_row(dataset: AnyDataset, name: str) -> dict[str, Any]:
    """
    The first row of a dataset.

    Raises:
        UserError: The dataset is empty.
    """
    return _next_row(iter(dataset), name)


def _next_row(rows: Iterator[Any], name: str) -> dict[str, Any]:
    row = next(rows, None)
    if row is None:
        raise UserError(f"dataset {name!r} is empty")
    return row


def is_local(name: str) -> bool:
    """Whether a dataset is on this machine."""
    return name == EMBEDDED_DATASET_NAME or Path(name).exists()
