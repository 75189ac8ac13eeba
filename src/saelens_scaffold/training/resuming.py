"""Trainings that go on by themselves, from their own newest checkpoint."""

import json
from pathlib import Path
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.constants import RUNNER_CFG_FILENAME

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.saes.runner_config import read_runner_config

AUTO = "auto"
"""Value of `resume_from_checkpoint` that goes on from the newest checkpoint, if any."""

_OF_ATTEMPT = {"checkpoint_path", "resume_from_checkpoint", "logger", "verbose"}
_OF_ATTEMPT |= {"device", "llm_device", "act_store_device", "sae_lens_version"}
"""Fields in which attempts of one training may differ."""


def resume_automatically(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """
    Have a training go on from the checkpoint that is furthest in it, if there is one, and
    keep its checkpoints beside that one.

    It is searched where SAELens puts the checkpoints of all trainings that have the same
    `checkpoint_path`.

    Raises:
        UserError: The configuration has no `checkpoint_path`.
    """
    if cfg.checkpoint_path is None:
        raise UserError(
            f"resume_from_checkpoint {AUTO!r} needs checkpoint_path, the folder of the "
            "training's checkpoints"
        )
    training = _training(cfg.to_dict())
    files = Path(cfg.checkpoint_path).parent.glob(f"*/*/{RUNNER_CFG_FILENAME}")
    # no training goes on from the final one, which has a name
    found = [file.parent for file in files if file.parent.name.isdecimal()]
    same = [each for each in found if _training(read_runner_config(each)) == training]
    cfg.resume_from_checkpoint = None
    if same:
        furthest = max(same, key=lambda checkpoint: int(checkpoint.name))
        cfg.resume_from_checkpoint = str(furthest)
        cfg.checkpoint_path = str(furthest.parent)


def _training(runner_cfg: dict[str, Any]) -> Any:
    """What a runner's configuration says of the training itself, as JSON has it."""
    of_sae = {k: v for k, v in runner_cfg.get("sae", {}).items() if k != "metadata"}
    fields = {k: v for k, v in runner_cfg.items() if k not in _OF_ATTEMPT}
    return json.loads(json.dumps({**fields, "sae": of_sae}))
