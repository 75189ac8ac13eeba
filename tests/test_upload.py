"""Uploading over real HTTP to a small Hub, and loading what has been uploaded."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from safetensors.torch import load_file

from eval_helpers import HOOK, eval_sae
from helpers import activations, scaffold_sae, train
from hub_fixtures import (
    REPO,
    RUNNER_CFG,
    SCAFFOLD_FILES,
    hub,
    hub_environment,
    paths_in,
    save_sae,
    some_activations,
)
from hub_server import CUT, LOST, READ_TOKEN, Blob, HubServer
from saelens_scaffold import (
    ScaffoldJumpReLUSAE,
    load_scaffold_sae,
    upload_scaffold_saes,
)
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.hub import commits as hub_commits
from saelens_scaffold.hub.commits import HubUploadError
from saelens_scaffold.hub.findings import without_directories
from saelens_scaffold.saes.facts import weights_sha256
from saelens_scaffold.saes.validation import InvalidSAEError
from saelens_scaffold.training.measurement import measure
from saelens_scaffold_cli import main

__all__ = ["hub"]  # a fixture


def upload(saes: Any, **kwargs: Any) -> Any:
    return upload_scaffold_saes(saes, REPO, show_progress=False, **kwargs)


def front_matter(readme: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", readme, flags=re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def test_both_forms_come_back_and_are_the_original(
    hub: HubServer, tmp_path: Path
) -> None:
    x = some_activations()
    original = save_sae(tmp_path / "layer_0")
    expected = original(x)
    summary = upload({"a/layer_0": tmp_path / "layer_0"}, license="mit")

    assert paths_in(hub, "a/layer_0") == SCAFFOLD_FILES | {
        "runner_cfg.json",
        "sparsity.safetensors",
        "jumprelu/sparsity.safetensors",
    }
    assert hub.repositories[REPO].titles == [
        "initial commit",
        "Upload SAE a/layer_0",
        "Write the model card",
    ]
    assert not hub.repositories[REPO].private
    assert summary.commits["a/layer_0"].startswith(f"{hub.url}/{REPO}/commit/")

    sae, cfg, log_sparsity = SAE.from_pretrained_with_cfg_and_sparsity(
        REPO, "a/layer_0"
    )
    assert isinstance(sae, ScaffoldJumpReLUSAE)
    assert sae.cfg.scaffold_rank == 4
    assert cfg["metadata"]["hook_name"] == HOOK
    torch.testing.assert_close(sae(x), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sae.scaffold(x), original.scaffold(x))

    plain, plain_cfg, plain_sparsity = SAE.from_pretrained_with_cfg_and_sparsity(
        REPO, "a/layer_0/jumprelu"
    )
    assert type(plain) is JumpReLUSAE
    torch.testing.assert_close(plain(x), expected, rtol=1e-6, atol=1e-6)

    # what the configurations say to those who read them is a call that works
    for text in cfg["metadata"]["how_to_load"], plain_cfg["metadata"]["how_to_load"]:
        call = re.findall(r'SAE\.from_pretrained\("(.*?)", "(.*?)"\)', text)[-1]
        assert call == (REPO, "a/layer_0/jumprelu")
    assert "pip install saelens-scaffold" in cfg["metadata"]["how_to_load"]

    assert log_sparsity is not None and plain_sparsity is not None
    stored = load_file(tmp_path / "layer_0" / "sparsity.safetensors")["sparsity"]
    assert torch.equal(log_sparsity, stored)
    assert plain_sparsity.shape == (plain.cfg.d_sae,)
    assert torch.equal(plain_sparsity[8:], stored[4:])
    assert torch.equal(plain_sparsity[:4], stored[:4])
    assert torch.equal(plain_sparsity[4:8], stored[:4])

    checked = load_scaffold_sae(REPO, "a/layer_0")
    torch.testing.assert_close(checked(x), expected, rtol=1e-6, atol=1e-6)
    assert isinstance(load_scaffold_sae(REPO, "a/layer_0/jumprelu"), JumpReLUSAE)


def test_an_sae_in_memory_is_uploaded_like_its_directory(
    hub: HubServer, tmp_path: Path
) -> None:
    sae = save_sae(tmp_path / "sae")
    sparsity = load_file(tmp_path / "sae" / "sparsity.safetensors")["sparsity"]
    beside = {
        "log_feature_sparsity": {"sae": sparsity},
        "runner_cfg": {"sae": RUNNER_CFG},
    }
    upload({"sae": tmp_path / "sae"}, hf_revision="directory")
    upload({"sae": sae}, hf_revision="memory", **beside)
    files = [
        {path: file.content for path, file in hub.repositories[REPO].files(of).items()}
        for of in ("directory", "memory")
    ]
    assert "sae/sparsity.safetensors" in files[0]
    assert files[0] == files[1]


def test_what_is_beside_an_sae_in_memory_is_checked(tmp_path: Path) -> None:
    sae = save_sae(tmp_path / "sae")
    for saes in {"sae": sae}, {"other": tmp_path / "sae"}:
        with pytest.raises(UserError, match="log_feature_sparsity is of 'other'"):
            beside = {"other": torch.zeros(96)}
            upload(saes, dry_run=True, log_feature_sparsity=beside)
    with pytest.raises(InvalidSAEError, match=r"SAE 'sae': .*sparsity"):
        beside = {"sae": torch.zeros(95)}
        upload({"sae": sae}, dry_run=True, log_feature_sparsity=beside)


def test_the_plain_form_loads_where_this_package_cannot_be_imported(
    hub: HubServer, tmp_path: Path
) -> None:
    sae = eval_sae(rank=4)
    upload({"layer_0": sae})
    x = some_activations()
    (tmp_path / "x.json").write_text(json.dumps(x.tolist()))
    program = """
import json, sys, torch
class NoScaffold:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "saelens_scaffold":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoScaffold())
from sae_lens import SAE
repo, file = sys.argv[1:]
sae = SAE.from_pretrained(repo, "layer_0/jumprelu")
x = torch.tensor(json.load(open(file)))
try:
    SAE.from_pretrained(repo, "layer_0")
except KeyError as error:
    problem = repr(error)
assert "saelens_scaffold" not in sys.modules
print(json.dumps([sae.cfg.architecture(), sae(x).tolist(), problem]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program, REPO, str(tmp_path / "x.json")],
        capture_output=True,
        text=True,
        env={**os.environ, **hub_environment(hub, tmp_path / "home")},
    )
    assert result.returncode == 0, result.stderr
    architecture, output, problem = json.loads(result.stdout.splitlines()[-1])
    assert architecture == "jumprelu"
    torch.testing.assert_close(torch.tensor(output), sae(x), rtol=1e-6, atol=1e-6)
    # what a colleague reads, they find in the card, with the way out
    readme = hub.repositories[REPO].files()["README.md"].content.decode()
    section = readme[readme.index(problem.replace("(", ": ").replace(")", "")) :]
    assert "pip install saelens-scaffold" in section
    assert 'SAE.from_pretrained("user/saes", "layer_0/jumprelu")' in section


def test_objects_directories_and_declined_plain_forms(
    hub: HubServer, tmp_path: Path
) -> None:
    save_sae(tmp_path / "plain", rank=0, sparsity=False)
    scaffold = eval_sae(rank=2)
    hints = scaffold.cfg.metadata.to_dict()
    upload({"plain": str(tmp_path / "plain"), "scaffold": scaffold}, jumprelu=False)
    assert paths_in(hub, "plain") == {
        "cfg.json",
        "sae_weights.safetensors",
        "runner_cfg.json",
    }
    assert paths_in(hub, "scaffold") == {"cfg.json", "sae_weights.safetensors"}
    assert scaffold.cfg.metadata.to_dict() == hints  # the user's SAE is as it was
    x = some_activations()
    torch.testing.assert_close(
        SAE.from_pretrained(REPO, "plain")(x),
        SAE.load_from_disk(tmp_path / "plain")(x),
    )
    readme = hub.repositories[REPO].files()["README.md"].content.decode()
    assert "/jumprelu" not in readme


def test_training_saes_are_uploaded_in_inference_form(hub: HubServer) -> None:
    sae = scaffold_sae()
    train(sae, steps=5)
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "gpt2", "hook"
    upload({"sae": sae})
    x = activations(20, seed=3)
    loaded = SAE.from_pretrained(REPO, "sae")
    torch.testing.assert_close(loaded(x), sae.to_inference()(x))
    readme = hub.repositories[REPO].files()["README.md"].content.decode()
    assert front_matter(readme)["base_model"] == "gpt2"


def test_the_card_of_a_scaffold_sae_without_scaffold(hub: HubServer) -> None:
    """Of rank 0, as the end of a sweep: it needs this package like the others."""
    sae = scaffold_sae(scaffold_rank=0)
    train(sae, steps=2)
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "gpt2", "hook"
    upload({"sae": sae})
    readme = hub.repositories[REPO].files()["README.md"].content.decode()
    assert "Plain SAEs load with SAELens alone" not in readme
    snippets = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert "import saelens_scaffold" in snippets[0]
    assert '"sae/jumprelu"' in snippets[1]
    for snippet in snippets:
        exec(compile(snippet, "card", "exec"), {})


def test_what_a_killed_upload_leaves_goes_with_the_next(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    sae = save_sae(tmp_path / "sae")
    commit = hub_commits.HubUpload._commit

    class Killed(BaseException):
        pass

    def killed(*_: Any) -> Any:
        left = tmp_path / "left"
        shutil.copytree(tmp_path / "tmp", left)
        raise Killed

    monkeypatch.setattr(hub_commits.HubUpload, "_commit", killed)
    with pytest.raises(Killed):
        upload({"sae": sae})
    (tmp_path / "tmp").rmdir()  # an exception leaves nothing
    (tmp_path / "left").rename(tmp_path / "tmp")
    assert [*(tmp_path / "tmp").rglob("sae_weights.safetensors")]
    monkeypatch.setattr(hub_commits.HubUpload, "_commit", commit)
    upload({"sae": sae})
    assert [*(tmp_path / "tmp").iterdir()] == []


def test_no_path_of_the_users_machine_is_published(
    hub: HubServer, tmp_path: Path
) -> None:
    from saelens_scaffold.evals.store import ResultStore, _current_versions

    home = "/home/alice/private"
    sae = save_sae(tmp_path / "sae", rank=4)
    sae.cfg.metadata.model_name = f"{home}/model"
    sae.cfg.metadata.dataset_path = f"{home}/texts"
    sae.save_model(tmp_path / "sae")
    runner_cfg = {"output_path": f"{home}/out", "sae": {"dataset": "~/private"}}
    (tmp_path / "sae" / "runner_cfg.json").write_text(json.dumps(runner_cfg))
    result = {
        "eval_result_metrics": {},
        "eval_result_unstructured": {"tokens": ["/*", "/usr/bin"]},
        "eval_config": {"dataset": f"{home}/texts"},
    }
    key = {
        "evaluation": {"name": "dense_latents"},
        "eval_config": result["eval_config"],
        "weights": {"sae": weights_sha256(sae)},
        "versions": _current_versions(),
    }
    ResultStore(tmp_path / "results").keep("sae.json", key, result)
    upload({"sae": tmp_path / "sae"}, eval_results=tmp_path / "results")
    files = hub.repositories[REPO].files()
    texts = {
        path: blob.content.decode()
        for path, blob in files.items()
        if path.endswith((".md", ".json"))
    }
    assert len(texts) == 5
    assert not [path for path, text in texts.items() if "private/" in text]
    assert "| `model` |" in texts["README.md"]
    assert json.loads(texts["sae/cfg.json"])["metadata"]["model_name"] == "model"
    stored = json.loads(texts["sae/eval_results/dense_latents.json"])
    assert stored["eval_result_unstructured"] == result["eval_result_unstructured"]
    assert stored["eval_config"] == {"dataset": "texts"}
    assert sae.cfg.metadata.model_name == f"{home}/model"


@pytest.mark.parametrize(
    ("value", "published"),
    [
        ("user/model", "user/model"),
        ("./texts", "texts"),
        (r"C:\Users\alice\texts", "texts"),
        ({"a": [1, None, "~/texts/"]}, {"a": [1, None, "texts"]}),
        ("/", "/"),
    ],
)
def test_what_is_left_of_a_path(value: Any, published: Any) -> None:
    assert without_directories(value) == published


def test_a_directory_tree_gives_ids_by_path(hub: HubServer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_sae(run / "saes" / "seed-0" / "ScaffoldBatchTopK")
    save_sae(run / "saes" / "seed-0" / "BatchTopK (centred)", rank=0)
    # a plain form that somebody has saved beside its SAE is no SAE of its own
    eval_sae(rank=4).to_jumprelu().save_model(
        run / "saes" / "seed-0" / "ScaffoldBatchTopK" / "jumprelu"
    )
    (run / "compare.yaml").write_text("seeds: [0]\n")
    (run / "results.json").write_text('{"saes": [], "comparisons": []}')
    summary = upload(run)
    assert set(summary.commits) == {
        "seed-0/ScaffoldBatchTopK",
        "seed-0/BatchTopK-centred",
    }
    files = hub.repositories[REPO].files()
    assert files["compare.yaml"].content == b"seeds: [0]\n"
    assert "results.json" in files and "report.html" not in files
    # the trainer's counts are not drawn as the SAEs'
    assert "firing_frequencies.png" not in files
    SAE.from_pretrained(REPO, "seed-0/ScaffoldBatchTopK/jumprelu")


def test_the_card(hub: HubServer, tmp_path: Path) -> None:
    save_sae(tmp_path / "scaffold")
    save_sae(tmp_path / "plain", rank=0, sparsity=False, seed=1)
    upload(
        {"scaffold": tmp_path / "scaffold", "plain": tmp_path / "plain"},
        license="apache-2.0",
        base_model="lab/py-neox",
    )
    readme = hub.repositories[REPO].files()["README.md"].content.decode()
    card = ModelCard(readme)
    data = card.data.to_dict()
    assert data.pop("tags") == [
        *("saelens", "sparse-autoencoder", "mechanistic-interpretability"),
        *("scaffold-sae", "arxiv:2606.14040"),
    ]
    assert data == {
        "library_name": "saelens",
        "license": "apache-2.0",
        "base_model": "lab/py-neox",
        "datasets": ["NeelNanda/pile-10k"],
    }
    rows = [line for line in card.text.splitlines() if line.startswith("| `scaffold`")]
    cells = [cell.strip() for cell in rows[0].split("|")[1:-1]]
    # whatever the trainer counted: 9 latents at 0.2 and 83 at 0.01
    assert cells == [
        *("`scaffold`", "`py-neox`", f"`{HOOK}`", "256", "96", "4"),
        *["not measured"] * 5,
    ]
    assert "Nothing was measured of `scaffold`, `plain`: run " in card.text
    assert "of the last tokens of the training: 200,000 of `scaffold`." in card.text
    assert "2606.14040" in card.text and "@misc" in card.text
    assert "![" not in card.text
    # every snippet is of the repository, and compiles
    snippets = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        namespace: dict[str, Any] = {}
        exec(compile(snippet, "card", "exec"), namespace)
        assert namespace["sae"].cfg.d_in == 256


def test_the_card_says_what_was_measured_when_the_training_ended(
    tmp_path: Path,
) -> None:
    sae = save_sae(tmp_path / "sae")
    found = measure(sae, [some_activations(300)], 200, "held out: some")
    sae.cfg.metadata.measured = found.to_metadata()
    sae.save_model(tmp_path / "sae")
    sae.threshold.data[4:] *= 2  # as somebody may who wants fewer latents to fire
    sae.save_model(tmp_path / "changed")
    readme = upload(
        {"sae": tmp_path / "sae", "changed": tmp_path / "changed"}, dry_run=True
    ).readme
    cells = {
        sae_id: [cell.strip() for cell in rest.split("|")[6:-1]]
        for sae_id, rest in re.findall(
            r"^\| `(\w+)` +(\| `py-neox`.*)$", readme, flags=re.MULTILINE
        )
    }
    assert cells == {
        "sae": [
            f"{found.l0_sparse:.1f}",
            f"{found.l0_sparse + 4:.1f}",
            str(found.dense_latents),
            "-",
            f"{found.explained_variance:.3f}",
        ],
        "changed": ["not measured"] * 5,
    }
    assert (
        "The numbers of `sae` were measured in inference form when the training ended, "
        "on 200 tokens, held out: some. Nothing was measured of `changed`: run"
    ) in readme


def test_the_configuration_on_the_hub_says_what_was_measured(
    hub: HubServer, tmp_path: Path
) -> None:
    sae = eval_sae(rank=4)
    found = measure(sae, [some_activations()], 50, "held out: some").to_metadata()
    sae.cfg.metadata.measured = found
    upload({"sae": sae})
    loaded: Any = load_scaffold_sae(REPO, "sae")
    assert loaded.cfg.metadata.measured == found
    loaded.threshold.data[4:] *= 2
    upload({"sae": loaded})
    again = load_scaffold_sae(REPO, "sae").cfg.metadata
    assert "measured" in again and again.measured is None
    assert loaded.cfg.metadata.measured == found  # the user's SAE is as it was


def test_a_readme_is_kept_unless_asked(hub: HubServer) -> None:
    sae = eval_sae(rank=4)
    repository = hub.add_repository(REPO)
    mine = {**repository.files(), "README.md": Blob(b"# Mine\n", False)}
    repository.commit("main", "mine", mine)
    dry = upload({"sae": sae}, dry_run=True)
    assert dry.readme_outcome == "kept"
    assert "-# Mine" in dry.readme_diff and "+# saes" in dry.readme_diff
    assert "README.md" not in dry.files
    assert upload({"sae": sae}).readme_outcome == "kept"
    assert repository.files()["README.md"].content == b"# Mine\n"

    assert upload({"sae": sae}, overwrite_readme=True).readme_outcome == "written"
    assert repository.files()["README.md"].content.startswith(b"---\n")
    assert upload({"sae": sae}, overwrite_readme=True).readme_outcome == "unchanged"
    assert upload({"sae": sae}, dry_run=True).readme_outcome == "unchanged"

    # what is not uploaded this time is not left out
    upload({"another": eval_sae(rank=2)}, overwrite_readme=True)
    text = repository.files()["README.md"].content.decode()
    assert "Also in this repository: `sae`." in text


def test_a_repeated_upload_sends_nothing_and_leaves_nothing_old(
    hub: HubServer, tmp_path: Path
) -> None:
    save_sae(tmp_path / "sae")
    upload({"sae": tmp_path / "sae"})
    titles, sent = list(hub.repositories[REPO].titles), hub.uploaded_bytes
    summary = upload({"sae": tmp_path / "sae"})
    assert summary.commits == {"sae": None}
    assert hub.repositories[REPO].titles == titles
    assert hub.uploaded_bytes == sent

    # another SAE of the same id takes the whole place, but not that of others
    upload({"sae/second": eval_sae(rank=1)})
    upload({"sae": eval_sae(rank=3, seed=2)}, jumprelu=False)
    assert paths_in(hub, "sae") == {
        "cfg.json",
        "sae_weights.safetensors",
        *(f"second/{path}" for path in SCAFFOLD_FILES),
    }


def test_dry_run_needs_neither_network_nor_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    save_sae(tmp_path / "my-sae")
    argv = ["upload", f"layer_0={tmp_path / 'my-sae'}", "--repo_id", REPO, "--dry-run"]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    for path in SCAFFOLD_FILES:
        assert f" bytes  layer_0/{path}\n" in shown
    assert "library_name: saelens" in shown
    assert "cannot be found out" in shown
    assert not list(tmp_path.glob("*.tmp"))


def test_private_pull_request_and_branch(hub: HubServer) -> None:
    upload({"sae": eval_sae(rank=1)}, private=True)
    repository = hub.repositories[REPO]
    assert repository.private
    before = repository.files()

    saes = {"one": eval_sae(rank=2), "two": eval_sae(rank=3)}
    summary = upload(saes, create_pr=True, overwrite_readme=True)
    assert summary.pull_request == f"{hub.url}/{REPO}/discussions/1"
    assert repository.files() == before
    proposed = repository.files("refs/pr/1")
    assert {path for path in proposed if path.startswith("two/")}
    assert proposed["README.md"] != before["README.md"]
    assert set(repository.refs) == {"main", "refs/pr/1"}

    upload({"one": saes["one"]}, hf_revision="experiments")
    assert repository.files() == before
    assert paths_in(hub, "one", "experiments") == SCAFFOLD_FILES

    upload({"open": eval_sae(rank=1)}, private=True)  # it is private already
    hub.repositories[REPO].private = False
    with pytest.raises(HubUploadError, match="public"):
        upload({"sae": eval_sae(rank=1)}, private=True)


def test_an_interrupted_pull_request_can_be_gone_on_with(hub: HubServer) -> None:
    hub.add_repository(REPO)
    saes = {"one": eval_sae(rank=2), "two": eval_sae(rank=3)}
    hub.fail(r"commit/refs%2Fpr%2F1|commit/refs/pr/1", 500, times=99)
    with pytest.raises(HubUploadError, match=r"--revision refs/pr/1") as error:
        upload(saes, create_pr=True)
    assert "1 of 2 SAEs are complete" in str(error.value)
    assert not paths_in(hub, "two", "refs/pr/1")
    hub.heal()
    assert upload(saes, hf_revision="refs/pr/1").commits["one"] is None
    assert paths_in(hub, "two", "refs/pr/1") == SCAFFOLD_FILES
    assert set(hub.repositories[REPO].refs) == {"main", "refs/pr/1"}


# What goes wrong: which request, how, and what the error says

COMMIT = r"POST .*/commit/"
FILE = r"PUT /lfs/"
FAILURES = [
    (r"GET /api/whoami", 401, "hf auth login"),
    (r"GET /api/models/", 401, "hf auth login"),
    (r"POST .*/preupload/", 401, "hf auth login"),
    (COMMIT, 401, "hf auth login"),
    (COMMIT, 403, "--create_pr"),
    (r"POST .*/preupload/", 404, "there is no repository"),
    (COMMIT, 404, "there is no repository"),
    (COMMIT, 409, "wait a minute"),
    (COMMIT, 429, "wait some minutes"),
    (r"POST .*/preupload/", 429, "wait some minutes"),
    (COMMIT, 500, "status.huggingface.co"),
    (FILE, 500, "status.huggingface.co"),
    (r"POST .*objects/batch", 503, "status.huggingface.co"),
    (FILE, 403, "--create_pr"),
    (FILE, CUT, "network"),
    (COMMIT, CUT, "network"),
]


@pytest.mark.parametrize(("pattern", "status", "advice"), FAILURES)
def test_failures_leave_nothing_partial_and_can_be_repeated(
    pattern: str, status: int | str, advice: str, hub: HubServer, tmp_path: Path
) -> None:
    save_sae(tmp_path / "first")
    save_sae(tmp_path / "second", seed=1)
    first = {"first": tmp_path / "first"}
    upload(first)
    whole = paths_in(hub, "first")
    readme = hub.repositories[REPO].files()["README.md"]

    both: Mapping[str, Any] = {**first, "second": tmp_path / "second"}
    hub.fail(pattern, status, times=99)
    with pytest.raises(HubUploadError, match=re.escape(advice)) as error:
        upload(both)
    message = str(error.value)
    assert "repeat the command" in message
    assert "Traceback" not in message and len(message) < 1000
    assert paths_in(hub, "first") == whole
    assert paths_in(hub, "second") == set()
    assert hub.repositories[REPO].files()["README.md"] == readme

    hub.heal()
    assert upload(both).commits["first"] is None
    assert paths_in(hub, "second") == whole
    x = some_activations()
    for sae_id in "second", "second/jumprelu":
        torch.testing.assert_close(
            SAE.from_pretrained(REPO, sae_id)(x),
            SAE.load_from_disk(tmp_path / "second")(x),
            rtol=1e-6,
            atol=1e-6,
        )


@pytest.mark.parametrize(
    ("pattern", "status", "times"),
    [
        (COMMIT, 409, 2),
        (COMMIT, 429, 2),
        (COMMIT, 500, 1),
        (COMMIT, 503, 3),
        (FILE, 500, 2),
        (FILE, CUT, 2),
        (r"POST .*/preupload/", 429, 2),
        (r"GET /api/whoami", 429, 1),
        (r"POST /api/repos/create", 503, 1),
        (r"POST /api/validate-yaml", 503, 1),
    ],
)
def test_what_passes_by_itself_is_waited_for(
    pattern: str, status: int | str, times: int, hub: HubServer
) -> None:
    hub.fail(pattern, status, times, Retry_After="0")
    upload({"sae": eval_sae(rank=4)})
    assert paths_in(hub, "sae") == SCAFFOLD_FILES
    assert hub.repositories[REPO].titles.count("Upload SAE sae") == 1


def test_commit_of_which_the_answer_is_lost(hub: HubServer) -> None:
    upload({"sae": eval_sae(rank=4)})
    hub.fail(COMMIT, LOST, Retry_After="0")
    # it deletes the plain form, which cannot be deleted twice
    summary = upload({"sae": eval_sae(rank=3)}, jumprelu=False)
    assert summary.commits["sae"] is not None
    assert paths_in(hub, "sae") == {"cfg.json", "sae_weights.safetensors"}
    assert load_scaffold_sae(REPO, "sae").cfg.scaffold_rank == 3  # type: ignore[attr-defined]


def test_downloads_that_break(hub: HubServer) -> None:
    sae = eval_sae(rank=4)
    upload({"sae": sae})
    x = some_activations()
    hub.fail(r"GET /cdn/", CUT, times=2)
    torch.testing.assert_close(SAE.from_pretrained(REPO, "sae")(x), sae(x))
    hub.fail(r"GET /cdn/", CUT, times=2)
    loaded = load_scaffold_sae(REPO, "sae", force_download=True)
    torch.testing.assert_close(loaded(x), sae(x))
    # a Hub in trouble is an error, and no half SAE, and the next call completes
    hub.fail(r"GET /cdn/", 500, times=1)
    with pytest.raises(UserError, match="the Hub answers 500"):
        load_scaffold_sae(REPO, "sae", force_download=True)
    loaded = load_scaffold_sae(REPO, "sae", force_download=True)
    torch.testing.assert_close(loaded(x), sae(x))


def test_a_repository_that_appears_meanwhile_is_used(hub: HubServer) -> None:
    hub.add_repository(REPO)
    hub.fail(rf"GET /api/models/{REPO}$", 404, times=1, X_Error_Code="RepoNotFound")
    upload({"sae": eval_sae(rank=4)})
    assert paths_in(hub, "sae") == SCAFFOLD_FILES


def test_permissions_are_seen_to_before_anything_is_sent(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    saes = {"sae": eval_sae(rank=4)}
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent")
    with pytest.raises(HubUploadError, match="there is no token; log in with"):
        upload(saes)
    with pytest.raises(HubUploadError, match="does not accept the token"):
        upload(saes, token="hf_wrong")
    with pytest.raises(HubUploadError, match="may only read"):
        upload(saes, token=READ_TOKEN)
    hub.tokens["hf_fine"] = {
        "role": "fineGrained",
        "fineGrained": {
            "scoped": [{"entity": {"name": "lab"}, "permissions": ["repo.write"]}]
        },
    }
    with pytest.raises(HubUploadError, match="no permission repo.write for user/saes"):
        upload(saes, token="hf_fine")
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    with pytest.raises(HubUploadError, match="write one of user/saes, lab/saes"):
        upload_scaffold_saes(saes, "somebody/saes", show_progress=False)
    with pytest.raises(HubUploadError, match="no repository user/saes to open a pull"):
        upload(saes, create_pr=True)
    with pytest.raises(HubUploadError, match="licen"):
        upload(saes, license="no-such-licence")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUploadError, match="HF_HUB_OFFLINE is set"):
        upload(saes)
    assert not hub.repositories
    assert not [line for line in hub.requests if "preupload" in line]


def test_everything_is_checked_before_anything_is_sent(
    hub: HubServer, tmp_path: Path
) -> None:
    save_sae(tmp_path / "good")
    good = tmp_path / "good"

    def bad_sae(change: Any) -> Any:
        sae = eval_sae(rank=4)
        change(sae)
        return sae

    def nan(sae: Any) -> None:
        sae.W_dec.data[3, 5] = torch.nan

    def no_hook(sae: Any) -> None:
        sae.cfg.metadata.hook_name = None

    def no_model(sae: Any) -> None:
        sae.cfg.metadata.model_name = " "

    def unfolded(sae: Any) -> None:
        sae.cfg.normalize_activations = "expected_average_only_in"

    def other_shape(sae: Any) -> None:
        sae.cfg.d_sae = 95

    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"bad": bad_sae(nan)}, InvalidSAEError, "SAE 'bad': W_dec has values"),
        ({"bad": bad_sae(no_hook)}, InvalidSAEError, "metadata.hook_name is None"),
        ({"bad": bad_sae(no_model)}, InvalidSAEError, "metadata.model_name is ' '"),
        ({"bad": bad_sae(unfolded)}, InvalidSAEError, "fold_activation_norm"),
        ({"bad": bad_sae(other_shape)}, InvalidSAEError, "has the shape"),
        ({"../bad": eval_sae()}, ValueError, "no valid SAE id"),
        ({"GOOD": eval_sae()}, ValueError, "the id 'GOOD' .'good'."),
        ({"bad": tmp_path / "nowhere"}, InvalidSAEError, "cfg.json is missing"),
        ({"bad": 3}, TypeError, "PathLike"),
    ]
    for bad, error, message in cases:
        with pytest.raises(error, match=message):
            upload({"good": good, **bad})
    with pytest.raises(ValueError, match="lacks the owner"):
        upload_scaffold_saes({"good": good}, "saes")
    with pytest.raises(ValueError, match="no repository's id"):
        upload_scaffold_saes({"good": good}, "../saes")
    with pytest.raises(ValueError, match="no SAEs to upload"):
        upload({})
    with pytest.raises(UserError, match="no folder with evaluation results"):
        upload({"good": good}, eval_results=tmp_path / "nowhere")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["k=4,rank=8", "a=b", "x=", "grid/k=4,rank=8-seed=0"])
def test_ids_and_directories_may_contain_what_separates_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_sae(tmp_path / name)
    save_sae(tmp_path / "sae")

    def ids(*arguments: str) -> list[str]:
        found = upload(list(arguments), dry_run=True)
        return [sae.sae_id for sae in found.saes]

    for directory in name, f"./{name}", str(tmp_path / name):
        assert ids(f"{name}={directory}") == [name]
        assert ids(f"other={directory}") == ["other"]
        assert ids(directory) == [Path(name).name]
    assert ids(f"{name}=sae", f"y=k={name}") == [name, "y=k"]
    for wrong in f"{name}=nowhere", f"{name}=", f"{name}x":
        with pytest.raises(UserError, match=f"'{wrong}' is neither a directory nor"):
            ids(wrong)
    with pytest.raises(UserError, match="'' is no valid SAE id"):
        ids("=sae")


def test_an_id_that_may_end_in_several_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for directory in "b=c", "c", "a=b=c":
        save_sae(tmp_path / directory)

    def saes(argument: str) -> list[tuple[str, Path]]:
        found = upload([argument], dry_run=True).saes
        return [(sae.sae_id, sae.directory) for sae in found]

    with pytest.raises(
        UserError, match="'a=b=c' may mean 'a=b=c' or 'b=c' as 'a' or 'c' as 'a=b'"
    ):
        saes("a=b=c")
    assert saes("./a=b=c") == [("a=b=c", Path("a=b=c"))]
    assert saes("a=./b=c") == [("a", Path("b=c"))]
    assert saes("a=b=./c") == [("a=b", Path("c"))]


@pytest.mark.parametrize(
    ("runner_cfg", "noted", "expected"),
    [
        ({}, None, 200_000),
        # 1,001 steps, the last of which takes more than is left, and counts as a whole
        ({"training_tokens": 1_000_500}, None, 201_000),
        ({"feature_sampling_window": 1000}, None, 1_000_000),
        ({"feature_sampling_window": 999}, None, "of 1,000 tokens; at least 100,000"),
        ({"feature_sampling_window": 100}, None, 100_000),
        ({"feature_sampling_window": 99}, None, "of 10,000 tokens"),
        ({"resume_from_checkpoint": "somewhere"}, None, "unknown number"),
        ({"resume_from_checkpoint": "somewhere"}, 123_456, 123_456),
        ({"sae_lens_training_version": "6.18.0"}, None, "unknown number"),
        ({"sae_lens_training_version": None}, None, "unknown number"),
        ({"feature_sampling_window": None}, None, "unknown number"),
        (None, None, "unknown number"),
        (None, 99_999, "of 99,999 tokens"),
    ],
)
def test_firing_frequencies_say_how_many_tokens_they_are_of(
    runner_cfg: dict[str, Any] | None, noted: int | None, expected: Any, tmp_path: Path
) -> None:
    sae = save_sae(tmp_path / "sae")
    sae.cfg.metadata.n_sparsity_tokens = noted
    sae.save_model(tmp_path / "sae")
    file = tmp_path / "sae" / "runner_cfg.json"
    file.unlink()
    if runner_cfg is not None:
        file.write_text(json.dumps({**RUNNER_CFG, **runner_cfg}))
    summary = upload(tmp_path / "sae", dry_run=True)

    is_sent = isinstance(expected, int)
    assert ("sae/sparsity.safetensors" in summary.files) == is_sent
    assert ("`sparsity.safetensors`" in summary.readme) == is_sent
    if is_sent:
        assert f"the training: {expected:,} of `sae`." in summary.readme
        assert not summary.left_out
    else:
        (reason,) = summary.left_out.values()
        assert expected in reason


def test_the_command(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_sae(tmp_path / "my-sae")
    command = ["upload", str(tmp_path / "my-sae"), "--repo_id", REPO]
    assert main([*command, "--license", "mit", "--private"]) == 0
    shown = capsys.readouterr()
    assert f"my-sae: {hub.url}/{REPO}/commit/" in shown.out
    assert "licence" not in shown.err
    assert hub.repositories[REPO].private

    hub.fail(COMMIT, 403, times=1)
    other = tmp_path / "other"
    save_sae(other, rank=2)
    assert main(["upload", f"x/y={other}", "--repo_id", REPO]) == 1
    error = capsys.readouterr().err
    assert "saelens-scaffold upload: error: uploading x/y: 403" in error
    assert main(["upload", f"x/y={other}", "--repo_id", REPO, "--no_jumprelu"]) == 0
    assert paths_in(hub, "x/y") == {
        "cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
        "runner_cfg.json",
    }
    assert main(["upload", str(tmp_path), "--repo_id", REPO, "--dry-run"]) == 0
    assert "would be kept" in capsys.readouterr().out
    for wrong in (
        ["upload", str(tmp_path / "nowhere"), "--repo_id", REPO],
        ["upload", f"../x={other}", "--repo_id", REPO],
        ["upload", f"jumprelu={other}", "--repo_id", REPO],
        ["upload", str(other), "--repo_id", "no-owner"],
        ["upload", str(other), str(other), "--repo_id", REPO],
    ):
        assert main(wrong) == 2, wrong
        assert "error: " in capsys.readouterr().err
