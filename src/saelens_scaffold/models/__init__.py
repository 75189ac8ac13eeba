"""A small language model and its text, for tests and examples without downloads.

The model (`local.py`) reads Python source code. The text (`stdlib.py`) is the standard
library of the running interpreter, with a fixed split of its files.
"""

from saelens_scaffold.models.local import (
    EMBEDDED_MODEL_NAME,
    embedded_model_path,
    load_embedded_model,
    register_embedded_model,
)
from saelens_scaffold.models.stdlib import (
    Split,
    load_stdlib_chunks,
    load_stdlib_text,
    probing_labels,
    write_stdlib_dataset,
)

__all__ = [
    "EMBEDDED_MODEL_NAME",
    "Split",
    "embedded_model_path",
    "load_embedded_model",
    "load_stdlib_chunks",
    "load_stdlib_text",
    "probing_labels",
    "register_embedded_model",
    "write_stdlib_dataset",
]
