"""The tutorials run from beginning to end, on less text than their readers train on."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

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


@pytest.mark.parametrize(
    "path", sorted(TUTORIALS.glob("*.ipynb")), ids=lambda p: p.stem
)
def test_tutorial(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # `!saelens-scaffold` in a cell is that of this environment
    scripts = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{scripts}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(path, as_version=4)
    assert any(cell.get("outputs") for cell in notebook.cells), "committed with outputs"
    for cell in notebook.cells:
        for number, smaller in SMALLER.items():
            cell.source = cell.source.replace(number, smaller)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, resources=resources).execute()
