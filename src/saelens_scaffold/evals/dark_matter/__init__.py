"""What SAEs leave of activations, and how much of it is linear in them."""

from saelens_scaffold.evals.dark_matter.eval_config import DarkMatterEvalConfig
from saelens_scaffold.evals.dark_matter.eval_output import DarkMatterEvalOutput

__all__ = ["DarkMatterEvalConfig", "DarkMatterEvalOutput"]
