"""The SAEs that are to be uploaded: where they are, and what is known of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.saes.sae import SAE, TrainingSAE
from safetensors.torch import load_file

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.hub.comparisons import Reduction
from saelens_scaffold.hub.evaluation_results import EvaluationResult, results_of
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

MAX_RUNNER_CFG_BYTES = 1 << 24

COMPARE_RUN_SAES = "saes"
"""The folder of a `compare` run with its SAEs."""

COMPARE_RUN_FILES = ("compare.yaml", "results.json", "report.html")
"""What else of a `compare` run is published: its configuration, results and report."""

SAESource = SAE[Any] | Path | str
"""An SAE, or the directory of one."""


@dataclass
class UploadedSAE:
    """
    An SAE to upload.

    Attributes:
        sae_id: Its id in the repository.
        source: The SAE, in inference form, or its directory.
        cfg: Its configuration.
        log_sparsity: log10 of the latents' firing frequencies in training, shape
            (d_sae,), if they are known.
        measurement: What was measured of these weights when they were saved, if anything.
        results: Its evaluation results.
        reduction: How many fewer dense latents it has than a baseline, if a `compare` run
            says so.
    """

    sae_id: str
    source: SAE[Any] | Path
    cfg: Any
    log_sparsity: torch.Tensor | None = None
    measurement: Measurement | None = None
    results: list[EvaluationResult] = field(default_factory=list)
    reduction: Reduction | None = None

    @property
    def rank(self) -> int:
        """Rank of its scaffold, 0 for a plain SAE."""
        return int(getattr(self.cfg, "scaffold_rank", 0))

    @property
    def in_scaffold_form(self) -> bool:
        """Whether it is in the form that needs this package, whatever its rank is."""
        return self.cfg.architecture() == "scaffold_jumprelu"

    @property
    def runner_cfg(self) -> Path | None:
        """The configuration of the runner that trained it, if there is one."""
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
        path: The directory of an SAE, that of a `compare` run, or any with SAEs below.

    Returns:
        The SAEs' directories by id: an SAE's own name, or its path below the directory.

    Raises:
        UserError: There is none.
        UserError: Two have the same id, or one's path makes none.
    """
    if not path.is_dir():
        raise UserError(f"{path} is no directory")
    if _is_sae(path):
        return {sae_id_of_path(Path(path.resolve().name)): path}
    root = path / COMPARE_RUN_SAES if is_compare_run(path) else path
    directories: list[Path] = []
    for file in sorted(root.rglob(SAE_CFG_FILENAME)):
        inside_another = any(other in file.parents for other in directories)
        # what lies in an SAE's directory belongs to it, as a plain form saved there
        if _is_sae(file.parent) and not inside_another:
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


def given_saes(arguments: Sequence[str]) -> dict[str, Path]:
    """
    The SAEs that a command line names.

    Args:
        arguments: Directories that `find_saes` takes, or ID=DIRECTORY.

    Raises:
        UserError: One holds no SAE.
        UserError: An id is none, or two are the same.
    """
    found: list[tuple[str, Path]] = []
    for given_id, path in map(split_id, arguments):
        for sae_id, directory in find_saes(path).items():
            if given_id is not None:
                sae_id = given_id if directory == path else f"{given_id}/{sae_id}"
            found.append((check_sae_id(sae_id), directory))
    check_distinct(sae_id for sae_id, _ in found)
    return dict(found)


def split_id(argument: str) -> tuple[str | None, Path]:
    """The id, if one is given, and the directory of an ID=DIRECTORY."""
    sae_id, equals, directory = argument.partition("=")
    if not equals or Path(argument).exists():
        return None, Path(argument)
    return sae_id, Path(directory)


def results_folders(paths: Iterable[str | Path]) -> list[Path]:
    """The folders with evaluation results that lie in these directories."""
    folders = [Path(path) / RESULTS_FOLDER for path in paths]
    return [folder for folder in folders if folder.is_dir()]


def is_compare_run(path: Path) -> bool:
    """Whether a folder is that of a `compare` run."""
    return (path / COMPARE_RUN_SAES).is_dir() and (
        path / COMPARE_RUN_FILES[0]
    ).is_file()


def run_files(path: Path) -> dict[str, Path]:
    """The files of a `compare` run that go along, by name."""
    files = {name: path / name for name in COMPARE_RUN_FILES}
    return {name: file for name, file in files.items() if file.is_file()}


def prepare_sae(
    sae_id: str, source: SAESource, results: Sequence[EvaluationResult]
) -> UploadedSAE:
    """
    See that an SAE can be uploaded, and gather what is known of it.

    Args:
        sae_id: The id it is to have.
        source: The SAE, in training or in inference form, or its directory.
        results: Evaluation results, of any SAEs.

    Raises:
        InvalidSAEError: The SAE, or a file of it, cannot be used.
        UserError: The id is none.
        TypeError: The source is neither an SAE nor a path.
    """
    check_sae_id(sae_id)
    try:
        if isinstance(source, SAE):
            sae = inference_form(source)
            uploaded = UploadedSAE(sae_id, sae, sae.cfg)
            check_weights(sae.cfg.to_dict(), sae.state_dict())
        elif isinstance(source, (str, Path)):
            sae = load_scaffold_sae(source)
            uploaded = UploadedSAE(sae_id, Path(source), sae.cfg)
            sparsity_file = Path(source) / SPARSITY_FILENAME
            if sparsity_file.exists():
                uploaded.log_sparsity = load_file(sparsity_file)["sparsity"]
            if uploaded.runner_cfg is not None:
                read_json_object(uploaded.runner_cfg, MAX_RUNNER_CFG_BYTES)
        else:
            raise TypeError(
                f"an SAE or the path of its directory is needed, got {source!r:.100}"
            )
        check_can_be_used(sae)
    except InvalidSAEError as error:
        raise InvalidSAEError(f"SAE {sae_id!r}: {error}") from error
    uploaded.results = results_of(sae, results)
    uploaded.measurement = Measurement.of(sae)
    return uploaded


def inference_form(sae: SAE[Any]) -> SAE[Any]:
    """
    The form of an SAE that is published.

    Raises:
        InvalidSAEError: It is a training SAE of SAELens's own.
    """
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


def as_mapping(
    saes: Mapping[str, SAESource] | SAESource,
) -> tuple[dict[str, SAESource], Path | None]:
    """
    The SAEs by id, and the directory in which they lie, if one was given.

    Raises:
        UserError: The directory holds no SAE.
        UserError: There is none, or it has no id.
    """
    if isinstance(saes, (str, Path)):
        return dict(find_saes(Path(saes))), Path(saes)
    if not isinstance(saes, Mapping):
        raise UserError("name the SAEs: pass a dictionary of SAEs by id")
    if not saes:
        raise UserError("no SAEs to upload")
    for sae_id in saes:
        check_sae_id(sae_id)
    check_distinct(saes)
    return dict(saes), None
