from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from saelens_scaffold._util.configs import documented
from saelens_scaffold.evals.eval_configs import ASCENDING, TwinsEvalConfig

Cosine = Annotated[NonNegativeFloat, Field(lt=1)]


@documented
class ScaffoldAblationEvalConfig(TwinsEvalConfig):
    """Configuration of the scaffold ablation. Defaults with a source are the paper's
    (arXiv 2606.14040)."""

    n_tokens: PositiveInt = 100_000
    """Tokens to evaluate on. BOS, EOS and padding do not count."""
    include_special_tokens: bool = True
    """Whether to report every figure twice: with BOS, EOS and padding unchanged, and with
    these ablated too, means and directions then being fitted on them as well. The second
    takes as long again."""
    n_fit_tokens: PositiveInt = 100_000
    """Tokens before those, from which means, principal directions, outlier dimensions and
    firing frequencies are estimated."""
    llm_batch_size: PositiveInt = 16
    """LLM batch size, in sequences. Two sets of logits of a batch are held at once."""
    pca_rank: PositiveInt | None = None
    """Number of principal directions, random directions and outlier dimensions removed. If
    None, the rank of the scaffold; for a plain SAE the largest rank in the call, else 24."""
    n_random_draws: PositiveInt = 3
    """Draws of random directions, and of random latents, that are averaged."""
    n_aligned_latents: Annotated[list[PositiveInt], Field(min_length=1), ASCENDING] = (
        Field(default_factory=lambda: [24, 100, 787, 2048])
    )
    """How many of the alive sparse latents most aligned with the scaffold are ablated. The
    paper names 787. A number larger than are alive is left out. The headline is 787, or
    else the largest."""
    aligned_cosines: Annotated[list[Cosine], ASCENDING] = Field(
        default_factory=lambda: [0.2, 0.3, 0.4, 0.5]
    )
    """Cosines between decoder direction and scaffold subspace. The alive sparse latents
    above each are counted, and ablated where there are any."""
    topics: bool = True
    """Whether to classify the topic of texts with and without the scaffold."""
    topic_dataset: str = "cais/mmlu"
    """Labelled text: a dataset on the Hub, a local directory or file, or python-stdlib."""
    topic_subset: str | None = None
    """Its configuration on the Hub. If None, 'all' for cais/mmlu."""
    topic_split: str | None = None
    """Its split, divided into train and test texts. If None, 'test' for cais/mmlu, else the
    dataset's own train and test splits."""
    topic_text_column: str | None = None
    """Its column with the text. If None, 'question' for cais/mmlu, else 'text'."""
    topic_label_column: str | None = None
    """Its column with the topic. If None, 'subject' for cais/mmlu, else 'label'."""
    topic_grouping: Literal["label", "mmlu_category"] = "label"
    """What a topic is: 'label' takes each label (MMLU's 57 subjects), 'mmlu_category' the 4
    categories of MMLU's authors: STEM, humanities, social sciences, other."""
    topic_answer_choices: bool = False
    """Whether the answers to choose from follow the text, as 'A. ...'. Needs a column
    'choices' with lists of them, as MMLU has."""
    topic_pooling: Literal["mean", "last_token"] = "mean"
    """What a probe reads of a text: 'mean' the mean over its tokens, 'last_token' its last
    one. BOS, EOS and padding do not count."""
    max_topics: Annotated[int, Field(ge=2)] = 57
    """Largest number of topics, the most frequent first. MMLU has 57."""
    topic_train_size: PositiveInt = 70
    """Texts of each topic to train the probes on. MMLU has 100 of the rarest subject."""
    topic_test_size: PositiveInt = 30
    """Texts of each topic to test the probes on."""
    n_topic_latents: PositiveInt = 2048
    """How many of the alive sparse latents most aligned with the topics are ablated. More
    than are alive means all of them."""
