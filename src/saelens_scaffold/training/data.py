"""The data of a training, in a form that SAELens takes."""

from typing import Any

from datasets import IterableDataset

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.models.datasets import (
    AnyDataset,
    first_row,
    is_local,
    open_dataset,
)
from saelens_scaffold.models.hook_points import model_config
from saelens_scaffold.models.language_models import transformers_name
from saelens_scaffold.training.pretokenized import (
    TOKEN_COLUMNS,
    check_row_lengths,
    check_tokenizer,
    token_column,
)

_TEXT_COLUMNS = (*TOKEN_COLUMNS, "text", "problem")
_CHAT_COLUMNS = ("conversation", "conversations", "messages", "text")


def training_data(cfg: Any) -> AnyDataset:
    """
    The rows that a training reads, checked as far as SAELens would fail on them.

    Args:
        cfg: Configuration of a training of one SAE or several.

    Raises:
        UserError: They cannot be read, or are not what SAELens needs.
    """
    name = cfg.dataset_path
    if not name:
        raise UserError("dataset_path is empty; name a dataset")
    try:
        rows = open_dataset(name, "train", streaming=cfg.streaming)
        row = first_row(rows, name)
        columns = _CHAT_COLUMNS if cfg.use_chat_formatting else _TEXT_COLUMNS
        if not any(column in row for column in columns):
            raise UserError(
                f"dataset {name!r} has columns {', '.join(row)}; one of "
                f"{', '.join(columns)} is needed"
            )
    except UserError as error:
        raise UserError(f"dataset_path: {error}") from error
    if _is_pretokenized(cfg, rows):
        check_row_lengths(rows, name, cfg.context_size)
        check_tokenizer(name, tokenizer_name(cfg))
    return rows


def tokenizer_name(cfg: Any) -> str:
    """Name or directory of the tokenizer of a training's language model."""
    if cfg.model_class_name == "HookedTransformer":
        return model_config(cfg.model_name).tokenizer_name
    return transformers_name(cfg.model_name)


def n_positions(cfg: Any) -> int:
    """Number of positions in a sequence at which a training takes activations."""
    return len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])


def _is_pretokenized(cfg: Any, rows: AnyDataset) -> bool:
    """Whether SAELens takes tokens from these rows."""
    return not cfg.use_chat_formatting and bool(token_column(rows, cfg.dataset_path))


def override_dataset(cfg: Any) -> IterableDataset | None:
    """
    Data for SAELens's argument of that name; None where it reads them by their name.

    By name, SAELens (6.54) reads no folder of `save_to_disk`, looks for the metadata of
    local rows of tokens on the Hub, and has rows that are not streamed made into PyTorch
    tensors, where the datasets library may fail (see `models.datasets`).

    Raises:
        UserError: As for `training_data`.
    """
    rows = training_data(cfg)
    if _is_pretokenized(cfg, rows):
        column = token_column(rows, cfg.dataset_path)
        rows = rows.select_columns([str(column)])
    elif not is_local(cfg.dataset_path):
        return None
    return rows if isinstance(rows, IterableDataset) else rows.to_iterable_dataset()
