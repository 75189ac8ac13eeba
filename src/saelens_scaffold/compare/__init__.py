"""`saelens-scaffold compare`: SAEs trained on the same activations, judged at matched sparsity."""

from saelens_scaffold.compare.config import CompareConfig, read_config
from saelens_scaffold.compare.experiment import compare

__all__ = ["CompareConfig", "compare", "read_config"]
