"""The README's Python runs as it stands, top to bottom."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from saelens_scaffold import upload_scaffold_saes
from saelens_scaffold_cli import main

README = Path(__file__).parents[1] / "README.md"
SAE_ID = "my-scaffold-sae"
MEASURED = ("l0_sparse", "l0_total", "dense latents", "expl. var.")
"""Columns of the card, in the order in which `EVALUATED` names them for the evaluation."""
EVALUATED = ("l0_sparse", "l0_total", "dense_latents: dense", "whole SAE's expl. var.")


@contextmanager
def working_in(directory: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which all blocks have run."""
    directory = tmp_path_factory.mktemp("readme")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict[str, object] = {}
    with working_in(directory):
        for block in blocks:
            exec(compile(block, str(README), "exec"), namespace)
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


def test_python_blocks_run(executed: Path) -> None:
    assert (executed / SAE_ID / "jumprelu" / "cfg.json").is_file()


def test_the_first_examples_card_says_what_was_measured(
    executed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SAELens's own runner measures no inference form: nothing, until `eval` has."""
    pytest.importorskip("sae_bench")
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
    command += ["--dataset=python-stdlib", "--set=dense_latents.n_tokens=100000"]
    assert main([*command, f"--output_folder={sae / 'eval_results'}"]) == 0
    printed = row(capsys.readouterr().out, SAE_ID)
    after = row(card(), SAE_ID)
    evaluated = [printed[column] for column in EVALUATED]
    assert [after[column] for column in MEASURED] == evaluated
    assert all(re.match(r"\d", cell) for cell in evaluated)
    # k is 4, whatever text this interpreter's standard library is
    assert float(evaluated[0]) == pytest.approx(4, rel=0.1)
