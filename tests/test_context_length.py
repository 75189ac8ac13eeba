"""A context that a language model has no room for is refused before long work."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from sae_lens.saes.sae import SAEMetadata

from eval_helpers import HOOK, eval_sae, evaluation_names
from helpers import HAS_BRIDGE
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.rank import suggest_rank
from saelens_scaffold.evals.registry import EVALUATIONS
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.evals.tokens import check_context_size
from saelens_scaffold.models import (
    embedded_model_path,
    load_embedded_model,
    register_embedded_model,
)
from saelens_scaffold.models.hook_points import (
    check_context,
    context_length,
)


def test_a_hooked_transformer_reads_so_many_tokens_and_no_more() -> None:
    name = register_embedded_model()
    limit = context_length(name)
    assert limit == 512
    model = load_embedded_model()
    model(torch.zeros(1, limit, dtype=torch.long), stop_at_layer=1)
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, limit + 1, dtype=torch.long), stop_at_layer=1)
    check_context(limit, name)
    with pytest.raises(
        UserError, match="context_size is 513; py-neox reads at most 512"
    ):
        check_context(limit + 1, name)
    if HAS_BRIDGE:
        check_context(limit + 1, name, n_ctx=1024)  # as the model will be loaded
    else:
        with pytest.raises(UserError, match="n_ctx .* needs transformer-lens >= 2.17"):
            check_context(limit + 1, name, n_ctx=1024)


CONFIGS: dict[str, tuple[Any, int | None]] = {
    "learned positions": (transformers.GPT2Config(n_positions=64), 64),
    "rotary": (transformers.LlamaConfig(max_position_embeddings=96), 96),
    "text of a multimodal model": (
        transformers.Gemma3Config(
            text_config=transformers.Gemma3TextConfig(max_position_embeddings=80)
        ),
        80,
    ),
    "no limit": (transformers.BloomConfig(), None),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers_models_say_it_in_their_configuration(
    kind: str, tmp_path: Path
) -> None:
    config, limit = CONFIGS[kind]
    config.save_pretrained(tmp_path)
    model_class = "AutoModelForCausalLM"
    assert context_length(str(tmp_path), model_class) == limit
    check_context(limit or 10**6, str(tmp_path), model_class)
    if limit is not None:
        with pytest.raises(UserError, match=f"reads at most {limit} tokens"):
            check_context(limit + 1, str(tmp_path), model_class)
    assert context_length(str(tmp_path), "HookedMamba") is None


def test_what_a_transformers_model_is_loaded_with_counts() -> None:
    path, kind = str(embedded_model_path()), "AutoModelForCausalLM"
    assert context_length(path, kind) == 512
    assert context_length(path, kind, max_position_embeddings=1024) == 1024
    with pytest.raises(UserError, match="no-such-model"):
        context_length("./no-such-model", kind)


def selected(context_size: int) -> list[SelectedSAE]:
    metadata = SAEMetadata(
        model_name="py-neox", hook_name=HOOK, context_size=context_size
    )
    return [SelectedSAE("plain", "custom_sae", eval_sae(metadata=metadata))]


FIELDS = {
    "dense_latents": "context_size",
    "scaffold_ablation": "context_size",
    "core": "context_size",
    "dark_matter": "context_size",
    "sparse_probing": "context_length",
    "tpp": "context_length",
    "scr": "context_length",
    "mdl": "context_length",
    "autointerp": "llm_context_size",
    "unlearning": "seq_len",
}


@pytest.mark.parametrize("name", evaluation_names(*FIELDS))
def test_every_evaluation_with_a_context_is_checked(name: str) -> None:
    field, make = FIELDS[name], EVALUATIONS[name].load().config_class
    config = make()
    if hasattr(config, "model_name"):
        config.model_name = "py-neox"
    setattr(config, field, 512)
    check_context_size(config, selected(1024))
    setattr(config, field, 513)
    with pytest.raises(UserError, match=f"^{field} is 513; py-neox reads at most 512"):
        check_context_size(config, selected(64))


@pytest.mark.sae_bench
def test_fields_that_mean_a_context_are_known() -> None:
    for evaluation in EVALUATIONS.values():
        for field in vars(evaluation.load().config_class()):
            if "context" in field or field.endswith(("ctx", "ctx_len", "seq_len")):
                assert FIELDS[evaluation.name] == field


def test_the_context_that_an_sae_was_trained_at_counts_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SimpleNamespace(model_name="py-neox", context_size=None)
    check_context_size(config, selected(512))
    with pytest.raises(UserError, match="context_size is 1024"):
        check_context_size(config, selected(1024))

    monkeypatch.setattr(
        "saelens_scaffold.evals.rank.suggestion.load_language_model",
        lambda *_: pytest.fail("loaded"),
    )
    selected(1024)[0].sae.save_model(tmp_path / "sae")
    with pytest.raises(UserError, match="context_size is 1024"):
        suggest_rank(
            output_path=tmp_path / "out",
            sae_path=str(tmp_path / "sae"),
            dataset="python-stdlib",
        )
