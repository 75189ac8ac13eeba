"""Labelled text for probes, from the Hub, local files, or the embedded text."""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from datasets import IterableDataset

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.models.datasets import open_dataset, rows_with, split_names

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
        if min(train_size, test_size) < 1:
            sizes = f"train_size is {train_size} and test_size {test_size}"
            raise UserError(f"{sizes}; each must be at least 1")
        if self.test is None:
            self._check_rows("rows", self.train, train_size + test_size)
        else:
            self._check_rows("train rows", self.train, train_size)
            self._check_rows("test rows", self.test, test_size)
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

    def _check_rows(self, kind: str, texts: TextsByLabel, needed: int) -> None:
        short = {label: len(t) for label, t in texts.items() if len(t) < needed}
        if short:
            raise UserError(
                f"dataset {self.name!r} has fewer than the {needed} {kind} needed of each "
                f"class: {short}; allowed are smaller sizes, or fewer classes (max_classes)"
            )


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
        dataset: As for `datasets.open_dataset`: "python-stdlib" for labelled pieces of
            the embedded text, a local directory or file, else a name on the Hub.
        text_column: The column with the text.
        label_column: The column with the label; its values are made strings.
        subset: The dataset's configuration on the Hub.
        split: Take both from this split. By default the splits "train" and "test" are
            taken if the dataset has both, else "train" for both.
        max_classes: Maximum number of classes, at least 2.
        choices_column: A column with lists of answers to choose from. They follow the
            text as MMLU prints them, one a line: "A. ...", "B. ...".
        class_of: The class that a label belongs to. By default each is its own.

    Raises:
        UserError: The dataset cannot be read, is empty, lacks a column, or has fewer
            than two classes.
    """
    columns = [text_column, label_column, *([choices_column] if choices_column else [])]
    seen: set[str] = set()

    def read(split: str) -> TextsByLabel:
        texts: TextsByLabel = {}
        repeated = 0
        for text, label in _labelled_rows(dataset, columns, subset, split):
            if text in seen:
                repeated += 1
            else:
                seen.add(text)
                texts.setdefault(class_of(label), []).append(text)
        if repeated:
            logger.warning(
                "dataset %r: %d texts occur again, left out", dataset, repeated
            )
        return texts

    train = read(split or "train")
    test = None
    if split is None and {"train", "test"} <= set(split_names(dataset, subset)):
        test = read("test")
    labels = _most_frequent(train, train if test is None else test, max_classes)
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


def _most_frequent(train: TextsByLabel, test: TextsByLabel, limit: int) -> list[str]:
    """The classes with the most texts in the split where they have fewer."""
    counts = {
        label: min(len(train[label]), len(test.get(label, []))) for label in train
    }
    labels = [label for label, count in counts.items() if count]
    return sorted(labels, key=lambda label: (-counts[label], label))[:limit]


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
            lines = [f"{chr(65 + i)}. {answer}" for i, answer in enumerate(answers)]
            text = "\n".join([text, *lines])
        yield text, str(label)
