"""Ids of SAEs in a repository, which are paths of its folders."""

import re
from collections.abc import Iterable
from pathlib import Path

from sae_lens import constants

from saelens_scaffold._util.errors import UserError

PLAIN_FORM = "jumprelu"
"""Folder of the plain form, in the folder of an SAE."""

RESULTS_FOLDER = "eval_results"
"""Folder of evaluation results, in the folder of an SAE."""

_RESERVED = {
    PLAIN_FORM,
    RESULTS_FOLDER,
    "README.md",
    "compare.yaml",
    "results.json",
    "report.html",
    "firing_frequencies.png",
    constants.SAE_CFG_FILENAME,
    constants.SAE_WEIGHTS_FILENAME,
    constants.SPARSITY_FILENAME,
    constants.RUNNER_CFG_FILENAME,
}

_PART = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.,=+-]{0,94}[A-Za-z0-9_,=+])?")
_OTHER_CHARACTERS = re.compile(r"[^A-Za-z0-9_.,=+/-]+")


def check_sae_id(sae_id: object) -> str:
    """
    Check that an id can be the path of a folder on the Hub and on every disk.

    Args:
        sae_id: The id, as in "blocks.12.hook_resid_post/rank_24".

    Returns:
        The id.

    Raises:
        UserError: It cannot.
    """
    parts = sae_id.split("/") if isinstance(sae_id, str) else []
    if not parts or not all(_PART.fullmatch(part) for part in parts):
        raise UserError(
            f"{sae_id!r:.200} is no valid SAE id: write names joined by /, of at most 96 "
            "letters, digits and _.,=+-, none of .,=+- first, and neither . nor - last"
        )
    folded = {part.lower() for part in parts}  # as on disks that ignore case
    for reserved in sorted(name for name in _RESERVED if name.lower() in folded):
        raise UserError(
            f"{sae_id!r:.200} is no valid SAE id: {reserved!r} is a file or folder of an "
            "SAE or of the repository; give the SAE another id, as in ID=DIR"
        )
    return str(sae_id)


def _is_sae_id(text: str) -> bool:
    try:
        return bool(check_sae_id(text))
    except UserError:
        return False


def check_sae_path(sae_path: object) -> str:
    """
    Check that this is the id of an SAE, or of its plain form, "ID/jumprelu".

    Raises:
        UserError: It is neither.
    """
    own = sae_path.removesuffix(f"/{PLAIN_FORM}") if isinstance(sae_path, str) else ""
    check_sae_id(own or sae_path)
    return str(sae_path)


def sae_id_of_path(path: Path) -> str:
    """
    The id made of a relative path: "BatchTopK (centred)" becomes "BatchTopK-centred".

    Raises:
        UserError: A part of the path has no allowed character.
    """
    parts = (_OTHER_CHARACTERS.sub("-", part).strip("-.") for part in path.parts)
    return check_sae_id("/".join(parts))


def check_path(path: Path | str) -> Path:
    """
    A path that was given, which is not empty, as that of an unset variable of a shell.

    Raises:
        UserError: It is.
    """
    if not str(path).strip():
        raise UserError("a path is empty; the current directory is ./")
    return Path(path)


def split_id(argument: str) -> tuple[str | None, Path]:
    """
    The id, if there is one, and the directory of "DIR" or "ID=DIR".

    Ids and directories may contain "=" themselves, as in "k=4,rank=8=saes/k=4,rank=8". The
    "=" between them is the one with a valid id before it and a directory behind it.

    Raises:
        UserError: There is no such "=", or there are several, or the argument is a
            directory, too.
    """
    path = check_path(argument)
    if "=" not in argument:
        return None, path
    parts = argument.split("=")
    splits = [("=".join(parts[:n]), "=".join(parts[n:])) for n in range(1, len(parts))]
    with_directory = [(i, d) for i, d in splits if d and Path(d).is_dir()]
    found: list[tuple[str | None, Path]] = [(None, path)] if path.is_dir() else []
    found += [(i, Path(d)) for i, d in with_directory if _is_sae_id(i)]
    if not found and with_directory:
        check_sae_id(with_directory[0][0])  # raises
    if not found:
        raise UserError(
            f"{argument!r} is neither a directory nor ID=DIR with the directory of an SAE"
        )
    if len(found) > 1:
        readings = " or ".join(
            f"{str(d)!r}" + (f" as {i!r}" if i else "") for i, d in found
        )
        raise UserError(
            f"{argument!r} may mean {readings}; write the directory with ./ before its name"
        )
    return found[0]


def check_distinct(sae_ids: Iterable[str]) -> None:
    """
    Check that ids are distinct.

    Raises:
        UserError: Two ids are the same on disks that ignore case.
    """
    seen: dict[str, str] = {}
    for sae_id in sae_ids:
        if sae_id.lower() in seen:
            raise UserError(
                f"two SAEs have the id {sae_id!r} ({seen[sae_id.lower()]!r}); name one of "
                "them otherwise, as in ID=DIR"
            )
        seen[sae_id.lower()] = sae_id
