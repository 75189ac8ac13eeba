"""Topic classification of the scaffold ablation: MMLU's columns, pooling, probes."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    IterableDatasetDict,
    Sequence,
    Value,
)
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformer_lens import HookedTransformer

from eval_helpers import HOOK, eval_sae
from saelens_scaffold.evals.runner import run_eval
from saelens_scaffold.evals.scaffold_ablation import ScaffoldAblationEvalConfig
from saelens_scaffold.evals.scaffold_ablation.topics import (
    SUBJECTS_BY_CATEGORY,
    read_topics,
)
from saelens_scaffold.models import datasets, load_embedded_model

WORDS = {
    "abstract_algebra": "group ring field ideal kernel",
    "college_physics": "force mass photon momentum charge",
    "philosophy": "ethics virtue duty reason Kant",
    "sociology": "class norm status family culture",
    "virology": "virus capsid host vaccine RNA",
}
"""Subjects of all four categories, STEM twice, and what their questions are about."""


@pytest.fixture(scope="module")
def mmlu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with the splits, columns and types of cais/mmlu."""
    generator = torch.Generator().manual_seed(0)

    def question(subject: str, i: int) -> dict[str, Any]:
        words = WORDS[subject].split()
        drawn = [words[j] for j in torch.randint(5, (6,), generator=generator)]
        return {
            "question": f"Question {i}: what do {' '.join(drawn)} mean?",
            "subject": subject,
            "choices": [f"{word} {i}" for word in words[:4]],
            "answer": i % 4,
        }

    rows = [question(subject, i) for i in range(24) for subject in WORDS]
    features = Features(
        {
            "question": Value("string"),
            "subject": Value("string"),
            "choices": Sequence(Value("string")),
            "answer": ClassLabel(names=["A", "B", "C", "D"]),
        }
    )
    path = tmp_path_factory.mktemp("mmlu") / "all"
    DatasetDict(
        {
            "test": Dataset.from_list(rows, features=features),
            "dev": Dataset.from_list(rows[:5], features=features),
        }
    ).save_to_disk(str(path))
    return path


def config(mmlu: Path | str, **overrides: Any) -> ScaffoldAblationEvalConfig:
    kwargs: dict[str, Any] = {
        "model_name": "py-neox",
        "dataset": "python-stdlib",
        "dataset_split": "test",
        "n_fit_tokens": 300,
        "n_tokens": 100,
        "n_bootstrap": 20,
        "n_random_draws": 1,
        "n_aligned_latents": [5],
        "topic_dataset": str(mmlu),
        "topic_split": "test",
        "topic_text_column": "question",
        "topic_label_column": "subject",
        "topic_train_size": 14,
        "topic_test_size": 10,
        **overrides,
    }
    return ScaffoldAblationEvalConfig(**kwargs)


def run(path: Path, cfg: ScaffoldAblationEvalConfig, sae: Any) -> dict[str, Any]:
    results = run_eval(
        "scaffold_ablation",
        cfg,
        [("sae", sae)],
        output_path=path / "out",
        artifacts_path=path / "artifacts",
    )
    return results["sae_custom_sae"]


def test_mmlu_on_the_hub_is_read_by_its_name_alone(
    mmlu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def streamed(*args: Any, **kwargs: Any) -> IterableDatasetDict:
        asked.append((args, kwargs))
        splits = DatasetDict.load_from_disk(str(mmlu)).items()
        return IterableDatasetDict(
            {name: split.to_iterable_dataset() for name, split in splits}
        )

    monkeypatch.setattr(datasets, "load_dataset", streamed)
    defaults = ScaffoldAblationEvalConfig(
        model_name="py-neox", topic_train_size=14, topic_test_size=10
    )
    assert read_topics(defaults) == read_topics(config(mmlu))
    assert asked == [(("cais/mmlu", "all"), {"streaming": True})]


def test_answer_choices_follow_the_question(mmlu: Path) -> None:
    for with_choices in (False, True):
        train, test = read_topics(config(mmlu, topic_answer_choices=with_choices))
        assert sorted(train) == sorted(test) == sorted(WORDS)
        for topic, texts in train.items():
            assert len(texts) == 14
            assert len(test[topic]) == 10
            assert not set(texts) & set(test[topic])
            for text in texts:
                question, *choices = text.split("\n")
                i = question.split(":")[0].removeprefix("Question ")
                words = WORDS[topic].split()[:4]
                lettered = [
                    f"{letter}. {word} {i}"
                    for letter, word in zip("ABCD", words, strict=True)
                ]
                assert choices == (lettered if with_choices else [])


def test_categories_hold_their_subjects(mmlu: Path) -> None:
    grouped = config(mmlu, topic_grouping="mmlu_category", topic_train_size=14)
    train, _ = read_topics(grouped)
    assert set(train) == {"STEM", "humanities", "social sciences", "other"}
    of = {
        word: subject for subject, words in WORDS.items() for word in words.split()[:5]
    }
    subjects = {
        category: {of[text.split("what do ")[1].split()[0]] for text in texts}
        for category, texts in train.items()
    }
    assert subjects == {
        "STEM": {"abstract_algebra", "college_physics"},
        "humanities": {"philosophy"},
        "social sciences": {"sociology"},
        "other": {"virology"},
    }


def test_mmlu_has_57_subjects_in_4_categories() -> None:
    subjects = [s for of in SUBJECTS_BY_CATEGORY.values() for s in of]
    assert len(subjects) == len(set(subjects)) == 57
    sizes = Counter({c: len(of) for c, of in SUBJECTS_BY_CATEGORY.items()})
    assert sizes == {"STEM": 18, "humanities": 13, "social sciences": 12, "other": 14}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"topic_answer_choices": True}, "no column 'choices'; it has"),
        (
            {"topic_grouping": "mmlu_category"},
            "topic_grouping is 'mmlu_category', but the label .* 57 subjects",
        ),
    ],
)
def test_other_data_is_refused_with_one_clear_line(
    overrides: dict[str, Any], message: str
) -> None:
    embedded = {
        "topic_split": None,
        "topic_text_column": "text",
        "topic_label_column": "label",
    }
    with pytest.raises(ValueError, match=message) as error:
        read_topics(config("python-stdlib", **embedded, **overrides))
    assert "\n" not in str(error.value)


def test_choices_must_be_lists(mmlu: Path, tmp_path: Path) -> None:
    dataset = DatasetDict.load_from_disk(str(mmlu))["test"]
    dataset = dataset.map(lambda row: {"choices": " ".join(row["choices"])})
    dataset.to_json(str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match="'choices' holds str, not a list of answers"):
        read_topics(
            config(tmp_path / "a.jsonl", topic_answer_choices=True, topic_split="train")
        )


@pytest.mark.parametrize(
    ("field", "allowed"),
    [
        ({"topic_pooling": "max"}, "'mean' or 'last_token'"),
        ({"topic_grouping": "subjects"}, "'label' or 'mmlu_category'"),
    ],
)
def test_config_names_what_is_allowed(field: dict[str, Any], allowed: str) -> None:
    with pytest.raises(ValidationError, match=allowed):
        config("x", **field)


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return load_embedded_model()


@torch.no_grad()
def features(
    model: HookedTransformer, texts: list[str], pooling: str, remove: Any, special: bool
) -> torch.Tensor:
    """After the last layer, one text at a time: there is no padding to get wrong."""
    found = []
    for text in texts:
        tokens = model.to_tokens(text, prepend_bos=True)
        may_change = (tokens != 0) | special

        def hook(x: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
            return torch.where(may_change[..., None], remove(x), x)  # noqa: B023

        cache: list[torch.Tensor] = []
        last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
        model.run_with_hooks(
            tokens,
            fwd_hooks=[(HOOK, hook), (last, lambda x, hook: cache.append(x))],  # noqa: ARG005, B023
        )
        acts = cache[0][0, 1:]  # without BOS
        found.append(acts.mean(dim=0) if pooling == "mean" else acts[-1])
    return torch.stack(found)


@pytest.mark.parametrize(
    ("pooling", "choices", "special"),
    [("mean", False, False), ("last_token", True, True)],
)
def test_accuracies_are_those_of_probes_on_hooked_activations(
    mmlu: Path,
    model: HookedTransformer,
    tmp_path: Path,
    pooling: str,
    choices: bool,
    special: bool,
) -> None:
    cfg = config(
        mmlu,
        topic_pooling=pooling,
        topic_answer_choices=choices,
        topic_grouping="mmlu_category",
        topic_train_size=8,
        topic_test_size=6,
        include_special_tokens=special,
    )
    rank = 40
    sae = eval_sae(rank=rank, d_sae=120)
    result = run(tmp_path, cfg, sae)
    basis = torch.linalg.qr(sae.W_dec[:rank].detach().T).Q.T

    train, test = read_topics(cfg)
    labels = {
        part: [topic for topic, texts in of.items() for _ in texts]
        for part, of in (("train", train), ("test", test))
    }
    texts = [t for of in (train, test) for part in of.values() for t in part]
    n_train = len(labels["train"])

    def accuracy(probe: Any, x: torch.Tensor) -> float:
        return probe.score(x[n_train:].numpy(), labels["test"])

    def fitted(x: torch.Tensor) -> Any:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        return probe.fit(x[:n_train].numpy(), labels["train"])

    rows = {
        row["intervention"]: row
        for row in result["topic_accuracies"]
        if row["read_at"] == "last_layer"
    }
    clean = features(model, texts, pooling, lambda x: x, False)
    probe = fitted(clean)
    # a probe may go either way on a text at its boundary
    within = 1.01 / len(labels["test"])
    assert rows["clean"]["accuracy"] == pytest.approx(
        accuracy(probe, clean), abs=within
    )
    for suffix in ("", *(["_with_special_tokens"] if special else [])):
        x = features(
            model, texts, pooling, lambda x: x - (x @ basis.T) @ basis, bool(suffix)
        )
        row = rows["scaffold_projected_out" + suffix]
        assert row["accuracy"] == pytest.approx(accuracy(probe, x), abs=within)
        retrained = accuracy(fitted(x), x)
        assert row["accuracy_retrained"] == pytest.approx(retrained, abs=within)
        assert row["special_tokens"] is bool(suffix)
    metrics = result["eval_result_metrics"]
    headline = metrics["topics"]["accuracy_scaffold_mean_ablated"]
    assert headline == rows["scaffold_mean_ablated"]["accuracy"]
    if special:
        name = "scaffold_mean_ablated_with_special_tokens"
        headline = metrics["special_tokens"][f"accuracy_{name}"]
        assert headline == rows[name]["accuracy"]


def test_fewer_latents_alive_than_asked_for_are_said(
    mmlu: Path, tmp_path: Path
) -> None:
    sae = eval_sae()
    with torch.no_grad():
        sae.threshold[10:] = 1e9  # 10 can fire
    results = {
        n: run(
            tmp_path / str(n),
            config(
                mmlu,
                n_topic_latents=n,
                include_special_tokens=False,
                topic_train_size=2,
                topic_test_size=1,
            ),
            sae,
        )["eval_result_metrics"]["topics"]
        for n in (4, 2048)
    }
    assert results[4]["n_topic_latents"] == 4
    alive = results[4]["n_topic_latents_alive"]
    assert 4 < alive <= 10
    assert results[2048]["n_topic_latents"] == alive
    assert results[2048]["n_topic_latents_alive"] == alive
