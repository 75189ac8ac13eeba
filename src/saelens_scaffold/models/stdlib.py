"""The standard library of the running Python as text: nothing to download or to ship.

Files of the library repeat each other (character tables, grammars, licences). So test
splits are held out by file, and then passages that a training file contains verbatim are
cut out of them. Copies that differ in a space or a letter are not found.
"""

import itertools
import os
import random
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import sha3_256
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from datasets import Dataset

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import new_directory

Split = Literal["train", "test"]

TEXT_TEST_FRACTION = 0.045
"""Share of files held out of `load_stdlib_text("train")`."""

PROBING_TEST_FRACTION = 0.2
"""Share of files in `load_stdlib_chunks("test")`, which includes the share above.

Probes are scored per label, and most packages have too few files for the smaller share.
"""

CHUNK_CHARS = 512
"""Default length of a chunk: about 150 tokens, a little over SAEBench's context of 128."""

_CHECKSUM_BITS = 24
_NUMBER_OF_CODE = np.random.default_rng(0).integers(2**64, size=2**12, dtype=np.uint64)
"""A number for each character, in whose sums a block's characters are recognised."""

MIN_FILE_CHARS = 500
MIN_FILES = 200
MIN_CHARS = 3_000_000


class Passages:
    """
    Hashes of blocks of text, to find verbatim repetitions (as rsync does in files).

    Known text is cut into blocks of half a passage, and other text is searched for them at
    every character: a repeated passage of `chars` characters contains a whole block
    wherever it starts. Of shorter repetitions, down to half of that, some are found.
    Nothing is normalised: a changed space makes another passage.

    As in rsync, a checksum that is cheap at every character, of which characters a block
    has in whatever order, says where a hash is worth its while.

    Args:
        chars: Length of a passage, at least 1.

    Attributes:
        block_chars: Length of a block.
    """

    def __init__(self, chars: int):
        self.block_chars = (chars + 1) // 2
        # hashes, not text, which would keep all that was ever read in memory
        self._blocks: set[int] = set()
        self._has_checksum = np.zeros(1 << _CHECKSUM_BITS, dtype=bool)

    def add(self, text: str) -> None:
        """Add a known text."""
        size = self.block_chars
        starts = np.arange(0, len(text) - size + 1, size)
        self._has_checksum[self._checksums(text, starts)] = True
        self._blocks.update(hash(text[start : start + size]) for start in starts)

    def repetitions(self, text: str) -> Iterator[tuple[int, int]]:
        """
        Start and end of each known block in a text, in order and without overlaps.
        """
        size, end = self.block_chars, 0
        starts = np.arange(len(text) - size + 1)
        known = self._has_checksum[self._checksums(text, starts)]
        for start in starts[known].tolist():
            if start >= end and hash(text[start : start + size]) in self._blocks:
                end = start + size
                yield start, end

    def _checksums(self, text: str, starts: np.ndarray) -> np.ndarray:
        """Checksums of the blocks that start at these characters."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        sums = np.zeros(len(codes) + 1, dtype=np.uint64)
        np.cumsum(_NUMBER_OF_CODE[codes % len(_NUMBER_OF_CODE)], out=sums[1:])
        of_blocks = sums[starts + self.block_chars] - sums[starts]
        return of_blocks >> np.uint64(64 - _CHECKSUM_BITS)

    def new_pieces(self, text: str) -> list[str]:
        """The pieces of a text between its known blocks, in order."""
        places = [0, *itertools.chain(*self.repetitions(text)), len(text)]
        return [text[a:b] for a, b in zip(places[::2], places[1::2], strict=True)]


class SourceFile(NamedTuple):
    """One file of the standard library.

    Attributes:
        path: Relative to the library's directory, with forward slashes.
        text: The whole source.
        label: Top-level package or module that the file is about.
    """

    path: str
    text: str
    label: str


def read_stdlib() -> list[SourceFile]:
    """Read the standard library of the running interpreter, its tests included.

    Returns:
        Every readable .py file over 500 characters, sorted by path.

    Raises:
        UserError: There is too little text: some distributions ship the standard library
            zipped or compiled.
    """
    return [*_sources(_library())]


@lru_cache(maxsize=1)  # one command opens the text several times, which takes seconds
def _sources(root: Path) -> list[SourceFile]:
    sources: list[SourceFile] = []
    for file in root.rglob("*.py"):
        relative = file.relative_to(root)
        if {"site-packages", "dist-packages"} & set(relative.parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # test data in other encodings
            continue
        if len(text) > MIN_FILE_CHARS:
            path = relative.as_posix()
            sources.append(SourceFile(path, text, label_of(path)))

    chars = sum(len(source.text) for source in sources)
    if len(sources) < MIN_FILES or chars < MIN_CHARS:
        raise UserError(
            f"the standard library in {root} has {len(sources)} readable .py files with "
            f"{chars:,} characters; {MIN_FILES} and {MIN_CHARS:,} are needed (a zipped or "
            "embeddable Python has none)"
        )
    return sorted(sources)


def label_of(path: str) -> str:
    """The top-level package or module that a file of the standard library is about.

    A test belongs to what it tests, since Python 3.12 moved many packages' tests from the
    package to `test`; "test" itself keeps the tests of the language.

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
    """Whether a file belongs to the test split, which its path alone determines.

    Args:
        path: Relative to the library's directory, with forward slashes.
        fraction: The test split's share of all files. A larger share includes a smaller.
    """
    # SHA3 because it leaves pydoc_data/topics.py, English prose and half as large as all
    # the rest of the test split, in the training split.
    digest = sha3_256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def load_stdlib_text(split: Split, seed: int = 0) -> Dataset:
    """The standard library, one row per file.

    SAELens takes it as `override_dataset`. SAELens reads a dataset in order, so the files
    are shuffled; sorted by path, one package would follow another.

    No 512 characters of the test split are in the training split: a held-out file that
    repeats others has a row for each piece between the repetitions.

    Args:
        split: "train", or "test" for the 4.5 % of files held out of it.
        seed: Seed of the order. The split does not depend on it.

    Returns:
        Dataset with the columns `text`, `path` and `label`.

    Raises:
        UserError: The standard library contains too little text, or there is no such
            split.
    """
    sources = [*_text_split(_library(), split)]
    random.Random(seed).shuffle(sources)
    columns = ("text", "path", "label")
    return Dataset.from_dict({c: [getattr(s, c) for s in sources] for c in columns})


def load_stdlib_chunks(
    split: Split,
    chars: int = CHUNK_CHARS,
    labels: Sequence[str] | None = None,
    per_label: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Chunks of the standard library, labelled by package, for probing tasks.

    The splits share no file and no chunk: no chunk of the test split occurs verbatim in a
    training file, and none occurs twice in its own split. This test split has 20 % of all
    files, and so includes that of `load_stdlib_text`.

    Args:
        split: "train" or "test".
        chars: Length of a chunk. Files are cut into chunks; the remainder is left out.
        labels: Packages or modules. By default `probing_labels()`.
        per_label: Number of chunks of each label, drawn at random. By default all.
        seed: Seed of the draw and of the order.

    Returns:
        Shuffled Dataset with the columns `text`, each `chars` characters long, and `label`.

    Raises:
        UserError: The standard library contains too little text, there is no such split,
            chars or per_label is below 1, or a label has fewer than per_label chunks (or
            none) in the split.
    """
    for name, value in ("chars", chars), ("per_label", per_label):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    _check_split(split)
    splits = _probing_splits(_library(), chars)
    labels = probing_labels(chars=chars) if labels is None else labels
    # before the labels are chosen, so that no label's chunks depend on the other labels
    label_of_chunk: dict[str, str] = {}
    for source in splits[split]:
        for start in range(0, len(source.text) - chars + 1, chars):
            label_of_chunk.setdefault(source.text[start : start + chars], source.label)
    chunks = label_of_chunk.items()
    pieces = {label: [text for text, of in chunks if of == label] for label in labels}

    needed = per_label or 1
    if short := {l: len(texts) for l, texts in pieces.items() if len(texts) < needed}:
        raise UserError(
            f"labels without the {needed} chunks of {chars} characters needed in the {split} "
            f"split, with the number they have: {short}; probing_labels() names those with most"
        )
    rng = random.Random(seed)
    rows = [
        {"text": text, "label": label}
        for label, texts in pieces.items()
        for text in (texts if per_label is None else rng.sample(texts, per_label))
    ]
    rng.shuffle(rows)
    return Dataset.from_list(rows)


def probing_labels(count: int = 5, chars: int = CHUNK_CHARS) -> list[str]:
    """The labels with the most text for a probing task, in both of its splits.

    Args:
        count: Number of labels.
        chars: Length of a chunk.

    Returns:
        Their names, most text first, without "test", which is about no one thing.

    Raises:
        UserError: The standard library contains too little text.
    """
    splits = _probing_splits(_library(), chars)
    # A label counts by its smaller split, which is not always the test split.
    chars_in_smaller = _chars(splits["train"]) & _chars(splits["test"])
    del chars_in_smaller["test"]
    return [label for label, _ in chars_in_smaller.most_common(count)]


def write_stdlib_dataset(
    path: str | os.PathLike[str], split: Split, seed: int = 0
) -> Path:
    """Write `load_stdlib_text(split)` where SAELens's `--dataset_path PATH` can read it.

    SAELens reads the split called "train" of any dataset, so each of our splits is a
    dataset of its own: a directory with one JSONL file.

    Args:
        path: The new directory.
        split: "train" or "test".
        seed: Seed of the order of the files.

    Returns:
        The directory.

    Raises:
        FileExistsError: `path` exists already.
        UserError: The standard library contains too little text, or there is no such
            split.
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
    """The files of a split; of the test split, the pieces that repeat no training file.

    Args:
        sources: All files.
        split: "train" or "test".
        test_fraction: The test split's share of all files.
        chars: Number of consecutive characters that must not be in both splits.
        min_chars: Minimum length of a piece of a file that is cut.
    """
    _check_split(split)
    held_out = [s for s in sources if is_held_out(s.path, test_fraction)]
    train = [s for s in sources if not is_held_out(s.path, test_fraction)]
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


@lru_cache(maxsize=2)
def _text_split(library: Path, split: Split) -> list[SourceFile]:
    files = _sources(library)
    return _split(files, split, TEXT_TEST_FRACTION, CHUNK_CHARS, MIN_FILE_CHARS)


@lru_cache(maxsize=1)  # takes seconds, and is called for labels, train and test in turn
def _probing_splits(library: Path, chars: int) -> dict[Split, list[SourceFile]]:
    """Both splits of labelled text."""
    sources = _sources(library)
    return {
        split: _split(sources, split, PROBING_TEST_FRACTION, chars, chars)
        for split in ("train", "test")
    }


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise UserError(f"split is {split!r}; it must be 'train' or 'test'")


def _chars(sources: list[SourceFile]) -> Counter[str]:
    """Number of characters of each label."""
    chars = Counter[str]()
    for source in sources:
        chars[source.label] += len(source.text)
    return chars
