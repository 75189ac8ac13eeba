"""Text to evaluate on: where it comes from, and whether it was trained on."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from saelens_scaffold._util.configs import documented
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.models.datasets import (
    EMBEDDED_DATASET_NAME,
    is_local,
    open_dataset,
    rows_with,
)
from saelens_scaffold.models.stdlib import CHUNK_CHARS, Passages
from saelens_scaffold.training.pretokenized import check_row_lengths, token_column

logger = logging.getLogger(__name__)


def check_text(
    dataset: str, split: str, column: str, context_size: int | None = None
) -> None:
    """
    See that an evaluation can read a text, or rows of tokens.

    Args:
        dataset: As for `datasets.open_dataset`.
        split: Its split.
        column: Its column with the text; rows of tokens have one of their own.
        context_size: Tokens per sequence, if known, which rows of tokens must have.

    Raises:
        UserError: It cannot.
    """
    rows = open_dataset(dataset, split)
    if token_column(rows, dataset) is None:
        rows_with(rows, dataset, column)
    elif context_size is not None:
        check_row_lengths(rows, dataset, context_size)


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
        dataset: The text of the evaluation, as for `datasets.open_dataset`.
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
    if dataset == EMBEDDED_DATASET_NAME or not is_local(dataset):
        return
    if _has_tokens(dataset, split):
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
        if not is_local(name):
            missing = f"{name} is not on this machine"
            return None, f"{text} was not compared with {where}: {missing}"
    if _has_tokens(dataset, split):
        return None, f"{text} was not compared with {where}: it has tokens, not text"
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


def _has_tokens(dataset: str, split: str) -> bool:
    return token_column(open_dataset(dataset, split), dataset) is not None


def _texts(dataset: str, split: str, column: str, max_chars: int) -> Iterator[str]:
    """The first texts of a dataset, until they have so many characters."""
    n_chars = 0
    for (text,) in rows_with(open_dataset(dataset, split), dataset, column):
        if n_chars >= max_chars:
            return
        if text:
            n_chars += len(text)
            yield text
