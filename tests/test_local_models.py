import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import HookedSAETransformer
from sae_lens.load_model import load_model
from safetensors.torch import load_file
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import get_official_model_name
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
)

from helpers import HAS_BRIDGE
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.models import embedded_model_path
from saelens_scaffold.models.language_models import load_language_model
from saelens_scaffold.models.local import (
    MODEL_ALIASES,
    OFFICIAL_MODEL_NAMES,
    _views_root,
    register_local_model,
    register_local_models_in,
)

VOCAB: dict[str, Any] = {
    "vocab_size": 4096,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LLAMA_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TINY_CONFIGS: dict[str, Any] = {
    "gpt2": GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=4, **VOCAB),
    "gpt_neox": GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        **VOCAB,
    ),
    "llama": LlamaConfig(**LLAMA_SHAPE, **VOCAB),
    "qwen2": Qwen2Config(**LLAMA_SHAPE, **VOCAB),
}


@pytest.fixture(autouse=True)
def names_of_other_tests_forgotten() -> Iterator[None]:
    """Registrations last as long as the process: here, only as long as a test."""
    names, aliases = [*OFFICIAL_MODEL_NAMES], {**MODEL_ALIASES}
    for name in filter(os.path.isabs, names):
        OFFICIAL_MODEL_NAMES.remove(name)
        MODEL_ALIASES.pop(name, None)
    yield
    OFFICIAL_MODEL_NAMES[:] = names
    MODEL_ALIASES.clear()
    MODEL_ALIASES.update(aliases)


@pytest.fixture(autouse=True)
def unchanged_names() -> Iterator[None]:
    names, aliases = list(OFFICIAL_MODEL_NAMES), dict(MODEL_ALIASES)
    yield
    OFFICIAL_MODEL_NAMES[:] = names
    MODEL_ALIASES.clear()
    MODEL_ALIASES.update(aliases)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A place for models whose own name has no word that TransformerLens misreads."""
    return save_model(tmp_path / "model", TINY_CONFIGS["gpt_neox"])


def save_model(directory: Path, config: Any) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_model_path() / file, directory)
    return directory


def edit_config(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def assert_same_logits(model: torch.nn.Module, directory: Path) -> None:
    tokens = torch.randint(1, 4096, (2, 16), generator=torch.Generator().manual_seed(0))
    reference = AutoModelForCausalLM.from_pretrained(directory).float().eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens), reference(tokens).logits, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("model_type", TINY_CONFIGS)
def test_logits_equal_those_of_transformers(tmp_path: Path, model_type: str):
    # As likely as not the name of a model's directory is that of its kind.
    directory = save_model(tmp_path / f"tiny-{model_type}", TINY_CONFIGS[model_type])
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    name = register_local_model(directory)
    assert name == str(directory)
    model = load_model("HookedTransformer", name, device="cpu")
    assert_same_logits(model, directory)
    assert model.tokenizer.bos_token_id == 0  # type: ignore
    assert model.to_tokens("import os", prepend_bos=False)[0, 0] != 0  # type: ignore
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


@pytest.mark.parametrize(
    "parent",
    ["robert", "t5", "Llama", "gemma-2-2b", "delphi", "wav2vec2-base", "plain"],
)
def test_no_word_in_the_path_is_misread(tmp_path: Path, parent: str):
    directory = save_model(tmp_path / parent / "model", TINY_CONFIGS["qwen2"])
    assert_same_logits(
        load_model("HookedTransformer", register_local_model(directory)), directory
    )


def test_a_view_keeps_the_same_last_part_and_follows_the_files(tmp_path: Path):
    directory = save_model(tmp_path / "llama", TINY_CONFIGS["llama"])
    first = load_model("HookedTransformer", register_local_model(directory))
    # a copy, since the file may be written over in place
    weights = load_file(directory / "model.safetensors")["lm_head.weight"].clone()
    AutoModelForCausalLM.from_config(TINY_CONFIGS["llama"]).save_pretrained(directory)
    second = load_model("HookedTransformer", register_local_model(directory))
    assert first.cfg.model_name == second.cfg.model_name  # type: ignore
    assert_same_logits(second, directory)
    assert not torch.equal(
        weights,
        load_file(directory / "model.safetensors")["lm_head.weight"],
    )


def test_a_misread_directory_for_temporary_files_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    directory = save_model(tmp_path / "llama", TINY_CONFIGS["llama"])
    (tmp_path / "albert").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "albert"))
    _views_root.cache_clear()
    with pytest.raises(ValueError, match="set TMPDIR to another"):
        register_local_model(directory)


def test_a_name_is_an_alias_everywhere(path: Path):
    assert register_local_model(path, name="My-Model") == "My-Model"
    assert_same_logits(
        HookedSAETransformer.from_pretrained_no_processing("my-model"), path
    )


def test_the_bridge_takes_path_and_alias(path: Path):
    names = [register_local_model(path, name="My-Model"), register_local_model(path)]
    if not HAS_BRIDGE:
        with pytest.raises(UserError, match="needs transformer-lens >= 3"):
            load_language_model(names[1], "cpu", model_class_name="TransformerBridge")
        return
    from sae_lens import SAETransformerBridge

    for name in names:
        model = SAETransformerBridge.boot_transformers(name, device="cpu")
        assert_same_logits(model, path)


def test_registering_twice_changes_nothing(path: Path):
    assert register_local_model(path, name="twice") == "twice"
    names = list(OFFICIAL_MODEL_NAMES)
    aliases = list(MODEL_ALIASES[get_official_model_name("twice")])
    assert register_local_model(path, name="twice") == "twice"
    assert register_local_model(path) == str(path)
    assert names == OFFICIAL_MODEL_NAMES
    assert aliases == MODEL_ALIASES[get_official_model_name("twice")]


def test_a_relative_path_works_as_it_was_given(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(path.parent)
    for text in ("model", "./model", "model/"):
        assert register_local_model(text) == text
    monkeypatch.chdir("/")
    model = HookedTransformer.from_pretrained_no_processing("model/")
    assert (
        model.cfg.model_name
    )  # TransformerLens alone takes what follows the slash: nothing
    assert_same_logits(model, path)


@pytest.mark.parametrize(
    "name", ["gpt2", "GPT2-small", "EleutherAI/pythia-70m-deduped"]
)
def test_a_name_of_transformer_lens_is_refused(path: Path, name: str):
    names = list(OFFICIAL_MODEL_NAMES)
    with pytest.raises(ValueError, match=f"{name!r} already means"):
        register_local_model(path, name=name)
    assert names == OFFICIAL_MODEL_NAMES


def test_a_name_of_another_local_model_is_refused(path: Path, tmp_path: Path):
    other = shutil.copytree(path, tmp_path / "other")
    register_local_model(path, name="mine")
    with pytest.raises(ValueError, match="'Mine' already means"):
        register_local_model(other, name="Mine")
    with pytest.raises(ValueError, match="name is ' '"):
        register_local_model(other, name=" ")


def test_what_is_missing_is_said(path: Path):
    (path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        register_local_model(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        register_local_model(path)
    index = path / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})
    )
    (path / "1.safetensors").touch()
    with pytest.raises(UserError, match=r"lacks weight files.*\['2.safetensors'\]"):
        register_local_model(path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="not a readable index"):
        register_local_model(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        register_local_model(path)
    (path / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        register_local_model(path)
    with pytest.raises(UserError, match="not a directory"):
        register_local_model(path / "nowhere")


def test_a_config_that_is_no_language_models_is_refused(path: Path):
    edit_config(path, architectures=["GPTNeoXModel"])
    with pytest.raises(ValueError, match=r"cannot read the model in .*GPTNeoXModel"):
        register_local_model(path)
    edit_config(path, architectures=None)
    with pytest.raises(ValueError, match="architectures is None"):
        register_local_model(path)
    edit_config(path, model_type=3)
    with pytest.raises(ValueError, match="model_type is 3"):
        register_local_model(path)


def test_gemma_is_refused_with_a_way_out(tmp_path: Path):
    config = Gemma2Config(**{**LLAMA_SHAPE, "head_dim": 8}, **VOCAB)
    directory = save_model(tmp_path / "gemma-2-2b", config)
    with pytest.raises(ValueError, match="by its Hub name only"):
        register_local_model(directory)


def test_sharded_and_bin_weights_are_accepted(path: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="200KB")
    assert (path / "model.safetensors.index.json").is_file()
    assert_same_logits(
        load_model("HookedTransformer", register_local_model(path)), path
    )

    binary = tmp_path / "binary"
    shutil.copytree(path, binary, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(model.state_dict(), binary / "pytorch_model.bin")
    assert_same_logits(
        load_model("HookedTransformer", register_local_model(binary)), binary
    )


def test_the_command_lines_models_are_registered(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.chdir(tmp_path)
    for directory, file, content in [
        ("sae", "cfg.json", {"architecture": "jumprelu"}),
        ("dataset", "config.json", {"features": {}}),
        ("list", "config.json", []),
        ("dir=ectory", "cfg.json", {}),
    ]:
        (tmp_path / directory).mkdir()
        (tmp_path / directory / file).write_text(json.dumps(content))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    other = shutil.copytree(path, tmp_path / "other")

    args = [
        "--model_name",
        "model",
        "--other=./other",
        "sae",
        "dataset",
        "list",
        "broken",
    ]
    args += [
        "dir=ectory",
        "gpt2",
        "--flag",
        "",
        "x" * 5000,
        "nul\0",
        "model",
        str(path) + "/",
    ]
    with caplog.at_level(logging.WARNING):
        assert register_local_models_in(args) == ["model", "./other", str(path) + "/"]
    assert not caplog.records
    assert_same_logits(
        HookedTransformer.from_pretrained_no_processing("./other"), other
    )


def test_a_tokenizer_alone_on_the_command_line_is_no_error(
    path: Path, caplog: pytest.LogCaptureFixture
):
    (path / "model.safetensors").unlink()
    assert register_local_models_in(["--tokenizer_name", str(path)]) == []
    assert "has no weights" in caplog.text
