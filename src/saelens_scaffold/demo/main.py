"""The demo from its options to its files and text."""

import sys
from contextlib import redirect_stdout
from pathlib import Path

from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import make_writable
from saelens_scaffold._util.workers import connected
from saelens_scaffold.demo.language_model import language_model_half
from saelens_scaffold.demo.planted import planted_half, planted_settings
from saelens_scaffold.demo.report import half_text, write_picture


def run(
    *,
    output_path: str | Path,
    seed: int = 0,
    seeds: int = 1,
    quick: bool = False,
    ray: str | None = None,
    cpus_per_task: int | None = None,
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
        ray: Address of a Ray cluster whose machines share the work, or "local" for one on
            this machine; by default this process does it all.
        cpus_per_task: CPU cores, and threads, of each training and evaluation there.

    Returns:
        The text to print: tables, and where everything is.

    Raises:
        UserError: An option makes no sense, or the folder holds SAEs of a demo with other
            settings.
    """
    if seeds < 1:
        raise UserError(f"seeds is {seeds}; it must be at least 1")
    output_path = Path(output_path)
    make_writable(output_path)
    numbers = [*range(seed, seed + seeds)]
    # libraries print their progress to stdout
    with (
        redirect_stdout(sys.stderr),
        connected(ray, "cpu", cpus_per_task) as workers,
    ):
        # first, since it refuses a folder with SAEs of other settings
        of_model = language_model_half(
            numbers, quick, output_path / "language_model", ray, cpus_per_task
        )
        with workers.sharing(output_path):
            planted = planted_half(
                planted_settings(quick), numbers, output_path / "planted", workers
            )
        halves = [planted, of_model]
    write_picture(halves, output_path / "demo.png")
    footer = Path(__file__).with_name("footer.txt").read_text().rstrip()
    texts = [*map(half_text, halves), footer.format(output_path=output_path)]
    return "\n\n".join(texts)
