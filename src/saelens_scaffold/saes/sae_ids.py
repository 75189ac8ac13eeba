"""Ids of SAEs in a repository, which are paths of its folders."""

import re
from collections.abc import Iterable
from pathlib import Path

from saelens_scaffold._util.errors import UserError

PLAIN_FORM = "jumprelu"
"""Folder of the plain form, in the folder of an SAE."""

RESULTS_FOLDER = "eval_results"
"""Folder of evaluation results, in the folder of an SAE."""

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
    for reserved in {PLAIN_FORM, RESULTS_FOLDER} & set(parts):
        raise UserError(
            f"{sae_id!r:.200} is no valid SAE id: {reserved!r} is a folder of an SAE; give "
            "the SAE another id, as in ID=DIR"
        )
    return str(sae_id)


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
