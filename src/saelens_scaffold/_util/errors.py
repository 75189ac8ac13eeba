"""What the user can mend, as one class of errors."""


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
