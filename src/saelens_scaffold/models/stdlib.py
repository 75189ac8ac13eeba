"""The standard library of the user's own Python as text: no download, no copy shipped.

Files of the library repeat each other (character tables, grammars, licences), so the test
splits are held out by file and then cut: what a training file has verbatim is left out.
Verbatim is meant: copies that differ in a space or a letter are not looked for.
"""

import os
import random
import sys
import sysconfig
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha3_256
from pathlib import Path
from typing import Literal, NamedTuple

from datasets import Dataset

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import new_directory
from saelens_scaffold.models.passages import Passages

Split = Literal["train", "test"]

TEXT_TEST_FRACTION = 0.045
"""Share of files held out of `load_stdlib_text("train")`."""

PROBING_TEST_FRACTION = 0.2
"""Share of files in `load_stdlib_chunks("test")`, which includes the share above.

A probe is judged per label, and most packages have too few files for the smaller share.
"""

CHUNK_CHARS = 512
"""Default length of a chunk: about 150 tokens, a little over SAEBench's context of 128."""

MIN_FILE_CHARS = 500
MIN_FILES = 200
MIN_CHARS = 3_000_000


class SourceFile(NamedTuple):
    """One file of the standard library.

    Attributes:
        path: Relative to the library's directory, with forward slashes.
        text: The whole source.
        label: The top-level package or module the file is about.
    """

    path: str
    text: str
    label: str


def read_stdlib() -> list[SourceFile]:
    """Read the standard library of the running interpreter, its tests included.

    Returns:
        Every readable .py file over 500 characters, sorted by path.

    Raises:
        RuntimeError: There is too little: some distributions ship a standard library that
            is zipped or compiled only.
    """
    root = _library()
    sources: list[SourceFile] = []
    for file in root.rglob("*.py"):
        relative = file.relative_to(root)
        if {"site-packages", "dist-packages"} & set(relative.parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (
            OSError,
            UnicodeDecodeError,
        ):  # test data in other encodings, on purpose
            continue
        if len(text) > MIN_FILE_CHARS:
            path = relative.as_posix()
            sources.append(SourceFile(path, text, label_of(path)))

    chars = sum(len(source.text) for source in sources)
    if len(sources) < MIN_FILES or chars < MIN_CHARS:
        raise RuntimeError(
            f"The standard library in {root} has {len(sources)} readable .py files with {chars:,} "
            f"characters; {MIN_FILES} files and {MIN_CHARS:,} characters are needed. A Python "
            "from python.org, pyenv, uv, conda or a Linux distribution has them; a zipped or "
            "embeddable one has not"
        )
    return sorted(sources)


def label_of(path: str) -> str:
    """The top-level package or module that a file of the standard library is about.

    A test counts to what it tests, because Python 3.12 moved many packages' tests from
    the package to `test`; "test" itself is left with what tests the language.

    Args:
        path: Relative to the library's directory, as in "asyncio/tasks.py".

    Returns:
        "asyncio" for asyncio/tasks.py and test/test_asyncio/utils.py, "json" for
        json/decoder.py, "argparse" for argparse.py and test/test_argparse.py.
    """
    top, *rest = path.removesuffix(".py").split("/")
    if top == "test" and rest:
        tested = rest[0].removeprefix("test_")
        return tested if tested in sys.stdlib_module_names else "test"
    return top


def is_held_out(path: str, fraction: float) -> bool:
    """Whether a file belongs to the test split: by its path alone, whatever else exists.

    Args:
        path: Relative to the library's directory, with forward slashes.
        fraction: The test split's share of all files. A larger share includes a smaller.

    Returns:
        True for the test split, False for the training split.
    """
    # Of the common digests this one leaves pydoc_data/topics.py, English prose and half as
    # large as all the rest of the test split, in the training split.
    return (
        int.from_bytes(sha3_256(path.encode()).digest()[:8], "big") < fraction * 2**64
    )


def load_stdlib_text(split: Split, seed: int = 0) -> Dataset:
    """The standard library, a row for each file.

    SAELens takes it as `override_dataset`. It reads a dataset in order, so the files come
    shuffled: by path, one package would follow another.

    No 512 characters of the test split are in the training split: a held-out file that
    repeats others has a row for each piece between the repetitions.

    Args:
        split: "train", or "test" for the 4.5 % of files held out of it.
        seed: Of the order. The split does not depend on it.

    Returns:
        Dataset with the columns `text`, `path` and `label`.

    Raises:
        RuntimeError: The standard library holds too little text.
        UserError: There is no such split.
    """
    sources = _split(
        read_stdlib(), split, TEXT_TEST_FRACTION, CHUNK_CHARS, MIN_FILE_CHARS
    )
    random.Random(seed).shuffle(sources)
    return Dataset.from_dict(
        {
            "text": [source.text for source in sources],
            "path": [source.path for source in sources],
            "label": [source.label for source in sources],
        }
    )


def load_stdlib_chunks(
    split: Split,
    chars: int = CHUNK_CHARS,
    labels: Sequence[str] | None = None,
    per_label: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Pieces of the standard library, labelled by package, for probing tasks.

    The splits share no file and no chunk: none of the test split occurs verbatim in a
    training file, and none occurs twice in its own split. This test split is of 20 % of
    all files, and so includes that of `load_stdlib_text`.

    Args:
        split: "train" or "test".
        chars: Length of a chunk. Files are cut into such pieces; the rest is left out.
        labels: The packages or modules. By default `probing_labels()`.
        per_label: Number of chunks of each label, drawn at random. By default all.
        seed: Of the draw and of the order.

    Returns:
        Shuffled Dataset with the columns `text`, each `chars` characters long, and `label`.

    Raises:
        RuntimeError: The standard library holds too little text.
        UserError: There is no such split, chars or per_label is below 1, or a label has
            fewer than per_label chunks (or none) in the split.
    """
    if chars < 1:
        raise UserError(f"chars is {chars}; it must be at least 1")
    if per_label is not None and per_label < 1:
        raise UserError(
            f"per_label is {per_label}; it must be at least 1, or None for all"
        )
    if split not in ("train", "test"):
        raise UserError(_no_split(split))
    splits = _probing_splits(_library(), chars)
    labels = _most_frequent_labels(splits) if labels is None else labels
    # before the labels are chosen, so that no label's chunks depend on the others asked for
    label_of_chunk: dict[str, str] = {}
    for source in splits[split]:
        for start in range(0, len(source.text) - chars + 1, chars):
            label_of_chunk.setdefault(source.text[start : start + chars], source.label)
    pieces: dict[str, list[str]] = {label: [] for label in labels}
    for text, label in label_of_chunk.items():
        if label in pieces:
            pieces[label].append(text)

    needed = per_label or 1
    short = {
        label: len(texts) for label, texts in pieces.items() if len(texts) < needed
    }
    if short:
        raise UserError(
            f"labels without the {needed} chunks of {chars} characters needed in the {split} "
            f"split, with the number they have: {short}; probing_labels() names those with most"
        )
    rng = random.Random(seed)
    rows = [
        (text, label)
        for label, texts in pieces.items()
        for text in (texts if per_label is None else rng.sample(texts, per_label))
    ]
    rng.shuffle(rows)
    return Dataset.from_dict(
        {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
    )


def probing_labels(count: int = 5) -> list[str]:
    """The labels with the most text for a probing task, in both of its splits.

    Args:
        count: How many.

    Returns:
        Their names, most text first; "test" is not among them, being about no one thing.

    Raises:
        RuntimeError: The standard library holds too little text.
    """
    return _most_frequent_labels(_probing_splits(_library(), CHUNK_CHARS), count)


def write_stdlib_dataset(
    path: str | os.PathLike[str], split: Split, seed: int = 0
) -> Path:
    """Write `load_stdlib_text(split)` where SAELens's `--dataset_path PATH` can read it.

    SAELens asks for the split called "train" of what it is given, so either split is
    written as the whole of its own directory, in one JSONL file.

    Args:
        path: The new directory.
        split: "train" or "test".
        seed: Of the order of the files.

    Returns:
        The directory.

    Raises:
        FileExistsError: There is something at `path` already.
        RuntimeError: The standard library holds too little text.
        UserError: There is no such split.
    """
    with new_directory(path) as directory:
        load_stdlib_text(split, seed).to_json(directory / "stdlib.jsonl")
    return Path(path)


def _split(
    sources: list[SourceFile],
    split: Split,
    test_fraction: float,
    chars: int,
    min_chars: int,
) -> list[SourceFile]:
    """The files of a split; of the test split, what repeats no others.

    Args:
        sources: All files.
        split: "train" or "test".
        test_fraction: The test split's share of all files.
        chars: How many characters in a row must not be in both splits.
        min_chars: Shorter pieces of a file that is cut are left out.
    """
    if split not in ("train", "test"):
        raise UserError(_no_split(split))
    train, held_out = [], []
    for source in sources:
        of_test = is_held_out(source.path, test_fraction)
        (held_out if of_test else train).append(source)
    if split == "train":
        return train
    seen = Passages(chars)
    for source in train:
        seen.add(source.text)
    return [
        source._replace(text=piece)
        for source in held_out
        for piece in seen.new_pieces(source.text)
        if len(piece) >= min_chars
    ]


@lru_cache(maxsize=1)  # takes seconds, and labels, train and test are asked for in turn
def _probing_splits(library: Path, chars: int) -> dict[Split, list[SourceFile]]:  # noqa: ARG001
    """Both splits of labelled text; library is what the cache knows the sources by."""
    sources = read_stdlib()
    return {
        split: _split(sources, split, PROBING_TEST_FRACTION, chars, chars)
        for split in ("train", "test")
    }


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _no_split(split: str) -> str:
    return f"split is {split!r}; it must be 'train' or 'test'"


def _most_frequent_labels(
    splits: dict[Split, list[SourceFile]], count: int = 5
) -> list[str]:
    chars: dict[Split, Counter[str]] = {"train": Counter(), "test": Counter()}
    for split, sources in splits.items():
        for source in sources:
            chars[split][source.label] += len(source.text)
    # A label is worth as much as its smaller split, which is not always the test split.
    chars_in_smaller = chars["train"] & chars["test"]
    del chars_in_smaller["test"]
    return [label for label, _ in chars_in_smaller.most_common(count)]
