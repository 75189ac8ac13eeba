"""The demo: what it finds on planted data, what it measures, and what it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sae_lens import SAE

from helpers import overlap
from saelens_scaffold import demo
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.compare.table import comparison_text
from saelens_scaffold.demo import language_model, main
from saelens_scaffold.demo.planted import (
    PlantedActivations,
    planted_configs,
    planted_half,
    planted_settings,
    train_on_planted,
)
from saelens_scaffold.demo.report import Half, Row, half_text
from wheels import build_wheel, install


class Run(NamedTuple):
    """A finished `demo --quick`."""

    output_path: Path
    text: str

    def results(self, path: str) -> dict[str, Any]:
        return json.loads((self.output_path / path / "results.json").read_text())


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run by the wheel, installed beside the source: on what it finds in itself."""
    folder = tmp_path_factory.mktemp("demo")
    site = install(build_wheel(folder / "dist"), folder / "site")
    output_path = folder / "out"
    command = [sys.executable, "-m", "saelens_scaffold", "demo", "--quick"]
    done = subprocess.run(
        [*command, f"--output_path={output_path}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # compiled when it was imported, so that nothing else was
    for package in ("saelens_scaffold", "saelens_scaffold_cli"):
        assert (site / package / "__pycache__").is_dir()
    return Run(output_path, done.stdout.removesuffix("\n"))


def test_scaffolds_find_the_planted_truth(quick: Run) -> None:
    # measured again in plain torch, on other samples
    planted = PlantedActivations(planted_settings(), seed=0)
    torch.manual_seed(123)
    x = planted.sample(16_384)
    explained: dict[str, float] = {}
    dense: dict[str, int] = {}
    cosines: dict[str, float] = {}
    rows = {row["sae"]: row for row in quick.results("planted/seed-0")["results"]}
    with torch.no_grad():
        for name in ("batchtopk", "scaffold_batchtopk"):
            sae: Any = SAE.load_from_disk(quick.output_path / "planted/seed-0" / name)
            rank = 8 if name == "scaffold_batchtopk" else 0
            acts = sae.encode(x)
            residual = (x - acts @ sae.W_dec - sae.b_dec).pow(2).sum()
            explained[name] = float(1 - residual / (x - x.mean(0)).pow(2).sum())
            fires = (acts[:, rank:] > 0).float().mean(0)
            dense[name] = int((fires > 0.1).sum())
            directions = sae.W_dec[rank:][fires > 0]
            directions = directions / directions.norm(dim=1, keepdim=True)
            cosines[name] = float((directions @ planted.features.T).amax(1).mean())
            if rank:
                assert overlap(sae.W_dec[:rank], planted.dense_directions) >= 0.999

            numbers = rows[name]["numbers"]
            assert numbers["explained_variance"] == pytest.approx(
                explained[name], abs=0.005
            )
            assert numbers["dense_10"] == pytest.approx(dense[name], abs=2)
            assert numbers["feature_cosine"] == pytest.approx(cosines[name], abs=0.02)
            assert numbers["l0_total"] == numbers["l0_sparse"] + rank
    assert dense["scaffold_batchtopk"] <= dense["batchtopk"] / 2
    assert dense["batchtopk"] >= 15
    assert explained["scaffold_batchtopk"] >= explained["batchtopk"] + 0.03
    assert cosines["scaffold_batchtopk"] >= cosines["batchtopk"] + 0.15


def test_planted_features_are_never_dense() -> None:
    planted = PlantedActivations(planted_settings(), seed=3)
    torch.manual_seed(0)
    activations, features = planted.model.sample_with_features(20_000)
    assert float((features != 0).float().mean(0).max()) < 0.1
    assert activations.shape == (20_000, 128)


def test_twins_have_the_same_width_and_k() -> None:
    twins = planted_configs(planted_settings())
    assert {cfg.d_sae for cfg in twins.values()} == {1024}
    assert {cfg.k for cfg in twins.values()} == {8}  # type: ignore[attr-defined]
    ranks = {name: getattr(cfg, "scaffold_rank", 0) for name, cfg in twins.items()}
    assert ranks == {
        "batchtopk": 0,
        "scaffold_batchtopk": 8,
        "matryoshka_batchtopk": 0,
        "scaffold_matryoshka": 8,
    }


def small_planted_settings() -> dict[str, Any]:
    settings = planted_settings()
    settings["training"].update(training_samples=2560, batch_size=256)
    settings["eval_samples"] = 512
    return settings


def test_planted_data_is_deterministic(tmp_path: Path) -> None:
    settings = small_planted_settings()
    first, second = (train_on_planted(settings, 7, tmp_path / name) for name in "ab")
    assert first == second
    assert train_on_planted(settings, 8, tmp_path / "c") != first


def test_planted_seeds_are_trained_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = small_planted_settings()
    first = planted_half(settings, [0], tmp_path)
    assert capsys.readouterr().err.count("training") == 1
    both = planted_half(settings, [0, 1], tmp_path)
    assert capsys.readouterr().err.count("training") == 1
    assert [runs[0] for runs in both.saes.values()] == [
        runs[0] for runs in first.saes.values()
    ]
    # other settings are another experiment
    settings["training"]["lr"] = 0.002
    assert planted_half(settings, [0], tmp_path) != first
    assert capsys.readouterr().err.count("training") == 1


def test_the_demo_writes_what_it_prints(quick: Run) -> None:
    out = quick.output_path
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob(".*")), "nothing half-written is left"
    for said in ("demo.png", "planted/seed-N", "language_model/saes"):
        assert said in quick.text

    planted = quick.results("planted/seed-0")["results"]
    assert len(planted) == 4
    for row in planted:
        sae = SAE.load_from_disk(out / "planted/seed-0" / row["sae"])
        rank = getattr(sae.cfg, "scaffold_rank", 0)
        numbers = row["numbers"]
        frequencies = torch.tensor(row["firing_frequencies"])
        assert len(frequencies) == sae.cfg.d_sae - rank
        for column, threshold in (("10", 0.1), ("20", 0.2), ("50", 0.5)):
            assert numbers[f"dense_{column}"] == int((frequencies > threshold).sum())
        assert numbers["l0_sparse"] == pytest.approx(float(frequencies.sum()), rel=1e-3)
        assert f"| {row['sae']} " in quick.text

    of_model = quick.results("language_model")
    table = quick.text[quick.text.index("A language model") :]
    command = of_model["provenance"]["command"]
    assert command.startswith("saelens-scaffold demo --quick ")
    assert len(of_model["saes"]) == 6
    for entry in of_model["saes"]:
        sae = SAE.load_from_disk(out / "language_model" / entry["path"])
        assert sae.cfg.metadata.model_name == "py-neox", "no path of the user's machine"
        (line,) = (
            line for line in table.splitlines() if line.startswith(f"| {entry['arm']} ")
        )
        score = entry["evaluations"]["scaffold_ablation"]["cross_entropy"]
        assert f"{score['ce_loss_score']:.3f}" in line
        assert f"{entry['l0_total']:.1f}" in line
        sparsity = entry["evaluations"]["dense_latents"]["sparsity"]
        rank = getattr(sae.cfg, "scaffold_rank", 0)
        assert sparsity["l0_total"] == pytest.approx(sparsity["l0_sparse"] + rank)
    assert "verdict" not in quick.text, "one seed is compared with nothing"


def test_the_language_model_half_starts_plain_saes_with_and_without_centring(
    quick: Run,
) -> None:
    arms = {sae["arm"] for sae in quick.results("language_model")["saes"]}
    assert arms == {
        "batchtopk b_dec_init=zeros",
        "batchtopk b_dec_init=mean",
        "scaffold_batchtopk",
        "matryoshka_batchtopk b_dec_init=zeros",
        "matryoshka_batchtopk b_dec_init=mean",
        "scaffold_matryoshka",
    }
    for plain in arms:
        if plain.startswith("batchtopk"):
            assert f"of the tokens, {plain} " in quick.text


def test_a_finished_demo_trains_nothing(
    quick: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        file: file.stat().st_mtime_ns
        for file in quick.output_path.rglob("*.safetensors")
    }
    assert demo.run(output_path=quick.output_path, quick=True) == quick.text
    assert files == {file: file.stat().st_mtime_ns for file in files}
    captured = capsys.readouterr()
    assert captured.out == "", "the caller prints"


def test_a_folder_of_another_demo_is_refused_before_anything_is_done(
    quick: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "planted_half", None)
    with pytest.raises(ValueError, match="another configuration"):
        demo.run(output_path=quick.output_path, seeds=2, quick=True)


def test_several_seeds_are_compared(
    quick: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = quick.results("language_model")
    monkeypatch.setattr(language_model, "compare", lambda *_, **__: results)
    half = language_model.language_model_half([0, 1], True, quick.output_path)
    assert half.notes[0] == comparison_text(results)


def test_several_seeds_are_summarised() -> None:
    rows = [
        Row("batchtopk", "batchtopk", seed, {"dense_10": dense, "overlap": None}, [])
        for seed, dense in ((0, 4), (1, 6))
    ]
    scaffold = Row(
        "scaffold_batchtopk",
        "scaffold_batchtopk",
        0,
        {"dense_10": 1, "overlap": 0.5},
        [],
    )
    saes = {"batchtopk": rows, "scaffold_batchtopk": [scaffold]}
    text = half_text(Half("Title", saes, ["A note."]))
    assert "| batchtopk          | 5.0 ± 1.4 |       - |" in text
    assert "| scaffold_batchtopk |         1 |  0.5000 |" in text
    assert "scaffold_batchtopk has 1.0 latents firing on more than 10%" in text
    assert "batchtopk 5.0 (-80%)." in text
    assert text.endswith("A note.")


def test_wrong_options(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="seeds is 0; it must be at least 1"):
        demo.run(output_path=out, seeds=0)
    assert not out.exists()


def test_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match=f"{tmp_path}/out"):
        demo.run(output_path=tmp_path / "out")
