"""The SAEs to upload: where they are, and what is known of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.saes.sae import SAE, TrainingSAE
from safetensors.torch import load_file
from tqdm.autonotebook import tqdm

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.hub.comparisons import Reduction, reductions_in
from saelens_scaffold.hub.facts import Facts, facts_of
from saelens_scaffold.hub.results import read_results, results_of
from saelens_scaffold.saes.loading import load_scaffold_sae
from saelens_scaffold.saes.sae_ids import (
    RESULTS_FOLDER,
    check_distinct,
    check_sae_id,
    sae_id_of_path,
)
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

_COMPARE_SAES = "saes"
"""Folder of a `compare` run with its SAEs."""

_COMPARE_FILES = ("compare.yaml", "results.json", "report.html")
"""Published files of a `compare` run: its configuration, results and report."""

SAESource = SAE[Any] | Path | str
"""An SAE, or the directory of one."""


@dataclass
class UploadedSAE:
    """
    An SAE to upload.

    Attributes:
        sae_id: Its id in the repository.
        source: The SAE in inference form, or its directory.
        cfg: Its configuration.
        log_sparsity: log10 of the latents' firing frequencies in training, shape
            (d_sae,), if known.
        measurement: What was measured of these weights when they were saved, if anything.
        results: Its evaluation results.
        reduction: Its reduction of dense latents against the baseline of a `compare` run.
    """

    sae_id: str
    source: SAE[Any] | Path
    cfg: Any
    log_sparsity: torch.Tensor | None = None
    measurement: Measurement | None = None
    results: "Sequence[StoredResult]" = ()
    reduction: Reduction | None = None

    @cached_property
    def facts(self) -> Facts:
        """Its numbers in the card."""
        return facts_of(self.results, self.measurement, self.reduction)

    @property
    def rank(self) -> int:
        """Rank of its scaffold, 0 for a plain SAE."""
        return int(getattr(self.cfg, "scaffold_rank", 0))

    @property
    def in_scaffold_form(self) -> bool:
        """Whether it needs this package to load, whatever its rank."""
        return self.cfg.architecture() == "scaffold_jumprelu"

    @property
    def runner_cfg(self) -> Path | None:
        """Configuration of the runner that trained it, if there is one."""
        if not isinstance(self.source, Path):
            return None
        file = self.source / RUNNER_CFG_FILENAME
        return file if file.exists() else None

    def load(self) -> SAE[Any]:
        """The SAE."""
        if isinstance(self.source, Path):
            return load_scaffold_sae(self.source)
        return self.source


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
        return {sae_id_of_path(Path(path.resolve().name)): path}
    root = path / _COMPARE_SAES if compare_files(path) else path
    directories: list[Path] = []
    for file in sorted(root.rglob(SAE_CFG_FILENAME)):
        # what lies in an SAE's directory belongs to it, as a plain form saved there
        is_inside_another = any(other in file.parents for other in directories)
        if _is_sae(file.parent) and not is_inside_another:
            directories.append(file.parent)
    if not directories:
        raise UserError(
            f"{path} holds no SAE: no directory in it has {SAE_CFG_FILENAME} and "
            f"{SAE_WEIGHTS_FILENAME} (SAELens's save_model and save_inference_model "
            "write both)"
        )
    ids = [sae_id_of_path(directory.relative_to(root)) for directory in directories]
    check_distinct(ids)
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
    check_distinct(sae_id for sae_id, _ in found)
    return dict(found), directories


def _split_id(argument: str) -> tuple[str | None, Path]:
    """The id, if one is given, and the directory of an ID=DIRECTORY."""
    sae_id, equals, directory = argument.partition("=")
    if not equals or Path(argument).exists():
        return None, Path(argument)
    return sae_id, Path(directory)


def results_folders(paths: Iterable[str | Path]) -> list[Path]:
    """The folders with evaluation results in these directories."""
    folders = [Path(path) / RESULTS_FOLDER for path in paths]
    return [folder for folder in folders if folder.is_dir()]


def compare_files(path: Path) -> dict[str, Path]:
    """The published files of a `compare` run by name; none of any other directory."""
    files = {name: path / name for name in _COMPARE_FILES if (path / name).is_file()}
    is_run = (path / _COMPARE_SAES).is_dir() and _COMPARE_FILES[0] in files
    return files if is_run else {}


def prepare(
    saes: Mapping[str, SAESource] | Path | str,
    eval_results: Path | str | Sequence[Path | str] | None,
    show_progress: bool,
) -> tuple[list[UploadedSAE], dict[str, Path], dict[Path, str]]:
    """
    Check that SAEs can be uploaded, and gather what is known of them.

    Args:
        saes: SAEs, or their directories, by id; or one directory as for `find_saes`.
        eval_results: Folders with evaluation results; None for those in the directories.
        show_progress: Whether to show a progress bar.

    Returns:
        The SAEs; the files of a `compare` run by name; and the evaluation results that
        are not uploaded, with the reason.

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
    results = read_results([Path(folder) for folder in folders])
    left_out = {r.file: why for r in results if (why := r.why_stale()) is not None}
    current = [result for result in results if result.file not in left_out]
    run_files = compare_files(directory) if directory else {}
    reductions = reductions_in(directory) if directory and run_files else {}
    prepared = [
        _prepare_sae(sae_id, source, current, reductions.get(sae_id))
        for sae_id, source in tqdm(
            by_id.items(), desc="Checking SAEs", disable=not show_progress
        )
    ]
    matched = {result.file for sae in prepared for result in sae.results}
    for result in current:
        if result.file not in matched:
            left_out[result.file] = "is of none of these SAEs"
    return prepared, run_files, left_out


def _by_id(saes: Mapping[str, SAESource] | Path | str) -> Mapping[str, SAESource]:
    if isinstance(saes, (str, Path)):
        return find_saes(Path(saes))
    if not isinstance(saes, Mapping):
        raise UserError("name the SAEs: pass a dictionary of SAEs by id")
    if not saes:
        raise UserError("no SAEs to upload")
    for sae_id in saes:
        check_sae_id(sae_id)
    check_distinct(saes)
    return saes


def _prepare_sae(
    sae_id: str,
    source: SAESource,
    results: "Sequence[StoredResult]",
    reduction: Reduction | None,
) -> UploadedSAE:
    if not isinstance(source, (SAE, str, Path)):
        raise TypeError(
            f"an SAE or the path of its directory is needed, got {source!r:.100}"
        )
    log_sparsity = None
    try:
        if isinstance(source, SAE):
            source = sae = _inference_form(source)
            check_weights(sae.cfg.to_dict(), sae.state_dict())
        else:
            source = Path(source)
            sae = load_scaffold_sae(source)
            if (source / SPARSITY_FILENAME).exists():
                log_sparsity = load_file(source / SPARSITY_FILENAME)["sparsity"]
            if (source / RUNNER_CFG_FILENAME).exists():
                read_json_object(source / RUNNER_CFG_FILENAME, _MAX_RUNNER_CFG_BYTES)
        check_can_be_used(sae)
    except InvalidSAEError as error:
        raise InvalidSAEError(f"SAE {sae_id!r}: {error}") from error
    return UploadedSAE(
        sae_id,
        source,
        sae.cfg,
        log_sparsity,
        Measurement.of(sae),
        results_of(sae, results),
        reduction,
    )


def _inference_form(sae: SAE[Any]) -> SAE[Any]:
    """The form of an SAE that is published."""
    if isinstance(sae, ScaffoldMixin):
        return sae.to_inference()
    if isinstance(sae, TrainingSAE):
        raise InvalidSAEError(
            f"a training SAE ({sae.cfg.architecture()}) is given; save it with "
            "save_inference_model, and upload the directory"
        )
    return sae


def _is_sae(directory: Path) -> bool:
    names = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME)
    return all((directory / name).is_file() for name in names)
