"""Carrying an upload out: a commit for each SAE, and one for the card."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)

from saelens_scaffold.hub.hub_errors import (
    NOTHING_DONE,
    TRY_AGAIN,
    HubUploadError,
    explained,
    try_again,
)
from saelens_scaffold.hub.plan import README, UploadPlan, UploadSummary
from saelens_scaffold.hub.sources import UploadedSAE
from saelens_scaffold.saes.sae_ids import PLAIN_FORM, RESULTS_FOLDER

_SAE_FILES = (
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
    RUNNER_CFG_FILENAME,
)


class HubUpload:
    """
    The conversation with the Hub, in which a plan is carried out.

    SAELens's `upload_saes_to_huggingface` has the layout and the commit messages that are
    used here. It is not called, since it makes two commits of an SAE's two forms, between
    which one is there without the other; it leaves files of a former upload beside those
    of a new one; its repositories are public, and its uploads no pull requests; and it
    checks nothing but that two files are there.
    """

    def __init__(self, plan: UploadPlan, summary: UploadSummary) -> None:
        self.plan = plan
        self.summary = summary
        self.repo_id = plan.repo_id
        self.api = HfApi(token=plan.token)
        # In a pull request, the first commit opens it and the others are made in it.
        self.revision = plan.revision
        self.opens_pr = plan.create_pr
        self.head: str | None = None
        self.remote_files: set[str] = set()

    def run(self) -> None:
        """
        Check, then make a commit for each SAE, and one for the card.

        Raises:
            HubUploadError: The Hub refuses, or cannot be reached, and what to do.
        """
        with self._explained(f"checking {self.repo_id}"):
            exists = self._check_account_and_repository()
            # create_commit has the Hub check the card's front matter, but the card comes
            # last. (ModelCard.validate of huggingface_hub 1 asks huggingface.co, whatever
            # the endpoint is.)
            card = str(self.plan.card())
            try_again(lambda: self.api._validate_yaml(card), TRY_AGAIN)
            if not exists:
                self._create_repository()
            self._read_repository()
        for sae in self.plan.progress(self.plan.saes, "Uploading SAEs"):
            with (
                self._explained(f"uploading {sae.sae_id}"),
                TemporaryDirectory() as folder,
            ):
                files = self.plan.write(sae, Path(folder))
                self.summary.commits[sae.sae_id] = self._commit(
                    files, self._left_over(sae, files), f"Upload SAE {sae.sae_id}"
                )
        with self._explained("uploading the model card"):
            self._write_card()

    def _check_account_and_repository(self) -> bool:
        """Whether the repository exists; an error if nothing may be written to it."""
        owner, name = self.repo_id.split("/")
        account = try_again(self.api.whoami, TRY_AGAIN)
        try:
            try_again(lambda: self.api.repo_info(self.repo_id), TRY_AGAIN)
            exists = True
        except RepositoryNotFoundError:
            exists = False
        _check_permission(account, self.repo_id, self.plan.create_pr)
        if exists:
            return True
        if self.plan.create_pr:
            raise HubUploadError(
                f"there is no repository {self.repo_id} to open a pull request in, or the "
                "token may not see it; see to its name, or leave out --create_pr"
            )
        may_create = [
            account["name"],
            *(org["name"] for org in account.get("orgs", [])),
        ]
        if owner not in may_create:
            raise HubUploadError(
                f"there is no repository {self.repo_id}, and the token, of "
                f"{account['name']}, can make none for {owner!r}; write one of "
                + ", ".join(f"{possible}/{name}" for possible in may_create)
            )
        return False

    def _create_repository(self) -> None:
        def create() -> None:
            self.api.create_repo(self.repo_id, private=self.plan.private or None)

        try:
            try_again(create, TRY_AGAIN - {409})
        except HfHubHTTPError as error:
            # 409: it is there meanwhile, as after an answer that was lost
            if error.response is None or error.response.status_code != 409:
                raise

    def _read_repository(self) -> None:
        """Find the branch, and what is in it."""

        def read() -> None:
            info = self.api.repo_info(self.repo_id, revision=self.revision)
            if self.plan.private and not info.private:
                raise HubUploadError(
                    f"{self.repo_id} exists, and is public, so that the SAEs would be, too; "
                    "make it private in its settings on the Hub, choose another repository, "
                    "or leave out --private (private=True)"
                )
            self.head = info.sha
            self.remote_files = set(
                self.api.list_repo_files(self.repo_id, revision=self.revision)
            )

        try:
            try_again(read, TRY_AGAIN)
        except RevisionNotFoundError:
            if self.revision.startswith("refs/"):
                raise
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            try_again(read, TRY_AGAIN)

    def _left_over(self, sae: UploadedSAE, files: Mapping[str, Path]) -> list[str]:
        """Files of a former upload of this SAE that the new one does not have."""
        plain = (f"{PLAIN_FORM}/{name}" for name in _SAE_FILES)
        own = {f"{sae.sae_id}/{name}" for name in (*_SAE_FILES, *plain)}
        results = f"{sae.sae_id}/{RESULTS_FOLDER}/"
        return sorted(
            path
            for path in self.remote_files - set(files)
            if path in own or path.startswith(results)
        )

    def _commit(
        self, files: Mapping[str, Path | bytes], left_over: Sequence[str], title: str
    ) -> str | None:
        """Make one commit; its URL is returned, and None if nothing has changed."""
        additions = [
            CommitOperationAdd(path, _content(file)) for path, file in files.items()
        ]
        # Files first, which huggingface_hub tries again by itself. They are seen by nobody
        # before they are in a commit.
        self.api.preupload_lfs_files(
            self.repo_id,
            additions,
            revision=self.revision,
            create_pr=self.opens_pr,
        )

        def commit_without(paths: Iterable[str]) -> CommitInfo:
            return self.api.create_commit(
                self.repo_id,
                [*additions, *map(CommitOperationDelete, paths)],
                commit_message=title,
                revision=self.revision,
                create_pr=self.opens_pr,
            )

        def make() -> CommitInfo:
            try:
                return commit_without(left_over)
            except EntryNotFoundError:
                # what is to go is gone, as after a commit of which the answer was lost
                there = self.api.list_repo_files(self.repo_id, revision=self.revision)
                return commit_without(sorted(set(left_over) & set(there)))

        # A commit made twice is harmless, as the second changes nothing; a pull request
        # opened twice is not.
        commit = try_again(make, NOTHING_DONE if self.opens_pr else TRY_AGAIN)
        self.remote_files = (self.remote_files | set(files)) - set(left_over)
        if commit.oid == self.head:
            return None
        self.head = commit.oid
        if commit.pr_revision is not None:
            self.summary.pull_request = commit.pr_url
            self.revision, self.opens_pr = commit.pr_revision, False
        return commit.commit_url

    def _write_card(self) -> None:
        self.summary.readme = str(self.plan.card(self.remote_files))
        if README in self.remote_files and not self.plan.overwrite_readme:
            self.summary.readme_outcome = "kept"
            return
        files: dict[str, Path | bytes] = dict(self.plan.extra_files)
        files[README] = self.summary.readme.encode()
        if self._commit(files, [], "Write the model card") is None:
            self.summary.readme_outcome = "unchanged"

    def _explained(self, doing: str) -> AbstractContextManager[None]:
        return explained(doing, self.repo_id, self._state)

    def _state(self) -> str:
        """What an error says of what is done, and of how to go on."""
        done = "Nothing in the repository has changed."
        if self.summary.commits:
            done = (
                f"{len(self.summary.commits)} of {len(self.plan.saes)} SAEs are complete in "
                f"{self.repo_id} ({self.revision}), and of the others nothing is visible."
            )
        if self.summary.pull_request is not None:
            return (
                f"{done} Then repeat the command with --revision {self.revision} instead "
                "of --create_pr, to go on in the same pull request."
            )
        return f"{done} Then repeat the command: what is there is not sent again."


def _check_permission(
    account: Mapping[str, object], repo_id: str, create_pr: bool
) -> None:
    """See that a token may write, as far as the Hub tells; it has the last word."""
    auth = account.get("auth")
    token = auth.get("accessToken") if isinstance(auth, dict) else None
    role = token.get("role") if isinstance(token, dict) else None
    if role == "read":
        raise HubUploadError(
            f"the token of {account.get('name')} may only read; make one that may write at "
            "https://huggingface.co/settings/tokens, and log in with it (`hf auth login`), "
            "or set HF_TOKEN to it"
        )
    if role == "fineGrained" and isinstance(token, dict) and not create_pr:
        scoped = (token.get("fineGrained") or {}).get("scoped")
        names = {repo_id, repo_id.partition("/")[0]}
        may_write = not isinstance(scoped, list) or any(
            scope
            for scope in scoped
            if (scope.get("entity") or {}).get("name") in names
            and "repo.write" in (scope.get("permissions") or [])
        )
        if not may_write:
            raise HubUploadError(
                f"the fine-grained token of {account.get('name')} has no permission "
                f"repo.write for {repo_id}; add it at "
                "https://huggingface.co/settings/tokens"
            )


def _content(file: Path | bytes) -> str | bytes:
    return file if isinstance(file, bytes) else str(file)
