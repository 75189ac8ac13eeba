"""Labelled text for probes: from anywhere, and made known to SAEBench."""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import islice
from typing import NamedTuple
from unittest.mock import patch

from datasets import IterableDataset
from sae_bench.evals.scr_and_tpp import main as scr_and_tpp
from sae_bench.sae_bench_utils import dataset_info, dataset_utils

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.text_data import open_dataset, rows_with, split_names

logger = logging.getLogger(__name__)

MAX_CLASSES = 5
"""Default number of classes: no class set of SAEBench has more."""

MAX_STREAMED_ROWS = 200_000
"""How much is read of a split that is streamed from the Hub."""

TextsByLabel = dict[str, list[str]]


class LabelledText(NamedTuple):
    """
    The texts of a dataset's classes, most frequent class first.

    Attributes:
        name: Of the dataset.
        train: The texts of each class in the train split, or in all of the dataset.
        test: Those in the test split; None if the dataset is not split.
    """

    name: str
    train: TextsByLabel
    test: TextsByLabel | None

    @property
    def labels(self) -> list[str]:
        """The classes."""
        return list(self.train)

    def sample(
        self, train_size: int, test_size: int, seed: int
    ) -> tuple[TextsByLabel, TextsByLabel]:
        """
        Draw as many texts of each class, without replacement.

        Args:
            train_size: Texts of each class to train on.
            test_size: Texts of each class to test on. Of a dataset that is not split,
                none is among those to train on.
            seed: Of the draw.

        Returns:
            The texts to train on and those to test on.

        Raises:
            UserError: A class has fewer.
        """
        self._check_sizes(train_size, test_size)
        train: TextsByLabel = {}
        test: TextsByLabel = {}
        for label in self.train:
            # a generator for each class, so that its draw depends on no other class
            rng = random.Random(f"{seed} {label}")
            if self.test is None:
                drawn = rng.sample(self.train[label], train_size + test_size)
                train[label], test[label] = drawn[:train_size], drawn[train_size:]
            else:
                train[label] = rng.sample(self.train[label], train_size)
                test[label] = rng.sample(self.test[label], test_size)
        return train, test

    def _check_sizes(self, train_size: int, test_size: int) -> None:
        for field, size in (("train_size", train_size), ("test_size", test_size)):
            if size < 1:
                raise UserError(f"{field} is {size}; it must be at least 1")
        if self.test is None:
            self._check_rows("rows", self.train, train_size + test_size)
        else:
            self._check_rows("train rows", self.train, train_size)
            self._check_rows("test rows", self.test, test_size)

    def _check_rows(self, kind: str, texts: TextsByLabel, needed: int) -> None:
        short = {label: len(t) for label, t in texts.items() if len(t) < needed}
        if short:
            raise UserError(
                f"dataset {self.name!r} has fewer than the {needed} {kind} needed of each "
                f"class: {short}; allowed are smaller sizes, or fewer classes (max_classes)"
            )

    def digest(self) -> str:
        """Digest of all its texts and labels."""
        digest = sha256()
        for part in (self.train, self.test or {}):
            for label, texts in part.items():
                digest.update(repr((label, texts)).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def read_labelled_text(
    dataset: str,
    text_column: str,
    label_column: str,
    subset: str | None = None,
    split: str | None = None,
    max_classes: int = MAX_CLASSES,
    choices_column: str | None = None,
    class_of: Callable[[str], str] = str,
) -> LabelledText:
    """
    Read a dataset's most frequent classes, to draw from with several seeds.

    Of a split that is streamed from the Hub the first 200,000 rows are read. A class is as
    frequent as it is in the smaller of the splits. A text that occurs again, in the same
    split or the other, is left out there, so that none is both trained and tested on.

    Args:
        dataset: As for `text_data.open_dataset`: "python-stdlib" for labelled pieces of
            the embedded text, a local directory or file, else a name on the Hub.
        text_column: The column with the text.
        label_column: The column with the label; its values are made strings.
        subset: The dataset's configuration on the Hub.
        split: Take both from this split. By default the splits "train" and "test" are
            taken if the dataset has both, else "train" for both.
        max_classes: How many classes are taken at most.
        choices_column: A column with lists of answers to choose from. They follow the
            text as MMLU prints them, one a line: "A. ...", "B. ...".
        class_of: The class that a label belongs to. By default each is its own.

    Raises:
        UserError: The dataset cannot be read, is empty, lacks a column, or has fewer
            than two classes.
    """
    if max_classes < 2:
        raise UserError(f"max_classes is {max_classes}; it must be at least 2")
    columns = [text_column, label_column, *([choices_column] if choices_column else [])]

    seen: set[str] = set()
    repeated = 0

    def read(split: str) -> TextsByLabel:
        nonlocal repeated
        texts: TextsByLabel = {}
        for text, label in _labelled_rows(dataset, columns, subset, split):
            if text in seen:
                repeated += 1
            else:
                seen.add(text)
                texts.setdefault(class_of(label), []).append(text)
        return texts

    train = read(split or "train")
    test = None
    if split is None and {"train", "test"} <= set(split_names(dataset, subset)):
        test = read("test")
    if repeated:
        logger.warning(
            "dataset %r: %d texts occur again, and are left out there",
            dataset,
            repeated,
        )
    counts = {
        label: min(len(texts), len(texts if test is None else test.get(label, [])))
        for label, texts in train.items()
    }
    labels = sorted(
        (label for label, count in counts.items() if count),
        key=lambda label: (-counts[label], label),
    )[:max_classes]
    if len(labels) < 2:
        both = "" if test is None else " in both its train and its test split"
        raise UserError(
            f"dataset {dataset!r} has {len(labels)} class(es) of text{both} in column "
            f"{label_column!r}: {labels}; a probe needs at least 2"
        )
    return LabelledText(
        dataset,
        {label: train[label] for label in labels},
        None if test is None else {label: test[label] for label in labels},
    )


def _labelled_rows(
    dataset: str, columns: Sequence[str], subset: str | None, split: str
) -> Iterator[tuple[str, str]]:
    """Text, with the choices if there are any, and label of every row that has both."""
    opened = open_dataset(dataset, split, subset, chunked=True)
    rows = rows_with(opened, dataset, *columns)
    if isinstance(opened, IterableDataset):
        rows = islice(rows, MAX_STREAMED_ROWS)
    for text, label, *choices in rows:
        if text is None or label is None:
            continue
        if not isinstance(text, str):
            raise UserError(
                f"dataset {dataset!r}: column {columns[0]!r} holds "
                f"{type(text).__name__}, not text; name another text_column"
            )
        if not text.strip():
            continue
        for answers in choices:
            if not isinstance(answers, list):
                raise UserError(
                    f"dataset {dataset!r}: column {columns[-1]!r} holds "
                    f"{type(answers).__name__}, not a list of answers"
                )
            text = "\n".join(
                [
                    text,
                    *(f"{chr(65 + i)}. {answer}" for i, answer in enumerate(answers)),
                ]
            )
        yield text, str(label)


def is_known_to_sae_bench(dataset: str) -> bool:
    """Whether a dataset is one of SAEBench's own, by the name SAEBench has for it."""
    return dataset in dataset_info.chosen_classes_per_dataset


@contextmanager
def known_to_sae_bench(texts: Sequence[LabelledText]) -> Iterator[None]:
    """
    Let SAEBench's sparse probing and TPP read other text, for as long as this lasts.

    SAEBench knows its datasets by name, in four places: a table of classes, a function
    that loads them, a table of second labels that TPP looks into (and does not use), and
    another function, which calls the first. Its own datasets work as before.

    Args:
        texts: The text. SAEBench's name for each is its `name`.
    """
    by_name = {text.name: text for text in texts}
    own = dataset_utils.get_multi_label_train_test_data

    def get_multi_label_train_test_data(
        dataset_name: str, train_set_size: int, test_set_size: int, random_seed: int
    ) -> tuple[TextsByLabel, TextsByLabel]:
        if dataset_name not in by_name:
            return own(dataset_name, train_set_size, test_set_size, random_seed)
        sizes = rows_per_class(train_set_size, test_set_size)
        return by_name[dataset_name].sample(*sizes, random_seed)

    with (
        patch.object(
            dataset_utils,
            "get_multi_label_train_test_data",
            get_multi_label_train_test_data,
        ),
        patch.dict(
            dataset_info.chosen_classes_per_dataset,
            {text.name: text.labels for text in texts},
        ),
        patch.dict(scr_and_tpp.COLUMN2_VALS_LOOKUP, dict.fromkeys(by_name)),
    ):
        yield


def rows_per_class(train_set_size: int, test_set_size: int) -> tuple[int, int]:
    """What SAEBench's set sizes take of each class: they are those of a binary task, half
    of whose rows are of the other classes."""
    return train_set_size // 2, test_set_size // 2


def check_set_sizes(
    text: LabelledText, train: tuple[str, int], test: tuple[str, int]
) -> None:
    """
    See that a dataset has the rows that SAEBench will draw.

    Args:
        text: The dataset.
        train: SAEBench's field, as "probe_train_set_size", and its value.
        test: The same for the test set.

    Raises:
        UserError: It has not.
    """
    sizes = rows_per_class(train[1], test[1])
    try:
        text.sample(*sizes, seed=0)
    except ValueError as error:
        has = min(len(texts) for texts in text.train.values())
        most = f"together at most {2 * has}"
        if text.test is not None:
            has_test = min(len(texts) for texts in text.test.values())
            most = f"at most {2 * has} and {2 * has_test}"
        raise UserError(
            f"{train[0]} {train[1]} and {test[0]} {test[1]} take {sizes[0]} train rows and "
            f"{sizes[1]} test rows of each class; with these classes they may be {most}: "
            f"{error}"
        ) from error
