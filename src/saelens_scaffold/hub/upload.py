"""Uploading SAEs to the Hugging Face Hub."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from tqdm.autonotebook import tqdm

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.hub.commits import HubUpload
from saelens_scaffold.hub.comparisons import reductions_in
from saelens_scaffold.hub.dry_run import look
from saelens_scaffold.hub.evaluation_results import read_results
from saelens_scaffold.hub.figure import write_firing_frequencies
from saelens_scaffold.hub.model_card import FIGURE_NAME, CardSettings
from saelens_scaffold.hub.plan import UploadPlan, UploadSummary
from saelens_scaffold.hub.sources import (
    SAESource,
    as_mapping,
    is_compare_run,
    prepare_sae,
    results_folders,
    run_files,
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

    `<id>` has the SAE itself, which needs this package to load if it is a scaffold SAE;
    `<id>/jumprelu` its exact plain form, which SAELens loads alone. Sparsity, runner
    configuration and evaluation results go along, and a model card is written.

    Everything is checked before the first byte is sent. An SAE is one commit, so that it
    is there whole or not at all, and what is there already is not sent again: after an
    interruption, repeat the call.

    Args:
        saes: SAEs, or their directories, by id; or one directory: an SAE's, that of a
            `compare` run, or any with SAEs below it, whose ids are then their paths.
        hf_repo_id: The repository, "user/repo". It is made if there is none.
        hf_revision: The branch. It is made if there is none.
        jumprelu: Whether scaffold SAEs go along in their plain form.
        eval_results: Output folder of `saelens-scaffold eval`, or several. By default the
            folder eval_results of each given directory, if there is one. A result is of
            that SAE whose weights have its digest.
        private: Whether a new repository is private.
        create_pr: Whether to open a pull request instead of changing the branch.
        overwrite_readme: Whether a README that is there is replaced.
        license: Of the SAEs, as the Hub calls it ("mit", "apache-2.0").
        base_model: The language model's id on the Hub; by default found by its name.
        datasets: Ids on the Hub of the training data; by default found by their names.
        token: Of the Hub; by default that of `hf auth login`, or of HF_TOKEN.
        show_progress: Whether to show progress bars.
        dry_run: Whether only to check, and to say what would be done. It needs neither
            network nor token; without them, an existing README is that in the cache.

    Returns:
        What has been done, or would be.

    Raises:
        InvalidSAEError: An SAE cannot be uploaded, and why.
        UserError: The repository's name, an id, or a result makes no sense.
        UserError: A directory is missing, or holds no SAE.
        HubUploadError: The Hub refuses, or cannot be reached, and what to do.
    """
    check_repo_id(hf_repo_id)
    by_id, directory = as_mapping(saes)
    if eval_results is None:
        sources = [s for s in by_id.values() if isinstance(s, str | Path)]
        eval_results = results_folders([directory] if directory else sources)
    results = [
        result for folder in _as_paths(eval_results) for result in read_results(folder)
    ]
    prepared = [
        prepare_sae(sae_id, source, results)
        for sae_id, source in tqdm(
            by_id.items(), desc="Checking SAEs", disable=not show_progress
        )
    ]
    extra_files: dict[str, Path] = {}
    if directory is not None and is_compare_run(directory):
        extra_files |= run_files(directory)
        reductions = reductions_in(directory)
        for sae in prepared:
            sae.reduction = reductions.get(sae.sae_id)
    matched = {result.file for sae in prepared for result in sae.results}
    summary = UploadSummary(
        f"{HfApi().endpoint}/{hf_repo_id}",
        unmatched_results=[r.file for r in results if r.file not in matched],
    )
    with TemporaryDirectory() as folder:
        figure = Path(folder, FIGURE_NAME)
        if write_firing_frequencies(prepared, figure):
            extra_files[FIGURE_NAME] = figure
        plan = UploadPlan(
            saes=prepared,
            extra_files=extra_files,
            repo_id=hf_repo_id,
            revision=hf_revision,
            jumprelu=jumprelu,
            private=private,
            create_pr=create_pr,
            overwrite_readme=overwrite_readme,
            card_settings=CardSettings(license, base_model, datasets),
            token=token,
            show_progress=show_progress,
        )
        if dry_run:
            look(plan, summary)
        else:
            with _file_progress(show_progress):
                HubUpload(plan, summary).run()
    return summary


def check_repo_id(hf_repo_id: str) -> str:
    """
    See that this is a repository's name with its owner's.

    Raises:
        UserError: It is not.
    """
    try:
        validate_repo_id(hf_repo_id)
    except HFValidationError as error:
        raise UserError(
            f"{hf_repo_id!r:.200} is no repository's id: {error}"
        ) from error
    if hf_repo_id.count("/") != 1:
        raise UserError(
            f"{hf_repo_id!r} lacks the owner, without which SAELens finds no repository; "
            f"write USER/{hf_repo_id}"
        )
    return hf_repo_id


def _as_paths(paths: Path | str | Sequence[Path | str]) -> list[Path]:
    return [Path(paths)] if isinstance(paths, str | Path) else list(map(Path, paths))


@contextmanager
def _file_progress(show: bool) -> Iterator[None]:
    """Whether huggingface_hub shows a bar for each file."""
    if show or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
