"""Read malformed results, experiments and SAEs, and measure time and memory.

    python benchmarks/malformed.py [--results 1000] [--experiments 1000] [--saes 2000]

The files are those of the tests (tests/test_malformed_results.py, test_hostile_yaml.py and
test_untrusted_saes.py), whose checks they go through: each file is read as what it is, or
refused in one line, and no other exception is raised. Time is that of the processor for the
slowest file. Memory is the peak of all files above what was in use before the first one; each
kind has a process of its own.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

Read = Callable[[Any], bool]


def results(n: int, folder: Path, read: Callable[[Read, Any], None]) -> None:
    from test_malformed_results import malformed_results, result_is_read

    for result in malformed_results(folder, n):
        read(lambda result: result_is_read(*result), result)


def experiments(n: int, folder: Path, read: Callable[[Read, Any], None]) -> None:
    from test_hostile_yaml import experiment_is_read, hostile

    file = folder / "experiment.yaml"
    _each(
        hostile, n, lambda content: read(lambda c: experiment_is_read(c, file), content)
    )


def saes(n: int, folder: Path, read: Callable[[Read, Any], None]) -> None:
    from test_untrusted_saes import hostile_files, sae_is_read

    sae = folder / "sae"
    _each(hostile_files(), n, lambda files: read(lambda f: sae_is_read(f, sae), files))


def _each(strategy: st.SearchStrategy[Any], n: int, use: Callable[[Any], None]) -> None:
    """Draw n values."""
    quiet = settings(
        max_examples=n,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    quiet(given(strategy)(use))()


def measure(kind: str, n: int) -> None:
    """Print a row of the table."""
    seconds: list[float] = []
    n_read, before = 0, 0

    def read(is_read: Read, given: Any) -> None:
        nonlocal n_read, before
        before = before or getrusage(RUSAGE_SELF).ru_maxrss
        started = time.process_time()
        n_read += is_read(given)
        seconds.append(time.process_time() - started)

    with TemporaryDirectory() as folder:
        KINDS[kind](n, Path(folder), read)
    megabytes = (getrusage(RUSAGE_SELF).ru_maxrss - before) / 1024
    cells = [kind, len(seconds), n_read, f"{max(seconds):.2f} s", f"{megabytes:.0f} MB"]
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


KINDS = {"results": results, "experiments": experiments, "saes": saes}


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    for kind, n in (("results", 1000), ("experiments", 1000), ("saes", 2000)):
        parser.add_argument(f"--{kind}", type=int, default=n)
    counts = vars(parser.parse_args())
    print(
        "| files | tried | read | slowest | peak |\n|---|---:|---:|---:|---:|",
        flush=True,
    )
    status = 0
    for kind, n in counts.items():
        process = multiprocessing.get_context("spawn").Process(
            target=measure, args=(kind, n)
        )
        process.start()
        process.join()
        status |= bool(process.exitcode)
    return status


if __name__ == "__main__":
    sys.exit(main())
