"""Runs of the language model that all SAEs of a call of SAEBench's core share."""

import pickle
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_bench.sae_bench_utils import activation_collection
from sae_bench.sae_bench_utils.activation_collection import get_llm_activations
from transformer_lens import HookedTransformer
from transformer_lens.components.embed import Embed

from eval_helpers import HOOK, eval_sae
from saelens_scaffold.evals.jobs import plan
from saelens_scaffold.evals.kept import Kept
from saelens_scaffold.evals.runner import run
from saelens_scaffold.evals.saebench import replacements
from saelens_scaffold.evals.saebench.shared_runs import SharedRuns
from saelens_scaffold.models import load_embedded_model

pytestmark = pytest.mark.sae_bench

HOOKS = [HOOK, "blocks.3.hook_resid_post", "blocks.1.hook_mlp_out"]
BOTH: dict[str, Any] = {"return_type": "both", "loss_per_token": True}


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return load_embedded_model()


@pytest.fixture
def layer_runs(model: HookedTransformer) -> Any:
    """How often each layer has been run."""
    runs: Counter[int] = Counter()
    handles = [
        block.register_forward_hook(lambda *_, i=i: runs.update([i]))
        for i, block in enumerate(model.blocks)
    ]
    yield runs
    for handle in handles:
        handle.remove()


def core_calls(model: Any, hook_name: str, tokens: torch.Tensor, scale: float) -> Any:
    """What core asks of a model for one SAE, here one that scales the activations."""

    def reconstructed(x: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        return scale * x

    def zeros(x: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        return torch.zeros_like(x)

    stop = int(hook_name.split(".")[1]) + 1
    hooks = [[(hook_name, partial(reconstructed))], [(hook_name, zeros)]]
    cached = {"names_filter": [hook_name], "stop_at_layer": stop, "prepend_bos": False}
    return [
        *model(tokens, **BOTH),
        *(
            each
            for h in hooks
            for each in model.run_with_hooks(tokens, fwd_hooks=h, **BOTH)
        ),
        model.run_with_cache(tokens, **cached)[1][hook_name],
    ]


@pytest.mark.parametrize("max_bytes", [0, 100_000, 2**30])
@pytest.mark.parametrize("hook_name", HOOKS)
@torch.no_grad()
def test_results_are_the_model_s_to_the_last_bit(
    model: HookedTransformer, hook_name: str, max_bytes: int
):
    shared = SharedRuns(model, Kept(max_bytes))
    assert shared.W_E is model.W_E
    batches = torch.randint(0, model.cfg.d_vocab, (2, 3, 20)).unbind()
    for scale in (0.5, 2.0):
        for tokens in batches:
            expected = core_calls(model, hook_name, tokens, scale)
            for ours, theirs in zip(
                core_calls(shared, hook_name, tokens, scale), expected, strict=True
            ):
                assert torch.equal(ours, theirs)


@torch.no_grad()
def test_a_further_sae_runs_the_layers_above_it_once(
    model: HookedTransformer, layer_runs: Counter[int]
):
    shared, tokens = SharedRuns(model), torch.randint(0, 4096, (2, 20))
    core_calls(shared, HOOK, tokens, 1.0)
    layer_runs.clear()
    core_calls(shared, HOOK, tokens, 2.0)
    assert layer_runs == {1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize("hook_name", HOOKS)
@torch.no_grad()
def test_what_is_read_for_probes_is_run_once(
    model: HookedTransformer, layer_runs: Counter[int], hook_name: str
):
    tokens = torch.randint(0, 4096, (5, 20))
    layer = int(hook_name.split(".")[1])

    def read(kept: Kept) -> torch.Tensor:
        shared: Any = SharedRuns(model, kept)
        args = (tokens, shared, 2, layer, hook_name)
        return get_llm_activations(*args, mask_bos_pad_eos_tokens=True)

    kept, args = Kept(), (tokens, model, 2, layer, hook_name)
    expected = get_llm_activations(*args, mask_bos_pad_eos_tokens=True)
    with replacements.lent_model(activation_collection, model):
        assert torch.equal(read(kept), expected)
        layer_runs.clear()
        assert torch.equal(read(kept), expected)
        assert not layer_runs
        read(pickle.loads(pickle.dumps(kept)))
    assert layer_runs[0] == 3  # batches


@pytest.mark.parametrize("name", ["core", "sparse_probing"])
def test_another_group_of_saes_runs_nothing_below_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fields: dict[str, Any] = {
        "core": {
            "n_eval_reconstruction_batches": 1,
            "n_eval_sparsity_variance_batches": 1,
            "batch_size_prompts": 2,
        },
        "sparse_probing": {"probe_train_set_size": 20, "probe_test_set_size": 20},
    }
    own, runs = Embed.forward, list[int]()

    def forward(embed: Any, tokens: torch.Tensor) -> torch.Tensor:
        runs.append(len(tokens))
        return own(embed, tokens)

    groups = [[("a", eval_sae())], [("b", eval_sae(seed=1))]]
    (job,) = plan(
        {name: fields[name]},
        [sae for group in groups for sae in group],
        output_path=tmp_path / "results",
        artifacts_path=tmp_path / "artifacts",
        device="cpu",
        **{"dataset" if name == "core" else "labelled_dataset": "python-stdlib"},
    )
    monkeypatch.setattr(Embed, "forward", forward)
    for group, is_run in zip(groups, (True, False), strict=True):
        assert run(job, group).error is None
        # a single row is the check that the SAEs fit the model
        assert (max(runs, default=0) > 1) == is_run
        runs.clear()


@torch.no_grad()
def test_padding_on_the_left_is_the_model_s_own(
    model: HookedTransformer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(model.tokenizer, "padding_side", "left")
    tokens = torch.randint(1, 4096, (2, 20))
    tokens[0, :5] = model.tokenizer.pad_token_id  # type: ignore[union-attr]
    shared = SharedRuns(model)
    for _ in range(2):
        for ours, theirs in zip(
            core_calls(shared, HOOK, tokens, 0.5),
            core_calls(model, HOOK, tokens, 0.5),
            strict=True,
        ):
            assert torch.equal(ours, theirs)
    assert not len(shared._kept)


def test_core_s_results_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saes = [
        ("plain", eval_sae()),
        ("scaffold", eval_sae(rank=4)),
        ("b", eval_sae(seed=1)),
    ]
    fields = {
        "n_eval_reconstruction_batches": 2,
        "n_eval_sparsity_variance_batches": 2,
        "batch_size_prompts": 2,
    }

    def results(folder: str) -> dict[str, Any]:
        (job,) = plan(
            {"core": fields},
            saes,
            output_path=tmp_path / folder,
            artifacts_path=tmp_path / "artifacts",
            device="cpu",
            dataset="python-stdlib",
        )
        outcome = run(job, saes)
        assert outcome.error is None
        names = ("eval_result_metrics", "eval_result_details")
        return {
            key: {name: result[name] for name in names}
            for key, result in outcome.results.items()
        }

    ours = results("shared")
    monkeypatch.setattr(replacements, "SharedRuns", lambda model, *_: model)
    assert ours == results("own")
