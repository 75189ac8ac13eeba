"""What is in a scaffold, and what is in its dictionary."""

from saelens_scaffold.inspect.axes import AxesFit, ScaffoldAxes
from saelens_scaffold.inspect.logit_lens import logit_lens
from saelens_scaffold.inspect.main import (
    InspectConfig,
    inspect_saes,
    read_inspection,
    run,
)
from saelens_scaffold.inspect.output import Inspection
from saelens_scaffold.inspect.steering import steering

__all__ = [
    "AxesFit",
    "InspectConfig",
    "Inspection",
    "ScaffoldAxes",
    "inspect_saes",
    "logit_lens",
    "read_inspection",
    "run",
    "steering",
]
