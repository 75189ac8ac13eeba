"""Retries, and advice on what to do when the Hub refuses or cannot be reached."""

import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import errors

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.saes.loading import HTTP_ERROR

TRANSIENT = frozenset({409, 429, 500, 502, 503, 504})
"""Statuses of failures that may pass: a concurrent commit, a rate limit, server trouble."""

NOT_APPLIED = frozenset({409, 429, 503})
"""Transient statuses after which the request has certainly changed nothing."""

TOKENS_URL = "https://huggingface.co/settings/tokens"

HUB_FAILURES = (HTTP_ERROR, OSError, RuntimeError, ValueError)
"""What huggingface_hub raises when a request fails."""

_MAX_WAIT = 60.0  # seconds

_LOG_IN = f"log in with `hf auth login`, or set HF_TOKEN to one from {TOKENS_URL}."
_ADVICE = {
    401: f"401, the Hub does not accept the token, or needs one; {_LOG_IN}",
    403: "403, the token may not do this; make one that may write to {owner}'s "
    f"repositories at {TOKENS_URL}, or propose the SAEs with --create_pr.",
    404: "404, there is no repository {repo_id}, or the token may not see it, or what was "
    "to be changed is gone; check its name and the token's permissions.",
    409: "409, somebody else is changing the repository; wait a minute.",
    429: "429, too many requests to the Hub; wait some minutes.",
}

Result = TypeVar("Result")


class HubUploadError(UserError):
    """The Hub refused an upload or could not be reached, with advice on what to do."""

    exit_status = 1


def retry(action: Callable[[], Result], statuses: frozenset[int] = TRANSIENT) -> Result:
    """
    Do something, and repeat it while the Hub answers with one of these statuses.

    huggingface_hub retries file transfers, but neither commits nor queries.
    """
    for wait in (1, 2, 4, 8):
        try:
            return action()
        except errors.HfHubHTTPError as error:
            if error.response is None or error.response.status_code not in statuses:
                raise
            asked_for = error.response.headers.get("Retry-After", "")
            asked = float(asked_for) if asked_for.isdigit() else wait
            time.sleep(min(asked, _MAX_WAIT))
    return action()


def advice(error: BaseException, repo_id: str) -> str:
    """What went wrong in a request to the Hub, and what to do, as sentences."""
    causes = [error]
    while following := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(following)
    for cause in causes:
        if isinstance(cause, errors.LocalTokenNotFoundError):
            return f"there is no token; {_LOG_IN}"
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set; unset it, or only look, with --dry-run."
        if isinstance(cause, errors.HfHubHTTPError) and cause.response is not None:
            status, said = cause.response.status_code, cause.server_message
            found = _ADVICE.get(status, f"the Hub refuses with {status}.")
            if status >= 500:
                found = f"{status}, the Hub has a problem; see status.huggingface.co."
            found = found.format(repo_id=repo_id, owner=repo_id.partition("/")[0])
            return f"{found} The Hub says: {said}." if said else found
    if any(isinstance(cause, HTTP_ERROR) for cause in causes):
        reason = str(causes[-1]).strip() or type(error).__name__
        return f"the connection broke ({reason:.200}); check the network."
    reason = f"{type(error).__name__}: {error!s:.500}."
    if "xet" in reason.lower():
        # huggingface_hub assumes Xet storage on every Hub, not only on huggingface.co
        reason += " If this Hub has no Xet storage, set HF_HUB_DISABLE_XET=1."
    return reason
