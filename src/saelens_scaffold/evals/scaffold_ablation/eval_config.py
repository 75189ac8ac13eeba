from typing import Literal

from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass

from saelens_scaffold.evals.text_eval_config import TextEvalConfig


@dataclass
class ScaffoldAblationEvalConfig(TextEvalConfig):
    """Configuration of the scaffold ablation. Defaults with a source are the paper's
    (arXiv 2606.14040)."""

    n_tokens: int = Field(
        default=100_000,
        title="Number of Tokens",
        description="Tokens to evaluate on. BOS, EOS and padding do not count.",
    )
    include_special_tokens: bool = Field(
        default=True,
        title="Include Special Tokens",
        description="Whether to report every figure twice: with BOS, EOS and padding left as they are, and with them ablated as well, means and directions being fitted on them, too. The second takes as long again.",
    )
    n_fit_tokens: int = Field(
        default=100_000,
        title="Number of Tokens to Fit On",
        description="Tokens before those, from which means, principal directions, outlier dimensions and firing frequencies are taken.",
    )
    llm_batch_size: int = Field(
        default=16,
        title="LLM Batch Size",
        description="LLM batch size, in sequences. Two sets of logits of a batch are held at once.",
    )
    pca_rank: int | None = Field(
        default=None,
        title="PCA Rank",
        description="Number of principal directions, random directions and outlier dimensions removed. If None, the scaffold's own rank; for a plain SAE the largest rank in the call, else 24.",
    )
    n_random_draws: int = Field(
        default=3,
        title="Random Draws",
        description="Draws of random directions, and of random latents, that are averaged.",
    )
    n_aligned_latents: list[int] = Field(
        default_factory=lambda: [24, 100, 787, 2048],
        title="Numbers of Aligned Latents",
        description="How many of the alive sparse latents most aligned with the scaffold are ablated. The paper names 787. A number larger than are alive is left out. The headline is 787, or else the largest.",
    )
    aligned_cosines: list[float] = Field(
        default_factory=lambda: [0.2, 0.3, 0.4, 0.5],
        title="Aligned Cosines",
        description="Cosines between decoder direction and scaffold subspace. The alive sparse latents above each are counted, and ablated where there are any.",
    )
    topics: bool = Field(
        default=True,
        title="Topics",
        description="Whether to classify the topic of texts with and without the scaffold.",
    )
    topic_dataset: str = Field(
        default="cais/mmlu",
        title="Topic Dataset",
        description="Labelled text: a dataset on the Hub, a local directory or file, or python-stdlib.",
    )
    topic_subset: str | None = Field(
        default=None,
        title="Topic Subset",
        description="Its configuration on the Hub. If None, 'all' for cais/mmlu.",
    )
    topic_split: str | None = Field(
        default=None,
        title="Topic Split",
        description="Its split, divided into train and test texts. If None, 'test' for cais/mmlu, else the dataset's own train and test splits.",
    )
    topic_text_column: str | None = Field(
        default=None,
        title="Topic Text Column",
        description="Its column with the text. If None, 'question' for cais/mmlu, else 'text'.",
    )
    topic_label_column: str | None = Field(
        default=None,
        title="Topic Label Column",
        description="Its column with the topic. If None, 'subject' for cais/mmlu, else 'label'.",
    )
    topic_grouping: Literal["label", "mmlu_category"] = Field(
        default="label",
        title="Topic Grouping",
        description="What a topic is: 'label' takes each label (MMLU's 57 subjects), 'mmlu_category' the 4 categories of MMLU's authors: STEM, humanities, social sciences, other.",
    )
    topic_answer_choices: bool = Field(
        default=False,
        title="Topic Answer Choices",
        description="Whether the answers to choose from follow the text, as 'A. ...'. Needs a column 'choices' with lists of them, as MMLU has.",
    )
    topic_pooling: Literal["mean", "last_token"] = Field(
        default="mean",
        title="Topic Pooling",
        description="What a probe reads of a text: 'mean' the mean over its tokens, 'last_token' its last one. BOS, EOS and padding do not count.",
    )
    max_topics: int = Field(
        default=57,
        title="Most Topics",
        description="How many topics are taken at most, the most frequent first. MMLU has 57.",
    )
    topic_train_size: int = Field(
        default=70,
        title="Topic Train Set Size",
        description="Texts of each topic to train the probes on. MMLU has 100 of the rarest subject.",
    )
    topic_test_size: int = Field(
        default=30,
        title="Topic Test Set Size",
        description="Texts of each topic to test the probes on.",
    )
    n_topic_latents: int = Field(
        default=2048,
        title="Number of Topic-Aligned Latents",
        description="How many of the alive sparse latents most aligned with the topics are ablated. More than are alive means all of them.",
    )

    baseline: str | dict[str, str] | None = Field(
        default=None,
        title="Baseline",
        description="Name of the plain SAE in the same call whose latents aligned with the others' scaffolds are ablated, too; or a name for each scaffold SAE, by its name.",
    )

    def baseline_of(self, name: str) -> str | None:
        """What the SAE of this name has for a baseline; None if nothing, as itself."""
        baseline = self.baseline
        if isinstance(baseline, dict):
            baseline = baseline.get(name)
        return None if baseline == name else baseline

    @field_validator("n_aligned_latents")
    @classmethod
    def ensure_numbers_of_latents(cls, values: list[int]) -> list[int]:
        if not values or min(values) < 1 or len(set(values)) < len(values):
            raise ValueError("must be different numbers of latents, each at least 1")
        return sorted(values)

    @field_validator(
        "n_fit_tokens",
        "n_random_draws",
        "topic_train_size",
        "topic_test_size",
        "n_topic_latents",
    )
    @classmethod
    def ensure_at_least_one(cls, value: int) -> int:
        if value < 1:
            raise ValueError("must be at least 1")
        return value

    @field_validator("max_topics")
    @classmethod
    def ensure_two_topics(cls, value: int) -> int:
        if value < 2:
            raise ValueError("must be at least 2")
        return value

    @field_validator("pca_rank")
    @classmethod
    def ensure_positive_rank(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError("must be at least 1, or None")
        return value

    @field_validator("aligned_cosines")
    @classmethod
    def ensure_cosines(cls, values: list[float]) -> list[float]:
        if not all(0 <= value < 1 for value in values) or len(set(values)) < len(
            values
        ):
            raise ValueError("must be different cosines, each from 0 to below 1")
        return sorted(values)
