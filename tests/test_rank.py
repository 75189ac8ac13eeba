"""`saelens-scaffold rank`: what each way of counting dimensions finds in known data."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sae_bench")

from eval_helpers import HOOK, eval_sae
from saelens_scaffold.rank import command as rank_command
from saelens_scaffold.rank.analysis import (
    RankCandidate,
    _shuffled,
    dense_latent_candidates,
    knee_of,
    spectrum_candidates,
    suggested,
)
from saelens_scaffold_cli import main


def ranks(candidates: list[RankCandidate]) -> dict[str, int]:
    return {candidate.name: candidate.rank for candidate in candidates}


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_planted_dense_directions_are_found(rank: int) -> None:
    g = torch.Generator().manual_seed(0)
    planted = torch.linalg.qr(torch.randn(64, rank, generator=g)).Q.T
    x = torch.randn(20_000, 64, generator=g)
    x += 8 * torch.randn(20_000, rank, generator=g) @ planted
    variances = torch.linalg.eigvalsh(torch.cov(x.double().T)).flip(0)
    noise = torch.linalg.eigvalsh(torch.cov(_shuffled(x, g).double().T)).flip(0)
    found = ranks(spectrum_candidates(variances, noise))
    assert found["knee"] == rank
    assert found["parallel analysis"] == rank
    shares = variances / variances.sum()
    assert found["participation ratio"] == round(float(1 / shares.pow(2).sum()))


def test_shuffling_keeps_variances_and_breaks_correlation() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5_000, 1, generator=g) @ torch.tensor([[1.0, 2.0, 3.0]])
    shuffled = _shuffled(x, g)
    assert torch.equal(shuffled.sort(dim=0).values, x.sort(dim=0).values)
    assert torch.corrcoef(shuffled.T).triu(1).abs().max() < 0.1


@settings(deadline=None, max_examples=50)
@given(
    variances=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40).map(
        lambda values: torch.tensor(sorted(values, reverse=True)).double()
    )
)
def test_knee_is_a_rank(variances: torch.Tensor) -> None:
    assert 1 <= knee_of(variances) <= max(3, len(variances) // 2)


def test_antipodal_dense_latents_span_one_dimension() -> None:
    eye = torch.eye(10)
    decoder = torch.cat([eye[:2], -eye[:2], eye[:1] + 0.01 * eye[5:6]])
    found = ranks(dense_latent_candidates(decoder, eye.double()))
    assert found == {"dense latents": 2, "dense latents in PCA": 2}
    reversed_directions = eye.flip(0).double()
    found = ranks(dense_latent_candidates(decoder, reversed_directions))
    assert found == {"dense latents": 2, "dense latents in PCA": 10}
    assert dense_latent_candidates(decoder[:0], eye.double()) == []


def test_suggestion() -> None:
    def of(**ranks: int) -> str:
        named = [RankCandidate(n.replace("_", " "), r, "") for n, r in ranks.items()]
        return suggested(named).name

    assert of(knee=5, parallel_analysis=9) == "knee"
    assert of(knee=9, parallel_analysis=5) == "parallel analysis"
    assert of(knee=9, parallel_analysis=5, dense_latents=20) == "dense latents"


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*args: str) -> tuple[int, str, str]:
        status = main(
            ["rank", "--device=cpu", f"--out={tmp_path}/out", "--n_tokens=2000", *args]
        )
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_command_with_a_plain_sae(run: Any, tmp_path: Path) -> None:
    eval_sae().save_model(tmp_path / "sae")
    status, out, _ = run("--dataset=python-stdlib", f"--sae_path={tmp_path}/sae")
    assert status == 0
    written = json.loads((tmp_path / "out" / "rank.json").read_text())
    assert f"Try scaffold_rank={written['suggestion']['rank']}" in out
    for candidate in written["candidates"]:
        assert candidate["name"] in out and candidate["reason"] in out
    assert written["suggestion"]["name"] == "dense latents"
    assert written["n_dense_latents"] > 0
    assert sum(written["variance_shares"]) == pytest.approx(1)
    picture = (tmp_path / "out" / "rank.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_command_without_an_sae(run: Any, tmp_path: Path) -> None:
    status, out, _ = run(
        "--model=py-neox", f"--hook_name={HOOK}", "--dataset=python-stdlib"
    )
    assert status == 0
    assert "dense latents" not in out


def test_sae_of_another_hook_point(run: Any, tmp_path: Path) -> None:
    eval_sae().save_model(tmp_path / "sae")
    other = "--hook_name=blocks.1.hook_resid_post"
    status, _, err = run("--dataset=python-stdlib", f"--sae_path={tmp_path}/sae", other)
    assert status == 2
    assert f"was trained at {HOOK}, not at blocks.1" in err.splitlines()[-1]


def test_scaffold_sae_is_no_plain_one(run: Any, tmp_path: Path) -> None:
    sae = eval_sae(rank=4)
    for name, form in ("scaffold", sae), ("jumprelu", sae.to_jumprelu()):
        form.save_model(tmp_path / name)
        status, _, err = run("--dataset=python-stdlib", f"--sae_path={tmp_path / name}")
        assert status == 2
        assert "has a scaffold (of rank 4)" in err.splitlines()[-1]


def test_folder_is_seen_to_before_the_work(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_command, "analyse_rank", None)  # not even called
    (tmp_path / "out").write_text("a file")
    args = ["--model=py-neox", f"--hook_name={HOOK}", "--dataset=python-stdlib"]
    status, _, err = run(*args)
    assert status == 2
    assert f"{tmp_path}/out" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model=py-neox"], "name the hook point"),
        (["--model=py-neox", "--hook_name=nowhere"], "no hook point 'nowhere'"),
        ([f"--hook_name={HOOK}"], "model_name is empty"),
        (["--sae_path=/nowhere"], "not an SAE's directory"),
        (["--model=py-neox", f"--hook_name={HOOK}", "--n_tokens=0"], "n_tokens"),
    ],
)
def test_mistakes(run: Any, args: list[str], message: str) -> None:
    status, out, err = run("--dataset=python-stdlib", *args)
    assert status == 2
    assert message in err.splitlines()[-1]
    assert out == ""
