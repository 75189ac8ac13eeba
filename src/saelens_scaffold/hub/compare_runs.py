"""The folder of a `compare` run: its SAEs, its files, and its reductions of dense latents."""

import json
from pathlib import Path
from typing import NamedTuple

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.saes.sae_ids import sae_id_of_path

SAES_FOLDER = "saes"

_FILES = ("compare.yaml", "results.json", "report.html")
_DENSE_LATENTS = "dense_latents.dense_latents.dense_latents"


class Reduction(NamedTuple):
    """
    How many fewer dense latents an SAE has than its baseline.

    Attributes:
        share: 1 minus the ratio of the two counts.
        baseline: Name of the baseline in the run.
    """

    share: float
    baseline: str


def run_files(path: Path) -> dict[str, Path]:
    """Configuration, results and report of a run by name; none of any other directory."""
    files = {name: path / name for name in _FILES if (path / name).is_file()}
    return files if (path / SAES_FOLDER).is_dir() and _FILES[0] in files else {}


def reductions_in(path: Path) -> dict[str, Reduction]:
    """
    The reductions of a run's SAEs against baselines of the same k and seed, by id.

    Raises:
        UserError: The run's results.json is not one of `compare`.
    """
    file = run_files(path).get("results.json")
    if file is None:
        return {}
    found: dict[str, Reduction] = {}
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        compared = {
            comparison["treatment"]["arm"]: comparison
            for comparison in results["comparisons"]
            if comparison["metric"] == _DENSE_LATENTS and comparison["matching"] == "k"
        }
        for sae in results["saes"]:
            if sae["arm"] not in compared:
                continue
            comparison = compared[sae["arm"]]
            difference = comparison["differences"].get(str(sae["seed"]))
            count = sae["metrics"][_DENSE_LATENTS]["value"]
            if difference is not None and count is not None and count > difference:
                share = -difference / (count - difference)
                baseline = comparison["baseline"]["arm"]
                found[sae_id_of_path(Path(sae["name"]))] = Reduction(share, baseline)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        kind = type(error).__name__
        raise UserError(
            f"{file} is not the results.json of a `compare` run ({kind}: {error})"
        ) from error
    return found
