"""SAEs trained on the same activations and compared at matched sparsity."""

from saelens_scaffold.compare.config import CompareConfig, read_config
from saelens_scaffold.compare.experiment import EvaluationsFailed, compare, run

__all__ = ["CompareConfig", "EvaluationsFailed", "compare", "read_config", "run"]
