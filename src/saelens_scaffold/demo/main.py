"""The demo from its options to its files and text."""

import sys
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import make_writable
from saelens_scaffold._util.quiet import quiet
from saelens_scaffold.demo.planted import PlantedSettings, planted_half
from saelens_scaffold.demo.report import half_text, write_picture
from saelens_scaffold.demo.rows import LEGEND, Half

WRITTEN = """\
Written to {}: demo.png; planted/seed-N, the SAEs of the planted data;
language_model/report.html, the comparison on the language model; its SAEs,
language_model/saes."""


def run(
    *, output_path: str | Path, seed: int = 0, seeds: int = 1, quick: bool = False
) -> str:
    """
    Train scaffold SAEs and their plain twins on planted data and on a language model.

    What an earlier run with the same settings has finished is not done again. Progress
    goes to stderr.

    Args:
        output_path: Folder for the SAEs, their results and demo.png.
        seed: The first training seed.
        seeds: Number of training seeds.
        quick: Whether to train for a fraction of the time.

    Returns:
        The text to print: tables, and where everything is.

    Raises:
        UserError: An option makes no sense, SAEBench is not installed, or the folder
            holds SAEs of a demo with other settings.
    """
    if seeds < 1:
        raise UserError(f"seeds is {seeds}; it must be at least 1")
    if find_spec("sae_bench") is None:
        raise UserError(
            "the demo evaluates with SAEBench, which is not installed: "
            'pip install "saelens-scaffold[bench]"'
        )
    output_path = Path(output_path)
    try:
        make_writable(output_path)
    except OSError as error:
        raise UserError(f"output_path {output_path} cannot be used: {error}") from error
    quiet()
    # libraries print their progress to stdout
    with redirect_stdout(sys.stderr):
        halves = _halves([*range(seed, seed + seeds)], quick, output_path)
    write_picture(halves, output_path / "demo.png")
    tables = [half_text(half) for half in halves]
    return "\n\n".join([*tables, LEGEND, WRITTEN.format(output_path)])


def _halves(seeds: list[int], quick: bool, output_path: Path) -> list[Half]:
    # not at the top: it needs SAEBench
    from saelens_scaffold.demo.language_model import language_model_half

    # first, since it refuses a folder with SAEs of other settings
    language_model = language_model_half(seeds, quick, output_path / "language_model")
    settings = PlantedSettings()
    if quick:
        settings = replace(settings, steps=150, eval_samples=4096)
    return [planted_half(settings, seeds, output_path / "planted"), language_model]
