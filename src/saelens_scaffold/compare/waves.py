"""Waves: the SAEs that are trained together, on one pass of the language model."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from saelens_scaffold._util.files import new_file
from saelens_scaffold.compare.grid import Run
from saelens_scaffold.training.runner import last_checkpoint

Wave = list[Run]

WAVES_FILENAME = "waves.json"
WAVE_FILENAME = "wave.json"
"""File with the facts of a wave, written when all its SAEs are trained."""


class WaveFolder:
    """
    Folder of a wave: its checkpoints, and its SAEs until they are moved to their places.

    Args:
        training_path: Folder of all waves.
        number: Number of the wave.
    """

    def __init__(self, training_path: Path, number: int):
        self.path = training_path / f"wave-{number}"
        self.saes = self.path / "saes"
        self.checkpoints = self.path / "checkpoints"
        self.about = self.path / WAVE_FILENAME

    @property
    def is_trained(self) -> bool:
        """Whether all SAEs of the wave are trained."""
        return self.about.is_file()


def plan_waves(
    training_path: Path,
    saes_path: Path,
    runs: Sequence[Run],
    saes_per_wave: int | None = None,
) -> list[Wave]:
    """
    Divide the SAEs of an experiment into waves.

    Args:
        training_path: Folder of the waves. Those that are trained stay, and so do those
            that have a checkpoint, since that is one of a whole wave.
        saes_path: Folder of the trained SAEs, which are left out of new waves.
        runs: The SAEs.
        saes_per_wave: Most SAEs of a wave; None for all that can share a runner.
    """
    by_name = {run.name: run for run in runs}
    waves: list[Wave] = []
    busy: set[str] = set()
    for number, names in enumerate(_read_waves(training_path)):
        folder = WaveFolder(training_path, number)
        if folder.is_trained:
            busy.update(name for name in names if (folder.saes / name).is_dir())
        elif last_checkpoint(folder.checkpoints) and not (
            saes_per_wave and len(names) > saes_per_wave
        ):
            busy.update(names)
        else:  # waves are trained in order
            break
        waves.append([by_name[name] for name in names])
    by_runner: dict[str, Wave] = {}
    for run in runs:
        if run.name not in busy and not is_trained(saes_path / run.name):
            settings = repr(sorted(run.training.items()))
            by_runner.setdefault(settings, []).append(run)
    for same in by_runner.values():
        size = saes_per_wave or len(same)
        waves += [same[i : i + size] for i in range(0, len(same), size)]
    return waves


def keep_waves(training_path: Path, waves: Sequence[Wave]) -> None:
    """Write the division into waves, and drop checkpoints of waves that are no more."""
    now = [[run.name for run in wave] for wave in waves]
    for number, names in enumerate(_read_waves(training_path)):
        if now[number : number + 1] != [names]:
            shutil.rmtree(WaveFolder(training_path, number).path, ignore_errors=True)
    training_path.mkdir(parents=True, exist_ok=True)
    with new_file(training_path / WAVES_FILENAME) as file:
        file.write_text(json.dumps(now, indent=1))


def halves(wave: Wave) -> list[Wave]:
    """A wave in two, the first of which is not the smaller one."""
    middle = (len(wave) + 1) // 2
    return [wave[:middle], wave[middle:]]


def is_trained(directory: Path) -> bool:
    """Whether a directory holds a trained SAE."""
    names = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME)
    return all((directory / name).is_file() for name in names)


def _read_waves(training_path: Path) -> list[list[str]]:
    file = training_path / WAVES_FILENAME
    return json.loads(file.read_text()) if file.is_file() else []
