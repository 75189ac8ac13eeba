"""Whether an evaluation's text was trained on: what is found, warned of and recorded."""

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from eval_helpers import eval_sae, write_texts
from saelens_scaffold.evals import data as overlap
from saelens_scaffold.evals.data import TextSeenInTraining, text_seen_in_training
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.models import load_stdlib_text
from saelens_scaffold_cli import main


def trained_on(dataset_path: str | None, name: str = "sae") -> SelectedSAE:
    sae = eval_sae()
    if dataset_path is not None:
        sae.cfg.metadata.dataset_path = dataset_path
    return SelectedSAE(name, "custom_sae", sae)


def ask(
    dataset_path: str | Path | None, dataset: str | Path, split: str = "train"
) -> TextSeenInTraining:
    sae = trained_on(None if dataset_path is None else str(dataset_path))
    return text_seen_in_training([sae], str(dataset), split, "text")[sae.key]


def prose(seed: int, chars: int = 3000) -> str:
    return "".join(random.Random(seed).choices("abcdefgh \n", k=chars))


@pytest.fixture
def no_dataset_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "open_dataset", lambda *_: pytest.fail("opened"))


@pytest.mark.usefixtures("no_dataset_is_opened")
@pytest.mark.parametrize(
    ("dataset_path", "dataset", "split", "seen", "reason"),
    [
        ("user/text", "user/text", "train", True, "what the SAE was trained on"),
        ("user/text", "user/text", "test", None, "user/text is not on this machine"),
        ("user/text", "user/other", "train", None, "user/text is not on this machine"),
        ("user/text", "python-stdlib", "test", None, "user/text is not on"),
        (None, "user/text", "train", None, "name no dataset_path"),
        ("python-stdlib", "python-stdlib", "train", True, "was trained on"),
        ("python-stdlib", "python-stdlib", "test", False, "no 512 characters"),
        ("python-stdlib", "user/text", "train", None, "user/text is not on"),
    ],
)
def test_what_names_tell(
    dataset_path: str | None, dataset: str, split: str, seen: bool | None, reason: str
):
    found = ask(dataset_path, dataset, split)
    assert found.seen is seen
    assert reason in found.reason


def test_local_text_is_compared(tmp_path: Path):
    training = write_texts(tmp_path / "train.jsonl", [prose(0), prose(1)])
    fresh = write_texts(tmp_path / "fresh.jsonl", [prose(2), prose(3)])
    partly = write_texts(
        tmp_path / "partly.jsonl", [prose(2), "x" * 77 + prose(1)[900:1900] + prose(3)]
    )
    assert ask(training, fresh).seen is False
    assert ask(training, tmp_path / "." / "train.jsonl").seen is True
    found = ask(training, partly)
    assert found.seen is True
    n_chars = 3000 + 77 + 1000 + 3000
    # whole blocks of 256 within the 1,000 characters
    assert found.reason.startswith(f"{3 * 256 / n_chars:.1%} of the first {n_chars:,} ")


def test_the_embedded_text_in_a_file_is_found(tmp_path: Path):
    texts = {True: load_stdlib_text("train"), False: load_stdlib_text("test")}
    for seen, dataset in texts.items():
        file = write_texts(tmp_path / f"{seen}.jsonl", dataset["text"][:9])
        assert ask("python-stdlib", file).seen is seen


def test_text_that_was_not_read_to_its_end_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(overlap, "MAX_TRAINING_CHARS", 4000)
    training = write_texts(tmp_path / "t.jsonl", [prose(0), prose(1), prose(2)])
    late = write_texts(tmp_path / "late.jsonl", [prose(2)])
    found = ask(training, late)
    assert found.seen is None
    assert "the first 6,000 characters of" in found.reason


def test_training_text_that_cannot_be_read_is_not_known(tmp_path: Path):
    training = write_texts(tmp_path / "train.jsonl", [prose(0)])
    training.write_text(json.dumps({"tokens": [1, 2]}))
    found = ask(training, write_texts(tmp_path / "fresh.jsonl", [prose(1)]))
    assert found.seen is None
    assert "no column 'text'" in found.reason


def test_one_warning_names_all_saes(caplog: pytest.LogCaptureFixture):
    saes = [trained_on("a/b", "one"), trained_on("a/b", "two"), trained_on("c/d", "no")]
    found = text_seen_in_training(saes, "a/b", "train", "text")
    assert [found[sae.key].seen for sae in saes] == [True, True, None]
    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    message = warning.getMessage()
    assert message.startswith("one, two were trained on text of this evaluation: a/b")
    assert "\n" not in message


def test_repeated_rows_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [prose(i) for i in range(4)]
    text_seen_in_training(
        [], str(write_texts(tmp_path / "a.csv", rows)), "train", "text"
    )
    assert caplog.text == ""
    rows += rows[:2]
    text_seen_in_training(
        [], str(write_texts(tmp_path / "b.csv", rows)), "train", "text"
    )
    assert "2 of the first 6 texts repeat others" in caplog.text


@pytest.mark.parametrize("name", ["dark_matter", "dense_latents", "scaffold_ablation"])
def test_results_say_it(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    sae = eval_sae()
    sae.cfg.metadata.dataset_path = "python-stdlib"
    sae.save_model(tmp_path / "sae")
    settings = [f"{name}.n_tokens=500", f"{name}.n_bootstrap=5"]
    if name == "dark_matter":
        settings += [f"{name}.n_fit_tokens=500"]
    if name == "scaffold_ablation":
        settings += [f"{name}.topics=false", f"{name}.n_fit_tokens=500"]
    for split, seen in ("train", True), ("test", False):
        out = tmp_path / split
        arguments: list[Any] = [
            *("eval", name, f"--sae_path={tmp_path}/sae", "--dataset=python-stdlib"),
            *(f"--dataset_split={split}", f"--output_path={out}", "--device=cpu"),
            *(arg for setting in settings for arg in ("--set", setting)),
        ]
        caplog.clear()
        assert main(arguments) == 0
        (file,) = (out / name).glob("*.json")
        assert json.loads(file.read_text())["text_seen_in_training"]["seen"] is seen
        assert ("was trained on text of this evaluation" in caplog.text) is seen


@pytest.mark.sae_bench
def test_core_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    sae = eval_sae()
    sae.cfg.metadata.dataset_path = "python-stdlib"
    sae.save_model(tmp_path / "sae")
    fields = {
        "n_eval_reconstruction_batches": 1,
        "n_eval_sparsity_variance_batches": 1,
    }
    arguments = [
        *("eval", "core", f"--sae_path={tmp_path}/sae", "--dataset=python-stdlib"),
        *("--dataset_split=train", f"--output_path={tmp_path}/out", "--device=cpu"),
        *(a for k, v in fields.items() for a in ("--set", f"core.{k}={v}")),
        f"--artifacts_path={tmp_path}/artifacts",
    ]
    assert main(arguments) == 0
    assert "sae was trained on text of this evaluation" in caplog.text


def test_rank_says_it(tmp_path: Path):
    sae = eval_sae()
    sae.cfg.metadata.dataset_path = "python-stdlib"
    sae.save_model(tmp_path / "sae")
    arguments = [
        *("rank", f"--sae_path={tmp_path}/sae", "--dataset=python-stdlib"),
        *("--n_tokens=500", f"--output_path={tmp_path}/out", "--device=cpu"),
    ]
    assert main(arguments) == 0
    written = json.loads((tmp_path / "out" / "rank.json").read_text())
    assert written["text_seen_in_training"]["seen"] is False
