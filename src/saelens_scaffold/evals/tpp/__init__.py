"""Whether the latents that matter to one class's probe matter to that one alone."""

from saelens_scaffold.evals.tpp.eval_config import TppEvalConfig
from saelens_scaffold.evals.tpp.eval_output import EVAL_TYPE_ID_TPP, TppEvalOutput

__all__ = ["EVAL_TYPE_ID_TPP", "TppEvalConfig", "TppEvalOutput"]
