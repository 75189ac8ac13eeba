"""What an upload would do."""

import difflib
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import (
    HfApi,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from saelens_scaffold.hub.plan import README, UploadPlan, UploadSummary
from saelens_scaffold.saes.loading import HTTP_ERROR

_TIMEOUT = 5.0
"""Seconds to wait for an existing README, which can be done without."""


def look(plan: UploadPlan, summary: UploadSummary) -> None:
    """
    Write every file once, and see what would be where, without sending anything.

    Args:
        plan: What is to be uploaded.
        summary: Where to say what would come of it.
    """
    for sae in plan.progress(plan.saes, "Writing files"):
        with TemporaryDirectory() as folder:
            for path, file in plan.write(sae, Path(folder)).items():
                summary.files[path] = file.stat().st_size
    existing, remote_files = _known_of_repository(plan)
    summary.readme = str(plan.card(remote_files))
    if existing is not None:
        summary.readme_diff = _diff(existing, summary.readme)
        if existing == summary.readme:
            summary.readme_outcome = "unchanged"
        elif existing and not plan.overwrite_readme:
            summary.readme_outcome = "kept"
    if summary.readme_outcome == "written":
        for name, file in plan.extra_files.items():
            summary.files[name] = file.stat().st_size
        summary.files[README] = len(summary.readme.encode())


def _known_of_repository(plan: UploadPlan) -> tuple[str | None, list[str]]:
    """
    The repository's README, and its files, as far as can be found out.

    Returns:
        The README, "" if there is none, and None if that is not known; and the files.
    """
    repo_id, revision, token = plan.repo_id, plan.revision, plan.token
    path, files = None, []
    try:
        url = hf_hub_url(repo_id, README, revision=revision)
        # asks once and not for long, which hf_hub_download would not
        get_hf_file_metadata(url, token=token, timeout=_TIMEOUT)
        path = hf_hub_download(repo_id, README, revision=revision, token=token)
        files = HfApi(token=token).list_repo_files(repo_id, revision=revision)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return "", []
    except (HTTP_ERROR, OSError):
        path = path or try_to_load_from_cache(repo_id, README, revision=revision)
    if not isinstance(path, str):
        return None, []
    return Path(path).read_text(encoding="utf-8"), files


def _diff(existing: str, new: str) -> str:
    return "".join(
        difflib.unified_diff(
            existing.splitlines(keepends=True),
            new.splitlines(keepends=True),
            f"{README} in the repository",
            f"{README} of this upload",
        )
    )
