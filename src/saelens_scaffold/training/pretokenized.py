"""Rows of tokens, as SAELens's `PretokenizeRunner` writes them."""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoTokenizer

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.untrusted import read_json
from saelens_scaffold.models.datasets import AnyDataset, first_row, is_local, rows_with

TOKEN_COLUMNS = ("tokens", "input_ids")
"""Columns with tokens, in the order in which SAELens looks for them, before text."""

METADATA_FILENAME = "sae_lens.json"
"""What `PretokenizeRunner` writes beside its rows."""


def token_column(dataset: AnyDataset, name: str) -> str | None:
    """
    Column with the tokens of a dataset; None if it has text.

    Raises:
        UserError: The dataset is empty.
    """
    row = first_row(dataset, name)
    return next((column for column in TOKEN_COLUMNS if column in row), None)


def pretokenized_rows(
    dataset: AnyDataset, name: str, context_size: int
) -> Iterator[torch.Tensor]:
    """
    Sequences of a pretokenized dataset: the first tokens of every row, as SAELens takes
    them. Begin and separator tokens are in the rows; nothing is added, and nothing joined.

    Args:
        dataset: It has a `token_column`.
        name: Its name, for messages.
        context_size: Tokens per sequence.

    Returns:
        An iterator over tensors of shape (context_size,), on the CPU.

    Raises:
        UserError: A row is shorter than context_size. Raised when called if it is the
            first, or if the rows are on this machine; else when the row is met.
    """
    check_row_lengths(dataset, name, context_size)
    rows = rows_with(dataset, name, str(token_column(dataset, name)))
    return (torch.tensor(_cut(row, name, context_size)) for (row,) in rows)


def check_row_lengths(dataset: AnyDataset, name: str, context_size: int) -> None:
    """
    Check that rows of tokens are long enough: all of them if they are on this machine,
    else the first.

    Raises:
        UserError: One is not.
    """
    column = str(token_column(dataset, name))
    _cut(first_row(dataset, name)[column], name, context_size)
    if isinstance(dataset, datasets.Dataset):
        # read from Arrow's offsets, without the tokens themselves
        chunks = (c for c in dataset.data.column(column).chunks if len(c))
        lengths = (int(c.value_lengths().to_numpy(False).min()) for c in chunks)
        _cut(range(min(lengths)), name, context_size)


def _cut(row: Sequence[int], name: str, context_size: int) -> Sequence[int]:
    if len(row) < context_size:
        raise UserError(
            f"context_size is {context_size}; it must be at most {len(row)}, since dataset "
            f"{name!r} has a row of so many tokens"
        )
    return row[:context_size]


@cache
def tokenization(name: str) -> dict[str, Any]:
    """
    How rows of tokens were made.

    Args:
        name: A folder, or the name of a dataset on the Hub.

    Returns:
        The fields of SAELens's `PretokenizedDatasetMetadata`; none if they are unknown.
    """
    file = Path(name, METADATA_FILENAME)
    if not is_local(name):
        try:
            file = Path(hf_hub_download(name, METADATA_FILENAME, repo_type="dataset"))
        except (OSError, ValueError, HfHubHTTPError):
            return {}
    return read_json(file) if file.is_file() else {}


def adopt_tokenization(cfg: Any) -> None:
    """
    Have a runner's configuration say how its rows of tokens were made.

    SAELens does not read these fields where data are pretokenized, but copies them to the
    SAE's metadata, and evaluations take text as these say.

    Args:
        cfg: Configuration of a training of one SAE or several; it is changed.
    """
    if not (made := tokenization(cfg.dataset_path)):
        return
    cfg.prepend_bos = made["begin_batch_token"] is not None
    for field in ("sequence_separator_token", "disable_concat_sequences"):
        setattr(cfg, field, made[field])


def check_tokenizer(name: str, tokenizer_name: str) -> None:
    """
    Check that rows were tokenized for a language model, if that is known.

    Args:
        name: As for `tokenization`.
        tokenizer_name: Name or directory of the language model's tokenizer.

    Raises:
        UserError: They were tokenized for another.
    """
    made_with = tokenization(name).get("tokenizer_name")
    if made_with is None:
        return
    try:
        vocabularies = [
            AutoTokenizer.from_pretrained(each).get_vocab()
            for each in (made_with, tokenizer_name)
        ]
    except (OSError, ValueError):  # not on this machine
        return
    if vocabularies[0] != vocabularies[1]:
        raise UserError(
            f"dataset {name!r} was tokenized with {made_with}, which has another "
            f"vocabulary than {tokenizer_name}"
        )
