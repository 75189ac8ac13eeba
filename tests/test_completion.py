"""Shell completion, in bash itself and as zsh and fish ask for it."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

BASH = """
eval "$({python} -m argcomplete.scripts.register_python_argcomplete saelens-scaffold)"
COMP_LINE={line} COMP_POINT={end} COMP_WORDS=({line}) COMP_CWORD=1
_python_argcomplete saelens-scaffold
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The command as a package's installation makes it, in tmp_path, which is the PATH."""
    script = tmp_path / "saelens-scaffold"
    program = "from saelens_scaffold_cli import main; main()"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} -c {program!r}\n")
    script.chmod(0o755)
    return script


def completed(script: Path, line: str, shell: str) -> list[str]:
    """What a shell offers after a command line."""
    asked = {**os.environ, "PATH": f"{script.parent}:{os.environ['PATH']}"}
    if shell == "bash":
        words = {"line": shlex.quote(line), "end": len(line), "python": sys.executable}
        command = ["bash", "-c", BASH.format(**words)]
        done = subprocess.run(command, env=asked, capture_output=True, text=True)
        return done.stdout.split()
    answer = script.with_name("answer")
    asked |= {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": shell, "COMP_LINE": line}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "COMP_POINT": str(len(line))}
    subprocess.run([script], env=asked)
    # each with its description
    return [offer.split()[0].split(":")[0] for offer in answer.read_text().split("\v")]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("saelens-scaffold ex", {"export"}),
        ("saelens-scaffold eval core --sae_r", {"--sae_regex_pattern"}),
        ("saelens-scaffold rank --llm_dtype b", {"bfloat16"}),
        ("saelens-scaffold export --form ", {"jumprelu", "sparse"}),
    ],
)
def test_completion(script: Path, line: str, offered: set[str], shell: str) -> None:
    assert set(completed(script, line, shell)) == offered
