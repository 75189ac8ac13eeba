"""The SAEs to upload: where they are, and what is known of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens import constants
from sae_lens.saes.sae import SAE, TrainingSAE
from tqdm.autonotebook import tqdm

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.hub import compare_runs
from saelens_scaffold.hub.facts import Facts, facts_of, read_results, results_of
from saelens_scaffold.saes import sae_ids
from saelens_scaffold.saes.loading import load_scaffold_sae
from saelens_scaffold.saes.scaffold import ScaffoldMixin
from saelens_scaffold.saes.validation import (
    InvalidSAEError,
    check_can_be_used,
    check_weights,
    read_json_object,
)
from saelens_scaffold.training.measurement import Measurement

if TYPE_CHECKING:
    from saelens_scaffold.evals.store import StoredResult

_MAX_RUNNER_CFG_BYTES = 1 << 24

SAESource = SAE[Any] | Path | str
"""An SAE, or the directory of one."""


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
    """

    sae_id: str
    directory: Path
    cfg: Any
    results: "Sequence[StoredResult]"
    facts: Facts

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
        """The log10 of its latents' firing frequencies in training, if there is one."""
        file = self.directory / constants.SPARSITY_FILENAME
        return file if file.exists() else None


def find_saes(path: Path) -> dict[str, Path]:
    """
    The SAEs of a directory.

    Args:
        path: Directory of an SAE, of a `compare` run, or any with SAEs below it.

    Returns:
        The SAEs' directories by id: an SAE's own name, or its path below the directory.

    Raises:
        UserError: There is none, two have the same id, or a path makes no id.
    """
    if not path.is_dir():
        raise UserError(f"{path} is no directory")
    if _is_sae(path):
        return {sae_ids.sae_id_of_path(Path(path.resolve().name)): path}
    is_run = bool(compare_runs.run_files(path))
    root = path / compare_runs.SAES_FOLDER if is_run else path
    directories: list[Path] = []
    for file in sorted(root.rglob(constants.SAE_CFG_FILENAME)):
        # what lies in an SAE's directory belongs to it, as a plain form saved there
        is_inside_another = any(other in file.parents for other in directories)
        if _is_sae(file.parent) and not is_inside_another:
            directories.append(file.parent)
    if not directories:
        raise UserError(
            f"{path} holds no SAE: no directory in it has {constants.SAE_CFG_FILENAME} "
            f"and {constants.SAE_WEIGHTS_FILENAME} (SAELens's save_model and "
            "save_inference_model write both)"
        )
    ids = [sae_ids.sae_id_of_path(found.relative_to(root)) for found in directories]
    sae_ids.check_distinct(ids)
    return dict(zip(ids, directories, strict=True))


def given_saes(
    arguments: Sequence[str],
) -> tuple[Mapping[str, Path] | Path, list[Path]]:
    """
    The SAEs of a command line.

    Args:
        arguments: Directories as for `find_saes`, or ID=DIRECTORY.

    Returns:
        The SAEs' directories by id, or the only directory if it is given without an id;
        and the directories as given.

    Raises:
        UserError: A directory holds no SAE, an id is invalid, or two are the same.
    """
    given = [_split_id(argument) for argument in arguments]
    directories = [path for _, path in given]
    if len(given) == 1 and given[0][0] is None:
        return directories[0], directories
    found: list[tuple[str, Path]] = []
    for given_id, path in given:
        for sae_id, directory in find_saes(path).items():
            if given_id is not None:
                sae_id = given_id if directory == path else f"{given_id}/{sae_id}"
            found.append((sae_id, directory))
    sae_ids.check_distinct(sae_id for sae_id, _ in found)
    return dict(found), directories


def results_folders(paths: Iterable[str | Path]) -> list[Path]:
    """The folders with evaluation results in these directories."""
    folders = [Path(path) / sae_ids.RESULTS_FOLDER for path in paths]
    return [folder for folder in folders if folder.is_dir()]


def prepare(
    saes: Mapping[str, SAESource] | Path | str,
    eval_results: Path | str | Sequence[Path | str] | None,
    folder: Path,
    show_progress: bool,
) -> tuple[list[UploadedSAE], dict[Path, str]]:
    """
    Check that SAEs can be uploaded, and gather what is known of them.

    Args:
        saes: SAEs, or their directories, by id; or one directory as for `find_saes`.
        eval_results: Folders with evaluation results; None for those in the directories.
        folder: Where to save the SAEs that are not in a directory.
        show_progress: Whether to show a progress bar.

    Returns:
        The SAEs; and the evaluation results that are not uploaded, with the reason.

    Raises:
        InvalidSAEError: An SAE, or one of its files, cannot be used.
        UserError: There is no SAE, or an id or a result cannot be used.
    """
    directory = Path(saes) if isinstance(saes, str | Path) else None
    by_id = _by_id(saes)
    if eval_results is None:
        sources = [s for s in by_id.values() if isinstance(s, str | Path)]
        eval_results = results_folders([directory] if directory else sources)
    folders = [eval_results] if isinstance(eval_results, str | Path) else eval_results
    results = read_results([Path(path) for path in folders])
    left_out = {r.file: why for r in results if (why := r.why_stale()) is not None}
    current = [result for result in results if result.file not in left_out]
    reductions = compare_runs.reductions_in(directory) if directory else {}
    prepared: list[UploadedSAE] = []
    checking = tqdm(by_id.items(), desc="Checking SAEs", disable=not show_progress)
    for sae_id, source in checking:
        try:
            path, sae = _checked(source, folder / sae_id)
        except InvalidSAEError as error:
            raise InvalidSAEError(f"SAE {sae_id!r}: {error}") from error
        own = results_of(sae, current)
        facts = facts_of(own, Measurement.of(sae), reductions.get(sae_id))
        prepared.append(UploadedSAE(sae_id, path, sae.cfg, own, facts))
    matched = {result.file for sae in prepared for result in sae.results}
    for result in current:
        if result.file not in matched:
            left_out[result.file] = "is of none of these SAEs"
    return prepared, left_out


def _by_id(saes: Mapping[str, SAESource] | Path | str) -> Mapping[str, SAESource]:
    if isinstance(saes, (str, Path)):
        return find_saes(Path(saes))
    if not isinstance(saes, Mapping):
        raise UserError("name the SAEs: pass a dictionary of SAEs by id")
    if not saes:
        raise UserError("no SAEs to upload")
    for sae_id in saes:
        sae_ids.check_sae_id(sae_id)
    sae_ids.check_distinct(saes)
    return saes


def _checked(source: SAESource, folder: Path) -> tuple[Path, SAE[Any]]:
    """The directory of an SAE, saved to `folder` if it has none yet, and the SAE."""
    if isinstance(source, TrainingSAE) and not isinstance(source, ScaffoldMixin):
        raise InvalidSAEError(
            f"a training SAE ({source.cfg.architecture()}) is given; save it with "
            "save_inference_model, and upload the directory"
        )
    if isinstance(source, SAE):
        sae = source.to_inference() if isinstance(source, ScaffoldMixin) else source
        check_weights(sae.cfg.to_dict(), sae.state_dict())
        sae.save_model(folder)
        source = folder
    if not isinstance(source, (str, Path)):
        raise TypeError(
            f"an SAE or the path of its directory is needed, got {source!r:.100}"
        )
    sae = load_scaffold_sae(source)
    check_can_be_used(sae)
    runner_cfg = Path(source, constants.RUNNER_CFG_FILENAME)
    if runner_cfg.exists():
        read_json_object(runner_cfg, _MAX_RUNNER_CFG_BYTES)
    return Path(source), sae


def _is_sae(directory: Path) -> bool:
    names = (constants.SAE_CFG_FILENAME, constants.SAE_WEIGHTS_FILENAME)
    return all((directory / name).is_file() for name in names)


def _split_id(argument: str) -> tuple[str | None, Path]:
    """The id, if one is given, and the directory of an ID=DIRECTORY."""
    sae_id, equals, directory = argument.partition("=")
    if not equals or Path(argument).exists():
        return None, Path(argument)
    return sae_id, Path(directory)
