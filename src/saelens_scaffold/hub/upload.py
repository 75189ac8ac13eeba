"""Uploading SAEs to the Hugging Face Hub."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, errors, utils

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import temporary_folder
from saelens_scaffold.hub.commits import HubUpload, look
from saelens_scaffold.hub.model_card import TEMPLATES, add_figure
from saelens_scaffold.hub.sources import Beside, SAESource, Upload
from saelens_scaffold.saes.loading import check_hub_client


def upload_scaffold_saes(
    saes: Mapping[str, SAESource] | Path | str | Sequence[Path | str],
    hf_repo_id: str,
    *,
    hf_revision: str = "main",
    jumprelu: bool = True,
    eval_results: Path | str | Sequence[Path | str] | None = None,
    log_feature_sparsity: Mapping[str, torch.Tensor] | None = None,
    runner_cfg: Mapping[str, Any] | None = None,
    private: bool = False,
    create_pr: bool = False,
    overwrite_readme: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] | None = None,
    token: str | None = None,
    show_progress: bool = True,
    dry_run: bool = False,
) -> Upload:
    """
    Upload SAEs to the Hugging Face Hub, scaffold SAEs in two forms.

    `<id>` is the SAE itself, which needs this package to load if it is a scaffold SAE;
    `<id>/jumprelu` is its exact plain form, which SAELens loads alone. Sparsity, runner
    configuration and evaluation results go along, and a model card is written.

    Everything is checked before the first byte is sent. An SAE is one commit: it is there
    whole or not at all. After an interruption, repeat the call, which sends only the rest.

    Args:
        saes: SAEs, or their directories, by id; or one directory: of an SAE, of a
            `compare` run, or any with SAEs below it, whose ids are then their paths; or
            several directories, also as "ID=DIRECTORY".
        hf_repo_id: The repository, "user/repo", created if there is none.
        hf_revision: The branch, created if there is none.
        jumprelu: Whether to upload scaffold SAEs in their plain form, too.
        eval_results: Output folder of `saelens-scaffold eval`, or several; by default the
            folder eval_results of each given directory, if there is one. A result belongs
            to the SAE whose weights have its hash, and stays at home if it is outdated.
        log_feature_sparsity: What the trainer's attribute of this name has, shape (d_sae,),
            by the id of an SAE that is not in a directory.
        runner_cfg: The configuration of SAELens's runner, or the same as a dictionary,
            likewise.
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
        UserError: An argument cannot be used, a directory is missing or holds no SAE, or
            huggingface_hub is too old.
        HubUploadError: The Hub refuses or cannot be reached, and what to do.
    """
    if not dry_run:
        check_hub_client()
    upload = Upload(hf_repo_id, HfApi(token=token), hf_revision, show_progress)
    upload.jumprelu, upload.private, upload.create_pr = jumprelu, private, create_pr
    upload.license, upload.base_model, upload.datasets = license, base_model, datasets
    upload.overwrite_readme = overwrite_readme
    beside = Beside(log_feature_sparsity or {}, runner_cfg or {})
    _carry_out(upload, saes, eval_results, beside, dry_run)
    return upload


def run(
    saes: Sequence[str], repo_id: str, revision: str, no_jumprelu: bool, **options: Any
) -> tuple[str, list[str]]:
    """
    The command `saelens-scaffold upload`.

    Args:
        saes: Directories, or ID=DIRECTORY.
        repo_id: The repository.
        revision: The branch.
        no_jumprelu: Whether to leave out the plain form of scaffold SAEs.
        options: Further options of `upload_scaffold_saes`.

    Returns:
        The text to print, and notes for the standard error.
    """
    options.update(hf_revision=revision, jumprelu=not no_jumprelu)
    upload = upload_scaffold_saes(saes, repo_id, **options)
    notes = [f"{file}: stays here, {why}" for file, why in upload.left_out.items()]
    if upload.license is None:
        notes.append("The card names no licence; --license mit, say, would.")
    text = TEMPLATES.get_template("report.txt.jinja").render(upload=upload)
    return text.rstrip(), notes


def _carry_out(
    upload: Upload, saes: Any, eval_results: Any, beside: Beside, dry_run: bool
) -> None:
    repo_id = upload.repo_id
    try:
        utils.validate_repo_id(repo_id)
    except errors.HFValidationError as error:
        raise UserError(f"{repo_id!r:.200} is no repository's id: {error}") from error
    if "/" not in repo_id:
        raise UserError(f"{repo_id!r} lacks the owner; write USER/{repo_id}")
    with temporary_folder() as folder, ExitStack() as stack:
        if not upload.show_progress and not utils.are_progress_bars_disabled():
            utils.disable_progress_bars()  # huggingface_hub's, for each file
            stack.callback(utils.enable_progress_bars)
        upload.gather(saes, eval_results, beside, folder / "saes")
        add_figure(upload, folder)
        if dry_run:
            look(upload)
        else:
            HubUpload(upload).run()
