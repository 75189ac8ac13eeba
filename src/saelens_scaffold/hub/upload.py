"""Uploading SAEs to the Hugging Face Hub."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, errors, utils

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.hub.commits import HubUpload
from saelens_scaffold.hub.compare_runs import run_files
from saelens_scaffold.hub.dry_run import look
from saelens_scaffold.hub.figure import write_firing_frequencies
from saelens_scaffold.hub.plan import FIGURE, README, UploadPlan, UploadSummary
from saelens_scaffold.hub.sources import (
    SAESource,
    given_saes,
    prepare,
    results_folders,
)


def upload_scaffold_saes(
    saes: Mapping[str, SAESource] | Path | str,
    hf_repo_id: str,
    *,
    hf_revision: str = "main",
    jumprelu: bool = True,
    eval_results: Path | str | Sequence[Path | str] | None = None,
    private: bool = False,
    create_pr: bool = False,
    overwrite_readme: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] | None = None,
    token: str | None = None,
    show_progress: bool = True,
    dry_run: bool = False,
) -> UploadSummary:
    """
    Upload SAEs to the Hugging Face Hub, scaffold SAEs in two forms.

    `<id>` is the SAE itself, which needs this package to load if it is a scaffold SAE;
    `<id>/jumprelu` is its exact plain form, which SAELens loads alone. Sparsity, runner
    configuration and evaluation results go along, and a model card is written.

    Everything is checked before the first byte is sent. An SAE is one commit: it is there
    whole or not at all. After an interruption, repeat the call, which sends only the rest.

    Args:
        saes: SAEs, or their directories, by id; or one directory: of an SAE, of a
            `compare` run, or any with SAEs below it, whose ids are then their paths.
        hf_repo_id: The repository, "user/repo", created if there is none.
        hf_revision: The branch, created if there is none.
        jumprelu: Whether to upload scaffold SAEs in their plain form, too.
        eval_results: Output folder of `saelens-scaffold eval`, or several; by default the
            folder eval_results of each given directory, if there is one. A result belongs
            to the SAE whose weights have its hash, and stays at home if it is outdated.
        private: Whether a new repository is private.
        create_pr: Whether to open a pull request instead of changing the branch.
        overwrite_readme: Whether to replace an existing README.
        license: License of the SAEs, by its id on the Hub ("mit", "apache-2.0").
        base_model: The language model's id on the Hub; by default found by its name.
        datasets: Hub ids of the training data; by default found by their names.
        token: Token of the Hub; by default that of `hf auth login`, or HF_TOKEN.
        show_progress: Whether to show progress bars.
        dry_run: Whether only to check, and to say what would be done. It needs neither
            network nor token; without them, an existing README is that in the cache.

    Returns:
        What was done, or would be.

    Raises:
        InvalidSAEError: An SAE cannot be uploaded, and why.
        UserError: An argument cannot be used, or a directory is missing or holds no SAE.
        HubUploadError: The Hub refuses or cannot be reached, and what to do.
    """
    _check_repo_id(hf_repo_id)
    plan = UploadPlan(
        repo_id=hf_repo_id,
        revision=hf_revision,
        jumprelu=jumprelu,
        private=private,
        create_pr=create_pr,
        overwrite_readme=overwrite_readme,
        license=license,
        base_model=base_model,
        datasets=datasets,
        api=HfApi(token=token),
        show_progress=show_progress,
    )
    return _upload(plan, saes, eval_results, dry_run)


def run(
    saes: Sequence[str],
    repo_id: str,
    *,
    revision: str = "main",
    no_jumprelu: bool = False,
    eval_results: Sequence[str] | None = None,
    dry_run: bool = False,
    **options: Any,
) -> tuple[str, list[str]]:
    """
    The command `saelens-scaffold upload`.

    Args:
        saes: Directories, or ID=DIRECTORY.
        repo_id: The repository.
        revision: The branch.
        no_jumprelu: Whether to leave out the plain form of scaffold SAEs.
        eval_results: Output folders of `saelens-scaffold eval`.
        dry_run: Whether only to look.
        options: Further options of `upload_scaffold_saes`.

    Returns:
        The text to print, and notes for the standard error.
    """
    given, directories = given_saes(saes)
    summary = upload_scaffold_saes(
        given,
        repo_id,
        hf_revision=revision,
        jumprelu=not no_jumprelu,
        eval_results=eval_results or results_folders(directories),
        dry_run=dry_run,
        **options,
    )
    notes = [f"{file}: stays here, {why}" for file, why in summary.left_out.items()]
    if options.get("license") is None:
        notes.append("The card names no licence; --license mit, say, would.")
    return (_dry_run_text if dry_run else _text)(summary), notes


def _upload(
    plan: UploadPlan,
    saes: Mapping[str, SAESource] | Path | str,
    eval_results: Path | str | Sequence[Path | str] | None,
    dry_run: bool,
) -> UploadSummary:
    with TemporaryDirectory() as folder:
        prepared, left_out = prepare(
            saes, eval_results, Path(folder, "saes"), plan.show_progress
        )
        extra_files = run_files(Path(saes)) if isinstance(saes, str | Path) else {}
        figure = Path(folder, FIGURE)
        if write_firing_frequencies(prepared, figure):
            extra_files[FIGURE] = figure
        plan = replace(plan, saes=prepared, extra_files=extra_files)
        url = f"{plan.api.endpoint}/{plan.repo_id}"
        summary = UploadSummary(url, left_out=left_out)
        if dry_run:
            look(plan, summary)
        else:
            with _file_progress(plan.show_progress):
                HubUpload(plan, summary).run()
    return summary


def _check_repo_id(repo_id: str) -> None:
    try:
        utils.validate_repo_id(repo_id)
    except errors.HFValidationError as error:
        raise UserError(f"{repo_id!r:.200} is no repository's id: {error}") from error
    if "/" not in repo_id:
        raise UserError(
            f"{repo_id!r} lacks the owner, without which SAELens finds no repository; "
            f"write USER/{repo_id}"
        )


@contextmanager
def _file_progress(show: bool) -> Iterator[None]:
    """Switch off huggingface_hub's progress bar for each file, unless it is wanted."""
    if show or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _text(summary: UploadSummary) -> str:
    outcome = {
        "written": "The model card has been written.",
        "unchanged": "The model card is there already, unchanged.",
        "kept": f"The repository's {README} is kept; --overwrite_readme replaces it, and "
        "--dry-run shows what would change.",
    }[summary.readme_outcome]
    commits = [
        f"{sae_id}: {url or 'is there already, unchanged'}"
        for sae_id, url in summary.commits.items()
    ]
    return "\n".join([*commits, outcome, summary.pull_request or summary.repo_url])


def _dry_run_text(summary: UploadSummary) -> str:
    width = max(len(f"{size:,}") for size in summary.files.values())
    lines = [f"{size:>{width},} bytes  {path}" for path, size in summary.files.items()]
    parts = [f"To {summary.repo_url} would go:", *lines, ""]
    if summary.readme_outcome == "unchanged":
        return "\n".join([*parts, f"The repository's {README} would stay as it is."])
    if summary.readme_outcome == "kept":
        parts.append(
            f"The repository's {README} would be kept. With --overwrite_readme:"
        )
    elif summary.readme_diff is None:
        parts.append(
            f"Whether the repository has a {README} cannot be found out from here; if it "
            "has, it would be kept, unless --overwrite_readme is given. The new one:"
        )
    return "\n".join([*parts, "", summary.readme_diff or summary.readme])
