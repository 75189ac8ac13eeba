"""What the wheel holds; test_demo.py runs it."""

import zipfile
from pathlib import Path

from wheels import ROOT, build_wheel


def test_it_holds_every_file_of_the_source(tmp_path: Path) -> None:
    source = {
        path.relative_to(ROOT / "src").as_posix()
        for package in ("saelens_scaffold", "saelens_scaffold_cli")
        for path in (ROOT / "src" / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    names = set(zipfile.ZipFile(build_wheel(tmp_path)).namelist())
    assert {name for name in names if ".dist-info/" not in name} == source
    assert "saelens_scaffold/compare/paper/gemma-2-2b-layer-12.yaml" in names
    assert "saelens_scaffold/models/py-neox/model.safetensors" in names
