from pydantic import PositiveInt

from saelens_scaffold._util.configs import documented
from saelens_scaffold.evals.eval_configs import TwinsEvalConfig


@documented
class DarkMatterEvalConfig(TwinsEvalConfig):
    """Configuration of the dark-matter evaluation. Numbers of tokens are those of the
    paper's code (arXiv 2410.14670)."""

    n_fit_tokens: PositiveInt = 150_000
    """Tokens to fit the linear maps on, more than the maps have inputs. They are read twice."""
    n_tokens: PositiveInt = 150_000
    """Tokens after those to test the maps on. BOS, EOS and padding do not count, nor tokens
    that none of the text follows, as the last of a sequence."""
    scaling: bool = True
    """Whether error norms are predicted from those of the other SAEs of the call at the same
    hook point. The result of each SAE then depends on which others there are."""
    earlier: str | dict[str, str] | None = None
    """Name of the SAE in the same call, at an earlier hook point, whose reconstruction and
    error are further inputs of the linear map; or a name for each SAE, by its name."""
    pursuit: bool = False
    """Whether to find activations by gradient pursuit as well, which is slow."""
