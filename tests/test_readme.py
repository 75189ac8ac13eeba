"""The examples of README and docs/training.md run as they stand."""

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from saelens_scaffold import upload_scaffold_saes
from saelens_scaffold_cli import main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SAE_ID = "my-scaffold-sae"
MEASURED = ("l0_sparse", "l0_total", "dense latents", "expl. var.")
"""Columns of the card, in the order in which `EVALUATED` names them for the evaluation."""
EVALUATED = ("l0_sparse", "l0_total", "dense_latents: dense", "whole SAE's expl. var.")

FEWER = "--set=dense_latents.n_tokens=20000"


@contextmanager
def working_in(directory: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def code_blocks(document: Path, language: str) -> list[str]:
    pattern = rf"```{language}\n(.*?)```"
    return re.findall(pattern, document.read_text(encoding="utf-8"), flags=re.DOTALL)


def run_python(document: Path, *replaced: tuple[str, str]) -> None:
    namespace: dict[str, object] = {}
    for block in code_blocks(document, "python"):
        for number, smaller in replaced:
            block = block.replace(number, smaller)
        exec(compile(block, str(document), "exec"), namespace)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the Python of docs/training.md has run, on fewer tokens."""
    directory = tmp_path_factory.mktemp("training")
    with working_in(directory):
        run_python(ROOT / "docs" / "training.md", ("524_288", "65_536"))
    return directory


def row(markdown: str, name: str) -> dict[str, str]:
    """A row of the first table that has one of this name, by column."""
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in markdown.splitlines()
        if line.startswith("|")
    ]
    of_name = next(line for line in lines if line[0].strip("`") == name)
    heads = [line for line in lines[: lines.index(of_name)] if line[0] in ("SAE", "id")]
    return dict(zip(heads[-1], of_name, strict=True))


def test_python_of_the_training_page_runs(executed: Path) -> None:
    assert (executed / SAE_ID / "jumprelu" / "cfg.json").is_file()


def test_the_readmes_example_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = next(b for b in code_blocks(README, "bash") if "scaffold train" in b)
    example = example.replace("\\\n", "").replace("524288", "131072")  # tokens
    write_text, *commands = example.splitlines()
    with working_in(tmp_path):
        exec(shlex.split(write_text)[2], {})
        train, evaluate = (shlex.split(command)[1:] for command in commands)
        assert main(train) == 0
        assert main([*evaluate, FEWER]) == 0
        run_python(README)
    evaluated = row(capsys.readouterr().out, "my-sae")
    assert float(evaluated["l0_sparse"]) == pytest.approx(4, rel=0.1)  # as k


def test_the_readme_is_short_and_its_links_work_on_pypi() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links and all(link.startswith("https://") for link in links)


LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
HERE = re.compile(
    "https://github.com/saelens-scaffold/saelens-scaffold/(?:blob|raw)/main/"
)


@pytest.mark.parametrize(
    "document",
    [README, *sorted((ROOT / "docs").glob("*.md"))],
    ids=lambda path: path.name,
)
def test_links_lead_somewhere(document: Path) -> None:
    for target, anchor in LINK.findall(document.read_text(encoding="utf-8")):
        if target.startswith("http") and not HERE.match(target):
            continue
        base = ROOT if HERE.match(target) else document.parent
        path = base / HERE.sub("", target) if target else document
        assert path.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in {slug(heading) for heading in headings}, (target, anchor)


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_first_examples_card_says_what_was_measured(
    executed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SAELens's own runner measures no inference form: nothing, until `eval` has."""
    sae = executed / SAE_ID

    def card() -> str:
        return upload_scaffold_saes(
            sae, "user/saes", dry_run=True, show_progress=False
        ).readme

    before = card()
    assert {row(before, SAE_ID)[column] for column in MEASURED} == {"not measured"}
    assert f"Nothing was measured of `{SAE_ID}`: run `saelens-scaffold eval" in before
    # not what the trainer counted, which SAELens writes into cfg.json
    assert not re.search(r"\| +(4|12)\.0 +\|", before)

    command = ["eval", "dense_latents", "--sae_path", str(sae), "--device=cpu"]
    command += ["--dataset=python-stdlib", FEWER]
    assert main([*command, f"--output_path={sae / 'eval_results'}"]) == 0
    printed = row(capsys.readouterr().out, SAE_ID)
    after = row(card(), SAE_ID)
    evaluated = [printed[column] for column in EVALUATED]
    assert [after[column] for column in MEASURED] == evaluated
    assert all(re.match(r"\d", cell) for cell in evaluated)
    # k is 4, whatever text this interpreter's standard library is
    # of so short a training
    assert float(evaluated[0]) == pytest.approx(4, rel=0.4)
