"""Fields of SAELens's runner that an experiment may set, and their allowed values."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import yaml
from pydantic import AfterValidator, ConfigDict, Field, create_model
from sae_lens import MultiSAETrainingRunnerConfig
from sae_lens.util import str_to_dtype

from saelens_scaffold._util.configs import make_config

_TABLE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
_TYPES = {
    name: annotation
    for name, annotation in get_type_hints(MultiSAETrainingRunnerConfig).items()
    if name not in _TABLE["own"] and not name.startswith("_")
}
TRAINING_FIELDS = sorted(_TYPES)
"""Fields of SAELens's `MultiSAETrainingRunnerConfig` that an experiment may set."""

AXIS_FIELDS = sorted(set(TRAINING_FIELDS) - set(_TABLE["shared"]))
"""Fields of the runner that can be axes of the grid."""


def _dtype_name(name: str) -> str:
    str_to_dtype(name)  # raises for an unknown one
    return name


_FIELDS: dict[str, Any] = {
    name: (Annotated[annotation, Field(**_TABLE["allowed"].get(name, {}))], None)
    for name, annotation in _TYPES.items()
}
_FIELDS["dtype"] = (Annotated[str, AfterValidator(_dtype_name)], None)
_Training: Any = create_model(
    "Training",
    __config__=ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=()),
    **_FIELDS,
)


def checked_training(values: Mapping[str, Any]) -> dict[str, Any]:
    """
    Check values of the runner's fields.

    Raises:
        UserError: A value has the wrong type, or is out of range.
    """
    return make_config(_Training, values).model_dump(exclude_unset=True)
