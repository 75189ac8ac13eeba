"""What the language model loses without the scaffold, and without what might replace it."""

from saelens_scaffold.evals.scaffold_ablation.eval_config import (
    ScaffoldAblationEvalConfig,
)
from saelens_scaffold.evals.scaffold_ablation.eval_output import (
    ScaffoldAblationEvalOutput,
)

__all__ = ["ScaffoldAblationEvalConfig", "ScaffoldAblationEvalOutput"]
