"""Whether the topic of a text can be read with the scaffold, without it, or without latents."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.intervals import SequenceBootstrap, estimates
from saelens_scaffold.evals.labelled_data import TextsByLabel, read_labelled_text
from saelens_scaffold.evals.model import HookedBatch, HookedModel, pooled
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.evals.scaffold_ablation import ScaffoldAblationEvalConfig
from saelens_scaffold.evals.scaffold_ablation import interventions as ablations
from saelens_scaffold.evals.scaffold_ablation.eval_output import TopicAccuracy
from saelens_scaffold.evals.scaffold_ablation.fit import Fit
from saelens_scaffold.evals.tokens import TokenSelection, TokenStream, special_ids
from saelens_scaffold.saes.subspaces import orthonormal_basis

MMLU = "cais/mmlu"
"""MMLU (Hendrycks et al. 2021, arXiv 2009.03300) on the Hub. Its columns are question,
subject, choices and answer."""

SUBJECTS_BY_CATEGORY: dict[str, list[str]] = json.loads(
    Path(__file__).with_name("mmlu_subjects.json").read_text(encoding="utf-8")
)
"""The grouping of MMLU's authors (`categories.py` of github.com/hendrycks/test). Other
harnesses differ in places: EleutherAI's has anatomy in STEM."""

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
        stream: Its context size is that of the longest text, beyond which texts are cut
            off. It also says whether they begin with BOS, and which tokens count; texts
            being short, they do so at all positions.

    Attributes:
        n_topics: Number of topics.
        chance: Accuracy of always naming the most frequent topic.

    Raises:
        UserError: The texts cannot be read, or there are too few.
    """

    def __init__(
        self,
        config: ScaffoldAblationEvalConfig,
        hooked: HookedModel,
        stream: TokenStream,
    ):
        self._config, self._hooked = config, hooked
        train, test = read_topics(config)
        texts = [
            (text, label)
            for part in (train, test)
            for label, of_topic in enumerate(part.values())
            for text in of_topic
        ]
        selection = self._selection = replace(stream.selection, seqpos_slice=[None])
        to_tokens = partial(
            hooked.model.to_tokens,
            prepend_bos=False,
            truncate=False,
            move_to_device=False,
        )
        tokenizer: Any = hooked.model.tokenizer
        bos = [tokenizer.bos_token_id] if selection.prepend_bos else []
        first, size = torch.tensor(bos, dtype=torch.long), selection.context_size
        tokens = (torch.cat([first, to_tokens(text)[0]]) for text, _ in texts)
        self._tokens = [of_text[:size] for of_text in tokens]
        # texts of similar length share a batch, since padding is computed and dropped
        self._order = sorted(range(len(texts)), key=lambda i: len(self._tokens[i]))
        self._n_train = sum(map(len, train.values()))
        labels = torch.tensor([label for _, label in texts])
        self._train_labels, self._test_labels = labels.tensor_split([self._n_train])
        # the same draws for every accuracy, so that differences are paired
        bootstrap = SequenceBootstrap(config.n_bootstrap, config.random_seed)
        self._weights = bootstrap.draw(len(self._test_labels))
        self._probes: dict[str, Pipeline] = {}
        self.n_topics = len(train)
        self.chance = float(self._test_labels.bincount().max() / len(self._test_labels))

    def accuracies(
        self,
        fits: Mapping[bool, Fit],
        interventions: Mapping[str, list[ablations.Intervention]],
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
        clean = replace(ablations.CLEAN, description="nothing taken away")
        unchanged = {key: [clean] for key in interventions}
        (of_clean,) = self._features("Topics", group[:1], unchanged).values()
        self._probes = {place: self._probe(of_clean[place]) for place in _PLACES}
        basis = self._topic_basis(of_clean["hook_point"])
        suffix = ablations.WITH_SPECIAL_TOKENS
        changes = {
            key: [
                *(i for i in of if i.name.removesuffix(suffix) in INTERVENTIONS),
                *self._topic_latents_ablated(fits, key, basis),
            ]
            for key, of in interventions.items()
        }
        features = self._features("Topics, ablating", group, changes)
        features[clean.identity()] = of_clean
        every = {i.identity(key): i for key, of in changes.items() for i in of}
        every[clean.identity()] = clean
        read = {i: [*self._read(change, features[i])] for i, change in every.items()}
        return {
            key: [a for i in [clean, *of] for a in read[i.identity(key)]]
            for key, of in changes.items()
        }

    def _read(
        self, change: ablations.Intervention, features: _Features
    ) -> Iterator[TopicAccuracy]:
        for place, x in features.items():
            figures = {
                "accuracy": self._accuracy(self._probes[place], x),
                "accuracy_retrained": self._accuracy(self._probe(x), x),
            }
            figures = estimates(self._config.confidence, **figures)
            yield TopicAccuracy(read_at=place, **change.fields(), **figures)

    def _probe(self, features: torch.Tensor) -> Pipeline:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        train = features[: self._n_train].numpy()
        return probe.fit(train, self._train_labels.numpy())

    def _accuracy(self, probe: Pipeline, features: torch.Tensor) -> torch.Tensor:
        """On the test texts, in every replicate."""
        predicted = torch.from_numpy(probe.predict(features[self._n_train :].numpy()))
        correct = (predicted == self._test_labels).float()
        return (self._weights @ correct) / self._weights.sum(dim=1)

    def _topic_basis(self, features: torch.Tensor) -> torch.Tensor:
        """Orthonormal rows that span the topics' mean activations."""
        train, labels = features[: self._n_train].double(), self._train_labels
        means = [train[labels == i].mean(dim=0) for i in range(self.n_topics)]
        centred = torch.stack(means) - torch.stack(means).mean(dim=0)
        return orthonormal_basis(centred)

    def _topic_latents_ablated(
        self, fits: Mapping[bool, Fit], sae_key: str, basis: torch.Tensor
    ) -> Iterator[ablations.Intervention]:
        """Without the alive latents that lie most in the span of the topics' means."""
        for special, fit in fits.items():
            of = fit.saes[sae_key]
            latents = of.most_aligned(basis)[0][: self._config.n_topic_latents]
            removal = ablations.without_latents(of, latents)
            change = ablations.Intervention(
                "topic_latents_ablated", [removal], "dictionary", len(latents)
            )
            yield change.fitted_with(special)

    @torch.no_grad()
    def _features(
        self,
        desc: str,
        group: Sequence[SelectedSAE],
        changes: Mapping[str, list[ablations.Intervention]],
    ) -> dict[ablations.Identity, _Features]:
        """Features of all texts after each distinct intervention."""
        parts: defaultdict[ablations.Identity, list[_Features]] = defaultdict(list)
        size = self._config.llm_batch_size
        for start in tqdm(range(0, len(self._order), size), desc=desc, unit="batch"):
            texts = [self._tokens[i] for i in self._order[start : start + size]]
            batch = _TextBatch(self._config, self._hooked, texts, self._selection)
            for identity, change, of in ablations.distinct(group, changes, batch.runs):
                parts[identity].append(batch.features(change, of))
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
        selection: TokenSelection,
    ):
        tokenizer, device = hooked.model.tokenizer, hooked.model.cfg.device
        # to the right, where no token of the text attends to it
        tokens = torch.nn.utils.rnn.pad_sequence(
            texts, batch_first=True, padding_value=int(special_ids(tokenizer)[0])
        )
        counts = selection.counts(tokens, tokenizer).to(device)
        run = HookedBatch(hooked, tokens.to(device), counts)
        self.runs = {False: run}
        if config.include_special_tokens:
            # special tokens of the texts, but not the padding added here
            lengths = torch.tensor([len(text) for text in texts])
            in_text = torch.arange(tokens.shape[1]) < lengths[:, None]
            in_text &= selection.counts(tokens, tokenizer, special=True)
            self.runs[True] = run.changing(in_text.to(device))
        self._weights = _pooling_weights(counts, config.topic_pooling)

    def features(
        self, change: ablations.Intervention, of: ablations.Batch
    ) -> _Features:
        """What a probe reads of each text with changed activations."""
        run = self.runs[change.special_tokens]

        def make() -> _Features:
            full = run.full_with(change.changes[0](of))
            at_hook_point = pooled(full, self._weights).cpu()
            last = run.pooled_above(full, self._weights).cpu()
            return {"hook_point": at_hook_point, "last_layer": last}

        return ablations.once("features", change, run, make, self._weights)


def _pooling_weights(counts: torch.Tensor, pooling: str) -> torch.Tensor:
    """What each token adds to the features of its text, shape (batch, seq)."""
    weights = counts.float()
    if pooling == "last_token":
        from_here_on = weights.flip(1).cumsum(dim=1).flip(1)
        weights *= from_here_on == 1
    return weights / weights.sum(dim=1, keepdim=True).clamp_min(1)


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
