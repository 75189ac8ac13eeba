"""What to do when the Hub does not do as it is asked."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from saelens_scaffold.saes.loading import HTTP_ERROR

TRY_AGAIN = {409, 429, 500, 502, 503, 504}
"""What may go by itself: another commit at the same time, a limit, a server in trouble."""

NOTHING_DONE = {409, 429, 503}
"""Those after which it is certain that nothing has been done."""

MAX_TRIES = 5
MAX_WAIT = 60.0

Result = TypeVar("Result")


class HubUploadError(RuntimeError):
    """The Hub refused an upload, or could not be reached, and what to do."""


def try_again(action: Callable[[], Result], statuses: set[int]) -> Result:
    """
    Do something, and again if the Hub asks for patience.

    huggingface_hub does this for files, but neither for commits nor for questions.

    Args:
        action: What can be done more than once.
        statuses: Of the answers after which it is done again.

    Returns:
        What the action returns.
    """
    for wait in (2**i for i in range(MAX_TRIES - 1)):
        try:
            return action()
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code not in statuses:
                raise
            asked_for = error.response.headers.get("Retry-After", "")
            time.sleep(min(float(asked_for), MAX_WAIT) if asked_for.isdigit() else wait)
    return action()


@contextmanager
def explained(doing: str, repo_id: str, state: Callable[[], str]) -> Iterator[None]:
    """
    Raise what goes wrong with the Hub as one error, which says what to do.

    Args:
        doing: What is being done, as in "uploading layer_12".
        repo_id: The repository.
        state: What to say of what is done already, and how to go on.

    Raises:
        HubUploadError: Something of the Hub's has gone wrong.
    """
    try:
        yield
    except HubUploadError:
        raise
    except (HTTP_ERROR, OSError, RuntimeError, ValueError) as error:
        advice = _advice(error, repo_id)
        message = " ".join(part for part in (advice, state()) if part)
        raise HubUploadError(f"{doing}: {message}") from error


def _advice(error: BaseException, repo_id: str) -> str:
    owner = repo_id.partition("/")[0]
    tokens = "https://huggingface.co/settings/tokens"
    for cause in _causes(error):
        if isinstance(cause, LocalTokenNotFoundError):
            return (
                "there is no token; log in with `hf auth login`, or set HF_TOKEN, with one "
                f"that may write, of {tokens}."
            )
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set; unset it, or look only, with --dry-run."
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            status = cause.response.status_code
            said = (
                f" The Hub says: {cause.server_message}."
                if cause.server_message
                else ""
            )
            return _advice_by_status(status, repo_id, owner, tokens) + said
    if any(isinstance(cause, HTTP_ERROR) for cause in _causes(error)):
        reason = str(list(_causes(error))[-1]).strip() or type(error).__name__
        return f"the connection broke ({reason:.200}); see to the network."
    if "xet" in str(error).lower():
        # which huggingface_hub takes for granted, also of Hubs other than huggingface.co
        return (
            f"{error!s:.500}; if this Hub has no Xet storage, set HF_HUB_DISABLE_XET=1."
        )
    return f"{type(error).__name__}: {error!s:.500}."


def _advice_by_status(status: int, repo_id: str, owner: str, tokens: str) -> str:
    if status == 401:
        return (
            "401, the Hub does not accept the token, or needs one; log in with "
            f"`hf auth login`, or set HF_TOKEN to a valid one, of {tokens}."
        )
    if status == 403:
        return (
            f"403, the token may not do this; make one that may write to {owner}'s "
            f"repositories at {tokens}, or propose the SAEs with --create_pr."
        )
    if status == 404:
        return (
            f"404, there is no repository {repo_id}, or the token may not see it, or what "
            "was to be changed is gone; see to its name, and to the token's permissions."
        )
    if status == 409:
        return "409, the repository is being changed by somebody else; wait a minute."
    if status == 429:
        return "429, the Hub has been asked too often; wait some minutes."
    if status >= 500:
        return f"{status}, the Hub has a problem; see https://status.huggingface.co."
    return f"the Hub refuses with {status}."


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
