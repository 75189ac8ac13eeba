"""What a training keeps when it breaks off, diverges, or cannot be saved."""

import errno
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file

from saelens_scaffold import ScaffoldBatchTopKTrainingSAE
from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import is_disk_full
from saelens_scaffold.plugins.manager import make_plugins
from saelens_scaffold.training.command import _parse
from saelens_scaffold.training.resuming import resume_automatically
from saelens_scaffold_cli import main
from test_cli import training_options

Train = Callable[..., tuple[int, str]]


@pytest.fixture
def train(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Train:
    """Runs `saelens-scaffold train`; gives its exit status and the last thing it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)

    def run(**changes: object) -> tuple[int, str]:
        options = training_options(tmp_path, d_sae=64, **changes)
        status = main(["train", *options])
        said = re.findall("saelens-scaffold train: .*", capsys.readouterr().err)
        return status, said[-1] if said else ""

    return run


def at_step(
    monkeypatch: pytest.MonkeyPatch, step: int, change: Callable[[Any], None]
) -> None:
    """Change the output of a training step."""
    forward = ScaffoldBatchTopKTrainingSAE.training_forward_pass

    def changed(self: Any, step_input: Any) -> Any:
        output = forward(self, step_input)
        if step_input.n_training_steps == step:
            change(output)
        return output

    monkeypatch.setattr(ScaffoldBatchTopKTrainingSAE, "training_forward_pass", changed)


def the_checkpoint(said: str) -> Path:
    """The checkpoint that a message names."""
    found = re.search(r"checkpoints/\S+/\d+", said)
    assert found is not None, said
    return Path(found[0])


def test_a_learning_rate_that_makes_weights_infinite(train: Train) -> None:
    status, said = train(lr=1e30)
    assert status == 2
    assert "diverged" in said and "1e+30" in said
    assert not Path("sae").exists()


def test_the_last_good_checkpoint_stays_when_training_diverges(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 9, lambda output: output.loss.data.fill_(math.nan))
    status, said = train()
    assert status == 2
    assert "the loss is nan" in said
    checkpoint = the_checkpoint(said)
    weights = load_file(checkpoint / "sae_weights.safetensors")
    assert all(bool(values.isfinite().all()) for values in weights.values())
    assert [*checkpoint.parent.iterdir()] == [checkpoint]
    assert not Path("sae").exists()


@pytest.mark.parametrize("lr", ["nan", "inf", "0"])
def test_learning_rates_are_finite_and_positive(train: Train, lr: str) -> None:
    status, said = train(lr=lr)
    assert status == 2
    assert said.startswith("saelens-scaffold train: error: lr is")


@pytest.mark.parametrize("value", [math.nan, math.inf, [1.0, -math.inf]])
def test_options_of_plugins_are_finite(value: Any) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        make_plugins({"schedule": {"lr_factor": value}})


def test_no_checkpoint_is_left_when_the_sae_is_saved(train: Train) -> None:
    status, _ = train()
    assert status == 0
    assert not Path("checkpoints").exists()
    assert sorted(path.name for path in Path("sae").iterdir()) == [
        "cfg.json",
        "runner_cfg.json",
        "sae_weights.safetensors",
        "sparsity.safetensors",
    ]


def test_checkpoints_that_were_asked_for_stay(train: Train) -> None:
    assert train(n_checkpoints=2)[0] == 0
    assert len([*Path("checkpoints").glob("*/*")]) == 2


def test_a_training_that_cannot_be_saved_is_in_a_checkpoint(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(ScaffoldBatchTopKTrainingSAE, "save_inference_model", full)
        status, said = train()
    assert status == 2
    assert "No space left" in said
    assert not [*Path("sae").iterdir()]
    (checkpoint,) = Path("checkpoints").glob("*/final_*")
    assert str(checkpoint) in said
    assert main(["export", str(checkpoint), "exported"]) == 0
    SAE.load_from_disk("exported")


def test_a_second_signal_does_not_cost_the_checkpoint(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminate(_: object = None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    save = SAETrainer.save_trainer_state

    def save_and_terminate(self: Any, path: Path) -> None:
        terminate()
        monkeypatch.setattr("saelens_scaffold._util.interruption._SAME_SECONDS", 0)
        terminate()
        save(self, path)

    monkeypatch.setattr(SAETrainer, "save_trainer_state", save_and_terminate)
    at_step(monkeypatch, 9, terminate)
    before = signal.getsignal(signal.SIGTERM)
    status, said = train(n_checkpoints=0)
    assert signal.getsignal(signal.SIGTERM) == before
    assert status == 130
    state = torch.load(the_checkpoint(said) / "trainer_state.pt")
    assert state["n_training_steps"] == 9


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        # of torch.save and of safetensors, on a full file system
        RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576"),
        RuntimeError("basic_ios::clear: iostream error"),
        Exception("Error while serializing: I/O error: No space left on device"),
    ],
)
def test_a_full_disk_is_recognised(error: Exception) -> None:
    assert is_disk_full(error)
    assert not is_disk_full(ValueError("a batch of no size"))


@pytest.mark.parametrize("field", ["output_path", "checkpoint_path"])
@pytest.mark.parametrize("path", ["file/below", "/proc/sae", ""])
def test_where_nothing_can_be_written(train: Train, field: str, path: str) -> None:
    Path("file").touch()
    # SAELens appends a name to checkpoint_path
    if field == "checkpoint_path" and not path:
        return
    status, said = train(**{field: path})
    assert status == 2
    assert said.startswith(f"saelens-scaffold train: error: {field} ")
    assert not Path("checkpoints").exists()


def test_a_checkpoint_is_there_whole_or_not_at_all(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = SAETrainer.save_trainer_state
    saved: list[Path] = []

    def fail_at_the_third(self: Any, path: Path) -> None:
        saved.append(path)
        if len(saved) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, path)

    monkeypatch.setattr(SAETrainer, "save_trainer_state", fail_at_the_third)
    status, said = train(n_checkpoints=3)
    assert status == 2
    folder = the_checkpoint(said).parent
    assert [path.name for path in sorted(folder.iterdir(), key=str)] == [
        path.name for path in saved[:2]
    ]
    # so had one been killed there, nothing would have been in the third's place
    assert saved[2].parent not in (folder, *folder.iterdir())


def test_a_training_goes_on_by_itself(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    again = {"resume_from_checkpoint": "auto"}
    with monkeypatch.context() as patch:
        at_step(patch, 9, interrupt)
        status, said = train(**again)  # there is none yet
        assert status == 130
        assert said.endswith(
            f"To go on from {the_checkpoint(said)}, repeat the command"
        )
        assert train(lr=1e-3, **again)[0] == 130  # another training's
    of_this, of_other = sorted(Path("checkpoints").glob("*/*"), key=os.path.getmtime)
    (of_other.parent / "final_4096").mkdir()  # nothing goes on from it
    steps = []
    at_step(monkeypatch, 3, steps.append)
    status, _ = train(**again)
    assert status == 0 and not steps
    assert not of_this.parent.exists() and of_other.exists()


def test_going_on_by_itself_needs_checkpoints(train: Train) -> None:
    parsed = ["--resume_from_checkpoint=auto", "--checkpoint_path=None"]
    cfg = _parse([*training_options(Path.cwd()), *parsed])
    cfg.checkpoint_path = None
    with pytest.raises(UserError, match="resume_from_checkpoint 'auto' needs"):
        resume_automatically(cfg)
