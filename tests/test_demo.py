"""The demo: what it finds on planted data, what it measures, and what it writes."""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

from helpers import overlap
from saelens_scaffold.demo import main as demo
from saelens_scaffold.demo.architectures import twin_configs
from saelens_scaffold.demo.language_model import LanguageModelSettings
from saelens_scaffold.demo.planted import (
    PlantedActivations,
    PlantedSettings,
    planted_configs,
    train_on_planted,
)


def test_scaffolds_find_the_planted_truth(tmp_path: Path):
    # one seed of benchmarks/sparse_encoder_input.py
    settings = PlantedSettings(structured=False, k=12, steps=800, batch_size=2048)
    twins = planted_configs(settings)
    saes = {name: twins[name] for name in ("BatchTopK", "ScaffoldBatchTopK")}
    planted = PlantedActivations(settings, seed=0)
    plain, scaffold = train_on_planted(planted, saes, 0, tmp_path)

    # measured again in plain torch, on other samples
    torch.manual_seed(123)
    x = planted.sample(16_384)
    explained: dict[str, float] = {}
    dense: dict[str, int] = {}
    cosines: dict[str, float] = {}
    with torch.no_grad():
        for name in saes:
            sae: Any = SAE.load_from_disk(tmp_path / name)
            rank = 8 if name == "ScaffoldBatchTopK" else 0
            acts = sae.encode(x)
            residual = (x - acts @ sae.W_dec - sae.b_dec).pow(2).sum()
            explained[name] = float(1 - residual / (x - x.mean(0)).pow(2).sum())
            fires = (acts[:, rank:] > 0).float().mean(0)
            dense[name] = int((fires > 0.1).sum())
            rows = sae.W_dec[rank:][fires > 0]
            rows = rows / rows.norm(dim=1, keepdim=True)
            cosines[name] = float((rows @ planted.features.T).amax(1).mean())
            if rank:
                assert overlap(sae.W_dec[:rank], planted.dense_directions) >= 0.999
    assert dense["ScaffoldBatchTopK"] == 0
    assert dense["BatchTopK"] >= 15
    assert explained["ScaffoldBatchTopK"] >= explained["BatchTopK"] + 0.03
    assert cosines["ScaffoldBatchTopK"] >= cosines["BatchTopK"] + 0.15

    for measured in (plain, scaffold):
        assert measured.explained_variance == pytest.approx(
            explained[measured.sae], abs=0.005
        )
        assert measured.dense_latents[0] == pytest.approx(dense[measured.sae], abs=2)
        assert measured.feature_cosine == pytest.approx(cosines[measured.sae], abs=0.02)
        assert measured.l0_total == measured.l0_sparse + measured.scaffold_rank


def test_planted_features_are_never_dense():
    planted = PlantedActivations(PlantedSettings(), seed=3)
    torch.manual_seed(0)
    activations, features = planted.model.sample_with_features(20_000)
    assert float((features != 0).float().mean(0).max()) < 0.1
    assert activations.shape == (20_000, 128)


def test_twins_start_alike_and_have_the_same_parameters():
    twins = twin_configs(16, 64, 4, 3, (8, 64))
    assert {cfg.d_sae for cfg in twins.values()} == {64}
    assert {cfg.k for cfg in twins.values()} == {4}  # type: ignore[attr-defined]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with next to no training."""
    monkeypatch.setattr(
        demo,
        "PlantedSettings",
        functools.partial(PlantedSettings, steps=10, batch_size=256, eval_samples=512),
    )
    monkeypatch.setattr(
        demo,
        "LanguageModelSettings",
        functools.partial(
            LanguageModelSettings,
            d_sae=256,
            matryoshka_widths=(64, 256),
            training_tokens=4096,
            batch_size=512,
            eval_contexts=16,
            eval_contexts_ce=16,
            pca_contexts=32,
            context_size=64,
        ),
    )


def options(*args: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(args)


@pytest.mark.usefixtures("small")
def test_the_demo_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    assert demo.run(options("--out", str(out), "--seeds", "2")) == 0
    first = capsys.readouterr()
    results = json.loads((out / "demo.json").read_text())
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob(".*")), "nothing half-written is left"

    for part, n_saes in (("planted", 4), ("language_model", 6)):
        rows = results[part]["results"]
        assert len(rows) == 2 * n_saes
        for row in rows:
            assert row["sae"] in first.out
            directory = out / "saes" / part / f"seed-{row['seed']}" / row["sae"]
            sae = SAE.load_from_disk(directory)
            rank = getattr(sae.cfg, "scaffold_rank", 0)
            assert row["scaffold_rank"] == rank
            frequencies = torch.tensor(row["firing_frequencies"])
            assert len(frequencies) == sae.cfg.d_sae - rank
            for count, threshold in zip(
                row["dense_latents"], (0.1, 0.2, 0.5), strict=True
            ):
                assert count == int((frequencies > threshold).sum())
            assert row["l0_sparse"] == pytest.approx(float(frequencies.sum()), rel=1e-3)
    metadata = sae.cfg.metadata
    assert metadata.model_name == "py-neox", "no path of the user's machine"

    # again: nothing is trained, the same is printed
    assert demo.run(options("--out", str(out), "--seeds", "2")) == 0
    second = capsys.readouterr()
    tables = first.out[first.out.index("Known truth") :]
    assert second.out.endswith(tables)
    assert second.err.count("finished before") == 4


@pytest.mark.usefixtures("small")
def test_the_demo_is_deterministic(tmp_path: Path):
    for name in ("a", "b"):
        demo.run(options("--out", str(tmp_path / name), "--seed", "7"))
    a, b = (json.loads((tmp_path / n / "demo.json").read_text()) for n in ("a", "b"))
    assert a == b


def test_bad_options(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        options("--seeds", "0")
    assert "must be at least 1, got 0" in capsys.readouterr().err


def test_directory_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file")
    assert demo.run(options("--out", str(tmp_path / "out"))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--out" in line and f"{tmp_path}/out" in line
