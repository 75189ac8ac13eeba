"""What the user can mend, as one class of errors."""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager

_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


class UserError(ValueError):
    """
    A mistake that the user can mend, said in one line: what is wrong, and what is allowed.

    The command line shows the line alone and exits with `exit_status`. Any other exception
    is a defect, and keeps its traceback.
    """

    exit_status = 2


def one_line(error: BaseException) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def shown(value: object) -> str:
    """A value from a file in a message, of at most 200 characters, however large it is."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # Python writes no integers of more than 4,300 digits
        text = "an integer of too many digits"
    return text if len(text) <= 200 else f"{text[:197]}..."


@contextmanager
def loading(model_name: str) -> Iterator[None]:
    """
    Where a language model is loaded.

    Raises:
        UserError: Its files cannot be had: they are gated, or there is no connection.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"model_name {model_name!r}: {one_line(error)}") from error
