"""Results are shown only if everything that they depend on is as it was."""

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest

from eval_helpers import eval_sae
from saelens_scaffold.evals import store
from saelens_scaffold.evals.store import ResultStore, differences, stored_results
from saelens_scaffold.models import embedded_model_path
from saelens_scaffold_cli import main

TEXT = "def f_{i}(x):\n    return x + {i}\n"


def write_text(file: str, offset: int) -> None:
    rows = [{"text": TEXT.format(i=i) * 30} for i in range(offset, offset + 20)]
    Path(file).write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds an SAE and a text."""
    monkeypatch.chdir(tmp_path)
    eval_sae(rank=4).save_model("sae")
    write_text("text.jsonl", 0)


def evaluate(*options: str, sae: str = "sae") -> dict[str, Any]:
    """The result of `eval dense_latents`, as the command leaves it."""
    command = ["eval", "dense_latents", "--sae_path", sae, "--dataset=text.jsonl"]
    quick = ["--set=dense_latents.n_tokens=500", "--device=cpu", *options]
    assert main([*command, *quick]) == 0
    name = f"{Path(sae).name}_custom_sae_eval_results.json"
    return json.loads(Path("eval_results/dense_latents", name).read_text())


def test_a_current_result_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    first = evaluate()
    assert evaluate("--llm_batch_size=3") == first  # which changes no number
    assert "measuring again" not in capsys.readouterr().err


def test_replaced_text_is_measured_again(capsys: pytest.CaptureFixture[str]) -> None:
    first = evaluate()
    write_text("text.jsonl", 1000)
    second = evaluate()
    assert second["eval_id"] != first["eval_id"]
    unstructured = "eval_result_unstructured"
    assert second[unstructured]["fired"] != first[unstructured]["fired"]
    assert "another dataset text.jsonl of the same name" in capsys.readouterr().err


def test_another_model_of_the_same_name_is_measured_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(embedded_model_path(), "model")
    first = evaluate("--model=./model")
    assert evaluate("--model=./model") == first
    readme = Path("model/README.md")
    readme.write_text("changed")
    second = evaluate("--model=./model")
    assert second["eval_id"] != first["eval_id"]
    assert "another model ./model of the same name" in capsys.readouterr().err


def test_other_versions_are_measured_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate()
    now = {**store.versions(), "torch": "99.0"}
    monkeypatch.setattr(store, "versions", lambda: now)
    second = evaluate()
    assert second["eval_id"] != first["eval_id"]
    assert "torch " in capsys.readouterr().err


def test_other_weights_of_the_baseline_are_measured_again() -> None:
    eval_sae(seed=1).save_model("plain")
    both = ["--sae_path", "sae", "plain", "--baseline=plain"]
    first = evaluate(*both)
    assert evaluate(*both) == first
    shutil.rmtree("plain")
    eval_sae(seed=2).save_model("plain")
    assert evaluate(*both)["eval_id"] != first["eval_id"]


@pytest.mark.parametrize("suffix", [".json", ".key"])
def test_a_damaged_file_is_no_result(suffix: str) -> None:
    first = evaluate()
    (file,) = Path("eval_results/dense_latents").glob(f"*{suffix}")
    file.write_text(file.read_text()[:-20])
    assert evaluate()["eval_id"] != first["eval_id"]


def test_stored_results_tell_what_has_changed() -> None:
    evaluate()
    (stored,) = stored_results(Path("eval_results"))
    assert stored.evaluation == "dense_latents"
    assert stored.why_stale() is None
    write_text("text.jsonl", 5)
    assert "another dataset text.jsonl" in str(stored.why_stale())
    Path("text.jsonl").unlink()  # then nobody can tell
    assert stored.why_stale() is None
    for key in Path("eval_results").rglob("*.key"):
        key.unlink()
    (stored,) = stored_results(Path("eval_results"))
    assert "nothing says" in str(stored.why_stale())


def test_a_result_and_its_key_belong_together(tmp_path: Path) -> None:
    results = ResultStore(tmp_path / "results")
    key, other = ({"eval_config": {"n": n}} for n in (1, 2))
    assert results.find("a.json", key) is None
    results.keep("a.json", key, {"value": float("nan")})
    assert results.find("a.json", key) is not None
    assert results.find("a.json", other) is None
    assert results.why_stale("a.json", other) == "measured with n 1 (now 2)"
    assert differences(key, key) == []


def keep_often(folder: Path, n: int) -> None:
    for _ in range(100):
        ResultStore(folder).keep("a.json", {"eval_config": {"n": n}}, {"n": n})


def test_a_result_never_has_the_key_of_another_process(tmp_path: Path) -> None:
    keys = [{"eval_config": {"n": n}} for n in (1, 2)]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=keep_often, args=(tmp_path, n)) for n in (1, 2)]
    for process in processes:
        process.start()
    n_found = 0
    while any(process.is_alive() for process in processes):
        for n, key in enumerate(keys, 1):
            found = ResultStore(tmp_path).find("a.json", key)
            assert found in (None, {"n": n})
            n_found += found is not None
    assert [process.exitcode for process in processes] == [0, 0]
    assert n_found


def test_a_result_whose_key_came_later_than_anothers_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, write = ResultStore(tmp_path), store._write
    one, two = ({"eval_config": {"n": n}} for n in (1, 2))

    def overtaken(file: Path, content: Any) -> None:
        if file.suffix == store.KEY_SUFFIX:
            monkeypatch.setattr(store, "_write", write)
            results.keep("a.json", two, {"n": 2})
        write(file, content)

    monkeypatch.setattr(store, "_write", overtaken)
    results.keep("a.json", one, {"n": 1})
    assert results.find("a.json", one) is None
    assert "nothing says" in str(results.why_stale("a.json", one))
