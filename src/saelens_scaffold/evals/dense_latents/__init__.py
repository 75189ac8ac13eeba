"""How many latents of the dictionary fire on a large share of all tokens."""

from saelens_scaffold.evals.dense_latents.eval_config import DenseLatentsEvalConfig
from saelens_scaffold.evals.dense_latents.eval_output import DenseLatentsEvalOutput

__all__ = ["DenseLatentsEvalConfig", "DenseLatentsEvalOutput"]
