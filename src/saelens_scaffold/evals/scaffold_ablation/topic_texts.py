"""The texts whose topic is classified: which they are, and as tokens."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformer_lens import HookedTransformer

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.labelled_data import TextsByLabel, read_labelled_text
from saelens_scaffold.evals.scaffold_ablation import ScaffoldAblationEvalConfig
from saelens_scaffold.evals.text_data import TokenStream

MMLU = "cais/mmlu"
"""MMLU (Hendrycks et al. 2021, arXiv 2009.03300) on the Hub. Its columns are question,
subject, choices and answer."""

SUBJECTS_BY_CATEGORY: dict[str, list[str]] = json.loads(
    Path(__file__).with_name("mmlu_subjects.json").read_text(encoding="utf-8")
)
"""The grouping of MMLU's authors (`categories.py` of github.com/hendrycks/test). Other
harnesses differ in places: EleutherAI's has anatomy in STEM."""


@dataclass
class TopicTexts:
    """
    Texts of several topics, as tokens.

    Attributes:
        topics: Names of the topics.
        tokens: The texts one after another, those to train on first, each of shape (seq,).
        labels: Index of each text's topic, shape (n_texts,).
        n_train: Number of texts to train on.
        chance: Accuracy of always naming the most frequent topic.
    """

    topics: list[str]
    tokens: list[torch.Tensor]
    labels: torch.Tensor
    n_train: int
    chance: float


def read_topics(
    config: ScaffoldAblationEvalConfig,
) -> tuple[TextsByLabel, TextsByLabel]:
    """
    The texts of each topic, those to train on and those to test on.

    Raises:
        UserError: They cannot be read, or there are too few.
    """
    is_mmlu = config.topic_dataset == MMLU
    texts = read_labelled_text(
        config.topic_dataset,
        config.topic_text_column or ("question" if is_mmlu else "text"),
        config.topic_label_column or ("subject" if is_mmlu else "label"),
        subset=config.topic_subset or ("all" if is_mmlu else None),
        split=config.topic_split or ("test" if is_mmlu else None),
        max_classes=config.max_topics,
        choices_column="choices" if config.topic_answer_choices else None,
        class_of=_category_of if config.topic_grouping == "mmlu_category" else str,
    )
    return texts.sample(
        config.topic_train_size, config.topic_test_size, config.random_seed
    )


def load_topic_texts(
    config: ScaffoldAblationEvalConfig,
    model: HookedTransformer,
    stream: TokenStream,
) -> TopicTexts:
    """
    Args:
        config: Which texts.
        model: The language model, for its tokenizer.
        stream: Its context size is that of the longest text, beyond which texts are cut
            off. It also says whether they begin with BOS.

    Raises:
        UserError: The texts cannot be read, or there are too few.
    """
    train, test = read_topics(config)
    topics = list(train)
    texts = [
        (text, topics.index(topic))
        for part in (train, test)
        for topic, of_topic in part.items()
        for text in of_topic
    ]
    n_train = sum(map(len, train.values()))
    labels = torch.tensor([label for _, label in texts])

    def tokens_of(text: str) -> torch.Tensor:
        bos = stream.prepend_bos
        tokens = model.to_tokens(text, prepend_bos=bos, move_to_device=False)
        return tokens[0, : stream.context_size]

    return TopicTexts(
        topics=topics,
        tokens=[tokens_of(text) for text, _ in texts],
        labels=labels,
        n_train=n_train,
        chance=float(labels[n_train:].bincount().max() / len(labels[n_train:])),
    )


def _category_of(subject: str) -> str:
    """The category of an MMLU subject."""
    for category, subjects in SUBJECTS_BY_CATEGORY.items():
        if subject in subjects:
            return category
    n_subjects = sum(map(len, SUBJECTS_BY_CATEGORY.values()))
    raise UserError(
        f"topic_grouping is 'mmlu_category', but the label {subject!r} is none of MMLU's "
        f"{n_subjects} subjects ('abstract_algebra' to 'world_religions'); for other "
        "labels use topic_grouping 'label'"
    )
