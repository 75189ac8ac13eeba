"""An upload: its SAEs, what is known of them, and their files in the repository."""

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from huggingface_hub import HfApi
from sae_lens import constants
from sae_lens.saes.sae import SAE, TrainingSAE
from safetensors.torch import load_file, save_file
from tqdm.autonotebook import tqdm

from saelens_scaffold._util import untrusted
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.hub import findings
from saelens_scaffold.saes import sae_ids, validation
from saelens_scaffold.saes.directories import sae_directories
from saelens_scaffold.saes.facts import weights_sha256
from saelens_scaffold.saes.loading import load_scaffold_sae
from saelens_scaffold.saes.runner_config import MIN_SPARSITY_TOKENS, n_sparsity_tokens
from saelens_scaffold.saes.scaffold import ScaffoldMixin
from saelens_scaffold.training.measurement import Measurement

if TYPE_CHECKING:
    from saelens_scaffold.evals.store import StoredResult

README = "README.md"
_PUBLISHED = (
    constants.SAE_CFG_FILENAME,
    constants.SAE_WEIGHTS_FILENAME,
    constants.SPARSITY_FILENAME,
    constants.RUNNER_CFG_FILENAME,
)
"""Files of an SAE's directory that are published."""
_MAX_RUNNER_CFG_BYTES = 1 << 24
_CONFIGURATIONS = ("eval_config", "sae_cfg_dict")
"""Parts of an evaluation result that may name local paths. The rest may quote text that
only looks like a path."""

SAESource: TypeAlias = SAE[Any] | Path | str
"""An SAE, or a directory of SAEs."""

Directories: TypeAlias = Path | str | Sequence[Path | str]
SAESources: TypeAlias = Mapping[str, SAESource] | Directories

Item = TypeVar("Item")


class Beside(NamedTuple):
    """
    What lies beside an SAE's weights in its directory, of SAEs that have none.

    Attributes:
        log_feature_sparsity: The log10 of the firing frequencies in training, by id.
        runner_cfg: Configurations of SAELens's runner, or the same as dictionaries, by id.
    """

    log_feature_sparsity: Mapping[str, torch.Tensor]
    runner_cfg: Mapping[str, Any]

    def check_ids(self, known: Collection[str]) -> None:
        """
        Raises:
            UserError: One is of no such SAE.
        """
        for name, by_id in self._asdict().items():
            for sae_id in by_id.keys() - known:
                raise UserError(
                    f"{name} is of {sae_id!r}; of SAEs that are not in a directory there "
                    f"are {sorted(known)}"
                )

    def write(self, sae_id: str, folder: Path) -> None:
        """Write the files that SAELens's runner writes."""
        if (sparsity := self.log_feature_sparsity.get(sae_id)) is not None:
            _write_sparsity(sparsity, folder)
        if (cfg := self.runner_cfg.get(sae_id)) is not None:
            content = cfg if isinstance(cfg, Mapping) else cfg.to_dict()
            _write_json(content, folder / constants.RUNNER_CFG_FILENAME)


@dataclass(frozen=True)
class UploadedSAE:
    """
    An SAE to upload.

    Attributes:
        sae_id: Its id in the repository.
        directory: Its files, in inference form.
        cfg: Its configuration.
        results: Its evaluation results.
        facts: Its numbers in the card.
        n_sparsity_tokens: Number of tokens that the trainer's firing frequencies are of;
            None if that is not known.
    """

    sae_id: str
    directory: Path
    cfg: Any
    results: "Sequence[StoredResult]"
    facts: findings.Facts
    n_sparsity_tokens: int | None

    @property
    def rank(self) -> int:
        """Rank of its scaffold, 0 for a plain SAE."""
        return int(getattr(self.cfg, "scaffold_rank", 0))

    @property
    def in_scaffold_form(self) -> bool:
        """Whether it needs this package to load, whatever its rank."""
        return self.cfg.architecture() == "scaffold_jumprelu"

    @property
    def sparsity_file(self) -> Path | None:
        """The log10 of its latents' firing frequencies in training, if of enough tokens."""
        file = self.directory / constants.SPARSITY_FILENAME
        is_enough = (self.n_sparsity_tokens or 0) >= MIN_SPARSITY_TOKENS
        return file if is_enough and file.exists() else None


@dataclass
class Upload:
    """
    An upload: what goes where, and what it did, or would do.

    Attributes:
        repo_id: The repository.
        api: The Hub, with the user's token.
        revision: The branch; the pull request, once it is open.
        show_progress: Whether to show progress bars.
        jumprelu: Whether scaffold SAEs are uploaded in their plain form, too.
        private: Whether the repository must be private.
        create_pr: Whether a pull request is still to be opened.
        overwrite_readme: Whether to replace an existing README.
        license: License id of the Hub, as in "mit"; None leaves it out.
        base_model: The language model's id on the Hub; None infers it from the SAEs.
        datasets: Hub ids of the training data; None infers them from the SAEs.
        saes: The SAEs.
        extra_files: Files beside the card, by path in the repository.
        left_out: Files that are not uploaded, with the reason.
        files: Sizes in bytes of all files, by path in the repository (dry run).
        commits: URL of each SAE's commit, None where nothing had changed; empty after a
            dry run.
        readme: The card.
        readme_outcome: What became of it, or would.
        readme_diff: Unified diff from the repository's README; None if that is unknown.
        pull_request: URL of the pull request, if there is one.
    """

    repo_id: str
    api: HfApi
    revision: str
    show_progress: bool
    jumprelu: bool = True
    private: bool = False
    create_pr: bool = False
    overwrite_readme: bool = False
    license: str | None = None
    base_model: str | None = None
    datasets: Sequence[str] | None = None
    saes: list[UploadedSAE] = field(default_factory=list)
    extra_files: dict[str, Path] = field(default_factory=dict)
    left_out: dict[Path, str] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    commits: dict[str, str | None] = field(default_factory=dict)
    readme: str = ""
    readme_outcome: Literal["written", "unchanged", "kept"] = "written"
    readme_diff: str | None = None
    pull_request: str | None = None

    def progress(self, items: Iterable[Item], description: str) -> Iterable[Item]:
        """The items, with a progress bar if one is wanted."""
        return tqdm(items, desc=description, disable=not self.show_progress)

    def gather(
        self,
        saes: SAESources,
        eval_results: Directories | None,
        beside: Beside,
        folder: Path,
    ) -> None:
        """
        Check that SAEs can be uploaded, and gather what is known of them.

        Args:
            saes: SAEs or directories of SAEs by id, or directories, also as ID=DIRECTORY.
            eval_results: Folders with evaluation results; None for those in directories.
            beside: What there is of SAEs that are not in a directory.
            folder: Where to save them.

        Raises:
            InvalidSAEError: An SAE, or one of its files, cannot be used.
            UserError: There is no SAE, or an id or a result cannot be used.
        """
        given = _given(saes)
        by_id = dict(_found(given))
        beside.check_ids({id_ for id_, sae in by_id.items() if isinstance(sae, SAE)})
        directories = [Path(s) for _, s in given if not isinstance(s, SAE)]
        reductions: dict[str, findings.Reduction] = {}
        if [given_id for given_id, _ in given] == [None]:
            self.extra_files = findings.run_files(directories[0])
            reductions = findings.reductions_in(directories[0])
        if eval_results is None:
            folders = [(path, path / sae_ids.RESULTS_FOLDER) for path in directories]
            eval_results = [
                untrusted.check_own_path(results, path)
                for path, results in folders
                if results.is_dir()
            ]
        elif isinstance(eval_results, Path | str):
            eval_results = [eval_results]
        stored = findings.read_results([*map(sae_ids.check_path, eval_results)])
        reasons = {result.file: result.why_stale() for result in stored}
        current = [result for result in stored if reasons[result.file] is None]
        for sae_id, source in self.progress(by_id.items(), "Checking SAEs"):
            with validation.named(f"SAE {sae_id!r}"):
                if isinstance(source, SAE):
                    _save_object(source, folder / sae_id)
                    beside.write(sae_id, folder / sae_id)
                    source = folder / sae_id
                path, sae = _checked(source)
            own = findings.results_of(sae, current)
            reduction = reductions.get(weights_sha256(sae))
            facts = findings.facts_of(own, Measurement.of(sae), reduction)
            n_tokens = n_sparsity_tokens(sae.cfg.metadata, path)
            uploaded = UploadedSAE(sae_id, path, sae.cfg, own, facts, n_tokens)
            self.saes.append(uploaded)
            file = path / constants.SPARSITY_FILENAME
            if file.exists() and uploaded.sparsity_file is None:
                counted = (
                    "an unknown number of" if n_tokens is None else f"{n_tokens:,}"
                )
                self.left_out[file] = (
                    f"its firing frequencies are of {counted} tokens; at least "
                    f"{MIN_SPARSITY_TOKENS:,} are needed"
                )
        sent = {result.file for sae in self.saes for result in sae.results}
        for file, reason in reasons.items():
            if file not in sent:
                self.left_out[file] = reason or "is of none of these SAEs"


def _given(saes: SAESources) -> list[tuple[str | None, SAESource]]:
    """SAEs and directories as they are given, with the ids that are."""
    if isinstance(saes, Mapping):
        return [
            (
                sae_ids.check_sae_id(sae_id),
                sae if isinstance(sae, SAE) else sae_ids.check_path(sae),
            )
            for sae_id, sae in saes.items()
        ]
    arguments = [saes] if isinstance(saes, Path | str) else saes
    return [sae_ids.split_id(str(argument)) for argument in arguments]


def _found(given: list[tuple[str | None, SAESource]]) -> list[tuple[str, SAESource]]:
    """
    The SAEs themselves, each with an id of its own.

    Raises:
        UserError: A directory holds no SAE, an id is invalid, or two are the same.
    """
    found: list[tuple[str, SAESource]] = []
    for given_id, source in given:
        if isinstance(source, SAE) or (given_id and not Path(source).is_dir()):
            found.append((str(given_id), source))  # whose check says what is missing
            continue
        for sae_id, directory in _saes_in(path := Path(source)):
            if given_id:
                sae_id = given_id if directory == path else f"{given_id}/{sae_id}"
            found.append((sae_id, directory))
    if not found:
        raise UserError("no SAEs to upload")
    sae_ids.check_distinct(sae_id for sae_id, _ in found)
    return found


def _saes_in(path: Path) -> Iterator[tuple[str, Path]]:
    """The SAEs of a directory with their ids, which are their names or paths below it."""
    for sae_id, directory in _directories_in(path):
        for name in _PUBLISHED:
            if os.path.lexists(file := directory / name):
                untrusted.check_own_file(file, path)
        yield sae_ids.sae_id_of_path(sae_id), directory


def _directories_in(path: Path) -> list[tuple[Path, Path]]:
    if not path.is_dir():
        raise UserError(f"{path} is no directory")
    root = path / findings.SAES_FOLDER if findings.run_files(path) else path
    return sae_directories(root)


def _save_object(sae: SAE[Any], folder: Path) -> None:
    """Save an SAE that has no directory yet, in inference form."""
    validation.check_scale_is_known(sae.cfg.normalize_activations)
    if isinstance(sae, TrainingSAE) and not isinstance(sae, ScaffoldMixin):
        raise validation.InvalidSAEError(
            "it is a training SAE; upload what its save_inference_model saves"
        )
    sae = sae.to_inference() if isinstance(sae, ScaffoldMixin) else sae
    validation.check_weights(sae.cfg.to_dict(), sae.state_dict())
    sae.save_model(folder)


def _checked(source: Path | str) -> tuple[Path, SAE[Any]]:
    """The directory of an SAE, and the SAE."""
    sae = load_scaffold_sae(source)
    validation.check_can_be_used(sae)
    runner_cfg = Path(source, constants.RUNNER_CFG_FILENAME)
    if runner_cfg.exists():
        validation.read_json_object(runner_cfg, _MAX_RUNNER_CFG_BYTES)
    return Path(source), sae


def write_files(upload: Upload, uploaded: UploadedSAE, folder: Path) -> dict[str, Path]:
    """
    Write all files of an SAE, in both forms.

    Args:
        upload: The upload.
        uploaded: The SAE.
        folder: Where to write them.

    Returns:
        The files by path in the repository.
    """
    sae: Any = load_scaffold_sae(uploaded.directory)
    sae_id, measurement = uploaded.sae_id, Measurement.of(sae)
    # null: nothing was measured of these weights
    measured = measurement.to_metadata() if measurement else None
    common = {"measured": measured, "n_sparsity_tokens": uploaded.n_sparsity_tokens}
    file = uploaded.sparsity_file
    sparsity = load_file(file)["sparsity"] if file else None
    hint = f'SAE.from_pretrained("{upload.repo_id}", "{sae_id}")'
    if uploaded.in_scaffold_form:
        hint = f"pip install saelens-scaffold; then import saelens_scaffold, and {hint}"
    if uploaded.in_scaffold_form and upload.jumprelu:
        plain_hint = (
            f'SAE.from_pretrained("{upload.repo_id}", "{sae_id}/{sae_ids.PLAIN_FORM}")'
        )
        hint += f". Or without that package, as a plain SAE with the same outputs: {plain_hint}"
        plain_sparsity = None
        if sparsity is not None:
            # Together, the two halves of a linear latent fire as often as it does; how
            # often each of them does was not counted.
            linear, sparse = sparsity.tensor_split([uploaded.rank])
            plain_sparsity = torch.cat([linear, linear, sparse])
        plain = folder / sae_ids.PLAIN_FORM
        about = {"how_to_load": plain_hint, **common}
        _save(sae.to_jumprelu(), plain_sparsity, plain, about)
    _save(sae, sparsity, folder, {"how_to_load": hint, **common})
    runner_cfg = uploaded.directory / constants.RUNNER_CFG_FILENAME
    if runner_cfg.exists():
        content = validation.read_json_object(runner_cfg, _MAX_RUNNER_CFG_BYTES)
        _write_json(findings.without_directories(content), folder / runner_cfg.name)
    for result in uploaded.results:
        about = {k: v for k, v in result.content.items() if k in _CONFIGURATIONS}
        name, number = untrusted.file_name(f"{result.evaluation}.json"), 1
        while (file := folder / sae_ids.RESULTS_FOLDER / name).exists():
            number += 1
            name = untrusted.file_name(f"{result.evaluation}-{number}.json")
        _write_json({**result.content, **findings.without_directories(about)}, file)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {f"{sae_id}/{path.relative_to(folder).as_posix()}": path for path in files}


def _save(
    sae: SAE[Any], sparsity: torch.Tensor | None, folder: Path, about: dict[str, Any]
) -> None:
    """Save an SAE with further metadata, and without local paths in them."""
    sae.save_model(folder)
    file = folder / constants.SAE_CFG_FILENAME
    cfg = json.loads(file.read_text(encoding="utf-8"))
    metadata = {**cfg["metadata"], **about, "weights_sha256": weights_sha256(sae)}
    cfg["metadata"] = findings.without_directories(metadata)
    file.write_text(json.dumps(cfg), encoding="utf-8")
    if sparsity is not None:
        _write_sparsity(sparsity, folder)


def _write_sparsity(sparsity: torch.Tensor, folder: Path) -> None:
    tensors = {"sparsity": sparsity.contiguous()}
    save_file(tensors, folder / constants.SPARSITY_FILENAME)


def _write_json(content: Any, file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")
