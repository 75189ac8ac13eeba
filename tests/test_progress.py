"""Progress of long work, and the time left."""

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tqdm import tqdm

from saelens_scaffold._util.progress import Progress, duration
from saelens_scaffold_cli import main
from test_compare import SMALL


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (59, "59 s"),
        (61, "1 min"),
        (3599, "1 h 0 min"),
        (11520, "3 h 12 min"),
    ],
)
def test_durations(seconds: float, said: str):
    assert duration(seconds) == said


def test_the_time_left_is_what_is_left_of_each_kind_at_its_own_pace():
    progress = Progress()
    assert progress.time_left({"slow": 3, "fast": 50}) == ""
    progress.done("slow", 1, 120)
    assert progress.time_left({"slow": 3, "fast": 50}) == "at least 6 min"
    progress.done("fast", 10, 10)
    assert progress.time_left({"slow": 3, "fast": 60}) == duration(3 * 120 + 60)
    assert progress.time_left({"slow": 3, "fast": 60}, 2) == duration(180 + 30)
    progress.done("slow", 1, 240)  # 180 s each, so far
    assert progress.time_left({"slow": 2, "fast": 0}) == "6 min"
    assert progress.time_left({"slow": 0}) == "0 s"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_says_it(monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress()
    with tqdm(total=2, file=terminal, mininterval=0) as bar:
        for i in range(2):
            progress.show(f"wave 1 of 2 · {i} min left", bar)
            bar.update()
    said = terminal.getvalue()
    assert "wave 1 of 2 · 1 min left: 100%" in said
    assert "\n" not in said.strip()


def test_in_a_log_there_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]):
    clock = Clock()
    progress = Progress(clock)
    n_steps = 69 * 60 * 60  # of a second each
    with tqdm(total=n_steps) as bar:
        for i in range(n_steps):
            clock.now += 1
            progress.show(f"step {i}", bar)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    steps = [int(line.partition("step ")[2]) for line in lines if "step" in line]
    assert steps[0] == 0
    pauses = [b - a for a, b in zip(steps, steps[1:], strict=False)]
    assert max(pauses) <= 600
    assert min(pauses) >= 30
    assert len(lines) < 1000


def test_bars_of_other_libraries_write_seldom_to_a_log():
    code = (
        "import time, sys\n"
        "from saelens_scaffold_cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit: pass\n"
        "from tqdm.auto import tqdm\n"
        "for _ in tqdm(range(60)): time.sleep(0.01)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "100%" in done.stderr
    assert done.stderr.count("\r") <= 2, done.stderr


def test_a_comparison_says_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    experiment: dict[str, Any] = {
        **SMALL,
        "grid": {"architecture": ["batchtopk"], "k": [4], "seed": [0, 1]},
        "evaluations": {"dense_latents": {"n_tokens": 500, "n_bootstrap": 5}},
    }
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    options = [f"--output_path={tmp_path / 'out'}", "--saes_per_wave=1"]
    command = ["compare", str(tmp_path / "experiment.yaml"), *options]
    assert main(command) == 0
    said = capsys.readouterr().err
    lines = re.split("[\r\n]+", said)
    # the pace of the first wave is known when the second begins
    waves = [line for line in lines if line.startswith("wave ")]
    assert waves[:2] == ["wave 1 of 2 (1 SAE)", "wave 1 of 2 (1 SAE) · 3 %"]
    hook_name = SMALL["hook_name"]
    about = f"dense_latents of 1 SAE of seed %d at {hook_name}"
    assert f"evaluation 1 of 2 · {about % 0}" in lines
    second = next(line for line in lines if line.startswith("evaluation 2 of 2 · "))
    assert re.fullmatch(rf"{re.escape(about % 1)} · \d+ s left", second[20:])

    (tmp_path / "out/eval_results/dense_latents").joinpath(
        "batchtopk-k_4-seed_1_custom_sae_eval_results.json"
    ).unlink()
    assert main(command) == 0
    assert f"evaluation 1 of 1 · {about % 1}\n" in capsys.readouterr().err
