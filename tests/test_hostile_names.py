"""Names and links out of files of others: none leads out of its folder."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub_fixtures import REPO, save_sae
from saelens_scaffold import upload_scaffold_saes
from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.untrusted import file_name, read_json, without_token
from saelens_scaffold.evals.base import Evaluation
from saelens_scaffold.evals.saes import result_file_name
from saelens_scaffold.evals.store import KEY_SUFFIX, ResultStore
from saelens_scaffold.hub import findings
from saelens_scaffold.models.datasets import open_dataset
from saelens_scaffold.saes.facts import weights_sha256
from saelens_scaffold.saes.sae_ids import check_sae_id, sae_id_of_path
from saelens_scaffold_cli import main

EVILS = ["../x", "/x", "a/b", "a\\b", "..", ".", "", "C:x", "a\0b", "x\n", "\ud800"]
NAMES = st.one_of(
    st.text(max_size=300),
    st.lists(st.sampled_from(["..", ".", "/", "\\", "a", "~", "\0", " ", "é"])).map(
        "".join
    ),
)


@pytest.fixture
def sae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_sae(tmp_path / "sae")
    return tmp_path / "sae"


def dry_run(source: Any, **options: Any) -> Any:
    options |= {"dry_run": True, "show_progress": False}
    return upload_scaffold_saes(source, REPO, **options)


def write_result(sae: Path, name: str, keyed: bool = True, **fields: Any) -> None:
    """A result of an SAE, of an evaluation with any name."""
    folder = sae / "eval_results"
    folder.mkdir(exist_ok=True)
    content = {"eval_type_id": name, "eval_config": {}, "eval_result_metrics": {}}
    (folder / "x.json").write_text(json.dumps({**content, **fields}))
    if keyed:
        from sae_lens import SAE

        from saelens_scaffold.evals.store import _current_versions, _identity

        key = {
            "result": _identity({**content, **fields}),
            "evaluation": {"name": name},
            "eval_config": {},
            "weights": {"sae": weights_sha256(SAE.load_from_disk(sae))},
            "fingerprints": {},
            "versions": _current_versions(),
        }
        (folder / f"x{KEY_SUFFIX}").write_text(json.dumps(key))


@given(NAMES)
@settings(max_examples=500, deadline=None)
def test_no_name_leads_out_of_its_folder(name: str) -> None:
    folder = Path("/home/user/results")
    for make in (file_name, result_file_name, check_sae_id):
        try:
            path = make(name)
        except UserError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 500
            continue
        inside = Path(os.path.normpath(folder / path))
        assert folder in inside.parents
        if make is not check_sae_id:
            assert inside.parent == folder


@given(st.text(alphabet=st.characters(categories=["L", "N"]), min_size=1, max_size=40))
def test_ordinary_names_are_file_names(name: str) -> None:
    for each in (name, f"{name} (a, b=1.5) [2].json", f"{name}-v2_x"):
        assert file_name(each) == each


@pytest.mark.parametrize("name", EVILS)
@pytest.mark.parametrize("keyed", [True, False])
def test_an_upload_writes_no_file_that_a_result_names(
    sae: Path, name: str, keyed: bool
) -> None:
    victim = sae.parent / "x.json"
    victim.write_text("mine")
    name = str(victim.with_suffix("")) if name == "/x" else name
    write_result(sae, name, keyed)
    with pytest.raises(
        UserError, match="cannot name a file|is no evaluation result"
    ) as caught:
        dry_run(sae)
    assert "x.json" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert victim.read_text() == "mine"


def test_a_result_of_that_kind_is_uploaded_where_its_name_is_one(sae: Path) -> None:
    write_result(sae, "my_eval")
    assert "sae/eval_results/my_eval.json" in dry_run(sae).files


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/b"])
def test_an_evaluations_name_makes_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot name a file"):
        ResultStore(tmp_path).keep(name, {"eval_config": {}}, {})
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "name", ["runner_cfg.json", "sparsity.safetensors", "cfg.json", "eval_results"]
)
def test_links_out_of_an_sae_are_not_followed(sae: Path, name: str) -> None:
    secret = sae.parent / "secret"
    if name == "eval_results":
        write_result(sae, "a")
    (sae / name).rename(secret)
    (sae / name).symlink_to(secret)
    with pytest.raises(UserError, match=f"{name} is a link that leads out of"):
        dry_run(sae)
    (sae / name).unlink()
    secret.rename(sae / f"other-{name}")
    (sae / name).symlink_to(sae / f"other-{name}")  # within it: published as a file
    assert "sae/cfg.json" in dry_run(sae).files


def test_links_out_of_a_result_folder_are_not_followed(sae: Path) -> None:
    write_result(sae, "a")
    result = sae / "eval_results" / "x.json"
    result.rename(sae.parent / "secret.json")
    result.symlink_to(sae.parent / "secret.json")
    with pytest.raises(UserError, match="link that leads out of"):
        dry_run(sae)


@pytest.mark.parametrize("name", ["report.html", "results.json", "compare.yaml"])
def test_links_out_of_a_comparison_are_not_followed(tmp_path: Path, name: str) -> None:
    run, secret = tmp_path / "run", tmp_path / "secret"
    save_sae(run / "saes" / "a")
    (run / "compare.yaml").write_text("grid: {}")
    secret.write_text("token")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(secret)
    with pytest.raises(UserError, match=f"{name} is a link that leads out of"):
        dry_run(run)


@pytest.mark.parametrize("source", ["", " ", "layer_12=", {"layer_12": ""}, [""]])
def test_an_empty_path_is_an_error(
    sae: Path, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sae.parent)
    with pytest.raises(UserError, match="empty|is neither a directory"):
        dry_run(source)


def test_an_empty_folder_of_results_is_an_error(
    sae: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["upload", str(sae), f"--repo_id={REPO}", "--dry-run", "--eval_results="]
    if main(command) != 2:
        pytest.fail(capsys.readouterr().err)
    assert "path is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "sae_id",
    ["README.md", "readme.md", "a/cfg.json", "a/sparsity.safetensors", "results.json"],
)
def test_ids_are_no_names_of_files(sae_id: str) -> None:
    with pytest.raises(UserError, match="is a file or folder of an SAE"):
        check_sae_id(sae_id)
    with pytest.raises(UserError, match="is a file or folder of an SAE"):
        sae_id_of_path(Path(sae_id))


@pytest.mark.parametrize(
    ("value", "published"),
    [
        ("data/alice/text.jsonl", "text.jsonl"),
        ("my data/alice/text.jsonl", "text.jsonl"),
        ("data\\alice\\text.jsonl", "text.jsonl"),
        ("file:///home/alice/text.jsonl", "text.jsonl"),
        ("FILE:/home/alice/text.jsonl", "text.jsonl"),
        ("user/model", "user/model"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("hf://datasets/a/b/c", "hf://datasets/a/b/c"),
        ('SAE.from_pretrained("a/b", "c/d")', 'SAE.from_pretrained("a/b", "c/d")'),
    ],
)
def test_local_paths_are_not_published(value: str, published: str) -> None:
    assert findings.without_directories({"a": [value]}) == {"a": [published]}


def test_a_card_keeps_the_whole_ids(tmp_path: Path) -> None:
    save_sae(tmp_path / "saes" / "a" / "b" / "c")
    upload = dry_run(tmp_path / "saes")
    assert "| `a/b/c` |" in upload.readme


def test_brackets_in_a_name_are_no_pattern(tmp_path: Path) -> None:
    from saelens_scaffold.evals.saebench import read_result

    name = result_file_name("sae[1]")
    (tmp_path / name).write_text("{}")
    assert read_result(tmp_path, name) == {}


def test_a_text_in_a_folder_with_brackets_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a[b]" / "t[1].jsonl"
    file.parent.mkdir()
    file.write_text('{"text": "x"}')
    assert [*open_dataset(str(file), "train")] == [{"text": "x"}]
    with pytest.raises(UserError, match="rename the folder"):
        open_dataset(str(file.parent), "train")


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    contents = [b"", b"{", b"\xff\xfe{\0}\0", b"[" * 100_000, b"1" * 5000]
    contents += [b"[" * 60 + b"]" * 60, b"[" + b"0," * (1 << 21) + b"0]"]
    for content in contents:
        file.write_bytes(content)
        with pytest.raises(UserError, match=re.escape(str(file))) as caught:
            read_json(file)
        assert "\n" not in str(caught.value)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="no regular file"):
        read_json(file)
    with file.with_name("large").open("wb") as large:
        large.truncate(1 << 34)  # takes no room
    with pytest.raises(UserError, match="more than 67,108,864 bytes"):
        read_json(file.with_name("large"))


def test_plugins_evaluations_have_file_names(
    sae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from saelens_scaffold.evals import registry

    evil: Evaluation = replace(registry.EVALUATIONS["dense_latents"], name="../out")
    monkeypatch.setitem(registry.EVALUATIONS, "../out", evil)
    monkeypatch.chdir(sae.parent)
    command = ["eval", "../out", f"--sae_path={sae}", "--dataset=python-stdlib"]
    assert main([*command, "--device=cpu"]) == 2
    assert not Path("out").exists()


def test_messages_have_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "of-another-form")
    given = "hf_" + 34 * "a"
    said = without_token(f"{given} and of-another-form may not use hf_hub_download")
    assert said == "<token> and <token> may not use hf_hub_download"
