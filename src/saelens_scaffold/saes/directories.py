"""Directories of saved SAEs."""

from pathlib import Path

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from saelens_scaffold._util.errors import UserError


def sae_directories(path: Path) -> list[tuple[Path, Path]]:
    """
    The SAEs of a directory: its own, or all below it.

    Returns:
        For each, its name or its path below the directory, and its directory. What lies in
        an SAE's directory belongs to that SAE, as a plain form saved there.

    Raises:
        UserError: There is none.
    """
    if _is_sae(path):
        return [(Path(path.resolve().name), path)]
    found: list[Path] = []
    for file in sorted(path.rglob(SAE_CFG_FILENAME)) if path.is_dir() else ():
        is_inside_another = any(other in file.parents for other in found)
        if _is_sae(file.parent) and not is_inside_another:
            found.append(file.parent)
    if not found:
        raise UserError(
            f"{path} holds no SAE: neither it nor a directory in it has {SAE_CFG_FILENAME} "
            f"and {SAE_WEIGHTS_FILENAME}, as SAELens's save_model writes them"
        )
    return [(directory.relative_to(path), directory) for directory in found]


def _is_sae(directory: Path) -> bool:
    names = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME)
    return all((directory / name).is_file() for name in names)
