"""The GPU check on a CPU, where nothing is installed but what it may count on."""

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from wheels import ROOT

WHEELS = ROOT / "benchmarks" / "gpu_wheels.txt"


def install_links(folder: Path, name: str, with_needs: bool) -> None:
    """Links to what a distribution consists of."""
    try:
        found = distribution(name)
    except importlib.metadata.PackageNotFoundError:  # NVIDIA's, without CUDA
        return
    if (folder / f"{name}.linked").exists():
        return
    (folder / f"{name}.linked").touch()
    for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
        if not (folder / top).exists():
            (folder / top).symlink_to(Path(str(found.locate_file(top))))
    for line in (found.requires or []) if with_needs else []:
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            install_links(folder, needed.name, True)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PyTorch, NumPy and Triton, and what `make gpu-wheels` downloads."""
    folder = tmp_path_factory.mktemp("site-packages")
    for name in ("torch", "numpy", "triton"):
        install_links(folder, name, True)
    for line in WHEELS.read_text().splitlines():
        if not line.startswith("#"):
            install_links(folder, line, False)
    return folder


def test_every_part_has_results_without_a_gpu(bare: Path, tmp_path: Path) -> None:
    output = tmp_path / "check.json"
    command = [str(ROOT / "benchmarks" / "gpu_check.py"), "--device=cpu", "--quick"]
    command += [f"--output={output}", f"--wheels={tmp_path}", "--minutes=60"]
    # without the site-packages of either environment
    done = subprocess.run(
        [sys.executable, "-S", *command],
        env={**os.environ, "PYTHONPATH": str(bare)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content: dict[str, Any] = json.loads(output.read_text())
    parts = content["parts"]
    assert {part["status"] for part in parts.values()} == {"done"}
    results = {name: part["results"] for name, part in parts.items()}

    (environment,) = results["environment"]
    assert {"datasets", "wandb"} <= {*environment["stand_ins"]}
    assert environment["versions"]["sae-lens"]
    (tests,) = results["kernel_tests"]
    assert tests["outcomes"]["passed"] >= 2 and not tests["failures"]
    steps = [profile["sae"] for profile in results["profile"]]
    assert steps == ["ScaffoldBatchTopK", "ScaffoldMatryoshka"]
    assert all(profile["ops"] for profile in results["profile"])
    trained = {row["of"]: row["tokens_per_s"] for row in results["training"]}
    assert [*trained] == ["language model alone", "BatchTopK", "ScaffoldBatchTopK"]
    assert min(trained.values()) > 0
    assert results["steps"][0]["roofline_reached"] > 0
    assert [call["call"] for call in results["inference"]] == ["encode", "decode"]
    for curves in results["loss_curves"]:
        of_kernels = curves["runs"]["torch kernels"]
        assert of_kernels["largest_difference_first_20"] < 1e-5
        other_seed = curves["runs"]["dense, other seed"]
        assert other_seed["largest_difference_first_20"] > 1e-5


def test_what_takes_too_long_is_cut_and_the_rest_not_begun(tmp_path: Path) -> None:
    output = tmp_path / "check.json"
    command = ["--device=cpu", "--quick", "--minutes=0.02", f"--output={output}"]
    script = str(ROOT / "benchmarks" / "gpu_check.py")
    subprocess.run(
        [sys.executable, script, *command, f"--wheels={tmp_path}"], check=True
    )
    first, *others = json.loads(output.read_text())["parts"].values()
    assert first["status"].startswith("cut: ")
    assert {part["status"] for part in others} == {"not begun"}


def test_wheels_are_unpacked_unless_they_are_for_another_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    unpack: Any = importlib.import_module("gpu_check").unpack
    this = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheels, folder = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    for i, tag in enumerate(
        ("py3-none-any", f"{this}-{this}-linux", "cp38-abi3-linux")
    ):
        with zipfile.ZipFile(wheels / f"package_{i}-1.0-{tag}.whl", "w") as wheel:
            wheel.writestr(f"package_{i}/__init__.py", "")
    unpack(wheels, folder)
    found = sorted(path.name for path in folder.iterdir())
    assert found == ["package_0", "package_1", "package_2"]
    (wheels / "package_3-1.0-cp27-cp27-linux.whl").touch()
    with pytest.raises(SystemExit, match="package_3.* make gpu-wheels GPU_PYTHON="):
        unpack(wheels, folder)
