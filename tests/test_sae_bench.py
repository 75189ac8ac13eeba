"""SAEBench's own evaluations through the adapter, on the embedded model and offline."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_bench.evals.absorption import common as absorption_common
from sae_bench.evals.absorption import feature_absorption
from sae_bench.evals.absorption import main as absorption
from sae_bench.evals.absorption.vocab import get_alpha_tokens
from sae_bench.evals.core import main as core
from sae_bench.evals.meta_structure import main as meta_structure
from sae_bench.evals.ravel import instance as ravel_instance
from sae_bench.evals.scr_and_tpp import dataset_creation
from sae_bench.evals.unlearning import main as unlearning
from sae_bench.evals.unlearning.utils import feature_activation, metrics
from sae_lens import ActivationsStore
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval_helpers import eval_sae, write_texts
from helpers import HAS_BRIDGE
from pickles import own_pickles_only
from saelens_scaffold._util.configs import make_config, validating
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals import runner
from saelens_scaffold.evals.base import EvaluationError
from saelens_scaffold.evals.jobs import Job
from saelens_scaffold.evals.registry import EVALUATIONS
from saelens_scaffold.evals.saebench import language_model as lent
from saelens_scaffold.evals.saebench.replacements import replaced
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.models import embedded_model_path, load_embedded_model
from saelens_scaffold.models.language_models import ModelClass, load_language_model
from saelens_scaffold_cli import main

MODULES = "AutoModelForCausalLM"
"""For which SAEBench is lent TransformerLens's bridge, as for the bridge itself."""

WORDS = ["open", "read", "write", "path", "close", "seek", "buffer", "stream", "for"]


def job(name: str, folder: Path, fields: dict[str, Any], **kwargs: Any) -> Job:
    evaluation = EVALUATIONS[name]
    implementation = evaluation.load()
    config = make_config(
        validating(implementation.config_class), {**evaluation.defaults, **fields}
    )
    paths = (folder / "results", folder / "artifacts")
    return Job(evaluation, implementation, config, "cpu", *paths, **kwargs)


def run(
    name: str, folder: Path, fields: dict[str, Any], saes: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """The results; nothing is left of the call but these, and the process is as before."""
    before = Path.cwd()
    saes = saes or [("plain", eval_sae()), ("scaffold", eval_sae(rank=4))]
    try:
        with own_pickles_only():
            outcome = runner.run(job(name, folder, fields, **kwargs), saes)
    finally:
        assert Path.cwd() == before
        assert torch.is_grad_enabled()
        assert not list(folder.glob("artifacts/*"))
    if outcome.error is not None:
        raise outcome.error
    assert [f"{label}_custom_sae" for label, _ in saes] == list(outcome.results)
    for key, result in outcome.results.items():
        file = folder / "results" / f"{key}_eval_results.json"
        assert json.loads(file.read_text()) == result
        for field in {"model_name", "dataset", "dataset_name"} & set(fields):
            assert result["eval_config"][field] == fields[field]
    return outcome.results


def run_by_routes(
    name: str, folder: Path, fields: dict[str, Any], saes: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """The results on HookedTransformer, whose metrics the other route has as well."""
    results, other = both_routes(name, folder, fields, saes, **kwargs)
    for key, result in results.items():
        for category, expected in result["eval_result_metrics"].items():
            found = other[key]["eval_result_metrics"][category]
            for metric, value in expected.items():
                assert found[metric] == pytest.approx(value, abs=1e-3), (key, metric)
    return results


def both_routes(
    name: str, folder: Path, fields: dict[str, Any], saes: Any = None, **kwargs: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results on HookedTransformer, and of the same SAEs on modules of transformers."""
    results = run(name, folder, fields, saes, **kwargs)
    saes = saes or [("plain", eval_sae()), ("scaffold", eval_sae(rank=4))]
    for _, sae in saes:
        sae.cfg.metadata.model_class_name = MODULES
        sae.cfg.metadata.hook_name = "gpt_neox.layers.0"
    kwargs["model_class_name"] = MODULES
    if runs_on(name) == "the bridge" and not HAS_BRIDGE:
        with pytest.raises(UserError, match="needs transformer-lens >= 3"):
            run(name, folder / MODULES, fields, saes, **kwargs)
        return results, results
    return results, run(name, folder / MODULES, fields, saes, **kwargs)


def values(results: dict[str, Any], path: str) -> list[float]:
    category, name = path.split(".")
    return [r["eval_result_metrics"][category][name] for r in results.values()]


def test_absorption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    by_letter: dict[str, list[str]] = {}
    for word in get_alpha_tokens(load_embedded_model().tokenizer):  # type: ignore[arg-type]
        by_letter.setdefault(word.strip()[0].lower(), []).append(word)
    few = [word for words in by_letter.values() for word in words[:7]]
    for module in (absorption_common, feature_absorption):
        monkeypatch.setattr(module, "get_alpha_tokens", lambda _: few)
    results = run_by_routes(
        "absorption",
        tmp_path,
        {
            "model_name": "py-neox",
            "max_k_value": 2,
            "k_sparse_probe_num_epochs": 2,
            "min_GT_probe_f1": 0.0,
            "min_feats_for_eval": 1,
            "precalc_k_sparse_probe_sae_acts": True,
            "llm_batch_size": 64,
        },
        [("scaffold", eval_sae(rank=4))],
    )
    (score,) = values(results, "mean.mean_absorption_fraction_score")
    assert 0 <= score <= 1
    # nothing is put where SAEBench is installed
    package = Path(str(absorption.__file__)).parents[2]
    assert not (package / "artifacts").exists()


class FakeOpenAI(BaseHTTPRequestHandler):
    """Answers chat completions: an explanation, then numbers of examples."""

    keys: list[str | None] = []

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.keys.append(self.headers["Authorization"])
        is_scoring = "comma-separated list" in request["messages"][0]["content"]
        answer = "1, 2" if is_scoring else "This neuron activates on brackets."
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": answer},
        }
        body = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [choice],
        }
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def fake_openai(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str | None]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeOpenAI)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    FakeOpenAI.keys.clear()
    yield FakeOpenAI.keys
    server.shutdown()
    server.server_close()


def test_autointerp(tmp_path: Path, fake_openai: list[str | None]):
    results, by_modules = both_routes(
        "autointerp",
        tmp_path,
        {
            "model_name": "py-neox",
            "dataset_name": "python-stdlib",
            "n_latents": 3,
            "total_tokens": 8000,
            "llm_context_size": 64,
            "llm_batch_size": 16,
            "llm_dtype": "float32",
        },
        dataset_split="test",
        api_key="secret",
    )
    for found in (results, by_modules):  # which draw other examples
        scores = values(found, "autointerp.autointerp_score")
        assert all(0 < score < 1 for score in scores)
    assert len(results["plain_custom_sae"]["eval_result_unstructured"]) == 3
    assert set(fake_openai) == {"Bearer secret"}


QUICK_CORE = {
    "model_name": "py-neox",
    "dataset": "python-stdlib",
    "n_eval_reconstruction_batches": 1,
    "n_eval_sparsity_variance_batches": 1,
    "batch_size_prompts": 2,
    "context_size": 64,
}


def test_core(tmp_path: Path):
    results = run_by_routes("core", tmp_path, QUICK_CORE, dataset_split="test")
    scores = values(results, "model_performance_preservation.ce_loss_score")
    assert all(score < 1 for score in scores)


def test_mdl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lengths: set[int] = set()
    own = ActivationsStore.get_batch_tokens

    def noted(self: ActivationsStore, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = own(self, *args, **kwargs)
        lengths.add(tokens.shape[-1])
        return tokens

    monkeypatch.setattr(ActivationsStore, "get_batch_tokens", noted)
    results, by_modules = both_routes(
        "mdl",
        tmp_path,
        {
            "context_length": 40,  # the SAEs' is another
            "model_name": "py-neox",
            "dataset_name": "python-stdlib",
            "sae_batch_size": 2,
            "k_values": [4],
            "num_bins_values": [4, 8],
        },
    )
    for key, result in results.items():
        found = result["eval_results"]
        lengths_by_modules = [
            of["description_length"] for of in by_modules[key]["eval_results"]
        ]
        expected = [of["description_length"] for of in found]
        assert lengths_by_modules == pytest.approx(expected, rel=1e-3)
        assert [(of["k"], of["num_bins"]) for of in found] == [(4, 4), (4, 8)]
        assert all(of["description_length"] > 0 for of in found)
    assert lengths == {40}


def test_meta_structure_is_repeatable(tmp_path: Path):
    fields = {"train_steps": 2, "train_batch_size": 32, "random_seed": 3}
    path = "meta_structure.decoder_fraction_variance_explained"
    scores = [
        values(run("meta_structure", tmp_path / folder, fields), path)
        for folder in ("a", "b")
    ]
    assert scores[0] == scores[1]


def ravel_prompts(folder: Path) -> None:
    """Entities, templates, and as labels what the model answers."""
    model: Any = AutoModelForCausalLM.from_pretrained(embedded_model_path())
    tokenizer: Any = AutoTokenizer.from_pretrained(embedded_model_path())
    templates = {
        "Country": "import %s\nfrom ",
        "Continent": "class %s(",
        "Language": "x",
    }
    entities = ["os", "json", "re", "ast", "time", "socket", "random", "string"]
    labels: dict[str, dict[str, str]] = {}
    for entity in entities:
        labels[entity] = {"Language": "x"}
        for attribute in ("Country", "Continent"):
            text = templates[attribute] % entity
            tokens = tokenizer(text, return_tensors="pt")
            out = model.generate(**tokens, max_new_tokens=3, do_sample=False)
            answer = tokenizer.decode(out[0, tokens["input_ids"].shape[1] :])
            labels[entity][attribute] = answer.split('"')[0].strip(' "')[:2] or "?"
    content = {
        "entity_attributes": labels,
        "prompt_to_split": dict.fromkeys(templates.values(), "train"),
        "entity_to_split": dict.fromkeys(entities, "train"),
        "attribute_to_prompts": {a: [t] for a, t in templates.items()},
    }
    for name, value in content.items():
        (folder / f"ravel_city_{name}.json").write_text(json.dumps(value))


def test_ravel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    downloads: list[str] = []

    def snapshot_download(
        repo_id: str, repo_type: str, local_dir: str, allow_patterns: str
    ) -> None:
        downloads.append(repo_id)
        ravel_prompts(Path(local_dir))

    monkeypatch.setattr(ravel_instance, "snapshot_download", snapshot_download)
    fields = {
        "model_name": "py-neox",
        "entity_attribute_selection": {"city": ["Country", "Continent"]},
        "artifact_dir": str(tmp_path / "prompts"),
        "num_pairs_per_attribute": 8,
        "train_test_split": 0.5,
        "llm_batch_size": 4,
        "llm_dtype": "float32",
        "n_generated_tokens": 3,
        "num_epochs": 1,
    }
    saes = [("scaffold", eval_sae(rank=4))]
    # the prompts stay where the configuration says, and nothing else does
    results = run_by_routes("ravel", tmp_path, fields, saes)
    (score,) = values(results, "ravel.disentanglement_score")
    assert 0 <= score <= 1
    assert len(downloads) == 1
    assert [file.name for file in (tmp_path / "prompts").iterdir()] == ["base"]
    assert not (embedded_model_path() / "blocks.0.hook_resid_post").exists()


def biographies(seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "hard_text": " ".join(
                WORDS[i]
                for i in torch.randint(0, len(WORDS), (8,), generator=generator)
            )
            + f" {profession} {gender}",
            "profession": profession,
            "gender": gender,
        }
        # professor and nurse, in SAEBench's numbers
        for profession in (21, 13)
        for gender in (0, 1)
        for _ in range(40)
    ]


def test_scr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        dataset_creation,
        "load_dataset",
        lambda name: {"train": biographies(0), "test": biographies(1)},
    )
    dataset = "LabHC/bias_in_bios_class_set1"
    results = run_by_routes(
        "scr",
        tmp_path,
        {
            "model_name": "py-neox",
            "dataset_names": [dataset],
            "column1_vals_lookup": {dataset: [("professor", "nurse")]},
            "train_set_size": 40,
            "test_set_size": 40,
            "context_length": 16,
            "probe_epochs": 2,
            "n_values": [2, 10],
            "llm_batch_size": 32,
            "llm_dtype": "float32",
        },
    )
    assert all(
        s is not None for s in values(results, "scr_metrics.scr_metric_threshold_10")
    )


def knowing_model(model_class: ModelClass = "HookedTransformer") -> Any:
    """The embedded model in place of Gemma: it knows that the answer is "right"."""
    model: Any = load_language_model("py-neox", "cpu", model_class_name=model_class)
    tokenizer = model.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<bos>", "pad_token": "<pad>"})
    if model_class == "HookedTransformer":
        embeddings = (model.embed, "W_E")
    else:
        embeddings = (model.original_model.get_input_embeddings(), "weight")
    weights = getattr(*embeddings).detach()
    more = torch.cat([weights, torch.zeros(2, model.cfg.d_model)])
    setattr(*embeddings, torch.nn.Parameter(more))
    model.cfg.model_name = "gemma-2-2b-it"
    own = model.forward

    def forward(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = own(tokens, *args, **kwargs)
        if kwargs.get("return_type") == "logits":
            for logits, text in zip(out, tokenizer.batch_decode(tokens), strict=True):
                letter = text.partition(". right")[0][-1]
                logits[:, model.to_single_token(letter)] += 50
        return out

    model.forward = forward
    return model


def questions(*_: Any, **__: Any) -> list[dict[str, Any]]:
    return [
        {"question": word, "choices": ["right", "open", "seek", "read"], "answer": 0}
        for word in WORDS[:4]
    ]


def test_unlearning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    fields = {
        "model_name": "gemma-2-2b-it",
        "dataset_names": ["wmdp-bio", "human_aging"],
        "retain_thresholds": [0.5],
        "n_features_list": [2],
        "multipliers": [25],
        "dataset_size": 8,
        "seq_len": 32,
        "llm_batch_size": 8,
        "llm_dtype": "float32",
    }
    corpus = tmp_path / "sae_bench/evals/unlearning/data/bio-forget-corpus.jsonl"
    corpus.parent.mkdir(parents=True)
    corpus.write_text(json.dumps({"text": "def f(x): return x + 1\n" * 60}) + "\n")

    retained = [{"text": "import os\nos.path.join(a, b)\n" * 60}]
    monkeypatch.setattr(feature_activation, "load_dataset", lambda *_, **__: retained)
    monkeypatch.setattr(metrics, "load_dataset", questions)
    model = knowing_model()
    loader = SimpleNamespace(from_pretrained_no_processing=lambda *_, **__: model)
    monkeypatch.setattr(unlearning, "HookedTransformer", loader)
    if HAS_BRIDGE:
        bridge = knowing_model("TransformerBridge")
        monkeypatch.setattr(lent, "load_language_model", lambda *_, **__: bridge)
    saes = [("scaffold", eval_sae(rank=4))]
    results = run_by_routes("unlearning", tmp_path, fields, saes)
    (score,) = values(results, "unlearning.unlearning_score")
    assert 0 <= score <= 1


def test_what_core_logs_is_the_reason_and_what_is_finished_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    own = core.run_evals

    def fail(sae: Any, *args: Any, **kwargs: Any) -> Any:
        if sae.cfg.d_sae == 40:
            raise RuntimeError("out of luck")
        return own(sae, *args, **kwargs)

    monkeypatch.setattr(core, "run_evals", fail)
    saes = [(name, eval_sae(d_sae=d_sae)) for name, d_sae in (("a", 40), ("b", 48))]
    with pytest.raises(EvaluationError, match="^a: RuntimeError: out of luck$"):
        run("core", tmp_path, QUICK_CORE, saes)
    (kept,) = (tmp_path / "results").glob("*.json")
    assert kept.name == "b_custom_sae_eval_results.json"


def test_an_interruption_leaves_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    own = meta_structure.run_eval_single_sae

    def interrupt(sae_release: str, *args: Any, **kwargs: Any) -> Any:
        if sae_release == "b":
            raise KeyboardInterrupt
        return own(sae_release, *args, **kwargs)

    def run_two() -> None:
        saes = [("a", eval_sae()), ("b", eval_sae(seed=1))]
        fields = {"train_steps": 1, "train_batch_size": 32}
        run("meta_structure", tmp_path, fields, saes)

    monkeypatch.setattr(
        meta_structure,
        "run_eval_single_sae",
        lambda *args, sae_release, **kwargs: interrupt(sae_release, *args, **kwargs),
    )
    with pytest.raises(KeyboardInterrupt):
        run_two()
    assert [file.name[0] for file in (tmp_path / "results").glob("*.json")] == ["a"]


def test_an_sae_without_a_result_and_without_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(meta_structure, "run_eval", lambda *_, **__: None)
    with pytest.raises(EvaluationError, match="plain, scaffold: .*wrote no result"):
        run("meta_structure", tmp_path, {})


def test_local_text_of_another_column(tmp_path: Path):
    texts = ["def f(x):\n    return x + 1\n" * 40] * 20
    file = write_texts(tmp_path / "code.jsonl", texts)
    file.write_text(file.read_text().replace('"text"', '"code"'))
    fields = {**QUICK_CORE, "dataset": str(file)}
    run("core", tmp_path, fields, [("plain", eval_sae())], text_column="code")


def test_models_that_unlearning_has_no_prompts_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    eval_sae().save_model(tmp_path / "sae")
    arguments = [f"--sae_path={tmp_path / 'sae'}", f"--output_path={tmp_path / 'out'}"]
    fits = "--set=unlearning.seq_len=64"
    assert main(["eval", "unlearning", *arguments, fits]) == 2
    said = (
        "SAEBench has prompts for gemma-2-2b-it and gemma-2-9b-it only, not for py-neox"
    )
    assert said in capsys.readouterr().err
    # a local copy, which only the other classes load, is as good
    local = str(tmp_path / "gemma-2-2b-it")
    implementation = EVALUATIONS["unlearning"].load()
    implementation.check(implementation.config_class(model_name=local), [])


DOCS = Path(__file__).parents[1] / "docs/models.md"


def runs_on(name: str) -> str:
    """What an evaluation of SAEs on modules of transformers runs on, by its code."""
    implementation = EVALUATIONS[name].load()
    if "saebench" not in EVALUATIONS[name].implementation:
        return "the model itself"
    if "model_name" not in implementation.config_class.__dataclass_fields__:
        return "no language model"
    return "the model itself" if name == "ravel" else "the bridge"


def test_the_documentation_says_on_which_model_each_evaluation_runs():
    table = DOCS.read_text().partition("| evaluation |")[2]
    rows = re.findall(r"^\| (`.+) \| (.+) \|$", table, re.MULTILINE)
    said = {
        name: where for names, where in rows for name in re.findall(r"`(\w+)`", names)
    }
    assert said == {name: runs_on(name) for name in EVALUATIONS}


def test_refusals():
    implementation = EVALUATIONS["absorption"].load()
    config = implementation.config_class(model_name="pythia-70m-deduped")
    of_release = SelectedSAE("release", "id", eval_sae())
    with pytest.raises(UserError, match="'release/id' was trained on py-neox, not on"):
        implementation.check(config, [of_release])


def test_replacements_are_taken_back():
    table = {"a": 1}
    replacements = (table, {"a": 2, "b": 3})
    with pytest.raises(KeyboardInterrupt), replaced(replacements):
        assert table == {"a": 2, "b": 3}
        raise KeyboardInterrupt
    assert table == {"a": 1}
