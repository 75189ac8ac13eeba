"""Whether the topic of a text can be read with the scaffold, without it, or without latents."""

from collections.abc import Iterator
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from saelens_scaffold.evals.bootstrap import Interval, SequenceBootstrap, interval
from saelens_scaffold.evals.language_model import (
    HookedBatch,
    HookedModel,
    special_token_ids,
)
from saelens_scaffold.evals.scaffold_ablation.eval_config import (
    ScaffoldAblationEvalConfig,
)
from saelens_scaffold.evals.scaffold_ablation.fit import SAEFit
from saelens_scaffold.evals.scaffold_ablation.interventions import (
    WITH_SPECIAL_TOKENS,
    Intervention,
    SAEBatch,
    without_latents,
)
from saelens_scaffold.evals.scaffold_ablation.latents import most_aligned
from saelens_scaffold.evals.scaffold_ablation.topic_output import (
    TopicAccuracy,
    TopicMetrics,
)
from saelens_scaffold.evals.scaffold_ablation.topic_texts import TopicTexts
from saelens_scaffold.saes.subspaces import orthonormal_basis

# What takes the scaffold, or its geometric twin, away. The others only change how much
# text costs to predict.
INTERVENTIONS = (
    "scaffold_subtracted",
    "scaffold_mean_ablated",
    "scaffold_projected_out",
    "pca_projected_out",
    "pca_mean_ablated",
)


_Features = dict[str, torch.Tensor]
"""For each place, the pooled activations of all texts, shape (n_texts, d)."""


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
        self._config = config
        self._hooked = hooked
        self._texts = texts
        # the same draws for every accuracy, so that differences are paired
        self._weights = SequenceBootstrap(config.n_bootstrap, config.random_seed).draw(
            len(texts.tokens) - texts.n_train
        )
        collected = _Collected(len(texts.tokens))
        for run in self._runs("Topics"):
            collected.add("clean", run.indices, run.features(run.x(False), False))
        self._clean = collected.features["clean"]
        self._probes = {
            place: _probe(features, texts) for place, features in self._clean.items()
        }

    def accuracies(
        self,
        fits: dict[bool, dict[str, SAEFit]],
        interventions: dict[str, list[Intervention]],
    ) -> dict[str, list[TopicAccuracy]]:
        """
        Args:
            fits: Of the SAEs, by their keys: without special tokens under False, and with
                them under True if they are to be included, too.
            interventions: On each SAE; the ones in `INTERVENTIONS` are used.

        Returns:
            For each SAE, one entry for each intervention and each place where the topic
            is read, clean first.
        """
        changes = {
            key: [i for i in of_sae if _base_name(i) in INTERVENTIONS]
            + [
                self._topic_latents_ablated(of[key], special)
                for special, of in fits.items()
            ]
            for key, of_sae in interventions.items()
        }
        features = self._features_after(fits[False], changes)
        clean = Intervention("clean", "reference", "nothing taken away", [])
        found = {"clean": self._accuracies_of(clean, self._clean)}
        for name, (change, of_texts) in features.items():
            found[name] = self._accuracies_of(change, of_texts)
        return {
            key: found["clean"]
            + [a for change in of_sae for a in found[self._feature_name(key, change)]]
            for key, of_sae in changes.items()
        }

    @torch.no_grad()
    def _features_after(
        self, fits: dict[str, SAEFit], changes: dict[str, list[Intervention]]
    ) -> dict[str, tuple[Intervention, _Features]]:
        """Each intervention and the features it leaves, once if all SAEs share it."""
        collected = _Collected(len(self._texts.tokens))
        names = {
            self._feature_name(key, change): change
            for key, of_sae in changes.items()
            for change in of_sae
        }
        for run in self._runs("Topics, ablating"):
            done: set[str] = set()
            for key, of_sae in changes.items():
                batches = {
                    special: SAEBatch(run.x(special), fits[key].sae.sae)
                    for special in {change.special_tokens for change in of_sae}
                }
                for change in of_sae:
                    name = self._feature_name(key, change)
                    if name not in done:
                        changed = change.changes[0](batches[change.special_tokens])
                        found = run.features(changed, change.special_tokens)
                        collected.add(name, run.indices, found)
                        done.add(name)
        return {name: (names[name], collected.features[name]) for name in names}

    @staticmethod
    def _feature_name(key: str, change: Intervention) -> str:
        shared = f"{change.name} {change.size}"
        return shared if change.of_model else f"{key} {shared}"

    def _accuracies_of(
        self, change: Intervention, features_at: _Features
    ) -> list[TopicAccuracy]:
        found: list[TopicAccuracy] = []
        for place, features in features_at.items():
            accuracy = self._interval(self._probes[place], features)
            retrained = self._interval(_probe(features, self._texts), features)
            found.append(
                TopicAccuracy(
                    intervention=change.name,
                    description=change.description,
                    read_at=place,
                    special_tokens=change.special_tokens,
                    size=change.size,
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

    def _topic_latents_ablated(self, fit: SAEFit, special: bool) -> Intervention:
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
        change = Intervention(
            "topic_latents_ablated",
            "dictionary",
            "the sparse latents most aligned with the topics' mean activations set to zero",
            [without_latents(fit, latents)],
            size=len(latents),
        )
        return change.including_special_tokens() if special else change

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
            yield _TopicRun(
                self._hooked,
                self._config.topic_pooling,
                indices,
                [tokens[i] for i in indices],
            )


class _TopicRun:
    """A batch of texts: run once up to the hook point, and on from there at will."""

    def __init__(
        self,
        hooked: HookedModel,
        pooling: str,
        indices: list[int],
        texts: list[torch.Tensor],
    ):
        special = torch.tensor(special_token_ids(hooked.model))
        tokens = torch.nn.utils.rnn.pad_sequence(
            texts, batch_first=True, padding_value=int(special[0])
        )
        lengths = torch.tensor([len(text) for text in texts])
        device = hooked.model.cfg.device
        is_text = (~torch.isin(tokens, special)).to(device)
        # special tokens of the texts, not what was added to make them equally long
        in_text = (torch.arange(tokens.shape[1]) < lengths[:, None]).to(device)
        self._masks = {False: is_text, True: in_text}
        self._batches = {False: HookedBatch(hooked, tokens.to(device), is_text)}
        self._weights = _pooling_weights(is_text, pooling)[..., None]
        self._n_layers = hooked.model.cfg.n_layers
        self.indices = torch.tensor(indices)

    def x(self, special_tokens: bool) -> torch.Tensor:
        """Activations of the texts, with or without special tokens, (n_tokens, d_in)."""
        return self._changing(special_tokens).x

    def features(self, x: torch.Tensor, special_tokens: bool) -> _Features:
        """What a probe reads of each text with other activations of those tokens."""
        batch = self._changing(special_tokens)
        full = batch.full_with(x)
        last = batch.above(full, stop_at_layer=self._n_layers)
        return {
            place: (acts.float() * self._weights).sum(dim=1).cpu()
            for place, acts in (("hook_point", full), ("last_layer", last))
        }

    def _changing(self, special_tokens: bool) -> HookedBatch:
        if special_tokens not in self._batches:
            mask = self._masks[special_tokens]
            self._batches[special_tokens] = self._batches[False].changing(mask)
        return self._batches[special_tokens]


def _pooling_weights(is_text: torch.Tensor, pooling: str) -> torch.Tensor:
    """What each token adds to the features of its text, shape (batch, seq)."""
    weights = is_text.float()
    if pooling == "last_token":
        from_here_on = weights.flip(1).cumsum(dim=1).flip(1)
        weights *= from_here_on == 1
    return weights / weights.sum(dim=1, keepdim=True).clamp_min(1)


class _Collected:
    """Features of all texts, by the name of the intervention, filled batch by batch."""

    def __init__(self, n_texts: int):
        self._n_texts = n_texts
        self.features: dict[str, _Features] = {}

    def add(self, name: str, indices: torch.Tensor, features: _Features) -> None:
        found = self.features.setdefault(name, {})
        for place, of_batch in features.items():
            if place not in found:
                found[place] = torch.zeros(self._n_texts, of_batch.shape[1])
            found[place][indices] = of_batch


def _probe(features: torch.Tensor, texts: TopicTexts) -> Pipeline:
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    n_train = texts.n_train
    return probe.fit(features[:n_train].numpy(), texts.labels[:n_train].numpy())


def _base_name(change: Intervention) -> str:
    return change.name.removesuffix(WITH_SPECIAL_TOKENS)


def topic_metrics(
    texts: TopicTexts | None, accuracies: list[TopicAccuracy], fit: SAEFit
) -> TopicMetrics:
    """
    The headline accuracies.

    Args:
        texts: The texts; None if topics were not classified.
        accuracies: Of one SAE, by `TopicProbes`.
        fit: Of that SAE, special tokens excluded.
    """
    if texts is None:
        return TopicMetrics()
    of = {a.intervention: a for a in accuracies if a.read_at == "last_layer"}
    metrics: dict[str, Any] = {}
    for name in ("scaffold_mean_ablated", "topic_latents_ablated"):
        if name in of:  # a plain SAE has no scaffold
            for suffix in ("", "_retrained"):
                for end in ("", "_ci_low", "_ci_high"):
                    value = getattr(of[name], f"accuracy{suffix}{end}")
                    metrics[f"accuracy_{name}{suffix}{end}"] = value
    return TopicMetrics(
        chance=texts.chance,
        n_topics=len(texts.topics),
        accuracy_clean=of["clean"].accuracy,
        n_topic_latents=of["topic_latents_ablated"].size,
        n_topic_latents_alive=int((fit.fired > 0).sum()),
        **metrics,
    )
