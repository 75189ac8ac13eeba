"""The texts whose topic is classified: which they are, and as tokens."""

from dataclasses import dataclass

import torch
from transformer_lens import HookedTransformer

from saelens_scaffold.evals.labelled_data import TextsByLabel, read_labelled_text
from saelens_scaffold.evals.scaffold_ablation.eval_config import (
    ScaffoldAblationEvalConfig,
)
from saelens_scaffold.evals.scaffold_ablation.mmlu import (
    CHOICES_COLUMN,
    MMLU,
    category_of,
)


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
        ValueError: They cannot be read, or there are too few.
    """
    is_mmlu = config.topic_dataset == MMLU
    texts = read_labelled_text(
        config.topic_dataset,
        config.topic_text_column or ("question" if is_mmlu else "text"),
        config.topic_label_column or ("subject" if is_mmlu else "label"),
        subset=config.topic_subset or ("all" if is_mmlu else None),
        split=config.topic_split or ("test" if is_mmlu else None),
        max_classes=config.max_topics,
        choices_column=CHOICES_COLUMN if config.topic_answer_choices else None,
        class_of=category_of if config.topic_grouping == "mmlu_category" else str,
    )
    return texts.sample(
        config.topic_train_size, config.topic_test_size, config.random_seed
    )


def load_topic_texts(
    config: ScaffoldAblationEvalConfig,
    model: HookedTransformer,
    context_size: int,
    prepend_bos: bool,
) -> TopicTexts:
    """
    Args:
        config: Which texts.
        model: The language model, for its tokenizer.
        context_size: Longest text in tokens, BOS included; the rest is cut off.
        prepend_bos: Whether each text begins with BOS.

    Raises:
        ValueError: The texts cannot be read, or there are too few.
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
    return TopicTexts(
        topics=topics,
        tokens=[
            model.to_tokens(text, prepend_bos=prepend_bos, move_to_device=False)[
                0, :context_size
            ]
            for text, _ in texts
        ],
        labels=labels,
        n_train=n_train,
        chance=float(labels[n_train:].bincount().max() / len(labels[n_train:])),
    )
