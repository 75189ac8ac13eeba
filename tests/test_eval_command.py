"""`saelens-scaffold eval`, and the JSON schemas of its results."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from helpers import scaffold_sae, train
from saelens_scaffold.evals import json_schemas, registry
from saelens_scaffold.evals.base import (
    Call,
    Evaluation,
    Implementation,
    Metric,
)
from saelens_scaffold.evals.eval_output import EvalOutput
from saelens_scaffold.evals.saes import load_saes
from saelens_scaffold_cli import main

QUICK_CORE = [
    "--dataset=python-stdlib",
    "--set=core.n_eval_reconstruction_batches=1",
    "--set=core.n_eval_sparsity_variance_batches=1",
    "--llm_batch_size=2",
]


# ---- a small evaluation, in the shape of this package's own


@dataclass
class FakeEvalConfig:
    model_name: str = Field(default="", title="Model", description="The model.")
    dataset: str = Field(default="python-stdlib", description="A text.")
    random_seed: int = Field(default=42, title="Seed", description="100 % random")
    llm_batch_size: int = Field(default=7, title="Batch", description="Batch size")
    llm_dtype: str = Field(default="float32", title="dtype", description="dtype")
    sizes: list[int] = Field(default_factory=lambda: [1], description="Sizes")
    pairs: dict[str, list[int]] = Field(default_factory=dict, description="Pairs")
    limit: int | None = Field(default=None, description="None for no limit")
    careful: bool = Field(default=False, description="Whether to be careful")
    baseline: str | None = Field(default=None, description="Name of an SAE")


@dataclass
class FakeMetrics:
    count: int = Field(title="Count")
    count_ci_low: float = Field(title="Count (low)")
    count_ci_high: float = Field(title="Count (high)")
    empty: float | None = Field(default=None, title="Empty")


@dataclass
class FakeMetricCategories:
    fake: FakeMetrics = Field(title="Fake")


@dataclass
class FakeEvalOutput(EvalOutput):
    eval_config: FakeEvalConfig
    eval_result_metrics: FakeMetricCategories
    eval_type_id: str = Field(default="dense_latents")


def measure(config: FakeEvalConfig, saes: list[Any], call: Call) -> Any:
    print("chatter")
    calls.append({"config": config, "call": call, "grad": torch.is_grad_enabled()})
    torch.set_grad_enabled(False)  # as some of SAEBench's do
    if config.careful:
        raise RuntimeError("too [careful]\nto work")
    for sae in saes:
        metrics = FakeMetrics(
            count=sae.sae.cfg.d_sae, count_ci_low=10, count_ci_high=14
        )
        yield sae, {"eval_result_metrics": FakeMetricCategories(fake=metrics)}
        sae.sae.W_dec.data.zero_()


calls: list[dict[str, Any]] = []


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Registers the evaluations `fake` and `other`, and works in tmp_path."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("fake_eval")
    module.IMPLEMENTATION = Implementation(  # type: ignore[attr-defined]
        FakeEvalConfig, measure, FakeEvalOutput
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in "fake", "other":
        evaluation = Evaluation(
            name,
            "sparse",
            "fake_eval:IMPLEMENTATION",
            (Metric("count", "fake.count", 0), Metric("empty", "fake.empty")),
            data="text",
        )
        monkeypatch.setitem(registry.EVALUATIONS, name, evaluation)
    calls.clear()
    with torch.enable_grad():
        yield


@pytest.fixture(scope="session")
def saes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of a plain and a scaffold SAE at a hook point of py-neox."""
    folder = tmp_path_factory.mktemp("saes")
    sae = train(scaffold_sae(d_in=256, d_sae=256), steps=3).to_inference()
    sae.cfg.metadata.model_name = "py-neox"
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.cfg.metadata.prepend_bos = True
    sae.cfg.metadata.context_size = 32
    sae.save_model(folder / "scaffold")
    sae.sparse_sae().save_model(folder / "plain")
    return {name: str(folder / name) for name in ("plain", "scaffold")}


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: exit status, output, errors."""

    def run_command(*args: str) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main(["eval", "--device=cpu", *args])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return run_command


def rows(table: str) -> dict[str, list[str]]:
    """The cells of each row of a table, under its first."""
    cells = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    return {first: rest for first, *rest in cells}


# ---- the command


def test_help_imports_nothing_heavy_and_names_all_evaluations() -> None:
    source = """if True:
        import sys
        from saelens_scaffold_cli import main
        try:
            main(["eval", "--help"])
        except SystemExit as exit:
            assert exit.code == 0
        assert not {"torch", "sae_lens", "saelens_scaffold"} & set(sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    named = set(registry.EVALUATIONS) - {"fake", "other"}
    assert all(name in done.stdout for name in named)


@pytest.mark.sae_bench
def test_core_and_a_failing_evaluation(run: Any, saes: dict[str, str]) -> None:
    arguments = [
        "other,core,fake",
        "--sae_path",
        *saes.values(),
        *QUICK_CORE,
        "--set=other.careful=true",
    ]
    status, output, errors = run(*arguments)
    assert status == 1
    assert "other failed: RuntimeError: too [careful] to work\n" in errors
    assert "Traceback" not in errors
    assert "chatter" not in output
    table = rows(output)
    assert table["SAE"] == [
        *("other: count", "empty"),
        *("core: l0", "expl. var.", "CE score", "KL score"),
        "fake: count",
    ]
    file = Path("eval_results/core/{}_custom_sae_eval_results.json")
    for name in saes:
        core = json.loads(Path(str(file).format(name)).read_text())
        metrics = core["eval_result_metrics"]
        assert core["eval_config"]["model_name"] == "py-neox"
        assert core["eval_config"]["context_size"] == 32
        assert table[name][:2] == ["failed", "failed"]
        assert table[name][2] == f"{metrics['sparsity']['l0']:.1f}"
        variance = metrics["reconstruction_quality"]["explained_variance_legacy"]
        assert table[name][3] == f"{variance:.3f}"
    # core judges the whole SAE, the other its sparse part
    assert float(table["scaffold"][2]) == pytest.approx(3 + float(table["plain"][2]))
    assert table["scaffold"][-1] == table["plain"][-1] == "253 [10, 14]"
    assert "core: judged the whole SAE\n" in output
    assert "other, fake: judged the sparse dictionary alone" in output
    assert torch.is_grad_enabled() and all(call["grad"] for call in calls)

    # a second run shows the same and computes nothing; --debug shows where it failed
    written = {f: f.stat().st_mtime_ns for f in Path("eval_results").glob("*/*")}
    status, again, errors = run(*arguments, "--debug")
    assert (status, again) == (1, output)
    assert "in measure" in errors
    assert written == {f: f.stat().st_mtime_ns for f in written}


@pytest.mark.sae_bench
def test_other_saes_and_configurations_are_measured_again(
    run: Any, saes: dict[str, str]
) -> None:
    shutil.copytree(saes["plain"], "a/sae")
    shutil.copytree(saes["scaffold"], "b/sae")
    core = ["core", *QUICK_CORE, "--sae_path"]
    status, first, _ = run(*core, "a/sae")
    status, output, errors = run(*core, "b/sae")
    assert status == 0
    assert "sae: measuring again, measured with other weights of the SAE" in errors
    assert rows(output)["sae"] != rows(first)["sae"]
    status, output, errors = run(*core, "a/sae", "--llm_batch_size=3")
    assert status == 0
    assert "batch_size_prompts 2 (now 3)" in errors


@pytest.mark.sae_bench
def test_what_core_logs_is_reported_and_what_is_there_is_kept(
    run: Any, saes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_bench.evals.core import main as core_main

    core = ["core", *QUICK_CORE, "--sae_path"]
    first, first_table, _ = run(*core, saes["plain"])

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("CE is broken")

    monkeypatch.setattr(core_main, "get_recons_loss", broken)
    status, output, errors = run(*core, *saes.values())
    assert (first, status) == (0, 1)
    assert "core failed: scaffold: RuntimeError: CE is broken\n" in errors
    assert rows(output)["plain"] == rows(first_table)["plain"]
    assert set(rows(output)["scaffold"]) == {"failed"}
    # a new run that fails shows no old result
    status, output, errors = run(*core, saes["plain"], "--force_rerun", "--debug")
    assert (status, set(rows(output)["plain"])) == (1, {"failed"})
    assert "in broken" in errors


@pytest.mark.sae_bench
def test_missing_result_without_an_error(
    run: Any, saes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_bench.evals.meta_structure import main as meta_structure

    monkeypatch.setattr(
        meta_structure, "run_eval", lambda *_, **__: print("Too few.\n")
    )
    status, _, errors = run("meta_structure", "--sae_path", saes["plain"])
    assert status == 1
    assert "plain: SAEBench wrote no result, and logged no error" in errors


@pytest.mark.sae_bench
def test_an_interruption_leaves_what_is_finished(
    run: Any, saes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    module: Any = sys.modules["fake_eval"]
    interrupted = Implementation(FakeEvalConfig, interrupt, FakeEvalOutput)
    monkeypatch.setattr(module, "IMPLEMENTATION", interrupted)
    arguments = ["meta_structure,fake", "--set=meta_structure.train_steps=1"]
    status, output, errors = run(*arguments, "--sae_path", saes["plain"])
    assert (status, output) == (130, "")
    assert "repeat the command to go on" in errors
    assert list(Path("eval_results/meta_structure").iterdir())


@pytest.mark.sae_bench
def test_meta_structure(run: Any, saes: dict[str, str]) -> None:
    arguments = ["meta_structure", "--sae_path", *saes.values()]
    arguments += ["--set=meta_structure.train_steps=3"]
    status, output, _ = run(*arguments, "--set=meta_structure.width_ratio=0.1")
    assert status == 0
    # the two have the same sparse dictionary
    table = rows(output)
    assert table["plain"] == table["scaffold"]


@pytest.mark.sae_bench
def test_local_text_of_another_column(run: Any, saes: dict[str, str]) -> None:
    texts = [{"body": f"def f_{i}():\n    return {i}\n" * 40} for i in range(40)]
    Path("text.jsonl").write_text("\n".join(map(json.dumps, texts)))
    arguments = ["core", "--sae_path", saes["plain"], *QUICK_CORE[1:]]
    arguments += ["--dataset=text.jsonl", "--text_column=body"]
    assert run(*arguments)[0] == 0
    status, output, errors = run(*arguments)
    assert status == 0, errors
    assert "measuring again" not in errors
    with Path("text.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"body": "x = 1\n"}))
    status, output, errors = run(*arguments)
    assert status == 0
    assert "measured with another dataset text.jsonl of the same name" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope,fake"], "no evaluation 'nope'; there are absorption, autointerp, core"),
        ([","], "there are absorption"),
        (["fake", "--set=fake.nope=1"], "no field 'nope'; it has model_name, dataset"),
        (["fake", "--set=core.verbose=1"], "'core' is none of the evaluations to run"),
        (["fake", "--set=fake.limit"], "write --set NAME.FIELD=VALUE"),
        (["fake", "--set=limit=1"], "write --set NAME.FIELD=VALUE"),
        (["fake", "--set=fake.limit=many"], "fake: limit is 'many': Input should be"),
        (["fake", "--label_column=x"], "label_column means nothing to fake"),
        pytest.param(
            ["core", "--baseline=x"],
            "baseline means nothing to core",
            marks=pytest.mark.sae_bench,
        ),
        *(
            (
                [f"fake,{name}", "--baseline=x", "--dataset=python-stdlib"],
                f"{name}: baseline is 'x'; it must be one of the SAEs in the call: ",
            )
            for name in ("dark_matter", "dense_latents", "scaffold_ablation")
        ),
        (["fake", "--model=nope"], "there is no language model 'nope'"),
        (["fake", "--model=./nope"], "there is no language model './nope'"),
        (["fake", "--device=nope"], "device 'nope' cannot be used"),
        (["fake", "--dataset=./nope.jsonl"], "there is no dataset ./nope.jsonl"),
        (["fake", "--sae_regex_pattern=.*"], "go together"),
        (["autointerp"], "set OPENAI_API_KEY, or give `saelens-scaffold eval` --api_"),
        (["autointerp", "--api_key_file=nope"], "nope"),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    arguments: list[str],
    message: str,
    run: Any,
    saes: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    status, output, errors = run(*arguments, "--sae_path", *saes.values())
    assert (status, output, calls) == (2, "", [])
    last = errors.splitlines()[-1]
    assert last.startswith("saelens-scaffold eval: error: ")
    assert message in last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no SAE is named"),
        (["--sae_path", "nope"], "nope holds no SAE"),
        (["--sae_path", "sae", "sae"], "named twice"),
        (
            ["--sae_regex_pattern=(", "--sae_block_pattern=x"],
            "not a regular expression",
        ),
        (["--sae_regex_pattern=x", "--sae_block_pattern=x"], "no SAE of SAELens's"),
    ],
)
def test_wrong_saes(
    arguments: list[str], message: str, run: Any, saes: dict[str, str]
) -> None:
    shutil.copytree(saes["plain"], "sae")
    status, _, errors = run("fake", *arguments)
    assert status == 2
    assert message in errors.splitlines()[-1]


def test_flags_reach_the_configuration(run: Any, saes: dict[str, str]) -> None:
    status, output, errors = run(
        *("fake,fake", "--sae_path", saes["plain"], "--dataset=python-stdlib"),
        *("--model=py-neox", "--random_seeds", "3", "4", "--llm_dtype=float64"),
        *("--set=fake.sizes=[2, 3]", '--set=fake.pairs={"a": [1]}'),
        *("--set=fake.limit=null", "--output_path=out", "--artifacts_path=kept"),
        "--baseline=plain",
    )
    assert status == 0, errors
    (call,) = calls
    assert call["config"] == FakeEvalConfig(
        model_name="py-neox",
        dataset="python-stdlib",
        random_seed=3,
        llm_batch_size=7,
        llm_dtype="float64",
        sizes=[2, 3],
        pairs={"a": [1]},
        baseline="plain",
    )
    assert Path("out/fake").is_dir()
    assert call["call"].artifacts.parent.resolve() == Path("kept").resolve()
    assert not Path("kept").exists()  # since it would be empty


def test_models_of_the_saes(run: Any, saes: dict[str, str]) -> None:
    shutil.copytree(saes["plain"], "sae")
    cfg = json.loads(Path("sae/cfg.json").read_text())
    cfg["metadata"]["model_name"] = "gpt2"
    Path("sae/cfg.json").write_text(json.dumps(cfg))
    status, _, errors = run("fake", "--sae_path", saes["plain"], "sae")
    assert status == 2
    assert "trained on different language models" in errors

    cfg["metadata"]["model_name"] = None
    Path("sae/cfg.json").write_text(json.dumps(cfg))
    assert run("fake", "--sae_path", "sae")[0] == 2
    assert run("fake", "--sae_path", "sae", "--model=py-neox")[0] == 0


# ---- schemas


@pytest.mark.sae_bench
def test_schemas_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "fake", "other":
        monkeypatch.delitem(registry.EVALUATIONS, name)
    for output_class, path in json_schemas.output_classes():
        current = json.loads(json_schemas.json_schema(output_class))
        assert path.is_file() and json.loads(path.read_text()) == current, (
            f"{path} is out of date; run python -m saelens_scaffold.evals.json_schemas"
        )


def test_load_saes_names_are_those_of_the_table(saes: dict[str, str]) -> None:
    assert [name for name, _ in load_saes(list(saes.values()))] == list(saes)


def test_saes_are_found_below_a_folder(tmp_path: Path) -> None:
    for name in ("a", "deep/b"):
        scaffold_sae().to_inference().save_model(tmp_path / name)
    # which belongs to the SAE
    scaffold_sae().to_jumprelu().save_model(tmp_path / "a" / "jumprelu")
    assert [name for name, _ in load_saes([tmp_path])] == ["a", "b"]
