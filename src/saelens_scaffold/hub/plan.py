"""What is to be uploaded, where, and what has come of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

from huggingface_hub import ModelCard
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from tqdm.autonotebook import tqdm

from saelens_scaffold.hub.model_card import FIGURE_NAME, CardSettings, model_card
from saelens_scaffold.hub.sources import UploadedSAE
from saelens_scaffold.hub.staging import write_files
from saelens_scaffold.saes.sae_ids import PLAIN_FORM

README = "README.md"

ReadmeOutcome = Literal["written", "unchanged", "kept"]
Item = TypeVar("Item")


@dataclass(frozen=True)
class UploadPlan:
    """
    What is to be uploaded, checked, and where.

    Attributes:
        saes: The SAEs.
        extra_files: What goes along with the card, by path in the repository.
        repo_id: The repository.
        revision: The branch.
        jumprelu: Whether scaffold SAEs go along in their plain form.
        private: Whether the repository is to be private.
        create_pr: Whether to open a pull request.
        overwrite_readme: Whether a README that is there is replaced.
        card_settings: What the card says that the SAEs do not.
        token: Of the Hub; None for the one that is stored.
        show_progress: Whether to show progress bars.
    """

    saes: Sequence[UploadedSAE]
    extra_files: Mapping[str, Path]
    repo_id: str
    revision: str
    jumprelu: bool
    private: bool
    create_pr: bool
    overwrite_readme: bool
    card_settings: CardSettings
    token: str | None
    show_progress: bool

    def write(self, sae: UploadedSAE, folder: Path) -> dict[str, Path]:
        """Write an SAE's files into a folder; they are returned by path in the repository."""
        write_files(sae, folder, self.repo_id, self.jumprelu)
        return {
            f"{sae.sae_id}/{file.relative_to(folder).as_posix()}": file
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }

    def card(self, remote_files: Iterable[str] = ()) -> ModelCard:
        """The card of a repository in which there are these files already."""
        return model_card(
            self.saes,
            self.repo_id,
            self.card_settings,
            self.jumprelu,
            FIGURE_NAME in self.extra_files,
            self._other_saes(remote_files),
        )

    def _other_saes(self, remote_files: Iterable[str]) -> list[str]:
        """The ids of further SAEs that these files make, plain forms not counted."""
        folders = {
            str(path.parent)
            for path in map(PurePosixPath, remote_files)
            if path.name == SAE_WEIGHTS_FILENAME
        }
        plain = {f"{folder}/{PLAIN_FORM}" for folder in folders}
        return sorted(folders - plain - {sae.sae_id for sae in self.saes})

    def progress(self, items: Iterable[Item], description: str) -> Iterable[Item]:
        """The items, with a progress bar if there is to be one."""
        return tqdm(items, desc=description, disable=not self.show_progress)


@dataclass
class UploadSummary:
    """
    What an upload has done, or would do.

    Attributes:
        repo_url: The repository.
        files: Sizes in bytes of all files, by path in the repository.
        commits: The URL of each SAE's commit, None where nothing had changed; empty for a
            dry run.
        readme: The card, as it is or would be written.
        readme_outcome: What has become of it, or would.
        readme_diff: What changes from the repository's README, in unified form; None if
            that is not known.
        pull_request: Its URL, if there is one.
        unmatched_results: Evaluation results that are of none of the SAEs.
    """

    repo_url: str
    files: dict[str, int] = field(default_factory=dict)
    commits: dict[str, str | None] = field(default_factory=dict)
    readme: str = ""
    readme_outcome: ReadmeOutcome = "written"
    readme_diff: str | None = None
    pull_request: str | None = None
    unmatched_results: list[Path] = field(default_factory=list)
