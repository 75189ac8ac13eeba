"""An upload: what goes where, and what came of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from huggingface_hub import HfApi
from tqdm.autonotebook import tqdm

from saelens_scaffold.hub.sources import UploadedSAE

README = "README.md"
FIGURE = "firing_frequencies.png"

Item = TypeVar("Item")


@dataclass(frozen=True)
class UploadPlan:
    """
    What is uploaded, checked, and where.

    Attributes:
        repo_id: The repository.
        revision: The branch.
        jumprelu: Whether scaffold SAEs are uploaded in their plain form, too.
        private: Whether the repository must be private.
        create_pr: Whether to open a pull request.
        overwrite_readme: Whether to replace an existing README.
        license: License id of the Hub, as in "mit"; None leaves it out.
        base_model: The language model's id on the Hub; None infers it from the SAEs.
        datasets: Hub ids of the training data; None infers them from the SAEs.
        api: The Hub, with the user's token.
        show_progress: Whether to show progress bars.
        saes: The SAEs.
        extra_files: Files beside the card, by path in the repository.
    """

    repo_id: str
    revision: str
    jumprelu: bool
    private: bool
    create_pr: bool
    overwrite_readme: bool
    license: str | None
    base_model: str | None
    datasets: Sequence[str] | None
    api: HfApi
    show_progress: bool
    saes: Sequence[UploadedSAE] = ()
    extra_files: Mapping[str, Path] = field(default_factory=dict)

    def progress(self, items: Iterable[Item], description: str) -> Iterable[Item]:
        """The items, with a progress bar if one is wanted."""
        return tqdm(items, desc=description, disable=not self.show_progress)


@dataclass
class UploadSummary:
    """
    What an upload did, or would do.

    Attributes:
        repo_url: The repository.
        files: Sizes in bytes of all files, by path in the repository (dry run).
        commits: URL of each SAE's commit, None where nothing had changed; empty after a
            dry run.
        readme: The card.
        readme_outcome: What became of it, or would.
        readme_diff: Unified diff from the repository's README; None if that is unknown.
        pull_request: URL of the pull request, if there is one.
        left_out: Evaluation results that are not uploaded, with the reason.
    """

    repo_url: str
    files: dict[str, int] = field(default_factory=dict)
    commits: dict[str, str | None] = field(default_factory=dict)
    readme: str = ""
    readme_outcome: Literal["written", "unchanged", "kept"] = "written"
    readme_diff: str | None = None
    pull_request: str | None = None
    left_out: Mapping[Path, str] = field(default_factory=dict)
