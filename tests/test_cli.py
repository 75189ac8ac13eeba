"""The command line, in this process where that is enough, and as a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import entry_points, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.registry import get_sae_class, get_sae_training_class
from safetensors.torch import load_file

import saelens_scaffold
from forked import forked_command
from helpers import scaffold_sae
from saelens_scaffold import ScaffoldJumpReLUSAE
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.models import embedded_model_path
from saelens_scaffold_cli import main
from saelens_scaffold_cli.commands import COMMANDS

RunCommand = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(tmp_path: Path) -> RunCommand:
    """Runs the installed command in tmp_path."""

    def run(*args: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [str(Path(sys.executable).with_name("saelens-scaffold")), *args],
            cwd=tmp_path,
            env={**os.environ, "HF_HOME": str(tmp_path / "hf"), **environment},
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tmp_path as the current directory, in a process that is put right afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def write_module(folder: Path, source: str, name: str = "scaffold_test_module") -> str:
    (folder / f"{name}.py").write_text(source)
    return name


def test_help_and_version_import_nothing_heavy() -> None:
    source = """if True:
        import sys
        from saelens_scaffold_cli import main
        for argv in [], ["--help"], ["run", "--help"], ["upload", "--help"], ["--version"], ["nonsense"]:
            try:
                main(argv)
            except SystemExit as exit:
                assert exit.code == (2 if argv == ["nonsense"] else 0), argv
        assert not {"torch", "sae_lens", "saelens_scaffold"} & set(sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    assert version("saelens-scaffold") in done.stdout
    assert "saelens-scaffold demo --quick" in done.stdout


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_threads_wait_briefly_unless_the_environment_says_how(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert os.environ.get("GOMP_SPINCOUNT") == expected


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0")])
def test_pages_are_large_unless_the_environment_says_otherwise(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", given or "")  # restored afterwards
    if given is None:
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    with pytest.raises(SystemExit):
        main(["--version"])
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == expected


def test_version_is_the_packages() -> None:
    assert saelens_scaffold.__version__ == version("saelens-scaffold")


@pytest.mark.parametrize(
    "argv",
    [
        ["run"],
        ["run", "-m"],
        ["run", "json.tool"],
        ["run", "-mjson.tool"],
        ["run", "json.tool", "-m", "json.tool"],
        ["run", "--verbose", "-m", "json.tool"],
        ["nonsense"],
        ["--nonsense"],
    ],
)
def test_usage_errors(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--help"],
        ["--version", "-h"],
        ["-m", "another", "run", "train"],
        ["--", "-x", "--", "--y=1"],
        ["", "two words", "-", "ünï", "@file", "--no-such-option"],
    ],
)
def test_run_passes_arguments_on_untouched(
    args: list[str], workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "import json, sys; print(json.dumps([__name__, __spec__.name, sys.argv]))"
    module = write_module(workdir, source)
    assert main(["run", "-m", module, *args]) == 0
    assert json.loads(capsys.readouterr().out) == [
        "__main__",
        module,
        [str(workdir / f"{module}.py"), *args],
    ]


def test_run_runs_a_package(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workdir / "scaffold_test_package").mkdir()
    write_module(workdir / "scaffold_test_package", "print('ran')", "__main__")
    assert main(["run", "-m", "scaffold_test_package"]) == 0
    assert capsys.readouterr().out == "ran\n"


@pytest.mark.parametrize("status", [0, 1, 7, "a message"])
def test_run_passes_the_exit_status_on(status: int | str, workdir: Path) -> None:
    module = write_module(workdir, f"import sys; sys.exit({status!r})")
    with pytest.raises(SystemExit) as exit:
        main(["run", "-m", module])
    assert exit.value.code == status


@pytest.mark.parametrize(
    "module",
    [
        "",
        "no_such_module",
        "no_such.module",
        "json.no_such",
        "json.tool.x",
        ".relative",
    ],
)
def test_run_unknown_module(
    module: str, workdir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "-m", module, "--help"]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("saelens-scaffold run: error: ")
    assert repr(module) in captured.err
    assert captured.err.count("\n") == 1


def test_run_package_without_main(
    workdir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "-m", "json"]) == 2
    assert "__main__" in capfd.readouterr().err


def test_run_a_file_instead_of_a_module(
    workdir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "-m", "no_such_script.py"]) == 2
    assert "Try using 'no_such_script'" in capfd.readouterr().err


def test_errors_of_the_module_are_its_own(workdir: Path) -> None:
    module = write_module(workdir, "import scaffold_test_missing")
    with pytest.raises(ModuleNotFoundError, match="scaffold_test_missing"):
        main(["run", "-m", module])

    (workdir / "scaffold_test_broken").mkdir()
    package = workdir / "scaffold_test_broken"
    write_module(package, "import scaffold_test_missing", "__init__")
    write_module(package, "", "module")
    with pytest.raises(ModuleNotFoundError, match="scaffold_test_missing"):
        main(["run", "-m", "scaffold_test_broken.module"])


def test_run_registers_architectures_and_starts_processes(
    command: RunCommand, tmp_path: Path
) -> None:
    # A spawned process imports the main module once more, by its name.
    source = """if True:
        import json, multiprocessing, sys
        from transformer_lens.loading_from_pretrained import get_official_model_name
        from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

        def square(x):
            return x * x

        if __name__ == "__main__":
            seen = {
                "training": [*SAE_TRAINING_CLASS_REGISTRY],
                "inference": [*SAE_CLASS_REGISTRY],
                "models": [get_official_model_name(name) for name in sys.argv[1:]],
            }
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seen["squares"] = pool.map(square, [2, 3])
            print(json.dumps(seen))
            sys.exit(7)
    """
    module = write_module(tmp_path, source)
    path = str(embedded_model_path())
    done = command("run", "-m", module, "py-neox", path)
    assert done.returncode == 7, done.stderr
    seen = json.loads(done.stdout)
    assert {"scaffold_batchtopk", "scaffold_matryoshka"} <= set(seen["training"])
    assert "scaffold_jumprelu" in seen["inference"]
    assert len(seen["models"]) == 2
    assert seen["squares"] == [4, 9]


def test_python_m_honours_safe_path(tmp_path: Path) -> None:
    module = write_module(tmp_path, "print('found')")
    done = subprocess.run(
        [sys.executable, "-m", "saelens_scaffold", "run", "-m", module],
        cwd=tmp_path,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    if sys.version_info < (3, 11):  # in which it is new
        assert (done.returncode, done.stdout) == (0, "found\n")
    else:
        assert done.returncode == 2
        assert "No module named" in done.stderr


@pytest.mark.parametrize("architecture", ["scaffold_batchtopk", "scaffold_matryoshka"])
def test_train_help(architecture: str) -> None:
    done = forked_command("train", "--architecture", architecture, "--help")
    assert done.wait() == 0, done.stderr
    for option in "--scaffold_rank", "--sparse_encoder_input", "--scaffold_init":
        assert option in done.stdout
    # a module that SAELens imports and that then runs is no cause for a warning
    assert "RuntimeWarning" not in done.stderr


def training_options(folder: Path, **changes: object) -> list[str]:
    """For a small SAE on the embedded model and text that is written into the folder."""
    (folder / "text").mkdir(exist_ok=True)
    source = Path(main.__code__.co_filename).read_text()
    records = [{"text": source[i:]} for i in range(64)]
    (folder / "text" / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    options: dict[str, object] = {
        "architecture": "scaffold_batchtopk",
        "scaffold_rank": 4,
        "k": 8,
        "d_in": 256,
        "d_sae": 512,
        "model_name": "py-neox",
        "hook_name": "blocks.1.hook_resid_post",
        "dataset_path": "./text",
        "is_dataset_tokenized": False,
        "streaming": False,
        "context_size": 64,
        "training_tokens": 4096,
        "train_batch_size_tokens": 256,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 16,
        "log_to_wandb": False,
        "device": "cpu",
        "output_path": "sae",
        **changes,
    }
    return [f"--{name}={value}" for name, value in options.items()]


def test_train_end_to_end(tmp_path: Path) -> None:
    done = forked_command("train", *training_options(tmp_path), cwd=tmp_path)
    assert done.wait() == 0, done.stderr

    sae = SAE.load_from_disk(tmp_path / "sae")
    assert isinstance(sae, ScaffoldJumpReLUSAE)
    assert sae.cfg.scaffold_rank == 4
    assert sae.cfg.metadata.model_name == "py-neox"


def test_interrupted_training_says_how_to_resume_and_resumes(tmp_path: Path) -> None:
    options = training_options(tmp_path, training_tokens=10**8, d_sae=64)
    process = forked_command("train", *options, cwd=tmp_path)
    # the progress bar at step 100
    process.wait_until(lambda: "100|" in process.stderr)
    for _ in range(3):  # some schedulers repeat it
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    # the last may come when all has been said, while Python ends
    assert process.wait() in (130, -signal.SIGTERM)
    hint = re.search(r"--resume_from_checkpoint (\S+)", process.stderr)
    assert hint is not None, process.stderr
    checkpoint = tmp_path / hint[1]
    state = torch.load(checkpoint / "trainer_state.pt")
    assert state["n_training_steps"] >= 100

    options = training_options(
        tmp_path,
        training_tokens=state["n_training_samples"] + 256,
        d_sae=64,
        resume_from_checkpoint=checkpoint,
    )
    done = forked_command("train", *options, cwd=tmp_path)
    assert done.wait() == 0, done.stderr
    weights = load_file(checkpoint / "sae_weights.safetensors")
    sae = SAE.load_from_disk(tmp_path / "sae")
    # one more step moves the scaffold a little; a new start would move it a lot
    B = torch.nn.functional.normalize(weights["W_dec"][:4], dim=1)
    assert (sae.W_dec[:4] * B).sum(1).min() > 0.99


@pytest.mark.parametrize(
    "architecture", ["scaffold_batchtopk", "scaffold_jumprelu", "standard"]
)
def test_training_starts_from_a_checkpoint_or_a_saved_sae(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    options = training_options(tmp_path, d_sae=64, lr=1e-9, training_tokens=1024)
    torch.manual_seed(1)
    start: Any = scaffold_sae(
        d_in=256, d_sae=64, scaffold_rank=4, calibrate_threshold=False
    )
    if architecture == "scaffold_jumprelu":
        start = start.to_inference()
    if architecture == "standard":
        # one name for both forms, so SAELens continues a saved SAE, too
        start = StandardSAE(StandardSAEConfig(d_in=256, d_sae=64))
        of_scaffold = ("--architecture", "--scaffold_rank", "--k=")
        options = [each for each in options if not each.startswith(of_scaffold)]
        options.append("--architecture=standard")
    start.save_model("start")
    assert main(["train", *options, "--from_pretrained_path=start"]) == 0
    trained = SAE.load_from_disk(tmp_path / "sae")
    torch.testing.assert_close(
        trained.W_dec[4:] / trained.W_dec[4:].norm(dim=1, keepdim=True),
        start.W_dec[4:] / start.W_dec[4:].norm(dim=1, keepdim=True),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces what `demo` runs."""

    def replace(run: Callable[..., object]) -> None:
        module = ModuleType("saelens_scaffold.demo")
        vars(module).update(run=run)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(saelens_scaffold, "demo", module, raising=False)

    return replace


def test_options_reach_the_function(
    demo: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(**options: object) -> str:
        print("what a library prints")
        return str(sorted(options.items() & given.items()))

    given = {"seed": 0, "seeds": 5, "quick": True, "output_path": "folder"}

    demo(run)
    assert main(["demo", "--seeds", "5", "--quick", "--output_path", "folder"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{sorted(given.items())}\n"
    assert captured.err == "what a library prints\n"


class Failed(UserError):
    exit_status = 1
    text = "what there is"
    lines = ("a warning",)


@pytest.mark.parametrize("debug", [False, True])
def test_a_users_mistake_is_one_line(
    debug: bool, demo: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(**_: object) -> str:
        raise UserError("a field\n  is wrong")

    demo(run)
    assert main(["demo", *["--debug"] * debug]) == 2
    *traceback, line = capsys.readouterr().err.splitlines()
    assert line == "saelens-scaffold demo: error: a field is wrong"
    assert bool(traceback) == debug


def test_a_partial_failure_shows_what_there_is(
    demo: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(**_: object) -> str:
        raise Failed("the rest")

    demo(run)
    assert main(["demo"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "what there is\n"
    assert captured.err == "a warning\nsaelens-scaffold demo: error: the rest\n"


def test_a_defect_keeps_its_traceback(demo: Callable[..., None]) -> None:
    def run(**_: object) -> str:
        raise ValueError("from a library")

    demo(run)
    with pytest.raises(ValueError, match="from a library"):
        main(["demo"])


def test_a_full_disk_is_said_in_one_line(
    demo: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(**_: object) -> str:
        raise RuntimeError("PytorchStreamWriter failed writing file:\nno more")

    demo(run)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == (
        "saelens-scaffold demo: error: the disk is full: PytorchStreamWriter failed "
        "writing file: no more\n"
    )


def test_an_interruption_says_how_to_go_on(
    demo: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(**_: object) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        return "not reached"

    demo(run)
    assert main(["demo", "--output_path", "folder"]) == 130
    assert capsys.readouterr().err == (
        "\nsaelens-scaffold demo: interrupted. What is finished is in folder; repeat the "
        "command to go on.\n"
    )


def test_options_as_they_are_read() -> None:
    arguments = "core,tpp --set=a.b=1 --sae_path x y --model m --set c.d=2 --debug"
    options = COMMANDS["eval"].parse([*arguments.split(), "--output_path", "z"])
    given = {name: value for name, value in vars(options).items() if value is not None}
    assert given == {
        "names": "core,tpp",
        "settings": ["a.b=1", "c.d=2"],
        "sae_path": ["x", "y"],
        "model_name": "m",
        "output_path": "z",
        "artifacts_path": "artifacts",
        "force_rerun": False,
        "debug": True,
    }
    train = COMMANDS["train"].parse(["--k=3", "--debug", "--help"])
    assert vars(train) == {"args": ["--k=3", "--help"], "debug": True}
    compare = COMMANDS["compare"].parse(["folder/experiment.yaml"])
    assert compare.arguments()["output_path"] == "experiment-output"


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"train"}))
def test_help_describes_every_option(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert f"saelens-scaffold {name} [-h]" in text or name == "run"
    assert "\nexample" in text
    for action in COMMANDS[name].parser()._actions:
        assert action.help


def test_entry_points_are_what_saelens_registers() -> None:
    training = entry_points(group="sae_lens.training_saes")
    inference = entry_points(group="sae_lens.saes")
    assert {"scaffold_batchtopk", "scaffold_matryoshka"} <= training.names
    assert "scaffold_jumprelu" in inference.names
    for entry_point in training:
        assert entry_point.load() == get_sae_training_class(entry_point.name)
    for entry_point in inference:
        assert entry_point.load() == get_sae_class(entry_point.name)
