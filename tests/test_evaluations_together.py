"""The whole way: four evaluations by one command, as users and schemas see them."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from eval_helpers import eval_sae
from saelens_scaffold.evals import json_schemas
from saelens_scaffold_cli import main

pytestmark = pytest.mark.sae_bench

OPTIONS = [
    "--dataset=python-stdlib",
    "--baseline=plain",
    "--device=cpu",
    "--llm_batch_size=16",
    "--set=dense_latents.n_tokens=2000",
    "--set=dark_matter.n_tokens=300",
    "--set=dark_matter.n_fit_tokens=400",
    "--set=scaffold_ablation.n_tokens=300",
    "--set=scaffold_ablation.n_fit_tokens=1000",
    "--set=scaffold_ablation.n_random_draws=1",
    "--set=scaffold_ablation.n_aligned_latents=[5]",
    "--set=scaffold_ablation.topic_train_size=10",
    "--set=scaffold_ablation.topic_test_size=5",
    "--set=sparse_probing.probe_train_set_size=40",
    "--set=sparse_probing.probe_test_set_size=20",
    "--set=tpp.train_set_size=40",
    "--set=tpp.test_set_size=20",
    "--set=tpp.n_values=[2,10]",
    "--set=tpp.probe_epochs=2",
]
NAMES = ("dark_matter", "dense_latents", "scaffold_ablation", "sparse_probing", "tpp")


def evaluate(folder: Path) -> int:
    saes = [str(folder / name) for name in ("plain", "scaffold")]
    where = [f"--output_path={folder}/out", f"--artifacts_path={folder}/artifacts"]
    return main(["eval", ",".join(NAMES), "--sae_path", *saes, *where, *OPTIONS])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds two SAEs, and the results of all five evaluations in `out`."""
    folder = tmp_path_factory.mktemp("evaluations")
    eval_sae(seed=1).save_model(folder / "plain")
    eval_sae(rank=4).save_model(folder / "scaffold")
    assert evaluate(folder) == 0
    return folder


def test_finished_results_are_shown_and_not_measured_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {file: file.read_bytes() for file in (folder / "out").rglob("*.json")}
    assert len(files) == 10
    assert evaluate(folder) == 0
    printed = capsys.readouterr().out
    header, _, *rows = (line for line in printed.splitlines() if line.startswith("|"))
    assert all(name in header for name in NAMES)
    assert [row.split("|")[1].strip() for row in rows] == ["plain", "scaffold"]
    assert "failed" not in printed
    assert {f: f.read_bytes() for f in (folder / "out").rglob("*.json")} == files


def test_json_follows_the_committed_schemas(folder: Path) -> None:
    checked = 0
    for _, schema_file in json_schemas.output_classes():
        schema = json.loads(schema_file.read_text())
        name = schema_file.stem.removeprefix("eval_output_schema_")
        for file in (folder / "out" / name).glob("*.json"):
            # as strict JSON, in which there is no NaN
            content = json.loads(file.read_text(), parse_constant=lambda text: text)
            jsonschema.validate(content, schema)
            assert content["eval_type_id"] == name
            checked += 1
    assert checked == 10


def test_views_are_told(folder: Path) -> None:
    def field(name: str, sae: str, key: str) -> Any:
        file = folder / "out" / name / f"{sae}_custom_sae_eval_results.json"
        return json.loads(file.read_text())[key]

    for name in ("sparse_probing", "tpp"):
        assert field(name, "scaffold", "judged_view") == "sparse"
        assert field(name, "scaffold", "scaffold_rank") == 4
        assert field(name, "plain", "judged_view") == "whole"
    assert field("dense_latents", "scaffold", "judged_view") == "sparse"
    for name in ("dark_matter", "scaffold_ablation"):
        assert field(name, "scaffold", "judged_view") == "whole"
    assert "noisy" in field("tpp", "plain", "caveat")
