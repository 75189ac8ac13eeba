"""What the user can mend, as one class of errors."""

from collections.abc import Iterator
from contextlib import contextmanager


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
