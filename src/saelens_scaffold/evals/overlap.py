"""Whether an evaluation's text was trained on, as far as that can be known."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from saelens_scaffold._util.configs import documented
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.selected_saes import SelectedSAE
from saelens_scaffold.evals.text_data import (
    EMBEDDED_DATASET_NAME,
    open_dataset,
    rows_with,
)
from saelens_scaffold.models.stdlib import CHUNK_CHARS, Passages

logger = logging.getLogger(__name__)

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
        dataset: The text of the evaluation, as for `text_data.open_dataset`.
        split: Its split.
        text_column: Its column.

    Returns:
        The answer for each SAE, under its key.

    Raises:
        UserError: The text of the evaluation cannot be read.
    """
    _warn_of_repetitions(dataset, split, text_column)
    trained_on = {sae.key: sae.sae.cfg.metadata.dataset_path for sae in saes}
    answers = {
        name: TextSeenInTraining(*_seen(name, dataset, split, text_column))
        for name in dict.fromkeys(trained_on.values())
    }
    for name, answer in answers.items():
        labels = [sae.label for sae in saes if trained_on[sae.key] == name]
        if answer.seen:
            logger.warning(
                "%s trained on text of this evaluation: %s",
                f"{', '.join(labels)} {'was' if len(labels) == 1 else 'were'}",
                answer.reason,
            )
        elif answer.seen is None:
            logger.info("%s: %s", ", ".join(labels), answer.reason)
    return {key: answers[name] for key, name in trained_on.items()}


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
    same = _is_same(trained_on, dataset)
    if same and (split == TRAINING_SPLIT or Path(dataset).is_file()):
        start = "and both begin with its first row"
        return True, f"{text} is what the SAE was trained on, {start}"
    if same and dataset == EMBEDDED_DATASET_NAME:
        return False, f"no {CHUNK_CHARS} characters of {text} are in its training split"
    for name in (trained_on, dataset):
        if not _is_local(name):
            missing = f"({TRAINING_SPLIT}): {name} is not on this machine"
            return None, f"{text} was not compared with {trained_on} {missing}"
    return _compared(trained_on, dataset, split, text_column)


def _compared(
    trained_on: str, dataset: str, split: str, text_column: str
) -> tuple[bool | None, str]:
    passages, n_training = Passages(CHUNK_CHARS), 0
    try:
        for text in _texts(trained_on, TRAINING_SPLIT, "text", MAX_TRAINING_CHARS):
            passages.add(text)
            n_training += len(text)
    except UserError as error:
        return None, f"the training text cannot be read: {error}"
    n_evaluated = n_repeated = 0
    for text in _texts(dataset, split, text_column, MAX_EVALUATED_CHARS):
        n_evaluated += len(text)
        n_repeated += sum(end - start for start, end in passages.repetitions(text))
    of = f"the first {n_evaluated:,} characters of {dataset} ({split})"
    whole = n_training < MAX_TRAINING_CHARS
    where = f"{trained_on} ({TRAINING_SPLIT})"
    if not whole:
        where = f"the first {n_training:,} characters of {where}"
    if n_repeated:
        share = n_repeated / n_evaluated
        return True, f"{share:.1%} of {of} are verbatim in {where}"
    seen = False if whole else None
    return seen, f"no {CHUNK_CHARS} characters of {of} are verbatim in {where}"


def _texts(dataset: str, split: str, column: str, max_chars: int) -> Iterator[str]:
    """The first texts of a dataset, until they have so many characters."""
    n_chars = 0
    for (text,) in rows_with(open_dataset(dataset, split), dataset, column):
        if n_chars >= max_chars:
            return
        if text:
            n_chars += len(text)
            yield text


def _is_same(trained_on: str, dataset: str) -> bool:
    return trained_on == dataset or (
        Path(dataset).exists()
        and Path(trained_on).exists()
        and Path(trained_on).samefile(dataset)
    )


def _is_local(name: str) -> bool:
    return name == EMBEDDED_DATASET_NAME or Path(name).exists()
