"""Other SAEs of a call that a configuration gives an SAE to be compared with."""

from collections.abc import Sequence
from typing import Any

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.eval_configs import check_baseline
from saelens_scaffold.evals.saes import SelectedSAE

OTHER_SAES = ("baseline", "earlier")
"""Fields of configurations that name another SAE of the call, or one for each."""


def named_for(names: str | dict[str, str] | None, label: str) -> str | None:
    """Name of the other SAE that a configuration gives an SAE; None if none, or itself."""
    name = names.get(label) if isinstance(names, dict) else names
    return None if name == label else name


def others_of(
    config: Any, sae: SelectedSAE, saes: Sequence[SelectedSAE]
) -> dict[str, SelectedSAE]:
    """
    The SAEs of a call that an SAE's result depends on, by what they are to it.

    Args:
        config: The evaluation's configuration.
        sae: The SAE.
        saes: All SAEs of the call.
    """
    by_name = {other.label: other for other in saes}
    names = {
        field: named_for(getattr(config, field, None), sae.label)
        for field in OTHER_SAES
    }
    found = {field: by_name[name] for field, name in names.items() if name in by_name}
    if getattr(config, "scaling", False):  # which predicts errors from one another
        at_hook = [other for other in saes if other.hook_name == sae.hook_name]
        found |= {f"SAE {of.label}": of for of in at_hook if of.key != sae.key}
    return found


def plain_twins(
    baseline: str | dict[str, str] | None,
    saes: Sequence[SelectedSAE],
    candidates: Sequence[SelectedSAE],
) -> dict[str, SelectedSAE]:
    """
    The plain twins of the scaffold SAEs that have one, by the scaffold SAEs' keys.

    Args:
        baseline: Name of their baseline, or a name for each, by its name.
        saes: The SAEs.
        candidates: All SAEs of the call.

    Raises:
        UserError: A baseline is not among the candidates, has a scaffold itself, or another
            hook point.
    """
    by_name = {candidate.label: candidate for candidate in candidates}
    given = baseline or {}
    for name in [given] if isinstance(given, str) else [*given, *given.values()]:
        check_baseline(name, [*by_name])
    found: dict[str, SelectedSAE] = {}
    for sae in saes:
        name = named_for(baseline, sae.label)
        if name is None or not sae.rank:
            continue
        twin = found[sae.key] = by_name[name]
        if twin.rank:
            raise UserError(
                f"baseline is {name!r}, whose scaffold has rank {twin.rank}; it must "
                "be a plain SAE"
            )
        if twin.hook_name != sae.hook_name:
            raise UserError(
                f"baseline is {name!r} at {twin.hook_name}; it must be an SAE at "
                f"{sae.hook_name}, where {sae.label!r} is"
            )
    return found
