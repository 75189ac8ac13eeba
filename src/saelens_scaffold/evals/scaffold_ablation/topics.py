"""Whether the topic of a text can be read with the scaffold, without it, or without latents."""

from dataclasses import dataclass

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer

from saelens_scaffold.evals.bootstrap import Interval, SequenceBootstrap, interval
from saelens_scaffold.evals.labelled_data import load_labelled_data
from saelens_scaffold.evals.language_model import HookedModel, special_token_ids
from saelens_scaffold.evals.scaffold_ablation.eval_config import (
    ScaffoldAblationEvalConfig,
)
from saelens_scaffold.evals.scaffold_ablation.eval_output import TopicAccuracy
from saelens_scaffold.evals.scaffold_ablation.fit import SAEFit
from saelens_scaffold.evals.scaffold_ablation.interventions import (
    Change,
    Intervention,
    SAEBatch,
    without_latents,
)
from saelens_scaffold.evals.scaffold_ablation.latents import most_aligned
from saelens_scaffold.evals.subspaces import orthonormal_basis

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
    is_mmlu = config.topic_dataset == MMLU
    train, test = load_labelled_data(
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
        self._features_of_model: dict[tuple[str, int | None], _Features] = {}
        self._clean = self._features("clean", None)
        self._probes = {
            place: _probe(features, texts) for place, features in self._clean.items()
        }

    def accuracies(
        self, fit: SAEFit, interventions: list[Intervention]
    ) -> list[TopicAccuracy]:
        """
        Args:
            fit: Of the SAE.
            interventions: Those of the SAE; the ones in `INTERVENTIONS` are used.

        Returns:
            One entry for each intervention and each place where the topic is read, clean
            first.
        """
        latents = self._topic_latents(fit)
        changes = [i for i in interventions if i.name in INTERVENTIONS]
        changes.append(
            Intervention(
                "topic_latents_ablated",
                "dictionary",
                "the sparse latents most aligned with the topics' mean activations set to zero",
                [without_latents(fit, latents)],
                size=len(latents),
            )
        )
        found = [
            self._accuracy("clean", "nothing taken away", None, place, features)
            for place, features in self._clean.items()
        ]
        for change in changes:
            features_at = self._features_after(change, fit)
            found += [
                self._accuracy(
                    change.name, change.description, change.size, place, features
                )
                for place, features in features_at.items()
            ]
        return found

    def _accuracy(
        self,
        name: str,
        description: str,
        size: int | None,
        place: str,
        features: torch.Tensor,
    ) -> TopicAccuracy:
        accuracy = self._interval(self._probes[place], features)
        retrained = self._interval(_probe(features, self._texts), features)
        return TopicAccuracy(
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

    def _interval(self, probe: Pipeline, features: torch.Tensor) -> Interval:
        n_train, labels = self._texts.n_train, self._texts.labels
        predicted = torch.from_numpy(probe.predict(features[n_train:].numpy()))
        correct = (predicted == labels[n_train:]).float()
        replicates = (self._weights @ correct) / self._weights.sum(dim=1)
        return interval(replicates, self._config.confidence)

    def _topic_latents(self, fit: SAEFit) -> torch.Tensor:
        """The alive latents that lie most in the span of the topics' mean activations."""
        n_train = self._texts.n_train
        features = self._clean["hook_point"][:n_train].double()
        labels = self._texts.labels[:n_train]
        means = torch.stack(
            [features[labels == i].mean(dim=0) for i in range(len(self._texts.topics))]
        )
        basis = orthonormal_basis(means - means.mean(dim=0))
        decoder = fit.sae.sae.W_dec[fit.sae.rank :].detach()
        aligned, _ = most_aligned(decoder, fit.fired > 0, basis)
        return aligned[: self._config.n_topic_latents]

    def _features_after(self, change: Intervention, fit: SAEFit) -> "_Features":
        key = (change.name, change.size)
        if not change.of_model:
            return self._features(change.name, change.changes[0], fit)
        if key not in self._features_of_model:
            self._features_of_model[key] = self._features(
                change.name, change.changes[0], fit
            )
        return self._features_of_model[key]

    @torch.no_grad()
    def _features(
        self, name: str, change: Change | None, fit: SAEFit | None = None
    ) -> "_Features":
        """Mean activation of each text at the hook point and after the last layer."""
        hooked, texts = self._hooked, self._texts
        model = hooked.model
        special = torch.tensor(special_token_ids(model))
        means: dict[str, list[torch.Tensor]] = {"hook_point": [], "last_layer": []}
        # Texts of like length together, since padding is computed and thrown away. It
        # stands to the right, where no token of the text can see it.
        order = sorted(range(len(texts.tokens)), key=lambda i: len(texts.tokens[i]))
        size = self._config.llm_batch_size
        for start in tqdm(
            range(0, len(order), size), desc=f"Topics, {name}", leave=False
        ):
            batch = [texts.tokens[i] for i in order[start : start + size]]
            tokens = torch.nn.utils.rnn.pad_sequence(
                batch, batch_first=True, padding_value=int(special[0])
            )
            counts = (~torch.isin(tokens, special)).to(model.cfg.device)
            x, below = hooked.below(tokens.to(model.cfg.device))
            if change is not None:
                assert fit is not None
                x = x.clone()
                x[counts] = change(SAEBatch(x[counts], fit.sae.sae)).to(x.dtype)
            last = hooked.above(below, x, stop_at_layer=model.cfg.n_layers)
            n_tokens = counts.sum(dim=1, keepdim=True).clamp_min(1)
            for place, acts in (("hook_point", x), ("last_layer", last)):
                sums = (acts.float() * counts[..., None]).sum(dim=1)
                means[place] += list((sums / n_tokens).cpu())
        back = torch.tensor(order).argsort()
        return {place: torch.stack(found)[back] for place, found in means.items()}


_Features = dict[str, torch.Tensor]
"""For each place, the mean activations of all texts, shape (n_texts, d)."""


def _probe(features: torch.Tensor, texts: TopicTexts) -> Pipeline:
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    n_train = texts.n_train
    return probe.fit(features[:n_train].numpy(), texts.labels[:n_train].numpy())
