"""Carrying out an upload, one commit for each SAE and one for the card, or a dry run."""

import difflib
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub as hf
from huggingface_hub import errors

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import temporary_folder
from saelens_scaffold._util.untrusted import without_token
from saelens_scaffold.hub.model_card import TEMPLATES, model_card
from saelens_scaffold.hub.sources import README, Upload, write_files
from saelens_scaffold.saes.loading import (
    HTTP_ERROR,
    MissingFileError,
    OldHubClientError,
    bounded_download,
)

_SAE_FILES = (
    r"(jumprelu/)?(cfg\.json|(sae_weights|sparsity)\.safetensors|runner_cfg\.json)"
    r"|eval_results/.*"
)
"""Files of an SAE in its folder, where other SAEs may have theirs."""

TRANSIENT = frozenset({409, 429, 500, 502, 503, 504})
"""Statuses of failures that may pass: a concurrent commit, a rate limit, server trouble."""

NOT_APPLIED = frozenset({409, 429, 503})
"""Transient statuses after which the request has certainly changed nothing."""

TOKENS_URL = "https://huggingface.co/settings/tokens"

HUB_FAILURES = (HTTP_ERROR, OSError, RuntimeError, ValueError)
"""What huggingface_hub raises when a request fails."""

_MAX_WAIT = 60.0  # seconds
_MAX_README_BYTES = 1 << 20

Result = TypeVar("Result")


class HubUploadError(UserError):
    """The Hub refused an upload or could not be reached, with advice on what to do."""

    exit_status = 1


class HubUpload:
    """
    A conversation with the Hub that carries out an upload.

    It keeps the layout and the commit messages of SAELens's `upload_saes_to_huggingface`,
    which has no private repositories and no pull requests, makes two commits for the two
    forms of an SAE, leaves files of former uploads in place, and checks only that two
    files exist.
    """

    def __init__(self, upload: Upload) -> None:
        self.upload = upload
        self.repo_id = upload.repo_id
        self.api = upload.api
        self.head: str | None = None
        self.remote_files: set[str] = set()
        self.doing = f"checking {self.repo_id}"

    def run(self) -> None:
        """
        Check everything, then commit each SAE, and then the card.

        Raises:
            HubUploadError: The Hub refuses or cannot be reached, and what to do.
        """
        try:
            self._open_repository()
            for sae in self.upload.progress(self.upload.saes, "Uploading SAEs"):
                self.doing = f"uploading {sae.sae_id}"
                with temporary_folder() as folder:
                    files = write_files(self.upload, sae, folder)
                    own = re.compile(f"{re.escape(sae.sae_id)}/({_SAE_FILES})")
                    old = set(filter(own.fullmatch, self.remote_files)) - set(files)
                    url = self._commit(files, old, f"Upload SAE {sae.sae_id}")
                    self.upload.commits[sae.sae_id] = url
            self.doing = "uploading the model card"
            self._write_card()
        except UserError:
            raise
        except HUB_FAILURES as error:
            raise failure(error, self.upload, self.doing) from error

    def _open_repository(self) -> None:
        """Find the repository, its branch and its files; create what is missing."""
        account = retry(self.api.whoami)
        _check_permission(account, self.upload)
        # create_commit validates the front matter, too, but the card comes last.
        # (ModelCard.validate always asks huggingface.co, whatever the endpoint is.)
        card = model_card(self.upload)
        retry(lambda: self.api._validate_yaml(card))
        try:
            retry(lambda: self.api.repo_info(self.repo_id))
        except errors.RepositoryNotFoundError:
            _check_may_create(account, self.upload)
            private, create = self.upload.private or None, self.api.create_repo
            retry(lambda: create(self.repo_id, private=private, exist_ok=True))
        try:
            retry(self._read_branch)
        except errors.RevisionNotFoundError:
            if (branch := self.upload.revision).startswith("refs/"):
                raise
            self.api.create_branch(self.repo_id, branch=branch, exist_ok=True)
            retry(self._read_branch)

    def _read_branch(self) -> None:
        info = self.api.repo_info(self.repo_id, revision=self.upload.revision)
        if self.upload.private and not info.private:
            advice = "make it private in its settings on the Hub, choose another"
            advice += ", or leave out --private (private=True)"
            raise HubUploadError(f"{self.repo_id} exists and is public; {advice}")
        self.head = info.sha
        self.remote_files = self._list_files()

    def _list_files(self) -> set[str]:
        revision = self.upload.revision
        return set(self.api.list_repo_files(self.repo_id, revision=revision))

    def _commit(
        self, files: Mapping[str, Path | bytes], old: set[str], title: str
    ) -> str | None:
        """Add files and delete old ones; returns the commit's URL, None if none was due."""
        additions = [hf.CommitOperationAdd(path, file) for path, file in files.items()]
        create_pr = self.upload.create_pr
        where: Any = {"revision": self.upload.revision, "create_pr": create_pr}
        # Large files go first, which huggingface_hub retries by itself. Nobody sees them
        # before a commit refers to them.
        self.api.preupload_lfs_files(self.repo_id, additions, **where)

        def commit(deleted: set[str]) -> hf.CommitInfo:
            operations = [*additions, *map(hf.CommitOperationDelete, sorted(deleted))]
            try:
                return self.api.create_commit(
                    self.repo_id, operations, commit_message=title, **where
                )
            except errors.EntryNotFoundError:
                still_there = deleted & self._list_files()
                if still_there == deleted:
                    raise
                # the others are gone, by a commit whose answer was lost
                return commit(still_there)

        # Repeating a commit changes nothing; repeating a pull request opens a second one.
        statuses = NOT_APPLIED if create_pr else TRANSIENT
        made = retry(lambda: commit(old), statuses)
        self.remote_files = (self.remote_files | set(files)) - old
        if made.oid == self.head:
            return None
        self.head = made.oid
        if made.pr_revision is not None:
            # the first commit opens a pull request, and the others are made in it
            self.upload.pull_request = made.pr_url
            self.upload.revision, self.upload.create_pr = made.pr_revision, False
        return made.commit_url

    def _write_card(self) -> None:
        upload = self.upload
        upload.readme = model_card(upload, self.remote_files)
        if README in self.remote_files and not upload.overwrite_readme:
            upload.readme_outcome = "kept"
            return
        files = {**upload.extra_files, README: upload.readme.encode()}
        if self._commit(files, set(), "Write the model card") is None:
            upload.readme_outcome = "unchanged"


def _check_permission(account: Mapping[str, Any], upload: Upload) -> None:
    """Check that the token may write, as far as the Hub tells before it is asked to."""
    token = (account.get("auth") or {}).get("accessToken") or {}
    role, user = token.get("role"), account.get("name")
    if role == "read":
        raise HubUploadError(
            f"the token of {user} may only read; log in with one that may write, or set "
            f"HF_TOKEN to it ({TOKENS_URL})"
        )
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if role != "fineGrained" or upload.create_pr or scopes is None:
        return
    may_write = {
        (scope.get("entity") or {}).get("name")
        for scope in scopes
        if "repo.write" in (scope.get("permissions") or [])
    }
    if not may_write & {upload.repo_id, upload.repo_id.partition("/")[0]}:
        raise HubUploadError(
            f"the fine-grained token of {user} has no permission repo.write for "
            f"{upload.repo_id}; add it at {TOKENS_URL}"
        )


def _check_may_create(account: Mapping[str, Any], upload: Upload) -> None:
    """Check that the account may create the repository, which does not exist."""
    if upload.create_pr:
        raise HubUploadError(
            f"there is no repository {upload.repo_id} to open a pull request in, or the "
            "token may not see it; check its name, or leave out --create_pr"
        )
    owner, _, name = upload.repo_id.partition("/")
    owners = [account["name"], *(org["name"] for org in account.get("orgs", []))]
    if owner not in owners:
        possible = ", ".join(f"{each}/{name}" for each in owners)
        raise HubUploadError(
            f"there is no repository {upload.repo_id}, and the token cannot create one for "
            f"{owner!r}; write one of {possible}"
        )


def look(upload: Upload) -> None:
    """
    Do a dry run: find out what an upload would do, without sending anything.

    Writes every file once to learn its size, and compares the card with an existing one.
    """
    for sae in upload.progress(upload.saes, "Writing files"):
        with temporary_folder() as folder:
            for path, file in write_files(upload, sae, folder).items():
                upload.files[path] = file.stat().st_size
    existing, remote_files = _known_of_repository(upload)
    upload.readme = model_card(upload, remote_files)
    if existing is not None:
        old, new = existing.splitlines(True), upload.readme.splitlines(True)
        names = (f"{README} in the repository", f"{README} of this upload")
        upload.readme_diff = "".join(difflib.unified_diff(old, new, *names))
        if existing == upload.readme:
            upload.readme_outcome = "unchanged"
        elif existing and not upload.overwrite_readme:
            upload.readme_outcome = "kept"
    if upload.readme_outcome == "written":
        sizes = {name: path.stat().st_size for name, path in upload.extra_files.items()}
        upload.files |= sizes
        upload.files[README] = len(upload.readme.encode())


def _known_of_repository(upload: Upload) -> tuple[str | None, list[str]]:
    """
    The repository's README and files, as far as the network and the cache tell.

    Returns:
        The README ("" if there is none, None if that is unknown), and the files' paths.
    """
    api, repo_id, revision = upload.api, upload.repo_id, upload.revision
    path, files = None, []
    try:
        where = (repo_id, README, _MAX_README_BYTES, revision)
        path = bounded_download(*where, token=api.token)
        files = api.list_repo_files(repo_id, revision=revision)
    except (
        errors.EntryNotFoundError,
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
    ):
        return "", []
    except (HTTP_ERROR, OSError, MissingFileError, OldHubClientError):
        pass  # no connection: the README may be in the cache, its files are not known
    if path is None:
        return None, []
    return Path(path).read_text(encoding="utf-8", errors="replace"), files


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


def failure(error: BaseException, upload: Upload, doing: str) -> HubUploadError:
    """What went wrong in a request to the Hub, what is done, and how to continue."""
    causes = [error]
    while following := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(following)
    kind, status, said = "unknown", 0, None
    if any(isinstance(cause, HTTP_ERROR) for cause in causes):
        kind = "broken"
    for cause in reversed(causes):
        if isinstance(cause, errors.LocalTokenNotFoundError):
            kind = "no token"
        elif isinstance(cause, errors.OfflineModeIsEnabled):
            kind = "offline"
        elif isinstance(cause, errors.HfHubHTTPError) and cause.response is not None:
            kind, said = "refused", cause.server_message
            status = cause.response.status_code
    context: dict[str, Any] = {"kind": kind, "status": status, "said": said}
    context |= {"error": error, "name": type(error).__name__, "root": causes[-1]}
    context |= {"upload": upload, "doing": doing, "tokens_url": TOKENS_URL}
    text = TEMPLATES.get_template("failure.txt.jinja").render(context)
    return HubUploadError(without_token(" ".join(text.split())))
