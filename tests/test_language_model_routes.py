"""One language model through HookedTransformer, TransformerLens's bridge and transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from eval_helpers import HOOK, eval_sae, write_texts
from helpers import HAS_BRIDGE, MODEL_CLASSES
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.model import HookedModel, activations_at
from saelens_scaffold.models import (
    embedded_model_path,
    language_models,
    load_stdlib_chunks,
)
from saelens_scaffold.models.language_models import (
    ModelClass,
    load_language_model,
    residual_post,
)
from saelens_scaffold_cli import main

LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "gpt_neox": {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"},
    "llama": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    # a window that is shorter than the sequences
    "gemma2": {
        **LLAMA_LIKE,
        "head_dim": 8,
        "sliding_window": 16,
        "query_pre_attn_scalar": 8,
    },
}


@pytest.fixture(scope="module")
def local_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model of each family, and the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer: Any = AutoTokenizer.from_pretrained(embedded_model_path())
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    for family, shape in FAMILIES.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **ids, **shape)
        model = AutoModelForCausalLM.from_config(config)
        for weights in model.parameters():
            weights.data += 0.05 * torch.randn_like(weights)
        model.save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    return folder


def hidden(output: Any) -> torch.Tensor:
    """What a layer returns: in transformers 4 with others in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_route_computes_what_transformers_does(
    local_models: Path, family: str, model_class: ModelClass
):
    path = str(local_models / family)
    if (family, model_class) == ("gemma2", "HookedTransformer"):
        with pytest.raises(UserError, match="--model_class_name TransformerBridge"):
            load_language_model(path, "cpu", model_class_name=model_class)
        return
    tokens = torch.randint(1, 4000, (2, 40), generator=torch.manual_seed(0))
    reference: Any = AutoModelForCausalLM.from_pretrained(path).float()
    layers: Any = reference.get_submodule(
        {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(
            family, "model.layers"
        )
    )
    outputs: dict[str, torch.Tensor] = {}
    change = torch.randn(2, 40, 32, generator=torch.manual_seed(1))

    def keep(_: Any, __: Any, output: Any) -> Any:
        outputs["x"] = hidden(output)
        changed = hidden(output) + change
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    with torch.no_grad():
        logits = reference(tokens).logits
        handle = layers[1].register_forward_hook(keep)
        last = layers[2].register_forward_hook(
            lambda _, __, output: outputs.__setitem__("last", hidden(output))
        )
        changed = reference(tokens).logits
        for each in (handle, last):
            each.remove()

    model = load_language_model(path, "cpu", model_class_name=model_class)
    for name in ("blocks.1.hook_resid_post", residual_post(model, 1)):
        hooked = HookedModel(model, name)
        x, start = hooked.below(tokens)
        assert torch.allclose(x, outputs["x"], atol=1e-4)
        assert torch.allclose(hooked.above(start, x), logits, atol=1e-4)
        assert torch.allclose(hooked.above(start, x + change), changed, atol=1e-4)
        last = hooked.above(start, x + change, final_residual=True)
        assert torch.allclose(last, outputs["last"], atol=1e-4)
    # nothing stays skipped
    assert torch.allclose(model(tokens), logits, atol=1e-4)


@pytest.mark.parametrize("model_class", MODEL_CLASSES[1:])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("layer", [0, 2])
def test_inside_a_layer_too(
    local_models: Path, family: str, model_class: ModelClass, layer: int
):
    path = str(local_models / family)
    model = load_language_model(path, "cpu", model_class_name=model_class)
    tokens = torch.randint(1, 4000, (2, 20), generator=torch.manual_seed(0))
    prefix = getattr(model, "layers_name", "blocks")
    name = f"{prefix}.{layer}.mlp"
    if model_class == "TransformerBridge":
        name += ".hook_out"
    hooked = HookedModel(model, name)
    with torch.no_grad():
        logits = model(tokens)
        zeroed = model.run_with_hooks(
            tokens, fwd_hooks=[(name, lambda x, hook: torch.zeros_like(x))]
        )
    x, start = hooked.below(tokens)
    assert torch.equal(x, activations_at(model, tokens, [name])[name])
    assert torch.allclose(hooked.above(start, x), logits, atol=1e-5)
    assert torch.allclose(hooked.above(start, 0 * x), zeroed, atol=1e-5)
    assert not torch.allclose(zeroed, logits, atol=1e-2)


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_a_hook_point_that_is_not_there(local_models: Path, model_class: ModelClass):
    path = str(local_models / "gpt_neox")
    model = load_language_model(path, "cpu", model_class_name=model_class)
    for name in ("blocks.3.hook_resid_post", "gpt_neox.layers.3", "gpt_neox.embed_in"):
        with pytest.raises(UserError, match="has no hook point"):
            HookedModel(model, name)


def test_all_routes_read_the_same_tokens(local_models: Path):
    path = str(local_models / "llama")
    text = "import os\n\ndef main():\n    return os.sep\n"
    tokens = [
        load_language_model(path, "cpu", model_class_name=of).to_tokens(
            text, prepend_bos=False, truncate=False, move_to_device=False
        )
        for of in MODEL_CLASSES
    ]
    assert all(torch.equal(each, tokens[0]) for each in tokens[1:])


# ---- from training to evaluations, by the commands


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few modules of the standard library, labelled by their packages."""
    chunks = load_stdlib_chunks("test", 300, ("asyncio", "json"), per_label=40)
    texts, labels = [*chunks["text"]], [*chunks["label"]]
    return write_texts(tmp_path_factory.mktemp("texts") / "t.jsonl", texts, labels)


@pytest.mark.sae_bench
@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_and_evaluated_by_every_route(
    local_models: Path,
    texts: Path,
    tmp_path: Path,
    family: str,
    model_class: ModelClass,
    capsys: pytest.CaptureFixture[str],
):
    path = str(local_models / family)
    hook_name = "blocks.1.hook_resid_post"
    if model_class == "AutoModelForCausalLM":
        prefix = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
        hook_name = f"{prefix.get(family, 'model.layers')}.1"
    sae = tmp_path / "sae"
    trained = [
        f"--model_name={path}",
        f"--model_class_name={model_class}",
        f"--hook_name={hook_name}",
        "--architecture=scaffold_batchtopk",
        "--d_in=32",
        "--d_sae=64",
        "--k=4",
        "--scaffold_rank=2",
        f"--dataset_path={texts}",
        "--context_size=32",
        "--training_tokens=2048",
        "--train_batch_size_tokens=128",
        "--n_batches_in_buffer=4",
        "--store_batch_size_prompts=4",
        "--log_to_wandb=False",
        f"--output_path={sae}",
        f"--checkpoint_path={tmp_path / 'checkpoints'}",
    ]
    if (family, model_class) == ("gemma2", "HookedTransformer"):
        assert main(["train", *trained]) == 2
        assert "--model_class_name TransformerBridge" in capsys.readouterr().err
        return
    assert main(["train", *trained]) == 0
    names = "dense_latents,scaffold_ablation"
    if HAS_BRIDGE or model_class == "HookedTransformer":
        names += ",core,sparse_probing"
    else:
        assert main(["eval", "dense_latents,core", f"--sae_path={sae}"]) == 2
        assert "needs transformer-lens >= 3" in capsys.readouterr().err
    evaluated = [
        f"--sae_path={sae}",
        f"--dataset={texts}",
        f"--labelled_dataset={texts}",
        f"--output_path={tmp_path / 'results'}",
        f"--artifacts_path={tmp_path / 'artifacts'}",
        "--llm_batch_size=4",
        "--random_seeds=1",
        *(
            f"--set={setting}"
            for setting in (
                "dense_latents.n_tokens=500",
                "scaffold_ablation.n_tokens=200",
                "scaffold_ablation.n_fit_tokens=200",
                "scaffold_ablation.n_random_draws=1",
                "scaffold_ablation.topic_train_size=20",
                "scaffold_ablation.topic_test_size=10",
                "core.n_eval_reconstruction_batches=1",
                "core.n_eval_sparsity_variance_batches=1",
                "sparse_probing.context_length=32",
                "sparse_probing.probe_train_set_size=20",
                "sparse_probing.probe_test_set_size=10",
                "sparse_probing.k_values=[1]",
            )
            if setting.partition(".")[0] in names.split(",")
        ),
    ]
    assert main(["eval", names, *evaluated]) == 0
    rank = [
        "--n_tokens=500",
        f"--dataset={texts}",
        f"--output_path={tmp_path / 'rank'}",
    ]
    if family == "gpt2":
        assert main(["rank", *rank, f"--sae_path={sae}"]) == 2
    model = [f"--model={path}", f"--model_class_name={model_class}"]
    assert main(["rank", *rank, f"--hook_name={hook_name}", *model]) == 0


def test_a_class_that_transformer_lens_does_not_have(
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    if HAS_BRIDGE:
        own = language_models.release
        monkeypatch.setattr(
            language_models,
            "release",
            lambda name: (2, 16) if name == "transformer-lens" else own(name),
        )
    eval_sae(rank=4).save_model(tmp_path / "sae")
    out = tmp_path / "out"
    bridge = "--model_class_name=TransformerBridge"
    transformers = "--model_class_name=AutoModelForCausalLM"
    model, sae = "--model_name=py-neox", f"--sae_path={tmp_path / 'sae'}"
    trained = ["--architecture=scaffold_batchtopk", "--train_batch_size_tokens=128"]
    for command in (
        ["train", model, bridge, *trained],
        ["eval", "dense_latents", sae, bridge],
        ["eval", "dense_latents,core", sae, transformers],
        ["rank", sae, bridge, f"--output_path={out}"],
        ["absorb", str(tmp_path / "sae"), bridge, f"--output_path={out}"],
    ):
        assert main(command) == 2, command
        error = capsys.readouterr().err.splitlines()[-1]
        assert "needs transformer-lens >= 3; " in error
    assert not out.exists()


def test_an_sae_is_judged_alike_by_every_route(texts: Path, tmp_path: Path):
    sae = eval_sae(rank=4)
    sae.save_model(tmp_path / "sae")
    results: list[dict[str, Any]] = []
    for model_class in MODEL_CLASSES:
        arguments = [
            f"--sae_path={tmp_path / 'sae'}",
            f"--model_class_name={model_class}",
            f"--dataset={texts}",
            f"--output_path={tmp_path / model_class}",
            "--set=dense_latents.n_tokens=500",
            "--set=scaffold_ablation.n_tokens=500",
            "--set=scaffold_ablation.n_fit_tokens=500",
            "--set=scaffold_ablation.n_random_draws=1",
            "--set=scaffold_ablation.topics=false",
        ]
        assert main(["eval", "dense_latents,scaffold_ablation", *arguments]) == 0
        same = [arguments[1], arguments[2], "--n_tokens=500"]
        found = f"--output_path={tmp_path / model_class}"
        by_name = ["--model=py-neox", f"--hook_name={HOOK}"]
        assert main(["rank", *by_name, *same, found]) == 0
        absorbed = f"--output_path={tmp_path / model_class / 'absorbed'}"
        one = [str(tmp_path / "sae"), "--rank=2", "--held_out_tokens=100"]
        assert main(["absorb", *one, *same, absorbed]) == 0
        (dense,) = (tmp_path / model_class / "dense_latents").glob("*.json")
        (ablation,) = (tmp_path / model_class / "scaffold_ablation").glob("*.json")
        results.append(
            {
                "counts": json.loads(dense.read_text())["eval_result_details"],
                "ratios": json.loads(ablation.read_text())["eval_result_metrics"],
            }
        )
    first, *others = results
    assert first["counts"][0]["count"] > 0
    for other in others:
        assert [of["count"] for of in other["counts"]] == [
            of["count"] for of in first["counts"]
        ]
        for name, value in first["ratios"]["cross_entropy"].items():
            assert other["ratios"]["cross_entropy"][name] == pytest.approx(
                value, abs=1e-4
            ), name


def test_a_comparison_on_a_local_gemma(local_models: Path, texts: Path, tmp_path: Path):
    training = {
        "model_class_name": "AutoModelForCausalLM",
        "training_tokens": 1024,
        "train_batch_size_tokens": 128,
        "context_size": 32,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 4,
    }
    experiment = {
        "model_name": str(local_models / "gemma2"),
        "hook_name": "model.layers.1",
        "dataset_path": str(texts),
        "sae": {"d_in": 32, "d_sae": 64},
        "grid": {
            "architecture": ["batchtopk", "scaffold_batchtopk"],
            "k": [4],
            "scaffold_rank": [2],
        },
        "training": training,
        "evaluations": {
            "dense_latents": {"n_tokens": 200, "n_bootstrap": 5},
            "dark_matter": {"n_tokens": 100, "n_fit_tokens": 200, "n_bootstrap": 5},
        },
        "evaluation_data": {"dataset": str(texts), "llm_batch_size": 4},
    }
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment))
    out = tmp_path / "out"
    assert main(["compare", str(file), f"--output_path={out}"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert len(results["saes"]) == 2
    for sae in results["saes"]:
        assert {"dense_latents", "dark_matter"} == {*sae["evaluations"]}

    one = str(out / "saes" / "batchtopk-k_4-seed_0")
    absorbed = [one, f"--dataset={texts}", "--n_tokens=300", "--held_out_tokens=100"]
    saved = tmp_path / "absorbed"
    assert main(["absorb", *absorbed, "--rank=2", f"--output_path={saved}"]) == 0
    metadata = json.loads((saved / "cfg.json").read_text())["metadata"]
    assert metadata["model_class_name"] == "AutoModelForCausalLM"
