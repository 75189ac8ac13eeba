"""The SAE of a call that others are compared with."""

from collections.abc import Sequence

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.selected_saes import SelectedSAE


def baseline_named(name: str, saes: Sequence[SelectedSAE]) -> SelectedSAE:
    """
    The SAE of a call that a configuration names as the baseline.

    Raises:
        UserError: There is none of that name.
    """
    by_label = {sae.label: sae for sae in saes}
    if name not in by_label:
        raise UserError(
            f"baseline is {name!r}; it must be one of the SAEs in the call: {[*by_label]}"
        )
    return by_label[name]
