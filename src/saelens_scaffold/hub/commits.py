"""Carrying out an upload: one commit for each SAE, and one for the card."""

import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    errors,
)

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.hub.hub_errors import (
    HUB_FAILURES,
    NOT_APPLIED,
    TOKENS_URL,
    TRANSIENT,
    HubUploadError,
    advice,
    retry,
)
from saelens_scaffold.hub.model_card import model_card
from saelens_scaffold.hub.plan import README, UploadPlan, UploadSummary
from saelens_scaffold.hub.staging import write_files

_SAE_FILES = (
    r"(jumprelu/)?(cfg\.json|(sae_weights|sparsity)\.safetensors|runner_cfg\.json)"
    r"|eval_results/.*"
)
"""Files of an SAE in its folder, where other SAEs may have theirs."""


class HubUpload:
    """
    A conversation with the Hub that carries out a plan.

    It keeps the layout and the commit messages of SAELens's `upload_saes_to_huggingface`,
    which has no private repositories and no pull requests, makes two commits for the two
    forms of an SAE, leaves files of former uploads in place, and checks only that two
    files exist.
    """

    def __init__(self, plan: UploadPlan, summary: UploadSummary) -> None:
        self.plan = plan
        self.summary = summary
        self.repo_id = plan.repo_id
        self.api = plan.api
        # the first commit opens a pull request, and the others are made in it
        self.revision = plan.revision
        self.opens_pr = plan.create_pr
        self.head: str | None = None
        self.remote_files: set[str] = set()
        self.doing = ""

    def run(self) -> None:
        """
        Check everything, then commit each SAE, and then the card.

        Raises:
            HubUploadError: The Hub refuses or cannot be reached, and what to do.
        """
        try:
            self._run()
        except UserError:
            raise
        except HUB_FAILURES as error:
            reason = advice(error, self.repo_id)
            raise HubUploadError(f"{self.doing}: {reason} {self._state()}") from error

    def _run(self) -> None:
        self.doing = f"checking {self.repo_id}"
        account = retry(self.api.whoami)
        _check_permission(account, self.plan)
        # create_commit validates the front matter, too, but the card comes last.
        # (ModelCard.validate always asks huggingface.co, whatever the endpoint is.)
        card = model_card(self.plan)
        retry(lambda: self.api._validate_yaml(card))
        self._open_repository(account)
        for sae in self.plan.progress(self.plan.saes, "Uploading SAEs"):
            self.doing = f"uploading {sae.sae_id}"
            with TemporaryDirectory() as folder:
                files = write_files(self.plan, sae, Path(folder))
                own = re.compile(f"{re.escape(sae.sae_id)}/({_SAE_FILES})")
                old = set(filter(own.fullmatch, self.remote_files)) - set(files)
                title = f"Upload SAE {sae.sae_id}"
                self.summary.commits[sae.sae_id] = self._commit(files, old, title)
        self.doing = "uploading the model card"
        self._write_card()

    def _open_repository(self, account: Mapping[str, Any]) -> None:
        """Find the repository, its branch and its files; create what is missing."""
        try:
            retry(lambda: self.api.repo_info(self.repo_id))
        except errors.RepositoryNotFoundError:
            _check_may_create(account, self.plan)
            private = self.plan.private or None
            create = self.api.create_repo
            retry(lambda: create(self.repo_id, private=private, exist_ok=True))
        try:
            retry(self._read_branch)
        except errors.RevisionNotFoundError:
            if self.revision.startswith("refs/"):
                raise
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            retry(self._read_branch)

    def _read_branch(self) -> None:
        info = self.api.repo_info(self.repo_id, revision=self.revision)
        if self.plan.private and not info.private:
            raise HubUploadError(
                f"{self.repo_id} exists and is public, so the SAEs would be public, too; "
                "make it private in its settings on the Hub, choose another repository, "
                "or leave out --private (private=True)"
            )
        self.head = info.sha
        self.remote_files = self._list_files()

    def _list_files(self) -> set[str]:
        return set(self.api.list_repo_files(self.repo_id, revision=self.revision))

    def _commit(
        self, files: Mapping[str, Path | bytes], old: set[str], title: str
    ) -> str | None:
        """Add files and delete old ones; returns the commit's URL, None if none was due."""
        additions = [CommitOperationAdd(path, file) for path, file in files.items()]
        where: dict[str, Any] = {"revision": self.revision, "create_pr": self.opens_pr}
        # Large files go first, which huggingface_hub retries by itself. Nobody sees them
        # before a commit refers to them.
        self.api.preupload_lfs_files(self.repo_id, additions, **where)

        def commit(deleted: set[str]) -> CommitInfo:
            operations = [*additions, *map(CommitOperationDelete, sorted(deleted))]
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
        statuses = NOT_APPLIED if self.opens_pr else TRANSIENT
        made = retry(lambda: commit(old), statuses)
        self.remote_files = (self.remote_files | set(files)) - old
        if made.oid == self.head:
            return None
        self.head = made.oid
        if made.pr_revision is not None:
            self.summary.pull_request = made.pr_url
            self.revision, self.opens_pr = made.pr_revision, False
        return made.commit_url

    def _write_card(self) -> None:
        self.summary.readme = model_card(self.plan, self.remote_files)
        if README in self.remote_files and not self.plan.overwrite_readme:
            self.summary.readme_outcome = "kept"
            return
        files = {**self.plan.extra_files, README: self.summary.readme.encode()}
        if self._commit(files, set(), "Write the model card") is None:
            self.summary.readme_outcome = "unchanged"

    def _state(self) -> str:
        """What is done, and how to continue."""
        done = "Nothing in the repository has changed."
        if self.summary.commits:
            done = (
                f"{len(self.summary.commits)} of {len(self.plan.saes)} SAEs are complete in "
                f"{self.repo_id} ({self.revision}), and nothing of the others is visible."
            )
        if self.summary.pull_request is not None:
            return (
                f"{done} Then repeat the command with --revision {self.revision} instead "
                "of --create_pr, to continue in the same pull request."
            )
        return f"{done} Then repeat the command: what is there is not sent again."


def _check_permission(account: Mapping[str, Any], plan: UploadPlan) -> None:
    """Check that the token may write, as far as the Hub tells before it is asked to."""
    token = (account.get("auth") or {}).get("accessToken") or {}
    role, user = token.get("role"), account.get("name")
    if role == "read":
        raise HubUploadError(
            f"the token of {user} may only read; make one that may write at {TOKENS_URL}, "
            "and log in with it (`hf auth login`), or set HF_TOKEN to it"
        )
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if role != "fineGrained" or plan.create_pr or scopes is None:
        return
    names = {plan.repo_id, plan.repo_id.partition("/")[0]}
    for scope in scopes:
        entity, permissions = scope.get("entity") or {}, scope.get("permissions") or []
        if entity.get("name") in names and "repo.write" in permissions:
            return
    raise HubUploadError(
        f"the fine-grained token of {user} has no permission repo.write for "
        f"{plan.repo_id}; add it at {TOKENS_URL}"
    )


def _check_may_create(account: Mapping[str, Any], plan: UploadPlan) -> None:
    """Check that the account may create the repository, which does not exist."""
    if plan.create_pr:
        raise HubUploadError(
            f"there is no repository {plan.repo_id} to open a pull request in, or the "
            "token may not see it; check its name, or leave out --create_pr"
        )
    owner, _, name = plan.repo_id.partition("/")
    owners = [account["name"], *(org["name"] for org in account.get("orgs", []))]
    if owner not in owners:
        raise HubUploadError(
            f"there is no repository {plan.repo_id}, and the token of {owners[0]} cannot "
            f"create one for {owner!r}; write one of "
            + ", ".join(f"{possible}/{name}" for possible in owners)
        )
