import os
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from sae_lens import LanguageModelSAERunnerConfig, StandardTrainingSAEConfig
from sae_lens.training.activations_store import ActivationsStore
from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import new_directory
from saelens_scaffold.models import (
    EMBEDDED_MODEL_NAME,
    embedded_model_path,
    load_embedded_model,
    load_stdlib_chunks,
    load_stdlib_text,
    probing_labels,
    register_embedded_model,
    write_stdlib_dataset,
)
from saelens_scaffold.models.stdlib import (
    PROBING_TEST_FRACTION,
    TEXT_TEST_FRACTION,
    is_held_out,
    label_of,
    read_stdlib,
)


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return load_embedded_model()


@pytest.fixture(scope="module")
def train() -> Dataset:
    return load_stdlib_text("train")


@pytest.fixture(scope="module")
def test() -> Dataset:
    return load_stdlib_text("test")


def make_library(root: Path, files: int, chars: int) -> None:
    for i in range(files):
        file = root / f"package{i % 7}" / f"module{i}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text((f"# {i}\n" * chars)[:chars])  # no two have a line in common


def set_library(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})


def store_config(dataset_path: str, tmp_path: Path) -> LanguageModelSAERunnerConfig:
    return LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=256, d_sae=16, normalize_activations="none"),
        model_name=EMBEDDED_MODEL_NAME,
        hook_name="blocks.2.hook_resid_post",
        dataset_path=dataset_path,
        context_size=64,
        training_tokens=4096,
        store_batch_size_prompts=4,
        n_batches_in_buffer=4,
        train_batch_size_tokens=256,
        device="cpu",
        checkpoint_path=str(tmp_path),
    )


# --- the model ---


def test_the_model_is_registered_under_its_short_name(model: HookedTransformer):
    assert register_embedded_model() == EMBEDDED_MODEL_NAME == "py-neox"
    assert (model.cfg.n_layers, model.cfg.d_model, model.cfg.n_ctx) == (4, 256, 512)
    assert next(model.parameters()).dtype == torch.float32


def test_bos_eos_and_padding_are_one_token(model: HookedTransformer):
    tokenizer = model.tokenizer
    assert tokenizer is not None
    assert (
        tokenizer.bos_token
        == tokenizer.eos_token
        == tokenizer.pad_token
        == "<|endoftext|>"
    )
    assert (
        tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    )
    assert model.to_tokens("import os", prepend_bos=True)[0].tolist().count(0) == 1
    assert model.to_tokens("import os", prepend_bos=False)[0].tolist().count(0) == 0


def test_the_model_predicts_the_library_and_both_libraries_agree(
    model: HookedTransformer, test: Dataset
):
    path = embedded_model_path()
    reference = AutoModelForCausalLM.from_pretrained(path).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = torch.tensor(
        [
            [0, *tokenizer(text)["input_ids"][:255]]
            for text in test[:16]["text"]
            if len(text) > 2000
        ]
    )
    assert tokens.numel() > 2000
    with torch.no_grad():
        expected = reference(tokens, labels=tokens)
        logits, loss = model(tokens, return_type="both")
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
    assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-4)
    assert loss.item() < 3.0


# --- the text ---


def test_the_splits_share_no_file_and_hold_all(train: Dataset, test: Dataset):
    paths = {source.path for source in read_stdlib()}
    held_out = {path for path in paths if is_held_out(path, TEXT_TEST_FRACTION)}
    assert set(train["path"]) == paths - held_out
    # a few hold nothing that others do not
    assert set(test["path"]) <= held_out
    assert len(set(test["path"])) > 0.9 * len(held_out)
    assert 0.03 < len(held_out) / len(paths) < 0.06
    assert "import" in "".join(test["text"])
    assert all(len(text) > 500 for text in train["text"])
    assert not any("site-packages" in path for path in paths)


def repeated_windows(
    texts: list[str], training: list[str], chars: int, step: int
) -> list[str]:
    """The windows of texts that occur in training, at any place.

    The whole lines of such a window are lines there, which rules out most of them fast.
    """
    lines = {line for text in training for line in text.split("\n")}
    return [
        window
        for text in texts
        for window in (
            text[start : start + chars]
            for start in range(0, len(text) - chars + 1, step)
        )
        if all(line in lines for line in window.split("\n")[1:-1])
        and any(window in other for other in training)
    ]


def test_no_chunk_of_the_test_text_occurs_in_the_training_text(
    train: Dataset, test: Dataset
):
    assert repeated_windows(test["text"], train["text"], 512, step=64) == []
    # as it would without the cuts
    whole = [
        source.text
        for source in read_stdlib()
        if is_held_out(source.path, TEXT_TEST_FRACTION)
    ]
    assert len(repeated_windows(whole, train["text"], 512, step=512)) > 0
    assert sum(map(len, test["text"])) > 0.9 * sum(map(len, whole))


@pytest.mark.parametrize("chars", [512, 300])
def test_no_labelled_chunk_is_in_both_splits_or_twice_in_one(chars: int):
    train, test = (load_stdlib_chunks(split, chars) for split in ("train", "test"))
    for chunks in (train, test):
        assert len(set(chunks["text"])) == len(chunks)
    files = [
        source.text
        for source in read_stdlib()
        if not is_held_out(source.path, PROBING_TEST_FRACTION)
    ]
    assert repeated_windows(test["text"], files, chars, step=1) == []


def test_the_labels_asked_for_change_no_labels_chunks():
    alone = load_stdlib_chunks("test", labels=["email"])
    among = load_stdlib_chunks("test", labels=["asyncio", "email", "logging"])
    of_email = [row["text"] for row in among.to_list() if row["label"] == "email"]
    assert sorted(alone["text"]) == sorted(of_email)


def test_the_split_is_fixed(
    train: Dataset, test: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Written down here: changing a file's split would change what held-out results mean.
    for path in (
        "argparse.py",
        "shutil.py",
        "asyncio/sslproto.py",
        "logging/handlers.py",
    ):
        assert is_held_out(path, TEXT_TEST_FRACTION)
    for path in (
        "asyncio/tasks.py",
        "json/decoder.py",
        "typing.py",
        "pydoc_data/topics.py",
    ):
        assert not is_held_out(path, TEXT_TEST_FRACTION)
    held_out = {
        source.path for source in read_stdlib() if is_held_out(source.path, 0.1)
    }
    assert set(test["path"]) < held_out

    make_library(tmp_path / "few", 400, 10_000)
    set_library(monkeypatch, tmp_path / "few")
    few = set(load_stdlib_text("test")["path"])
    make_library(tmp_path / "many", 800, 10_000)
    set_library(monkeypatch, tmp_path / "many")
    many = set(load_stdlib_text("test")["path"])
    assert few == {path for path in many if int(path[15:-3]) < 400}
    assert few < many


def test_the_order_is_shuffled_by_the_seed_alone(train: Dataset):
    assert train["path"] == load_stdlib_text("train")["path"]
    other = load_stdlib_text("train", seed=1)
    assert train["path"] != other["path"]
    assert sorted(train["path"]) == sorted(other["path"])
    assert len(set(train[:20]["label"])) > 3


def test_labels_name_what_a_file_is_about(train: Dataset):
    assert label_of("asyncio/tasks.py") == "asyncio"
    assert label_of("argparse.py") == "argparse"
    assert label_of("test/test_asyncio/utils.py") == "asyncio"
    assert label_of("test/test_argparse.py") == "argparse"
    assert label_of("test/test_itertools.py") == "itertools"
    assert label_of("test/support/__init__.py") == "test"
    assert label_of("test/test_grammar.py") == "test"
    assert train["label"] == [label_of(path) for path in train["path"]]


def test_other_encodings_small_files_and_installed_packages_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_library(tmp_path, 400, 10_000)
    make_library(tmp_path / "site-packages", 5, 10_000)
    (tmp_path / "latin.py").write_bytes(b"\xe4" * 1000)
    (tmp_path / "small.py").write_text("x" * 500)
    (tmp_path / "text.txt").write_text("x" * 1000)
    set_library(monkeypatch, tmp_path)
    assert len(read_stdlib()) == 400


@pytest.mark.parametrize(("files", "chars"), [(0, 0), (150, 50_000), (400, 1000)])
def test_a_poor_library_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int, chars: int
):
    make_library(tmp_path, files, chars)
    set_library(monkeypatch, tmp_path / "missing.zip" if files == 0 else tmp_path)
    with pytest.raises(UserError, match=rf"has {files} readable \.py files"):
        load_stdlib_text("train")


def test_an_unknown_split_is_an_error():
    with pytest.raises(
        ValueError, match="split is 'val'; it must be 'train' or 'test'"
    ):
        load_stdlib_text("val")  # pyright: ignore[reportArgumentType]


# --- chunks ---


def test_chunks_have_the_length_the_number_and_the_labels_asked_for():
    chunks = load_stdlib_chunks(
        "train", chars=300, labels=["asyncio", "email"], per_label=50
    )
    assert chunks.column_names == ["text", "label"]
    assert {len(text) for text in chunks["text"]} == {300}
    assert Counter(chunks["label"]) == {"asyncio": 50, "email": 50}
    assert len(set(chunks["text"])) > 90
    assert "asyncio" in chunks[:20]["label"]
    assert "email" in chunks[:20]["label"]

    asyncio = "".join(
        source.text for source in read_stdlib() if source.label == "asyncio"
    )
    for text, label in zip(chunks["text"], chunks["label"], strict=True):
        assert (text in asyncio) == (label == "asyncio")


def test_the_default_labels_suffice_for_a_probing_task():
    labels = probing_labels()
    assert len(set(labels)) == 5
    assert "test" not in labels
    train, test = load_stdlib_chunks("train"), load_stdlib_chunks("test", per_label=100)
    assert set(train["label"]) == set(test["label"]) == set(labels)
    assert min(Counter(train["label"]).values()) >= 200


def test_chunks_of_the_splits_come_from_different_files(test: Dataset):
    text_of = {True: "", False: ""}
    for source in read_stdlib():
        if source.label == "email":
            text_of[is_held_out(source.path, PROBING_TEST_FRACTION)] += source.text
    for split in ("train", "test"):
        chunks = load_stdlib_chunks(split, labels=["email"], per_label=30)
        assert all(text in text_of[split == "test"] for text in chunks["text"])
    assert all(is_held_out(path, PROBING_TEST_FRACTION) for path in test["path"])


def test_the_draw_depends_on_the_seed_alone():
    def draw(seed: int) -> list[str]:
        return load_stdlib_chunks("test", labels=["email"], per_label=20, seed=seed)[
            "text"
        ]

    assert draw(0) == draw(0) != draw(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"labels": ["email", "nonesuch"]},
            r"needed in the test split.*\{'nonesuch': 0\}",
        ),
        ({"labels": ["email"], "per_label": 100_000}, "without the 100000 chunks"),
        ({"chars": 0}, "chars is 0"),
        ({"per_label": 0}, "per_label is 0"),
    ],
)
def test_impossible_chunks_are_an_error(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        load_stdlib_chunks("test", **arguments)


# --- in SAELens ---


@pytest.mark.parametrize("from_disk", [True, False])
def test_saelens_streams_the_text(
    model: HookedTransformer, test: Dataset, tmp_path: Path, from_disk: bool
):
    # The directory's own name must not be taken for that of a split.
    path = write_stdlib_dataset(tmp_path / "test", "test") if from_disk else ""
    store = ActivationsStore.from_config(
        model,
        store_config(str(path), tmp_path),
        override_dataset=None if from_disk else test,
    )
    tokens = store.get_batch_tokens()
    assert tokens.shape == (4, 64)
    assert tokens[:, 0].tolist() == [0] * 4
    decoded = model.tokenizer.decode(tokens[0, 1:])  # type: ignore
    assert test[0]["text"].startswith(decoded)
    assert store.next_batch().shape == (256, 256)


def test_the_written_dataset_is_the_same(test: Dataset, tmp_path: Path):
    path = write_stdlib_dataset(tmp_path / "deep" / "text", "test")
    assert os.listdir(path.parent) == ["text"]
    again = load_dataset(str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert again.to_dict() == test.to_dict()  # type: ignore
    with pytest.raises(FileExistsError, match="exists already"):
        write_stdlib_dataset(path, "test")


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "new") as directory:
        (directory / "file").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
