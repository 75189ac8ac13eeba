"""Run a command, and keep what it prints in benchmarks/recorded/NAME.txt.

    python benchmarks/record.py demo --seeds "0, 1, 2" -- saelens-scaffold demo --seeds 3
    python benchmarks/record.py demo        # the same command again

Numbers in README and docs are copied from these files; `make docs-check` finds those that are
not. A command that fails records nothing.
"""

import argparse
import shlex
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

RECORDED = Path(__file__).parent / "recorded"


def record(file: Path, command: list[str], seeds: str) -> int:
    """
    Run a command and write its recording.

    Args:
        file: Where to. What is there is replaced once the command has succeeded.
        command: The command's words.
        seeds: Every seed that its output depends on, in words.

    Returns:
        The command's exit status.
    """
    lines: list[str] = []
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    seconds = time.monotonic() - start
    if process.returncode == 0:
        header = "\n".join(_header(command, seeds, seconds))
        file.write_text(f"{header}\n\n{''.join(lines)}", encoding="utf-8")
    return process.returncode


def _header(command: list[str], seeds: str, seconds: float) -> list[str]:
    # which takes seconds to import
    from saelens_scaffold._util.provenance import hardware, versions

    return [
        f"$ {shlex.join(command)}",
        f"date: {datetime.now(timezone.utc).date()}",
        f"versions: {', '.join(f'{name} {v}' for name, v in versions().items())}",
        f"machine: {hardware('cpu')}",
        f"seeds: {seeds}",
        f"took: {seconds:.0f} s, {seconds / 60:.1f} minutes",
    ]


def main() -> int:
    """Read the command line, or the command in the recording."""
    argv = sys.argv[1:]
    i = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the recording")
    parser.add_argument("--seeds", help="every seed that the output depends on")
    parser.add_argument("--folder", type=Path, default=RECORDED)
    options = parser.parse_args(argv[:i])
    command = argv[i + 1 :]
    file = options.folder / f"{options.name}.txt"
    if not command:
        if not file.is_file():
            parser.error(f"there is no {file} to repeat; give a command after --")
        header = dict(line.split(" ", 1) for line in file.read_text().splitlines()[:5])
        command = shlex.split(header["$"])
        options.seeds = options.seeds or header["seeds:"]
    elif not options.seeds:
        parser.error("--seeds is missing; `--seeds none` if nothing is drawn")
    return record(file, command, options.seeds)


if __name__ == "__main__":
    sys.exit(main())
