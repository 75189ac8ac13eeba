"""
Scaffold SAEs for SAELens: a rank-r linear bottleneck beside a sparse dictionary.

Importing this package registers the architectures `scaffold_batchtopk`,
`scaffold_matryoshka` (training) and `scaffold_jumprelu` (inference) with SAELens.
"""

from saelens_scaffold._util.compat import let_rows_be_tensors
from saelens_scaffold.hub.upload import upload_scaffold_saes
from saelens_scaffold.models.local import register_local_model
from saelens_scaffold.plugins.hookspecs import hookimpl
from saelens_scaffold.saes import (
    ScaffoldBatchTopKTrainingSAE,
    ScaffoldBatchTopKTrainingSAEConfig,
    ScaffoldJumpReLUSAE,
    ScaffoldJumpReLUSAEConfig,
    ScaffoldMatryoshkaTrainingSAE,
    ScaffoldMatryoshkaTrainingSAEConfig,
)
from saelens_scaffold.saes.loading import load_scaffold_sae
from saelens_scaffold.saes.registration import register_architectures
from saelens_scaffold.training.runner import (
    RepeatableMultiSAETrainingRunner,
    ResumableTrainingRunner,
)

__version__ = "0.1.0"

__all__ = [
    "RepeatableMultiSAETrainingRunner",
    "ResumableTrainingRunner",
    "ScaffoldBatchTopKTrainingSAE",
    "ScaffoldBatchTopKTrainingSAEConfig",
    "ScaffoldJumpReLUSAE",
    "ScaffoldJumpReLUSAEConfig",
    "ScaffoldMatryoshkaTrainingSAE",
    "ScaffoldMatryoshkaTrainingSAEConfig",
    "hookimpl",
    "load_scaffold_sae",
    "register_architectures",
    "register_local_model",
    "upload_scaffold_saes",
]

register_architectures()
let_rows_be_tensors()
