"""sae-dashboard, in a virtual environment on top of the one that the tests run in.

sae-dashboard needs older transformers and TransformerLens. Whatever it does not need in
another version, PyTorch above all, is that of the tests' own environment, so that 200 MB
are installed instead of 6 GB.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[1]
VENV = ROOT / f"{Path(sys.prefix).name}-dashboard"
REQUIREMENT = "sae-dashboard==0.8.0"


class NotInstallable(Exception):
    """What pip said."""


def dashboard_python() -> Path:
    """
    The Python of that environment, which is made if there is none.

    Raises:
        NotInstallable: sae-dashboard cannot be installed.
    """
    python, done = VENV / "bin" / "python", VENV / ".installed"
    shared = sysconfig.get_path("purelib")
    made_of = f"{REQUIREMENT} on {shared}"
    with FileLock(f"{VENV}.lock"):
        if done.is_file() and done.read_text() == made_of:
            return python
        _run(sys.executable, "-m", "venv", "--clear", "--without-pip", str(VENV))
        (own,) = VENV.glob("lib/python3.*/site-packages")
        # adds that environment's own .pth files, as of an editable install, as well
        (own / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
        pip = (sys.executable, "-m", "pip", "--python", str(python))
        _run(*pip, "install", "-q", "--no-compile", REQUIREMENT)
        done.write_text(made_of)
    return python


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise NotInstallable(result.stderr.strip())
