"""Sparse probing and TPP: SAEBench's own numbers, over seeds and on any text."""

import json
import pickle
import random
import re
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from pydantic import TypeAdapter
from sae_bench.evals.scr_and_tpp import main as sae_bench_tpp
from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
from sae_bench.evals.sparse_probing import eval_config as sae_bench_sp_config
from sae_bench.evals.sparse_probing import main as sae_bench_sparse_probing
from sae_bench.evals.sparse_probing_sae_probes import (
    eval_config as sae_bench_sae_probes_config,
)
from sae_bench.evals.sparse_probing_sae_probes import main as sae_bench_sae_probes
from sae_bench.sae_bench_utils import dataset_info, dataset_utils, graphing_utils
from sae_lens import SAE, StandardSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_probes import utils_data
from scipy import stats

from helpers import HAS_BRIDGE, scaffold_sae
from pickles import Planted, own_pickles_only
from saelens_scaffold._util.configs import config_fields
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals import runner
from saelens_scaffold.evals.labelled_data import read_labelled_text
from saelens_scaffold.evals.registry import EVALUATIONS
from saelens_scaffold.evals.saebench.probing import (
    SparseProbingEvalConfig,
    TppEvalConfig,
)
from saelens_scaffold.evals.saebench.replacements import (
    labelled_texts,
    sae_probes_tasks,
)
from saelens_scaffold.evals.saebench.sae_probes import (
    SparseProbingSaeProbesEvalConfig,
    one_vs_rest_tasks,
)
from saelens_scaffold.evals.saes import View, resolve_saes
from saelens_scaffold.models import load_embedded_model, register_embedded_model
from saelens_scaffold.saes.jumprelu_on_kernels import JumpReLUOnKernels

HOOK, D_IN, D_SAE = "blocks.2.hook_resid_post", 256, 48
WORDS = {
    "files": ["open", "read", "write", "path", "close", "seek", "buffer", "stream"],
    "loops": ["for", "while", "range", "enumerate", "zip", "next", "iter", "break"],
    "types": ["int", "str", "float", "class", "Protocol", "generic", "cast", "bool"],
}
ROWS_PER_CLASS = 110


def metadata() -> SAEMetadata:
    return SAEMetadata(
        model_name="py-neox", hook_name=HOOK, context_size=128, prepend_bos=True
    )


def plain(seed: int = 0, d_sae: int = D_SAE) -> JumpReLUSAE:
    torch.manual_seed(seed)
    cfg = JumpReLUSAEConfig(d_in=D_IN, d_sae=d_sae, metadata=metadata())
    sae = JumpReLUSAE(cfg)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, D_IN), dim=1)
    sae.W_dec.data = W_dec
    sae.W_enc.data = W_dec.T.clone()
    sae.threshold.data.fill_(0.1)
    return sae


@pytest.fixture(scope="module")
def scaffold() -> Any:
    sae = scaffold_sae(d_in=D_IN, d_sae=D_SAE, scaffold_rank=4, scaffold_init="random")
    sae.topk_threshold.fill_(0.1)
    inference: Any = sae.to_inference()
    inference.cfg.metadata = metadata()
    return inference


def rows(seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    rows = [
        {"text": " ".join(rng.choices(words, k=12)) + f" {i}", "label": label}
        for label, words in WORDS.items()
        for i in range(ROWS_PER_CLASS)
    ]
    rng.shuffle(rows)
    return rows


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in every format, and some that cannot be used."""
    folder = tmp_path_factory.mktemp("texts")
    dataset = Dataset.from_list(rows())
    dataset.to_csv(folder / "data.csv")
    dataset.to_json(folder / "data.jsonl")
    dataset.to_parquet(folder / "data.parquet")
    dataset.save_to_disk(folder / "saved")
    unseen = Dataset.from_list(rows(seed=1)).select(range(200))
    DatasetDict(train=dataset, test=unseen).save_to_disk(folder / "split")
    one_class = dataset.filter(lambda row: row["label"] == "files")
    one_class.to_json(folder / "one-class.jsonl")
    dataset.select(range(30)).to_json(folder / "few.jsonl")
    (folder / "empty.jsonl").write_text("")
    Dataset.from_dict({"text": [], "label": []}).save_to_disk(folder / "empty")
    return folder


def sp_config(dataset: Path | str, **overrides: Any) -> SparseProbingEvalConfig:
    kwargs: dict[str, Any] = {
        "model_name": "py-neox",
        "dataset_names": [str(dataset)],
        "probe_train_set_size": 60,
        "probe_test_set_size": 40,
        "context_length": 24,
        "k_values": [1, 5],
        **overrides,
    }
    return SparseProbingEvalConfig(**kwargs)


def tpp_config(dataset: Path | str, **overrides: Any) -> TppEvalConfig:
    kwargs: dict[str, Any] = {
        "model_name": "py-neox",
        "dataset_names": [str(dataset)],
        "train_set_size": 60,
        "test_set_size": 40,
        "context_length": 24,
        "n_values": [2, 10],
        "probe_epochs": 3,
        **overrides,
    }
    return TppEvalConfig(**kwargs)


def sae_probes_config(
    dataset: Path | str, **overrides: Any
) -> SparseProbingSaeProbesEvalConfig:
    kwargs: dict[str, Any] = {
        "model_name": "py-neox",
        "dataset_names": [str(dataset)],
        "task_size": 200,
        "ks": [1, 2],
        "reg_type": "l2",
        "include_llm_baseline": False,
        **overrides,
    }
    return SparseProbingSaeProbesEvalConfig(**kwargs)


CONFIGS: dict[str, Callable[..., Any]] = {
    "sparse_probing": sp_config,
    "tpp": tpp_config,
    "sparse_probing_sae_probes": sae_probes_config,
}


def metric_values(result: dict[str, Any]) -> dict[str, float]:
    return {
        name: value
        for metrics in result["eval_result_metrics"].values()
        for name, value in metrics.items()
        if value is not None
    }


def run(
    name: str, config: Any, saes: Any, folder: Path, **kwargs: Any
) -> dict[str, dict[str, Any]]:
    with own_pickles_only():
        return runner.run_eval(
            name,
            config,
            saes,
            output_path=folder / "results",
            artifacts_path=folder / "artifacts",
            **kwargs,
        )


def json_of(value: Any) -> Any:
    return json.loads(json.dumps(value))


# SAEBench's first SAE of a call has other random draws than those after it.
FIRST = [("first", plain(2))]


@pytest.mark.parametrize("name", [*CONFIGS])
def test_planted_pickles_are_not_read(
    name: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    config = CONFIGS[name](texts / "data.csv")
    with own_pickles_only() as read:
        run(name, config, [("a", plain())], tmp_path)
    assert read
    for path in read:
        for folder in ("", "artifacts", f"artifacts/{name}"):
            file = Path(folder, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(pickle.dumps(Planted(tmp_path / "executed")))
    run(name, config, [("a", plain(1))], tmp_path)
    assert not (tmp_path / "executed").exists()
    pickle.loads(file.read_bytes())
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["sparse_probing", "tpp"])
def test_equal_saes_have_equal_results(name: str, texts: Path, tmp_path: Path):
    config = CONFIGS[name](texts / "data.csv")
    together = run(name, config, [(n, plain()) for n in "abc"], tmp_path)
    later = run(name, config, [("d", plain())], tmp_path)
    alone = run(name, config, [("e", plain())], tmp_path / "alone")
    metrics = [
        result["eval_result_metrics"]
        for results in (together, later, alone)
        for result in results.values()
    ]
    assert len(metrics) == 5
    assert all(json_of(m) == json_of(metrics[0]) for m in metrics)
    # nothing is left of what stood in for the first
    assert not list(tmp_path.rglob("*stores*"))


@pytest.mark.parametrize("name", [*CONFIGS])
def test_an_sae_on_modules_of_transformers_has_the_same_results(
    name: str, texts: Path, tmp_path: Path
):
    sae = plain()
    first = run(name, CONFIGS[name](texts / "data.csv"), [("a", sae)], tmp_path / "a")
    modules = sae.cfg.metadata.model_class_name = "AutoModelForCausalLM"
    sae.cfg.metadata.hook_name = "gpt_neox.layers.2"
    fields = config_fields(type(CONFIGS[name]("x")))
    named = {"model_class_name": modules} if "model_class_name" in fields else {}
    config = CONFIGS[name](texts / "data.csv", **named)
    if not HAS_BRIDGE:
        with pytest.raises(UserError, match="needs transformer-lens >= 3"):
            run(name, config, [("a", sae)], tmp_path / "b")
        return
    by_modules = run(name, config, [("a", sae)], tmp_path / "b")
    values = [metric_values(each["a_custom_sae"]) for each in (first, by_modules)]
    assert values[1] == pytest.approx(values[0], abs=0.01)


@pytest.mark.parametrize("name", ["sparse_probing", "tpp"])
def test_what_stands_in_for_the_first_is_narrow(
    name: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    widths: list[int] = []
    for cls in (StandardSAE, JumpReLUOnKernels):
        own = cls.encode

        def encode(sae: Any, x: torch.Tensor, own: Any = own) -> torch.Tensor:
            widths.append(sae.cfg.d_sae)
            return own(sae, x)

        monkeypatch.setattr(cls, "encode", encode)
    run(name, CONFIGS[name](texts / "data.csv"), [("a", plain())], tmp_path)
    assert set(widths) == {2, D_SAE}


def check_equal_but_for_the_names(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """To the last digit, and nothing left out."""
    assert set(ours) == set(theirs)
    for name, result in ours.items():
        for field in ("eval_result_metrics", "eval_result_details"):
            assert json_of(result[field]) == json_of(theirs[name][field])
        assert result["eval_result_unstructured"] == {
            "42": json_of(theirs[name]["eval_result_unstructured"])
        }
        assert len(metric_values(result)) > 3


def test_sparse_probing_equals_sae_bench(texts: Path, scaffold: Any, tmp_path: Path):
    dataset = texts / "data.csv"
    config = sp_config(dataset)
    ours = run(
        "sparse_probing", config, [("plain", plain()), ("scaffold", scaffold)], tmp_path
    )
    model_name = register_embedded_model()
    text = read_labelled_text(str(dataset), "text", "label")
    with labelled_texts([text]):
        theirs = sae_bench_sparse_probing.run_eval(
            sae_bench_sp_config.SparseProbingEvalConfig(
                model_name=model_name,
                dataset_names=[str(dataset)],
                probe_train_set_size=60,
                probe_test_set_size=40,
                context_length=24,
                k_values=[1, 5],
                llm_batch_size=32,
                llm_dtype="float32",
            ),
            [*FIRST, ("plain", plain()), ("scaffold", scaffold.sparse_sae())],
            "cpu",
            str(tmp_path / "sae-bench"),
            artifacts_path=str(tmp_path / "sae-bench-artifacts"),
        )
    del theirs["first_custom_sae"]
    check_equal_but_for_the_names(ours, theirs)
    of_plain, of_scaffold = ours.values()
    assert (of_plain["judged_view"], of_plain["scaffold_rank"]) == ("whole", 0)
    assert (of_scaffold["judged_view"], of_scaffold["scaffold_rank"]) == ("sparse", 4)
    assert of_scaffold["sae_cfg_dict"]["d_sae"] == D_SAE - 4
    # one seed has no interval
    metric = of_plain["metrics_over_seeds"]["sae_top_1_test_accuracy"]
    assert metric["ci_low"] is metric["ci_high"] is None


def test_tpp_equals_sae_bench(texts: Path, scaffold: Any, tmp_path: Path):
    dataset = texts / "data.csv"
    config = tpp_config(dataset)
    ours = run("tpp", config, [("plain", plain()), ("scaffold", scaffold)], tmp_path)
    assert torch.is_grad_enabled()
    text = read_labelled_text(str(dataset), "text", "label")
    with labelled_texts([text]):
        theirs = sae_bench_tpp.run_eval(
            ScrAndTppEvalConfig(
                model_name=register_embedded_model(),
                perform_scr=False,
                dataset_names=[str(dataset)],
                train_set_size=60,
                test_set_size=40,
                context_length=24,
                n_values=[2, 10],
                probe_epochs=3,
                llm_batch_size=32,
                llm_dtype="float32",
            ),
            [*FIRST, ("plain", plain()), ("scaffold", scaffold.sparse_sae())],
            "cpu",
            str(tmp_path / "sae-bench"),
            artifacts_path=str(tmp_path / "sae-bench-artifacts"),
        )
    del theirs["first_custom_sae"]
    torch.set_grad_enabled(True)  # SAEBench switches them off
    check_equal_but_for_the_names(ours, theirs)
    assert all("2605.18229" in result["caveat"] for result in ours.values())
    files = sorted((tmp_path / "results").glob("*.json"))
    assert len(files) == 2


def test_sae_probes_equals_sae_bench(texts: Path, scaffold: Any, tmp_path: Path):
    dataset = texts / "data.csv"
    config = sae_probes_config(dataset, include_llm_baseline=True)
    ours = run(
        "sparse_probing_sae_probes",
        config,
        [("plain", plain()), ("scaffold", scaffold)],
        tmp_path,
    )
    tasks = one_vs_rest_tasks(read_labelled_text(str(dataset), "text", "label"), 200)
    with sae_probes_tasks(tasks, load_embedded_model()):
        theirs = sae_bench_sae_probes.run_eval(
            sae_bench_sae_probes_config.SparseProbingSaeProbesEvalConfig(
                model_name=register_embedded_model(),
                dataset_names=list(tasks),
                ks=[1, 2],
                reg_type="l2",
                results_path=str(tmp_path / "sae-probes"),
                model_cache_path=str(tmp_path / "sae-probes-cache"),
            ),
            [("plain", plain()), ("scaffold", scaffold.sparse_sae())],
            "cpu",
            str(tmp_path / "sae-bench"),
        )
    check_equal_but_for_the_names(ours, theirs)
    for name, result in ours.items():
        assert json_of(result["sae_metrics_by_k"]) == json_of(
            theirs[name]["sae_metrics_by_k"]
        )
        assert len(result["eval_result_details"]) == len(WORDS)
        assert result["sae_cfg_dict"]["architecture"] == "jumprelu"


def test_one_vs_rest_tasks_are_balanced(texts: Path):
    text = read_labelled_text(str(texts / "data.csv"), "text", "label")
    label_of = {row["text"]: row["label"] for row in rows()}
    tasks = one_vs_rest_tasks(text, 200)
    assert list(tasks) == ["0_data-files", "1_data-loops", "2_data-types"]
    for label, task in zip(text.labels, tasks.values(), strict=True):
        assert (task["target"] == [label_of[t] == label for t in task["prompt"]]).all()
        assert task["target"].sum() == 100
        assert task["prompt"].is_unique
    own = utils_data.get_dataset_sizes().copy()
    with sae_probes_tasks(tasks, load_embedded_model()):
        assert (
            utils_data.get_yvals("0_data-files") == tasks["0_data-files"]["target"]
        ).all()
        assert len(utils_data.get_yvals("5_hist_fig_ismale")) == 5000
    assert utils_data.get_dataset_sizes() == own


@pytest.mark.parametrize("name", CONFIGS)
def test_several_seeds(name: str, texts: Path, scaffold: Any, tmp_path: Path):
    make_config = CONFIGS[name]
    output_class: Any = EVALUATIONS[name].load().output_class
    seeds = [3, 1, 8]
    saes = [("my/scaffold", scaffold)]
    config = make_config(texts / "data.csv", random_seeds=seeds, confidence=0.9)
    result = run(name, config, saes, tmp_path / "all")["my/scaffold_custom_sae"]
    single = [
        metric_values(
            run(
                name,
                make_config(texts / "data.csv", random_seed=seed),
                saes,
                tmp_path / f"{seed}",
            )["my/scaffold_custom_sae"]
        )
        for seed in seeds[:2]
    ]
    assert set(result["metrics_over_seeds"]) == set(metric_values(result))
    for metric, value in metric_values(result).items():
        over_seeds = result["metrics_over_seeds"][metric]
        values = over_seeds["values"]
        assert values[:2] == [of_seed[metric] for of_seed in single]
        assert len(values) == 3
        assert value == over_seeds["mean"] == pytest.approx(np.mean(values))
        if np.ptp(values):
            low, high = stats.t.interval(0.9, 2, np.mean(values), stats.sem(values))
            # without what no accuracy can be, and no drop of one less the drop of another
            least, largest = (-2, 2) if name == "tpp" else (0, 1)
            assert over_seeds["ci_low"] == pytest.approx(max(low, least))
            assert over_seeds["ci_high"] == pytest.approx(min(high, largest))
        else:
            assert over_seeds["ci_low"] == over_seeds["ci_high"] == value
    assert any(np.ptp(m["values"]) for m in result["metrics_over_seeds"].values())

    # what SAEBench and the ecosystem do with the files
    results = tmp_path / "all" / "results"
    (file,) = graphing_utils.find_eval_results_files([str(results)])
    assert file == str(results / "my_scaffold_custom_sae_eval_results.json")
    # graphing_utils takes the kind of evaluation from the path
    place = tmp_path / name / "scaffold_eval_results.json"
    place.parent.mkdir()
    place.write_text(Path(file).read_text())
    loaded = graphing_utils.get_eval_results([str(place)])
    (loaded_metrics,) = loaded.values()
    assert loaded_metrics["sae_class"] == "jumprelu"
    stored = json.loads(Path(file).read_text())
    output = TypeAdapter(output_class).validate_python(stored)
    assert output.eval_type_id == name
    assert output.eval_config == config
    assert json_of(TypeAdapter(output_class).dump_python(output, mode="json")) == stored
    json.dumps(TypeAdapter(output_class).json_schema())
    assert "NaN" not in Path(file).read_text()


@pytest.mark.parametrize("file", ["data.jsonl", "data.parquet", "saved"])
def test_every_format_gives_the_same_texts(file: str, texts: Path):
    def load(name: str) -> Any:
        return read_labelled_text(str(texts / name), "text", "label").sample(50, 20, 1)

    assert load(file) == load("data.csv")


def test_rows_are_drawn_apart_and_again(texts: Path):
    label_of = {row["text"]: row["label"] for row in rows()}

    def load(seed: int, name: str = "data.csv") -> Any:
        return read_labelled_text(str(texts / name), "text", "label").sample(
            70, 40, seed
        )

    train, test = load(0)
    assert set(train) == set(test) == set(WORDS)
    for label in WORDS:
        assert {label_of[text] for text in train[label] + test[label]} == {label}
        assert len(set(train[label])) == 70
        assert len(set(test[label])) == 40
        assert not set(train[label]) & set(test[label])
    assert load(0) == (train, test)
    assert load(1)[0] != train
    # a test split is drawn from for the test, and from nowhere else
    in_test = {row["text"] for row in rows(seed=1)[:200]}
    _, test = load(0, "split")
    assert all(set(texts_of) <= in_test for texts_of in test.values())


def test_the_most_frequent_classes(tmp_path: Path):
    counts = {"rare": 3, 7: 9, "often": 12, "x": 9}
    labels = [str(label) for label, count in counts.items() for _ in range(count)]
    dataset = Dataset.from_dict(
        {"body": [f"text {i}" for i in range(len(labels))], "kind": labels}
    )
    dataset.to_json(tmp_path / "data.jsonl")
    text = read_labelled_text(
        str(tmp_path / "data.jsonl"), "body", "kind", max_classes=3
    )
    assert text.labels == ["often", "7", "x"]


def test_text_from_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch):
    dataset = Dataset.from_list(rows()).to_iterable_dataset()
    unseen = Dataset.from_list(rows(seed=1)).to_iterable_dataset()
    opened: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> IterableDatasetDict:
        opened.append((args, kwargs))
        return IterableDatasetDict({"train": dataset, "test": unseen.take(60)})

    monkeypatch.setattr("saelens_scaffold.models.datasets.load_dataset", load_dataset)
    monkeypatch.setattr("saelens_scaffold.evals.labelled_data.MAX_STREAMED_ROWS", 200)
    text = read_labelled_text("user/name", "text", "label", subset="en")
    assert sum(map(len, text.train.values())) == 200
    assert text.test is not None
    assert sum(map(len, text.test.values())) == 60
    assert all(call == (("user/name", "en"), {"streaming": True}) for call in opened)


def test_no_text_is_trained_and_tested_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    train, test = rows(), rows(seed=1)
    copies = DatasetDict(
        train=Dataset.from_list([*train, *train[:40]]),
        test=Dataset.from_list([*test, *train[:20], *test[:10]]),
    )
    copies.save_to_disk(tmp_path / "copies")
    text = read_labelled_text(str(tmp_path / "copies"), "text", "label")
    assert "40 texts occur again" in caplog.text
    assert "30 texts occur again" in caplog.text
    assert text.test is not None
    found = [
        sorted(text for texts in part.values() for text in texts)
        for part in (text.train, text.test)
    ]
    assert found == [sorted(row["text"] for row in part) for part in (train, test)]

    # where the halves are drawn from one split
    Dataset.from_list([*train, *train]).to_json(tmp_path / "twice.jsonl")
    once = read_labelled_text(str(tmp_path / "twice.jsonl"), "text", "label")
    halves = once.sample(ROWS_PER_CLASS - 10, 10, seed=0)
    drawn = [{text for texts in half.values() for text in texts} for half in halves]
    assert drawn[0].isdisjoint(drawn[1])
    assert len(drawn[0]) + len(drawn[1]) == len(train)


def test_embedded_text():
    train, test = read_labelled_text("python-stdlib", "text", "label").sample(
        20, 10, seed=0
    )
    assert set(train) == set(test)
    assert len(train) == 5
    assert {len(texts) for texts in train.values()} == {20}


def test_sae_bench_is_left_as_it_was(texts: Path):
    classes = dict(dataset_info.chosen_classes_per_dataset)
    load = dataset_utils.get_multi_label_train_test_data
    text = read_labelled_text(str(texts / "data.csv"), "text", "label")
    with pytest.raises(KeyboardInterrupt), labelled_texts([text]):
        assert text.name in dataset_info.chosen_classes_per_dataset
        with pytest.raises(ValueError, match="not supported"):
            dataset_utils.get_multi_label_train_test_data("unknown", 4, 4, 0)
        raise KeyboardInterrupt
    assert dataset_info.chosen_classes_per_dataset == classes
    assert dataset_utils.get_multi_label_train_test_data is load
    assert text.name not in sae_bench_tpp.COLUMN2_VALS_LOOKUP


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("dataset", "overrides", "message"),
    [
        ("data.csv", {"text_column": "body"}, "no column 'body'; it has"),
        ("data.csv", {"label_column": "kind"}, "no column 'kind'; it has"),
        ("one-class.jsonl", {}, r"1 class\(es\) of text in column 'label'"),
        ("empty.jsonl", {}, "is empty"),
        ("empty", {}, "is empty"),
        ("few.jsonl", {}, "has fewer than the|has fewer of these"),
        ("nowhere.csv", {}, "no such file"),
    ],
)
def test_unusable_text_is_refused_before_anything_is_run(
    name: str,
    dataset: str,
    overrides: dict[str, Any],
    message: str,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(
        "saelens_scaffold.evals.saebench.over_seeds.lent_language_model",
        lambda *_: pytest.fail("the model was loaded"),
    )
    results = tmp_path / "results"
    results.mkdir()
    kept = results / "plain_custom_sae_eval_results.json"
    kept.write_text("kept")
    config = CONFIGS[name](texts / dataset, **overrides)
    with pytest.raises(UserError, match=message) as error:
        run(name, config, [("plain", plain())], tmp_path, force_rerun=True)
    assert "\n" not in str(error.value)
    assert dataset in str(error.value)
    assert kept.read_text() == "kept"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sp_config("x", random_seeds=[]), "at least one, and none twice"),
        (lambda: sp_config("x", random_seeds=[1, 1]), "none twice"),
        (
            lambda: sp_config("x", random_seeds=[1, 2], random_seed=3),
            "random_seed is 3",
        ),
        (lambda: sp_config("x", llm_dtype="int8"), "should be 'float32'"),
        (lambda: tpp_config("x", llm_batch_size=0), "greater than 0"),
        (lambda: sp_config("x", k_values=[3]), "1, 2, 5, 10"),
        (lambda: sp_config("x", confidence=1.0), "less than 1"),
        (lambda: tpp_config("x", n_values=[1]), "2, 5, 10"),
        (lambda: tpp_config("x", perform_scr=True), "should be False"),
        (lambda: sae_probes_config("x", setting="scarcity"), "should be 'normal'"),
        (lambda: sae_probes_config("x", binarize=True), "should be False"),
        (lambda: sae_probes_config("x", task_size=101), "multiple of 2"),
    ],
)
def test_unusable_configurations(make: Callable[[], Any], message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_other_refusals(texts: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="a dimension for heads"):
        of_heads = plain()
        of_heads.cfg.reshape_activations = "hook_z"
        run("sparse_probing", sp_config("x"), [("heads", of_heads)], tmp_path)
    saes = [("plain", plain())]
    data = texts / "data.csv"
    with pytest.raises(ValueError, match="dataset_names is empty"):
        run("sparse_probing", sp_config(data, dataset_names=[]), saes, tmp_path)
    with pytest.raises(ValueError, match="n_values has 100, but SAE 'plain'"):
        run("tpp", tpp_config(data, n_values=[100]), saes, tmp_path)
    with pytest.raises(ValueError, match="d_in 16, but py-neox has width 256"):
        narrow = plain()
        narrow.cfg.d_in = 16
        run("sparse_probing", sp_config(data), [("narrow", narrow)], tmp_path)


def test_every_field_can_be_a_flag():
    for make_config in CONFIGS.values():
        for field in type(make_config("x")).__pydantic_fields__.values():
            assert field.title
            assert field.description


def test_a_scaffold_sae_of_a_release_is_judged_by_its_sparse_part(
    scaffold: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        SAE,
        "from_pretrained_with_cfg_and_sparsity",
        lambda **_: (scaffold, {}, None),
    )
    widths: dict[View, int] = {"sparse": D_SAE - 4, "whole": D_SAE}
    for view, d_sae in widths.items():
        (selected,) = resolve_saes([("release", "id")], "cpu", "", view)
        assert selected.key == "release_id"
        assert selected.sae.cfg.d_sae == d_sae
        assert selected.hook_name == HOOK


def test_a_local_model_of_any_path(texts: Path, tmp_path: Path):
    directory = tmp_path / "models" / "my-model"
    shutil.copytree(Path(str(files("saelens_scaffold.models") / "py-neox")), directory)
    before = sorted(directory.rglob("*"))
    data = texts / "data.csv"
    for name in ("sparse_probing", "sparse_probing_sae_probes"):
        config = CONFIGS[name](data, model_name=str(directory))
        (ours,) = run(name, config, [("plain", plain())], tmp_path / name).values()
        assert ours["eval_config"]["model_name"] == str(directory)
        assert sorted(directory.rglob("*")) == before


def test_random_seed_alone_is_the_only_seed():
    assert sp_config("x", random_seed=7).random_seeds == [7]
    assert sp_config("x", random_seeds=[5, 7]).random_seed == 5
    assert sp_config("x").random_seeds == [42]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """Seeds and SAEs of the calls of SAEBench. With seed 13 it is interrupted."""
    calls: list[tuple[int, list[str]]] = []
    own = sae_bench_sparse_probing.run_eval

    def count(config: Any, selected_saes: Any, *args: Any, **kwargs: Any) -> Any:
        names = [re.split("[-_]", name)[0] for name, _ in selected_saes]
        calls.append((config.random_seed, names))
        if config.random_seed == 13:
            raise KeyboardInterrupt
        return own(config, selected_saes, *args, **kwargs)

    monkeypatch.setattr(sae_bench_sparse_probing, "run_eval", count)
    return calls


def test_an_interrupted_call_goes_on(
    texts: Path, tmp_path: Path, runs: list[tuple[int, list[str]]]
):
    data = texts / "data.csv"
    a, b = ("a", plain(0)), ("b", plain(1))
    with pytest.raises(KeyboardInterrupt):
        run(
            "sparse_probing", sp_config(data, random_seeds=[1, 2, 13]), [a, b], tmp_path
        )
    stored = ["stores"]
    both = ["a", "b"]
    assert runs == [(1, stored), (1, both), (2, stored), (2, both), (13, stored)]
    assert not list((tmp_path / "results").glob("*.json"))

    # a result that was not written to its end does not count, the others do
    (broken,) = tmp_path.rglob("b_*.seed-2.partial")
    broken.write_text(broken.read_text()[:100])
    runs.clear()
    config = sp_config(data, random_seeds=[1, 2, 3])
    resumed = run("sparse_probing", config, [a, b], tmp_path)
    assert runs == [(2, stored), (2, ["b"]), (3, stored), (3, both)]
    fresh = run("sparse_probing", config, [a, b], tmp_path / "fresh")
    assert [r["metrics_over_seeds"] for r in resumed.values()] == [
        r["metrics_over_seeds"] for r in fresh.values()
    ]

    # finished results are left alone
    runs.clear()
    assert json_of(run("sparse_probing", config, [a, b], tmp_path)) == json_of(resumed)
    assert runs == []
    # results of an SAE of that name, or of other settings, are measured again
    run(
        "sparse_probing", sp_config(data, random_seeds=[1]), [("a", plain(2))], tmp_path
    )
    other = sp_config(data, random_seeds=[1], context_length=20)
    run("sparse_probing", other, [a], tmp_path)
    assert runs == [(1, stored), (1, ["a"])] * 2
    # SAEBench's results of single seeds are nowhere where its tools look for results
    assert len(graphing_utils.find_eval_results_files([str(tmp_path)])) == 4
