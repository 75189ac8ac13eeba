"""What runs without SAEBench, and how what needs it says so."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from eval_helpers import HOOK, eval_sae
from saelens_scaffold._util.configs import config_fields
from saelens_scaffold.evals.eval_output import EvalOutput
from saelens_scaffold.evals.jobs import _OF_LANGUAGE_MODELS

EXPERIMENT: dict[str, Any] = {
    "model_name": "py-neox",
    "hook_name": HOOK,
    "dataset_path": "python-stdlib",
    "sae": {"d_in": 256, "d_sae": 96, "k": 4},
    "grid": {
        "architecture": ["batchtopk", "scaffold_batchtopk"],
        "scaffold_rank": [2],
        "seed": [0, 1],  # for intervals, by scipy
    },
    "training": {
        "training_tokens": 1024,
        "train_batch_size_tokens": 256,
        "context_size": 32,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 8,
    },
    "evaluations": {"dense_latents": {"n_tokens": 1000, "n_bootstrap": 10}},
    "evaluation_data": {"dataset": "python-stdlib"},
}

TEXT = "--dataset=python-stdlib"
OWN = ("dark_matter", "dense_latents", "scaffold_ablation")
NEEDS = ("core", "sparse_probing_sae_probes", "tpp")
FEW = {
    "n_tokens": dict.fromkeys(OWN, 500),
    "n_bootstrap": dict.fromkeys(OWN, 10),
    "n_fit_tokens": {"dark_matter": 1000, "scaffold_ablation": 1000},
    # for topics, whose probes are of scikit-learn
    "topic_train_size": {"scaffold_ablation": 10},
    "topic_test_size": {"scaffold_ablation": 5},
    "max_topics": {"scaffold_ablation": 3},
}
SETTINGS = [
    f"--set={name}.{field}={value}"
    for field, values in FEW.items()
    for name, value in values.items()
]
COMMANDS: dict[str, list[str]] = {
    "rank": ["rank", "--model=py-neox", f"--hook_name={HOOK}", TEXT, "--n_tokens=2000"],
    "eval": ["eval", ",".join(OWN), "--sae_path=saes", TEXT, *SETTINGS],
    "upload": [
        "upload",
        "saes",
        "--repo_id=user/it",
        "--eval_results=eval_results",
        "--dry-run",
    ],
    "compare": ["compare", "experiment.yaml", "--output_path=out"],
    "probing": ["compare", "probing.yaml", "--output_path=other"],
    **{name: ["eval", name, "--sae_path=saes", TEXT] for name in NEEDS},
}

# None stands for a package that cannot be imported, and that `find_spec` does not find.
PROGRAM = """
import contextlib, io, json, sys
sys.modules.update(sae_bench=None, sae_probes=None)
from saelens_scaffold_cli import main
done = {}
for name, argv in json.loads(sys.argv[1]).items():
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        done[name] = main(argv), out.getvalue(), err.getvalue()
print(json.dumps(done))
"""


class Done(NamedTuple):
    """A finished command."""

    status: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("light")


@pytest.fixture(scope="module")
def done(folder: Path) -> dict[str, Done]:
    """All commands, run in a process that cannot import SAEBench."""
    eval_sae(rank=2).save_model(folder / "saes" / "scaffold")
    eval_sae().save_model(folder / "saes" / "plain")
    probing = {**EXPERIMENT["evaluations"], "sparse_probing": None}
    for name, changes in ("experiment", {}), ("probing", {"evaluations": probing}):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**EXPERIMENT, **changes}))
    command = [sys.executable, "-c", PROGRAM, json.dumps(COMMANDS)]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return {
        name: Done(*of_command) for name, of_command in json.loads(ran.stdout).items()
    }


@pytest.mark.parametrize("name", ["rank", "eval", "upload", "compare"])
def test_commands_that_do_not_need_it(name: str, done: dict[str, Done]) -> None:
    assert done[name].status == 0, done[name].stderr


def test_their_results(folder: Path, done: dict[str, Done]) -> None:
    assert "Try scaffold_rank=" in done["rank"].stdout
    for name in OWN:
        (file,) = (folder / "eval_results" / name).glob("scaffold_*.json")
        result = json.loads(file.read_text())
        assert result["eval_type_id"] == name
        assert result["sae_cfg_dict"]["metadata"]["hook_layer"] == 0
        assert f"eval_results/{name}.json" in done["upload"].stdout
    assert json.loads(file.read_text())["topic_accuracies"]
    assert len(json.loads((folder / "out/results.json").read_text())["saes"]) == 4
    assert "Plotly" in (folder / "out/report.html").read_text()


@pytest.mark.parametrize("name", NEEDS)
def test_evaluations_that_need_it(name: str, done: dict[str, Done]) -> None:
    message = f'{name} needs SAEBench: pip install "saelens-scaffold[bench]"'
    assert done[name].stderr.endswith(f"saelens-scaffold eval: error: {message}\n")
    assert done[name].status == 2


def test_a_comparison_says_so_before_it_trains(
    folder: Path, done: dict[str, Done]
) -> None:
    assert done["probing"].status == 2
    assert "error: sparse_probing needs SAEBench: pip install" in done["probing"].stderr
    assert not (folder / "other").exists()


@pytest.mark.sae_bench
def test_results_have_the_layout_of_sae_bench() -> None:
    from sae_bench.evals.base_eval_output import BaseEvalOutput

    own, theirs = config_fields(EvalOutput), config_fields(BaseEvalOutput)
    assert [*own] == [*theirs]
    for name, field in theirs.items():
        # where it requires the list of details, it lets it be None
        assert own[name].is_required() == field.is_required(), name


@pytest.mark.sae_bench
def test_language_models_get_what_sae_bench_gives_them() -> None:
    from sae_bench.sae_bench_utils import activation_collection

    batch_sizes = activation_collection.LLM_NAME_TO_BATCH_SIZE
    dtypes = activation_collection.LLM_NAME_TO_DTYPE
    found = {name: (size, dtypes[name]) for name, size in batch_sizes.items()}
    assert found == _OF_LANGUAGE_MODELS
