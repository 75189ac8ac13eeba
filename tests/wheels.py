"""The package's wheel, built and installed without network."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def build_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, site: Path) -> Path:
    """Install it alone into a folder for PYTHONPATH, beside what it needs."""
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q"]
    pip += ["--no-compile", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    return site
