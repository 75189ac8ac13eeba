"""The tutorials run from beginning to end, on less text than their readers train on."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient

from forked import Forked
from saelens_scaffold_cli import main

TUTORIALS = Path(__file__).parent.parent / "docs" / "tutorials"
# Numbers of a notebook's cells, and what the test has in their place
SMALLER = {
    "524_288": "8_192",
    "262_144": "8_192",
    "131_072": "4_096",
    "200_000": "9_000",
    "20_000": "4_000",
    "d_sae=2048": "d_sae=512",
    "k=[4, 12]": "k=[4]",
    "seed=[0, 1, 2]": "seed=[0, 1]",
    "n_batches_for_norm_estimate=20": "n_batches_for_norm_estimate=2",
}


def smaller(path: Path) -> Any:
    """The notebook, with less to do."""
    notebook = nbformat.read(path, as_version=4)
    assert any(cell.get("outputs") for cell in notebook.cells), "committed with outputs"
    for cell in notebook.cells:
        for number, less in SMALLER.items():
            cell.source = cell.source.replace(number, less)
    return notebook


def test_a_tutorial_in_a_notebook_server_s_kernel(tmp_path: Path) -> None:
    notebook = smaller(TUTORIALS / "train_and_compare.ipynb")
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=None, resources=resources).execute()


def _command(line: str) -> None:
    """A cell's `!saelens-scaffold`, in this process."""
    name, *argv = shlex.split(line.removesuffix("2>/dev/null"))
    assert name == "saelens-scaffold"
    assert main(argv) == 0


def _run_cells(path: Path) -> None:
    # beside what a kernel has of its own, for which a process would import all anew
    shell = InteractiveShell.instance()
    shell.system = _command
    for cell in smaller(path).cells:
        if cell.cell_type == "code":
            shell.run_cell(cell.source).raise_error()


@pytest.mark.parametrize("name", ["look_inside", "publish_and_load"])
def test_tutorial(name: str, tmp_path: Path) -> None:
    process = Forked(_run_cells, TUTORIALS / f"{name}.ipynb", cwd=tmp_path)
    assert process.wait() == 0, process.stdout[-3000:] + process.stderr[-3000:]


def test_every_tutorial_is_run() -> None:
    run = {"look_inside", "publish_and_load", "train_and_compare"}
    assert {path.stem for path in TUTORIALS.glob("*.ipynb")} == run
