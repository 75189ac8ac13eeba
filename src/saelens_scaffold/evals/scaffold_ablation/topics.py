"""Whether the topic of a text can be read with the scaffold, without it, or without latents."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer

from saelens_scaffold.evals.bootstrap import Interval, SequenceBootstrap, interval
from saelens_scaffold.evals.labelled_data import TextsByLabel, load_labelled_data
from saelens_scaffold.evals.language_model import (
    HookedBatch,
    HookedModel,
    special_token_ids,
)
from saelens_scaffold.evals.scaffold_ablation.eval_config import (
    ScaffoldAblationEvalConfig,
)
from saelens_scaffold.evals.scaffold_ablation.eval_output import TopicAccuracy
from saelens_scaffold.evals.scaffold_ablation.fit import SAEFit
from saelens_scaffold.evals.scaffold_ablation.interventions import (
    Intervention,
    SAEBatch,
    without_latents,
)
from saelens_scaffold.evals.scaffold_ablation.latents import most_aligned
from saelens_scaffold.subspaces import orthonormal_basis

MMLU = "cais/mmlu"

# What takes the scaffold, or its geometric twin, away. The others only change how much
# text costs to predict.
INTERVENTIONS = (
    "scaffold_subtracted",
    "scaffold_mean_ablated",
    "scaffold_projected_out",
    "pca_projected_out",
    "pca_mean_ablated",
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
    return load_labelled_data(
        config.topic_dataset,
        config.topic_text_column or ("question" if is_mmlu else "text"),
        config.topic_label_column or ("subject" if is_mmlu else "label"),
        config.topic_train_size,
        config.topic_test_size,
        config.random_seed,
        subset=config.topic_subset or ("all" if is_mmlu else None),
        split=config.topic_split or ("test" if is_mmlu else None),
        max_classes=config.max_topics,
    )


def load_topic_texts(
    config: ScaffoldAblationEvalConfig, model: HookedTransformer, context_size: int
) -> TopicTexts:
    """
    Args:
        config: Which texts.
        model: The language model, for its tokenizer.
        context_size: Longest text in tokens, BOS included; the rest is cut off.

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
            model.to_tokens(text, move_to_device=False)[0, :context_size]
            for text, _ in texts
        ],
        labels=labels,
        n_train=n_train,
        chance=float(labels[n_train:].bincount().max() / len(labels[n_train:])),
    )


_Features = dict[str, torch.Tensor]
"""For each place, the mean activations of all texts, shape (n_texts, d)."""


class TopicProbes:
    """
    Linear probes for the topic of a text, at the hook point and after the last layer
    (claim iii of the paper, arXiv 2606.14040).

    A probe is a logistic regression on the mean activation of a text, standardised. It is
    trained on clean activations; a second one, trained on the changed activations, tells
    whether the topic is gone or has only moved.

    Args:
        config: The configuration.
        hooked: The language model at the hook point.
        texts: The texts.
    """

    def __init__(
        self, config: ScaffoldAblationEvalConfig, hooked: HookedModel, texts: TopicTexts
    ):
        self._config = config
        self._hooked = hooked
        self._texts = texts
        # the same draws for every accuracy, so that differences are paired
        self._weights = SequenceBootstrap(config.n_bootstrap, config.random_seed).draw(
            len(texts.tokens) - texts.n_train
        )
        collected = _Collected(len(texts.tokens))
        for run in self._runs("Topics"):
            collected.add("clean", run, run.x)
        self._clean = collected.features["clean"]
        self._probes = {
            place: _probe(features, texts) for place, features in self._clean.items()
        }

    def accuracies(
        self, fits: dict[str, SAEFit], interventions: dict[str, list[Intervention]]
    ) -> dict[str, list[TopicAccuracy]]:
        """
        Args:
            fits: Of the SAEs, by their keys.
            interventions: On each SAE; the ones in `INTERVENTIONS` are used.

        Returns:
            For each SAE, one entry for each intervention and each place where the topic
            is read, clean first.
        """
        changes = {
            key: [i for i in of_sae if i.name in INTERVENTIONS]
            + [self._topic_latents_ablated(fits[key])]
            for key, of_sae in interventions.items()
        }
        collected = _Collected(len(self._texts.tokens))
        for run in self._runs("Topics, ablating"):
            done: set[str] = set()
            for key, of_sae in changes.items():
                batch = SAEBatch(run.x, fits[key].sae.sae)
                for change in of_sae:
                    name = self._feature_name(key, change)
                    if name not in done:
                        collected.add(name, run, change.changes[0](batch))
                        done.add(name)
        clean = self._accuracies_of("clean", "nothing taken away", None, self._clean)
        return {
            key: clean
            + [
                accuracy
                for change in of_sae
                for accuracy in self._accuracies_of(
                    change.name,
                    change.description,
                    change.size,
                    collected.features[self._feature_name(key, change)],
                )
            ]
            for key, of_sae in changes.items()
        }

    @staticmethod
    def _feature_name(key: str, change: Intervention) -> str:
        shared = f"{change.name} {change.size}"
        return shared if change.of_model else f"{key} {shared}"

    def _accuracies_of(
        self, name: str, description: str, size: int | None, features_at: _Features
    ) -> list[TopicAccuracy]:
        found: list[TopicAccuracy] = []
        for place, features in features_at.items():
            accuracy = self._interval(self._probes[place], features)
            retrained = self._interval(_probe(features, self._texts), features)
            found.append(
                TopicAccuracy(
                    intervention=name,
                    description=description,
                    read_at=place,
                    size=size,
                    accuracy=accuracy.estimate,
                    accuracy_ci_low=accuracy.low,
                    accuracy_ci_high=accuracy.high,
                    accuracy_retrained=retrained.estimate,
                    accuracy_retrained_ci_low=retrained.low,
                    accuracy_retrained_ci_high=retrained.high,
                )
            )
        return found

    def _interval(self, probe: Pipeline, features: torch.Tensor) -> Interval:
        n_train, labels = self._texts.n_train, self._texts.labels
        predicted = torch.from_numpy(probe.predict(features[n_train:].numpy()))
        correct = (predicted == labels[n_train:]).float()
        replicates = (self._weights @ correct) / self._weights.sum(dim=1)
        return interval(replicates, self._config.confidence)

    def _topic_latents_ablated(self, fit: SAEFit) -> Intervention:
        """Of the alive latents, those that lie most in the span of the topics' means."""
        n_train = self._texts.n_train
        features = self._clean["hook_point"][:n_train].double()
        labels = self._texts.labels[:n_train]
        means = torch.stack(
            [features[labels == i].mean(dim=0) for i in range(len(self._texts.topics))]
        )
        basis = orthonormal_basis(means - means.mean(dim=0))
        decoder = fit.sae.sae.W_dec[fit.sae.rank :].detach()
        aligned, _ = most_aligned(decoder, fit.fired > 0, basis)
        latents = aligned[: self._config.n_topic_latents]
        return Intervention(
            "topic_latents_ablated",
            "dictionary",
            "the sparse latents most aligned with the topics' mean activations set to zero",
            [without_latents(fit, latents)],
            size=len(latents),
        )

    @torch.no_grad()
    def _runs(self, desc: str) -> Iterator["_TopicRun"]:
        """The texts, run up to the hook point once."""
        # Texts of like length together, since padding is computed and thrown away. It
        # stands to the right, where no token of the text can see it.
        tokens = self._texts.tokens
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        size = self._config.llm_batch_size
        for start in tqdm(range(0, len(order), size), desc=desc, unit="batch"):
            indices = order[start : start + size]
            yield _TopicRun(self._hooked, indices, [tokens[i] for i in indices])


class _TopicRun:
    """A batch of texts: run once up to the hook point, and on from there at will."""

    def __init__(
        self, hooked: HookedModel, indices: list[int], texts: list[torch.Tensor]
    ):
        special = torch.tensor(special_token_ids(hooked.model))
        tokens = torch.nn.utils.rnn.pad_sequence(
            texts, batch_first=True, padding_value=int(special[0])
        )
        device = hooked.model.cfg.device
        self.indices = torch.tensor(indices)
        self._counts = (~torch.isin(tokens, special)).to(device)
        self._batch = HookedBatch(hooked, tokens.to(device), self._counts)
        self._n_layers = hooked.model.cfg.n_layers
        self.x = self._batch.x

    def mean_activations(self, x: torch.Tensor) -> _Features:
        """Of each text, with other activations of the tokens that count."""
        full = self._batch.full_with(x)
        last = self._batch.above(full, stop_at_layer=self._n_layers)
        n_tokens = self._counts.sum(dim=1, keepdim=True).clamp_min(1)

        def mean(acts: torch.Tensor) -> torch.Tensor:
            sums = (acts.float() * self._counts[..., None]).sum(dim=1)
            return (sums / n_tokens).cpu()

        return {"hook_point": mean(full), "last_layer": mean(last)}


class _Collected:
    """Features of all texts, by the name of the intervention, filled batch by batch."""

    def __init__(self, n_texts: int):
        self._n_texts = n_texts
        self.features: dict[str, _Features] = {}

    @torch.no_grad()
    def add(self, name: str, run: _TopicRun, x: torch.Tensor) -> None:
        found = self.features.setdefault(name, {})
        for place, means in run.mean_activations(x).items():
            if place not in found:
                found[place] = torch.zeros(self._n_texts, means.shape[1])
            found[place][run.indices] = means


def _probe(features: torch.Tensor, texts: TopicTexts) -> Pipeline:
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    n_train = texts.n_train
    return probe.fit(features[:n_train].numpy(), texts.labels[:n_train].numpy())
