"""A small language model and its text, for tests and examples without downloads.

The model (`local.py`) reads Python source code. The text (`stdlib.py`) is the standard
library of the running interpreter, with a fixed split of its files.
"""

from saelens_scaffold.models.local import EMBEDDED_MODEL_NAME as EMBEDDED_MODEL_NAME
from saelens_scaffold.models.local import embedded_model_path as embedded_model_path
from saelens_scaffold.models.local import load_embedded_model as load_embedded_model
from saelens_scaffold.models.local import (
    register_embedded_model as register_embedded_model,
)
from saelens_scaffold.models.stdlib import Split as Split
from saelens_scaffold.models.stdlib import load_stdlib_chunks as load_stdlib_chunks
from saelens_scaffold.models.stdlib import load_stdlib_text as load_stdlib_text
from saelens_scaffold.models.stdlib import probing_labels as probing_labels
from saelens_scaffold.models.stdlib import write_stdlib_dataset as write_stdlib_dataset
