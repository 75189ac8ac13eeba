"""Rows of tokens, as SAELens's PretokenizeRunner writes them, are what is trained on."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, load_from_disk
from sae_lens import PretokenizeRunner, PretokenizeRunnerConfig
from sae_lens.training.activations_store import ActivationsStore
from transformers import AutoTokenizer

from eval_helpers import HOOK, assert_fired, eval_sae
from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.tasks import Workers
from saelens_scaffold.evals import data as text_data
from saelens_scaffold.evals import runner
from saelens_scaffold.evals.dense_latents import DenseLatentsEvalConfig
from saelens_scaffold.evals.eval_configs import TextEvalConfig
from saelens_scaffold.evals.jobs import Job
from saelens_scaffold.evals.rank.suggestion import analyse_rank
from saelens_scaffold.evals.registry import EVALUATIONS
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.models import (
    embedded_model_path,
    load_embedded_model,
    load_stdlib_text,
)
from saelens_scaffold.models.datasets import open_dataset
from saelens_scaffold.training.pretokenized import (
    pretokenized_rows,
    token_column,
)
from saelens_scaffold_cli import main

ROW = 48
"""Tokens of a row."""


def pretokenize(folder: Path, **changes: Any) -> None:
    """A little of the embedded text in `folder/text`, and its tokens beside it."""
    rows = load_stdlib_text("test").select(range(12))
    assert isinstance(rows, Dataset)
    (folder / "text").mkdir()
    rows.select_columns("text").to_json(folder / "text" / "data.jsonl")
    made: dict[str, Any] = {
        "begin_batch_token": "bos",
        "sequence_separator_token": None,
    }
    cfg = PretokenizeRunnerConfig(
        tokenizer_name=str(embedded_model_path()),
        dataset_path=str(folder / "text"),
        context_size=ROW,
        num_proc=1,
        shuffle=True,
        seed=3,
        save_path=str(folder / "saved"),
        **{**made, **changes},
    )
    PretokenizeRunner(cfg).run()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows as `save_to_disk` writes them, and as a dataset on the Hub has them."""
    folder = tmp_path_factory.mktemp("pretokenized")
    pretokenize(folder)
    (folder / "hub").mkdir()
    shutil.copy(folder / "saved" / "sae_lens.json", folder / "hub")
    saved: Any = load_from_disk(str(folder / "saved"))
    saved.to_parquet(folder / "hub" / "train.parquet")
    return folder


def rows_of(folder: Path) -> torch.Tensor:
    """All rows, read without the datasets library, shape (n, ROW)."""
    (file,) = folder.glob("saved/*.arrow")
    with pa.memory_map(str(file)) as source:
        column = pa.ipc.open_stream(source).read_all()["input_ids"]
        return torch.tensor(column.to_pylist())


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Batches of tokens that SAELens takes."""
    batches: list[torch.Tensor] = []
    get_batch_tokens = ActivationsStore.get_batch_tokens

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        batches.append(get_batch_tokens(*args, **kwargs))
        return batches[-1]

    monkeypatch.setattr(ActivationsStore, "get_batch_tokens", spy)
    return batches


def train(dataset: Path, output: Path, **changes: Any) -> int:
    options = {
        "architecture": "scaffold_batchtopk",
        "scaffold_rank": 2,
        "k": 4,
        "d_in": 256,
        "d_sae": 64,
        "model_name": "py-neox",
        "hook_name": HOOK,
        "dataset_path": dataset,
        "context_size": ROW,
        "training_tokens": 2048,
        "train_batch_size_tokens": 256,
        "n_batches_in_buffer": 16,
        "store_batch_size_prompts": 8,
        "n_eval_batches": 0,
        "log_to_wandb": False,
        "verbose": False,
        "output_path": output,
        **changes,
    }
    return main(["train", *(f"--{name}={value}" for name, value in options.items())])


@pytest.mark.parametrize("context_size", [ROW, 32])
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("form", ["saved", "hub"])
def test_training_reads_the_rows_as_they_are(
    form: str,
    streaming: bool,
    context_size: int,
    folder: Path,
    tmp_path: Path,
    read: list[torch.Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = {"context_size": context_size, "streaming": streaming}
    assert train(folder / form, tmp_path / "sae", **sizes) == 0
    tokens = torch.cat(read)
    assert len(tokens) > 2048 / ROW
    assert torch.equal(tokens, rows_of(folder)[: len(tokens), :context_size])
    # SAELens says so of data that a configuration does not name
    assert "will not be reproducible" not in capsys.readouterr().err


def test_metadata_say_how_the_rows_were_made(tmp_path: Path) -> None:
    pretokenize(
        tmp_path,
        begin_batch_token=None,
        sequence_separator_token="eos",
        disable_concat_sequences=True,
    )
    assert train(tmp_path / "saved", tmp_path / "sae") == 0
    metadata = json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]
    assert metadata["prepend_bos"] is False
    assert metadata["sequence_separator_token"] == "eos"
    assert metadata["disable_concat_sequences"] is True
    assert metadata["context_size"] == ROW


def line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr that is not progress."""
    said = capsys.readouterr().err.splitlines()
    (found,) = (line for line in said if "error:" in line)
    return found


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens import HookedTransformer

    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("the language model was loaded")

    name = "from_pretrained_no_processing"
    monkeypatch.setattr(HookedTransformer, name, fail)


@pytest.mark.usefixtures("never_loaded")
def test_rows_that_cannot_be_used_are_named_before_the_model_is_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in "saved", "hub":
        assert train(folder / form, tmp_path / "sae", context_size=ROW + 1) == 2
        said = line(capsys)
        assert "context_size is 49; it must be at most 48" in said
        assert form in said
    # a short row anywhere, where SAELens looks at the first
    ragged = [[*range(ROW)]] * 30 + [[1, 2, 3]]
    Dataset.from_dict({"tokens": ragged}).save_to_disk(str(tmp_path / "ragged"))
    assert train(tmp_path / "ragged", tmp_path / "sae", context_size=16) == 2
    assert "it must be at most 3" in line(capsys)
    # tokens of another language model
    shutil.copytree(folder / "hub", tmp_path / "foreign")
    tokenizer: Any = AutoTokenizer.from_pretrained(embedded_model_path())
    tokenizer.add_tokens(["unheard-of"])
    tokenizer.save_pretrained(tmp_path / "other-tokenizer")
    made = json.loads((folder / "hub" / "sae_lens.json").read_text())
    made["tokenizer_name"] = str(tmp_path / "other-tokenizer")
    (tmp_path / "foreign" / "sae_lens.json").write_text(json.dumps(made))
    assert train(tmp_path / "foreign", tmp_path / "sae") == 2
    assert "other-tokenizer, which has another vocabulary than" in line(capsys)


def text_as(form: str, folder: Path, tmp_path: Path) -> Path:
    """The text in a form in which it can be named."""
    text: Any = open_dataset(str(folder / "text"), "train")
    if form == "python-stdlib":
        return Path(form)
    place = tmp_path / form
    if form == "folder of files":
        place.mkdir()
        text.to_parquet(place / "train.parquet")
    elif form == "splits":
        DatasetDict(train=text, test=text.select([5])).save_to_disk(place)
    elif place.suffix == ".parquet":
        text.to_parquet(place)
    elif place.suffix == ".csv":
        text.to_csv(place)
    elif place.suffix in (".json", ".jsonl"):
        text.to_json(place, lines=place.suffix == ".jsonl")
    else:
        text.save_to_disk(place)
    return place


FORMS = [
    "a.jsonl",
    "a.json",
    "a.parquet",
    "a.csv",
    "saved",
    "folder of files",
    "splits",
]


@pytest.mark.parametrize(
    ("form", "streaming"),
    [*((form, True) for form in FORMS), ("python-stdlib", False), ("a.csv", False)],
)
def test_training_opens_text_as_evaluations_do(
    form: str, streaming: bool, folder: Path, tmp_path: Path, read: list[torch.Tensor]
) -> None:
    dataset = text_as(form, folder, tmp_path)
    short = {"training_tokens": 256, "streaming": streaming}
    assert train(dataset, tmp_path / "sae", **short) == 0
    first = next(iter(open_dataset(str(dataset), "train")))
    tokenizer: Any = AutoTokenizer.from_pretrained(embedded_model_path())
    expected = [tokenizer.bos_token_id, *tokenizer(first["text"])["input_ids"]][:ROW]
    assert read[0][0].tolist() == expected


@pytest.mark.parametrize("command", ["eval", "rank", "absorb", "compare"])
def test_a_split_of_a_single_file_is_named_before_the_model_is_loaded(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eval_sae().save_model(str(tmp_path / "sae"))
    file = folder / "text" / "data.jsonl"
    text = {"dataset": str(file), "dataset_split": "test"}
    of_text = [f"--{name}={value}" for name, value in text.items()]
    experiment = {
        **compare_config(folder),
        "evaluations": {"dense_latents": {"n_tokens": 100}},
        "evaluation_data": text,
    }
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    arguments = {
        "eval": ["dense_latents", f"--sae_path={tmp_path / 'sae'}", *of_text],
        "rank": ["--model=py-neox", f"--hook_name={HOOK}", *of_text],
        "absorb": [str(tmp_path / "sae"), *of_text],
        "compare": [str(tmp_path / "experiment.yaml")],
    }[command]
    assert main([command, *arguments, f"--output_path={tmp_path / 'out'}"]) == 2
    said = "has no split 'test'; a single file is the split 'train'"
    assert said in line(capsys)
    assert not (tmp_path / "out").exists()


def compare_config(folder: Path, **changes: Any) -> dict[str, Any]:
    training: dict[str, Any] = {
        "context_size": ROW,
        "training_tokens": 2048,
        "train_batch_size_tokens": 256,
        "n_batches_in_buffer": 16,
        "store_batch_size_prompts": 8,
        **changes,
    }
    return {
        "model_name": "py-neox",
        "hook_name": HOOK,
        "dataset_path": str(folder / "saved"),
        "sae": {"d_in": 256, "d_sae": 64, "k": 4, "scaffold_rank": 2},
        "grid": {"architecture": ["batchtopk", "scaffold_batchtopk"]},
        "training": training,
        "evaluations": {"meta_structure": None},
    }


@pytest.mark.sae_bench
def test_compare_trains_on_the_rows_and_plans_with_them(
    folder: Path,
    tmp_path: Path,
    read: list[torch.Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from saelens_scaffold.compare.config import CompareConfig
    from saelens_scaffold.compare.experiment import make_plan

    file = tmp_path / "experiment.yaml"
    output = ["--output_path", str(tmp_path / "out")]
    for size, most in ((ROW + 1, 48), (513, 512)):
        file.write_text(yaml.safe_dump(compare_config(folder, context_size=size)))
        assert main(["compare", str(file), "--plan", *output]) == 2
        said = line(capsys)
        assert f"context_size is {size}" in said
        assert f"at most {most}" in said

    plan = make_plan(CompareConfig(**compare_config(folder)), tmp_path / "out", "cpu")
    plan.trainer.train(plan.waves, Workers())
    tokens = torch.cat(read)
    assert len(tokens) > 2048 / ROW
    assert torch.equal(tokens, rows_of(folder)[: len(tokens)])
    # trained SAEs need their data no more
    gone = compare_config(folder) | {"dataset_path": str(folder / "saved")}
    shutil.move(folder / "saved", tmp_path / "moved")
    try:
        make_plan(CompareConfig(**gone), tmp_path / "out", "cpu")
    finally:
        shutil.move(tmp_path / "moved", folder / "saved")


@pytest.mark.parametrize("form", ["saved", "hub"])
def test_evaluations_take_the_first_tokens_of_every_row(
    form: str, folder: Path
) -> None:
    name = str(folder / form)
    dataset = open_dataset(name, "train")
    assert token_column(dataset, name) == "input_ids"
    text_data.check_text(name, "train", "text", ROW)  # no such column is needed
    for size in 3, ROW:
        found = torch.stack(list(pretokenized_rows(dataset, name, size)))
        assert torch.equal(found, rows_of(folder)[:, :size])
    for check in (
        lambda: pretokenized_rows(dataset, name, ROW + 1),
        lambda: text_data.check_text(name, "train", "text", ROW + 1),
    ):
        with pytest.raises(
            UserError, match="context_size is 49; it must be at most 48"
        ):
            check()
    # text is read as before
    text = str(folder / "text")
    assert token_column(open_dataset(text, "train"), text) is None
    with pytest.raises(UserError, match="no column 'body'"):
        text_data.check_text(text, "train", "body", ROW)


def test_a_short_row_of_a_stream_is_named_when_it_is_met() -> None:
    rows = Dataset.from_dict({"tokens": [[1, 2, 3, 4], [5, 6]]})
    with pytest.raises(UserError, match="it must be at most 2"):
        pretokenized_rows(rows, "rows", 3)
    stream: Iterator[torch.Tensor] = pretokenized_rows(
        rows.to_iterable_dataset(), "rows", 3
    )
    assert next(stream).tolist() == [1, 2, 3]
    with pytest.raises(UserError, match="'rows'"):
        next(stream)


def core_job(folder: Path, output: Path, name: str = "core") -> Job:
    evaluation = EVALUATIONS[name]
    implementation = evaluation.load()
    config = implementation.config_class(model_name="py-neox")
    setattr(config, evaluation.data_field, str(folder / "saved"))
    if name == "core":
        config.context_size, config.batch_size_prompts = ROW, 4
        config.n_eval_reconstruction_batches = 2
        config.n_eval_sparsity_variance_batches = 3
        config.compute_l2_norms = config.compute_sparsity_metrics = True
        config.compute_variance_metrics = config.compute_kl = True
        config.compute_ce_loss = True
    paths = (output / "results", output / "artifacts")
    return Job(evaluation, implementation, config, "cpu", *paths)


@pytest.mark.sae_bench
def test_core_reads_rows_of_tokens_and_autointerp_refuses_them(
    folder: Path, tmp_path: Path, read: list[torch.Tensor]
) -> None:
    saes: list[tuple[str, Any]] = [("plain", eval_sae())]
    outcome = runner.run(core_job(folder, tmp_path), saes)
    assert outcome.error is None
    (result,) = outcome.results.values()
    assert result["eval_result_metrics"]["token_stats"][
        "total_tokens_eval_reconstruction"
    ]
    rows = {tuple(row) for row in rows_of(folder).tolist()}
    assert {tuple(row) for row in torch.cat(read).tolist()} < rows
    outcome = runner.run(core_job(folder, tmp_path, "autointerp"), saes)
    assert "has tokens; text is needed here" in str(outcome.error)


def test_tokens_are_not_compared_with_text(folder: Path) -> None:
    tokens, text = str(folder / "saved"), str(folder / "text")

    def seen(trained_on: str, dataset: str) -> text_data.TextSeenInTraining:
        sae = eval_sae()
        sae.cfg.metadata.dataset_path = trained_on
        selected = SelectedSAE("plain", "custom_sae", sae)
        found = text_data.text_seen_in_training([selected], dataset, "train", "text")
        return found[selected.key]

    assert seen(tokens, tokens).seen is True
    assert seen(text, tokens).seen is None
    assert "it has tokens, not text" in seen(text, tokens).reason
    assert seen(tokens, text).seen is None


@pytest.mark.parametrize("context_size", [ROW, 32])
@pytest.mark.parametrize("form", ["saved", "hub"])
def test_the_dense_latents_and_the_rank_are_of_the_rows(
    folder: Path, tmp_path: Path, context_size: int, form: str
) -> None:
    sae = eval_sae()
    sae.cfg.metadata.context_size = context_size
    fields: dict[str, Any] = {
        "model_name": "py-neox",
        "dataset": str(folder / form),
        "n_tokens": 10**9,
    }
    cfg = DenseLatentsEvalConfig(**fields, n_bootstrap=2)
    results = runner.run_eval(
        "dense_latents", cfg, [("sae", sae)], output_path=tmp_path / "out"
    )
    analysis = analyse_rank(
        TextEvalConfig(**fields, context_size=context_size), HOOK, "cpu"
    )

    tokens = rows_of(folder)[:, :context_size]
    with torch.no_grad():
        _, cache = load_embedded_model().run_with_cache(tokens, names_filter=HOOK)
    x = cache[HOOK][tokens != 0]
    fired = results["sae_custom_sae"]["eval_result_unstructured"]["fired"]
    assert_fired(fired, sae, x)
    assert analysis.n_tokens == len(x)


def test_eval_takes_a_folder_of_rows(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = eval_sae(rank=2)
    sae.cfg.metadata.context_size = ROW
    sae.save_model(str(tmp_path / "sae"))
    arguments = [
        f"--sae_path={tmp_path / 'sae'}",
        f"--dataset={folder / 'saved'}",
        f"--output_path={tmp_path / 'out'}",
        f"--artifacts_path={tmp_path / 'artifacts'}",
        "--llm_batch_size=4",
        "--set=dense_latents.n_tokens=500",
        "--set=core.n_eval_reconstruction_batches=1",
        "--set=core.n_eval_sparsity_variance_batches=1",
    ]
    assert main(["eval", "dense_latents,core", *arguments]) == 0
    said = capsys.readouterr().err
    assert "evaluation 2 of 2 · core of 1 SAE" in said
    for name in ("dense_latents", "core"):
        (file,) = (tmp_path / "out" / name).glob("*.json")
        config = json.loads(file.read_text())["eval_config"]
        assert config["dataset"] == str(folder / "saved")
