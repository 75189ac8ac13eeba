"""One language model through HookedTransformer, TransformerLens's bridge and transformers."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("sae_bench")

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.model import HookedModel, activations_at
from saelens_scaffold.models import embedded_model_path
from saelens_scaffold.models.language_models import (
    ModelClass,
    load_language_model,
    residual_post,
)

CLASSES: tuple[Any, ...] = get_args(ModelClass)
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
        config = AutoConfig.for_model(
            family, vocab_size=len(tokenizer), **ids, **shape
        )
        model = AutoModelForCausalLM.from_config(config)
        for weights in model.parameters():
            weights.data += 0.05 * torch.randn_like(weights)
        model.save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    return folder


@pytest.mark.parametrize("model_class", CLASSES)
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
    reference: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    layers: Any = reference.get_submodule(
        {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(
            family, "model.layers"
        )
    )
    outputs: dict[str, torch.Tensor] = {}
    change = torch.randn(2, 40, 32, generator=torch.manual_seed(1))

    def keep(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        outputs["x"] = output
        return output + change

    with torch.no_grad():
        logits = reference(tokens).logits
        handle = layers[1].register_forward_hook(keep)
        last = layers[2].register_forward_hook(
            lambda _, __, output: outputs.__setitem__("last", output)
        )
        changed = reference(tokens).logits
        handle.remove(), last.remove()

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


@pytest.mark.parametrize("model_class", CLASSES[1:])
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


@pytest.mark.parametrize("model_class", CLASSES)
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
        for of in CLASSES
    ]
    assert all(torch.equal(each, tokens[0]) for each in tokens[1:])
