"""The lowest versions that pyproject.toml declares are those of constraints-min.txt."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
# whose interfaces this package works with; others may be higher, where those need it
LIBRARIES = (
    "sae-lens",
    "transformer-lens",
    "transformers",
    "torch",
    "datasets",
    "huggingface-hub",
    "beartype",
    "plotly",
    "pluggy",
    "pydantic",
    "ray",
    "sae-bench",
)


@pytest.mark.parametrize("name", LIBRARIES)
def test_make_test_min_installs_the_lowest_version(name: str) -> None:
    declared = re.findall(
        rf'^ +"({name}[><=].*)",$', (ROOT / "pyproject.toml").read_text(), re.M
    )
    assert declared
    pins = (ROOT / "constraints-min.txt").read_text()
    (pinned,) = re.findall(rf"^{name}==(\S+)$", pins, re.M)
    for requirement in map(Requirement, declared):
        lowest = [of.version for of in requirement.specifier if of.operator == ">="]
        assert Version(pinned) == Version(*lowest)
