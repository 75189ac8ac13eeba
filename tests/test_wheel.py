"""The wheel: built, installed, and run, without network and beside the source."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_it_holds_every_file_of_the_source(wheel: Path) -> None:
    source = {
        path.relative_to(ROOT / "src").as_posix()
        for package in ("saelens_scaffold", "saelens_scaffold_cli")
        for path in (ROOT / "src" / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == source
    assert "saelens_scaffold/compare/paper/gemma-2-2b-layer-12.yaml" in names
    assert "saelens_scaffold/models/py-neox/model.safetensors" in names


def test_it_runs(wheel: Path, tmp_path: Path) -> None:
    """On the embedded model and text, which it finds in itself."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q"]
    pip += ["--no-compile", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    options = "--model=py-neox --hook_name=blocks.0.hook_resid_post"
    options += " --dataset=python-stdlib --n_tokens=500"
    done = subprocess.run(
        [sys.executable, "-m", "saelens_scaffold", "rank", *options.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Try scaffold_rank=" in done.stdout
    assert (tmp_path / "rank-output" / "rank.png").is_file()
    # compiled when it was imported, so that nothing else was
    for package in ("saelens_scaffold", "saelens_scaffold_cli"):
        assert (site / package / "__pycache__").is_dir()
