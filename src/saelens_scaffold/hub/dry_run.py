"""A dry run: what an upload would do, found without sending anything."""

import difflib
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import errors, hf_hub_url, try_to_load_from_cache

from saelens_scaffold.hub.model_card import model_card
from saelens_scaffold.hub.plan import README, UploadPlan, UploadSummary
from saelens_scaffold.hub.staging import write_files
from saelens_scaffold.saes.loading import HTTP_ERROR

_NOT_THERE = (
    errors.EntryNotFoundError,
    errors.RepositoryNotFoundError,
    errors.RevisionNotFoundError,
)

_TIMEOUT = 5.0
"""Seconds to wait for an existing README, which is optional."""


def look(plan: UploadPlan, summary: UploadSummary) -> None:
    """
    Write every file once to learn its size, and compare the card with an existing one.

    Args:
        plan: The upload.
        summary: Filled with what the upload would do.
    """
    for sae in plan.progress(plan.saes, "Writing files"):
        with TemporaryDirectory() as folder:
            for path, file in write_files(plan, sae, Path(folder)).items():
                summary.files[path] = file.stat().st_size
    existing, remote_files = _known_of_repository(plan)
    summary.readme = model_card(plan, remote_files)
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
    The repository's README and files, as far as the network and the cache tell.

    Returns:
        The README ("" if there is none, None if that is unknown), and the files' paths.
    """
    api, repo_id, revision = plan.api, plan.repo_id, plan.revision
    path, files = None, []
    try:
        # one short request, where hf_hub_download alone would retry for long
        url = hf_hub_url(repo_id, README, revision=revision)
        api.get_hf_file_metadata(url=url, timeout=_TIMEOUT)
        path = api.hf_hub_download(repo_id, README, revision=revision)
        files = api.list_repo_files(repo_id, revision=revision)
    except _NOT_THERE:
        return "", []
    except (HTTP_ERROR, OSError):
        path = path or try_to_load_from_cache(repo_id, README, revision=revision)
    if not isinstance(path, str):
        return None, []
    return Path(path).read_text(encoding="utf-8"), files


def _diff(existing: str, new: str) -> str:
    old_lines, new_lines = existing.splitlines(True), new.splitlines(True)
    names = (f"{README} in the repository", f"{README} of this upload")
    return "".join(difflib.unified_diff(old_lines, new_lines, *names))
