"""Whether the topic of a text can be read with the scaffold, without it, or without latents."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from saelens_scaffold.evals.bootstrap import SequenceBootstrap
from saelens_scaffold.evals.language_model import (
    HookedBatch,
    HookedModel,
    special_token_ids,
)
from saelens_scaffold.evals.output_fields import estimates
from saelens_scaffold.evals.scaffold_ablation import ScaffoldAblationEvalConfig
from saelens_scaffold.evals.scaffold_ablation.eval_output import TopicAccuracy
from saelens_scaffold.evals.scaffold_ablation.fit import Fit
from saelens_scaffold.evals.scaffold_ablation.interventions import (
    CLEAN,
    WITH_SPECIAL_TOKENS,
    Identity,
    Intervention,
    distinct,
    without_latents,
)
from saelens_scaffold.evals.scaffold_ablation.topic_texts import TopicTexts
from saelens_scaffold.evals.selected_saes import SelectedSAE
from saelens_scaffold.saes.subspaces import orthonormal_basis

# What removes the scaffold, or its geometric twin. The others only change how much text
# costs to predict.
INTERVENTIONS = (
    "scaffold_subtracted",
    "scaffold_mean_ablated",
    "scaffold_projected_out",
    "pca_projected_out",
    "pca_mean_ablated",
)

_PLACES = ("hook_point", "last_layer")

_Features = dict[str, torch.Tensor]
"""The pooled activations of texts at each place, shape (n_texts, d)."""


class TopicProbes:
    """
    Linear probes for the topic of a text, at the hook point and after the last layer
    (claim iii of the paper, arXiv 2606.14040).

    A probe is a logistic regression on the pooled activations of a text, standardised. It
    is trained on clean activations; a second one, trained on the changed activations,
    tells whether the topic is gone or has only moved.

    Args:
        config: The configuration.
        hooked: The language model at the hook point.
        texts: The texts.
    """

    def __init__(
        self, config: ScaffoldAblationEvalConfig, hooked: HookedModel, texts: TopicTexts
    ):
        self._config, self._hooked, self._texts = config, hooked, texts
        self._probes: dict[str, Pipeline] = {}
        # Texts of similar length share a batch, since padding is computed and dropped.
        n_texts = len(texts.tokens)
        self._order = sorted(range(n_texts), key=lambda i: len(texts.tokens[i]))
        # the same draws for every accuracy, so that differences are paired
        self._weights = SequenceBootstrap(config.n_bootstrap, config.random_seed).draw(
            n_texts - texts.n_train
        )

    def accuracies(
        self, fits: Mapping[bool, Fit], interventions: Mapping[str, list[Intervention]]
    ) -> dict[str, list[TopicAccuracy]]:
        """
        Args:
            fits: Statistics without special tokens under False, and with them under True
                if they are included.
            interventions: On each SAE by its key; those in `INTERVENTIONS` are used.

        Returns:
            For each SAE, one entry for each intervention and each place where the topic
            is read, clean first.
        """
        group = [fits[False].saes[key].sae for key in interventions]
        clean = replace(CLEAN, description="nothing taken away")
        (of_clean,) = self._features(
            "Topics", group[:1], {key: [clean] for key in interventions}
        ).values()
        self._probes = {place: self._probe(of_clean[place]) for place in _PLACES}
        basis = self._topic_basis(of_clean["hook_point"])
        changes = {
            key: [
                *(i for i in of_sae if _base_name(i) in INTERVENTIONS),
                *self._topic_latents_ablated(fits, key, basis),
            ]
            for key, of_sae in interventions.items()
        }
        features = self._features("Topics, ablating", group, changes)
        read = {clean.identity(): self._accuracies_of(clean, of_clean)}
        for key, of_sae in changes.items():
            for change in of_sae:
                identity = change.identity(key)
                if identity not in read:
                    read[identity] = self._accuracies_of(change, features[identity])
        return {
            key: [a for i in [clean, *of_sae] for a in read[i.identity(key)]]
            for key, of_sae in changes.items()
        }

    def _accuracies_of(
        self, change: Intervention, features: _Features
    ) -> list[TopicAccuracy]:
        return [
            TopicAccuracy(
                intervention=change.name,
                description=change.description,
                read_at=place,
                special_tokens=change.special_tokens,
                size=change.size,
                **estimates(
                    self._config.confidence,
                    accuracy=self._accuracy(self._probes[place], features[place]),
                    accuracy_retrained=self._accuracy(
                        self._probe(features[place]), features[place]
                    ),
                ),
            )
            for place in _PLACES
        ]

    def _probe(self, features: torch.Tensor) -> Pipeline:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        n_train, labels = self._texts.n_train, self._texts.labels
        return probe.fit(features[:n_train].numpy(), labels[:n_train].numpy())

    def _accuracy(self, probe: Pipeline, features: torch.Tensor) -> torch.Tensor:
        """On the test texts, in every replicate."""
        n_train, labels = self._texts.n_train, self._texts.labels
        predicted = torch.from_numpy(probe.predict(features[n_train:].numpy()))
        correct = (predicted == labels[n_train:]).float()
        return (self._weights @ correct) / self._weights.sum(dim=1)

    def _topic_basis(self, features: torch.Tensor) -> torch.Tensor:
        """Orthonormal rows that span the topics' mean activations."""
        n_train, n_topics = self._texts.n_train, len(self._texts.topics)
        train, labels = features[:n_train].double(), self._texts.labels[:n_train]
        means = torch.stack([train[labels == i].mean(dim=0) for i in range(n_topics)])
        return orthonormal_basis(means - means.mean(dim=0))

    def _topic_latents_ablated(
        self, fits: Mapping[bool, Fit], sae_key: str, basis: torch.Tensor
    ) -> Iterator[Intervention]:
        """Without the alive latents that lie most in the span of the topics' means."""
        for special, fit in fits.items():
            of = fit.saes[sae_key]
            latents = of.most_aligned(basis)[0][: self._config.n_topic_latents]
            change = Intervention(
                "topic_latents_ablated",
                "the sparse latents most aligned with the topics' mean activations set to "
                "zero",
                [without_latents(of, latents)],
                kind="dictionary",
                size=len(latents),
            )
            yield change.including_special_tokens() if special else change

    @torch.no_grad()
    def _features(
        self,
        desc: str,
        group: Sequence[SelectedSAE],
        changes: Mapping[str, list[Intervention]],
    ) -> dict[Identity, _Features]:
        """Features of all texts after each distinct intervention."""
        parts: defaultdict[Identity, list[_Features]] = defaultdict(list)
        size = self._config.llm_batch_size
        for start in tqdm(range(0, len(self._order), size), desc=desc, unit="batch"):
            texts = [self._texts.tokens[i] for i in self._order[start : start + size]]
            batch = _TextBatch(self._config, self._hooked, texts)
            for identity, change, of in distinct(group, changes, batch.runs):
                x = change.changes[0](of)
                parts[identity].append(batch.features(x, change.special_tokens))
        rank_of_text = torch.tensor(self._order).argsort()
        return {
            identity: {
                place: torch.cat([part[place] for part in of])[rank_of_text]
                for place in _PLACES
            }
            for identity, of in parts.items()
        }


class _TextBatch:
    """
    A batch of texts: run once up to the hook point, and on from there with any change.

    Attributes:
        runs: The run of which activations may be changed: of special tokens, too, under
            True, if they are included.
    """

    def __init__(
        self,
        config: ScaffoldAblationEvalConfig,
        hooked: HookedModel,
        texts: list[torch.Tensor],
    ):
        special = torch.tensor(special_token_ids(hooked.model))
        device = hooked.model.cfg.device
        # to the right, where no token of the text attends to it
        tokens = torch.nn.utils.rnn.pad_sequence(
            texts, batch_first=True, padding_value=int(special[0])
        )
        is_text = (~torch.isin(tokens, special)).to(device)
        run = HookedBatch(hooked, tokens.to(device), is_text)
        self.runs = {False: run}
        if config.include_special_tokens:
            # special tokens of the texts, but not the padding added here
            lengths = torch.tensor([len(text) for text in texts])
            in_text = torch.arange(tokens.shape[1]) < lengths[:, None]
            self.runs[True] = run.changing(in_text.to(device))
        self._weights = _pooling_weights(is_text, config.topic_pooling)[..., None]
        self._n_layers = hooked.model.cfg.n_layers

    def features(self, x: torch.Tensor, special_tokens: bool) -> _Features:
        """What a probe reads of each text with other activations of those tokens."""
        run = self.runs[special_tokens]
        full = run.full_with(x)
        last = run.above(full, stop_at_layer=self._n_layers)
        return {
            place: (acts.float() * self._weights).sum(dim=1).cpu()
            for place, acts in zip(_PLACES, (full, last), strict=True)
        }


def _pooling_weights(is_text: torch.Tensor, pooling: str) -> torch.Tensor:
    """What each token adds to the features of its text, shape (batch, seq)."""
    weights = is_text.float()
    if pooling == "last_token":
        from_here_on = weights.flip(1).cumsum(dim=1).flip(1)
        weights *= from_here_on == 1
    return weights / weights.sum(dim=1, keepdim=True).clamp_min(1)


def _base_name(change: Intervention) -> str:
    return change.name.removesuffix(WITH_SPECIAL_TOKENS)
