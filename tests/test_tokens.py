"""Evaluations take the tokens that an SAE was trained on, as SAELens's runner takes them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import LanguageModelSAERunnerConfig, StandardTrainingSAEConfig
from sae_lens.training.activations_store import ActivationsStore
from transformer_lens import HookedTransformer

from eval_helpers import D_MODEL, HOOK, assert_fired, eval_sae, write_texts
from saelens_scaffold._util.configs import make_config
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.dense_latents import DenseLatentsEvalConfig
from saelens_scaffold.evals.eval_configs import TextEvalConfig
from saelens_scaffold.evals.rank.suggestion import analyse_rank
from saelens_scaffold.evals.registry import evaluations_named
from saelens_scaffold.evals.runner import evaluate, run_eval
from saelens_scaffold.evals.saes import resolve_saes
from saelens_scaffold.evals.scaffold_ablation import ScaffoldAblationEvalConfig
from saelens_scaffold.evals.tokens import TokenSelection, other_tokens
from saelens_scaffold.models import load_embedded_model, load_stdlib_chunks

SETTINGS: dict[str, dict[str, Any]] = {
    "seqpos_slice": {"seqpos_slice": (5, -3, 2)},
    # among the most frequent ones of source code
    "exclude_special_tokens": {"exclude_special_tokens": [199, 15, 12]},
    "separator": {"sequence_separator_token": 199},
    "concat": {"disable_concat_sequences": True, "exclude_special_tokens": True},
    "prepend_bos": {"prepend_bos": False, "sequence_separator_token": None},
    "context_size": {"context_size": 40},
    "all": {
        "seqpos_slice": [3, 30],
        "exclude_special_tokens": [15],
        "sequence_separator_token": 199,
        "prepend_bos": False,
        "context_size": 48,
    },
}
EVERY = 10**9
"""More tokens than there are."""


N_FIT = 150


class Tokens(NamedTuple):
    sequences: torch.Tensor
    """Shape (n, context_size)"""
    counts: torch.Tensor
    """Those that were trained on, but BOS, which evaluations never count"""


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return load_embedded_model()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rows: Any = load_stdlib_chunks("test")
    # of several lengths, some shorter than a sequence
    return [rows[i]["text"][: 40 + 37 * i % 400] for i in range(60)]


@pytest.fixture
def dataset(tmp_path: Path, texts: list[str]) -> str:
    return str(write_texts(tmp_path / "texts.jsonl", texts))


@pytest.fixture(params=SETTINGS.values(), ids=[*SETTINGS])
def setting(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"context_size": 64, "prepend_bos": True, **request.param}


@pytest.fixture
def tokens(
    setting: dict[str, Any], texts: list[str], model: HookedTransformer
) -> Tokens:
    """What SAELens's runner trains on, by its own activation store."""
    positions = setting.get("seqpos_slice", (None,))
    given: dict[str, Any] = {**setting, "seqpos_slice": tuple(positions)}
    cfg = LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=8),
        model_name="py-neox",
        hook_name=HOOK,
        dataset_path="unused",
        device="cpu",
        **given,
    )
    dataset = Dataset.from_dict({"text": texts})
    store = ActivationsStore.from_config(model, cfg, override_dataset=dataset)
    sequences = torch.stack([*store._iterate_tokenized_sequences()])
    positions = torch.arange(sequences.shape[1])[slice(*cfg.seqpos_slice)]
    counts = torch.zeros_like(sequences, dtype=torch.bool)
    counts[:, positions] = True
    excluded = [0]  # BOS, EOS and padding in one
    if store.exclude_special_tokens is not None:
        excluded += store.exclude_special_tokens.tolist()
    for token in excluded:
        counts &= sequences != token
    assert counts.any(dim=1).all()
    return Tokens(sequences, counts)


def sae_with(setting: dict[str, Any], **kwargs: Any) -> Any:
    sae = eval_sae(**kwargs)
    for name, value in setting.items():
        sae.cfg.metadata[name] = value
    return sae


@torch.no_grad()
def run_model(model: HookedTransformer, tokens: torch.Tensor) -> tuple[Any, Any]:
    logits, cache = model.run_with_cache(tokens, names_filter=HOOK)
    return logits, cache[HOOK]


def first_counting(tokens: Tokens, n: int) -> Tokens:
    """The first sequences in which so many tokens count."""
    needed = int((tokens.counts.sum(dim=1).cumsum(0) < n).sum()) + 1
    return Tokens(tokens.sequences[:needed], tokens.counts[:needed])


def test_dense_latents(
    tmp_path: Path,
    setting: dict[str, Any],
    dataset: str,
    tokens: Tokens,
    model: HookedTransformer,
) -> None:
    cfg = DenseLatentsEvalConfig(
        model_name="py-neox", dataset=dataset, n_tokens=EVERY, n_bootstrap=2
    )
    sae = sae_with(setting)
    results = run_eval("dense_latents", cfg, [("sae", sae)], output_path=tmp_path / "o")
    result = results["sae_custom_sae"]

    x = run_model(model, tokens.sequences)[1][tokens.counts]
    stats = result["eval_result_metrics"]["token_stats"]
    assert stats == {"n_tokens": len(x), "n_sequences": len(tokens.sequences)}
    assert_fired(result["eval_result_unstructured"]["fired"], sae, x)
    assert result["tokens"]["context_size"] == setting["context_size"]


def test_scaffold_ablation(
    tmp_path: Path,
    setting: dict[str, Any],
    dataset: str,
    tokens: Tokens,
    model: HookedTransformer,
) -> None:
    cfg = ScaffoldAblationEvalConfig(
        model_name="py-neox",
        dataset=dataset,
        n_fit_tokens=N_FIT,
        n_tokens=N_FIT,
        n_bootstrap=2,
        n_random_draws=1,
        n_aligned_latents=[3],
        aligned_cosines=[],
        topics=False,
        include_special_tokens=False,
    )
    sae = sae_with(setting, rank=4)
    results = run_eval(
        "scaffold_ablation", cfg, [("sae", sae)], output_path=tmp_path / "o"
    )
    result = results["sae_custom_sae"]

    fitted = first_counting(tokens, N_FIT)
    rest = Tokens(*(part[len(fitted.sequences) :] for part in tokens))
    sequences, counts = first_counting(rest, N_FIT)
    mean = run_model(model, fitted.sequences)[1][fitted.counts].mean(dim=0)

    def ablate(x: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        return torch.where(counts[..., None], mean, x)

    with torch.no_grad():
        changed = model.run_with_hooks(sequences, fwd_hooks=[(HOOK, ablate)])
    predicts = counts[:, :-1] & (sequences[:, 1:] != 0)
    expected = [
        float(F.cross_entropy(logits[:, :-1][predicts], sequences[:, 1:][predicts]))
        for logits in (run_model(model, sequences)[0], changed)
    ]
    assert result["n_predictions"] == int(predicts.sum())
    by_name = {d["intervention"]: d["ce"] for d in result["eval_result_details"]}
    found = [by_name["clean"], by_name["mean_ablation"]]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.sae_bench
def test_core(
    tmp_path: Path,
    setting: dict[str, Any],
    dataset: str,
    tokens: Tokens,
    model: HookedTransformer,
) -> None:
    sae = sae_with(setting)
    sae.save_model(tmp_path / "sae")
    evaluate(
        "core",
        [
            "core.n_eval_reconstruction_batches=1",
            "core.n_eval_sparsity_variance_batches=1",
        ],
        sae_path=[str(tmp_path / "sae")],
        dataset=dataset,
        llm_batch_size=8,
        device="cpu",
        output_path=str(tmp_path / "o"),
        artifacts_path=str(tmp_path / "a"),
    )
    (file,) = (tmp_path / "o/core").glob("*.json")
    metrics = json.loads(file.read_text())["eval_result_metrics"]

    def counted(part: slice) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
        sequences, counts = tokens.sequences[part], tokens.counts[part]
        return (*run_model(model, sequences), sequences, counts)

    logits, _, sequences, counts = counted(slice(8))
    predicts = counts[:, :-1]
    ce = F.cross_entropy(logits[:, :-1][predicts], sequences[:, 1:][predicts])
    of_model = metrics["model_performance_preservation"]
    assert of_model["ce_loss_without_sae"] == pytest.approx(float(ce), rel=1e-4)
    _, x, _, counts = counted(slice(8, 16))
    l0 = (sae.encode(x[counts]) != 0).sum(dim=1).float().mean()
    assert metrics["sparsity"]["l0"] == pytest.approx(float(l0), rel=1e-6)


def test_rank(
    setting: dict[str, Any],
    dataset: str,
    tokens: Tokens,
    model: HookedTransformer,
) -> None:
    cfg = TextEvalConfig(model_name="py-neox", dataset=dataset, n_tokens=EVERY)
    (sae,) = resolve_saes([("sae", sae_with(setting))], "cpu", "float32")
    analysis = analyse_rank(cfg, HOOK, "cpu", sae)

    x = run_model(model, tokens.sequences)[1][tokens.counts].double()
    assert analysis.n_tokens == len(x)
    variances = torch.tensor(analysis.dimension_variances)
    assert torch.allclose(variances.double(), x.var(dim=0, correction=0), rtol=1e-3)


def message(path: Path, **metadata: Any) -> str:
    """What `eval` says of an SAE with these metadata, beside one without."""
    cfg = DenseLatentsEvalConfig(model_name="py-neox", dataset="python-stdlib")
    saes = [("a", eval_sae()), ("b", sae_with(metadata, seed=1))]
    with pytest.raises(UserError) as error:
        run_eval("dense_latents", cfg, saes, output_path=path / "o")
    return str(error.value)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (
            {"seqpos_slice": [5, None]},
            "different seqpos_slice: {'a': [None], 'b': [5, ",
        ),
        ({"disable_concat_sequences": True}, "different disable_concat_sequences"),
        ({"sequence_separator_token": None}, "different sequence_separator_token"),
        ({"context_size": 1}, "context_size is 1: Input should be greater"),
        (
            {"context_size": 64.5},
            "context_size is 64.5: Input should be a valid integer",
        ),
        ({"exclude_special_tokens": ["a"]}, "exclude_special_tokens"),
        ({"seqpos_slice": [64, None]}, "takes none of the 64 positions"),
        ({"seqpos_slice": [0, 5, 0]}, "takes none of the 64 positions"),
    ],
)
def test_saes_that_disagree_and_metadata_that_cannot_be(
    tmp_path: Path, metadata: dict[str, Any], said: str
) -> None:
    line = message(tmp_path, **metadata)
    assert said in line
    assert "\n" not in line
    assert not list(tmp_path.glob("o/*"))


def test_a_configuration_overrides_metadata(tmp_path: Path) -> None:
    saes = [("a", eval_sae()), ("b", sae_with({"seqpos_slice": [5, None]}, seed=1))]
    cfg = DenseLatentsEvalConfig(
        model_name="py-neox",
        dataset="python-stdlib",
        dataset_split="test",
        n_tokens=300,
        n_bootstrap=2,
        seqpos_slice=[None, 32],
    )
    results = run_eval("dense_latents", cfg, saes, output_path=tmp_path / "o")
    for result in results.values():
        assert result["tokens"]["seqpos_slice"] == [None, 32]
        counted = result["eval_result_metrics"]["token_stats"]
        assert counted["n_tokens"] <= 32 * counted["n_sequences"]


def test_a_result_is_of_the_tokens_that_the_sae_was_trained_on(tmp_path: Path) -> None:
    cfg = DenseLatentsEvalConfig(
        model_name="py-neox",
        dataset="python-stdlib",
        dataset_split="test",
        n_tokens=300,
        n_bootstrap=2,
    )
    found = [
        run_eval("dense_latents", cfg, [("sae", sae)], output_path=tmp_path / "o")
        for sae in (eval_sae(), sae_with({"seqpos_slice": [32, None]}))
    ]
    fired = [of["sae_custom_sae"]["eval_result_unstructured"]["fired"] for of in found]
    assert fired[0] != fired[1]


def test_probes_on_whole_texts_say_that_they_are(texts: list[str]) -> None:
    saes = resolve_saes(
        [
            ("whole", eval_sae()),
            (
                "part",
                sae_with({"seqpos_slice": [5, None], "prepend_bos": False}, seed=1),
            ),
            ("special", sae_with({"exclude_special_tokens": True}, seed=2)),
        ],
        "cpu",
        "float32",
    )
    assert other_tokens(evaluations_named("tpp,sparse_probing,core"), saes) == [
        "tpp, sparse_probing: took other tokens than part was trained on (prepend_bos "
        "False, seqpos_slice [5, None]), since SAEBench reads whole texts, from BOS on"
    ]
    assert other_tokens(evaluations_named("core,dense_latents"), saes) == []


bounds = st.none() | st.integers(-12, 12)


@settings(max_examples=50)
@given(
    rows=st.lists(st.lists(st.integers(0, 5), min_size=10, max_size=10), min_size=1),
    start=bounds,
    stop=bounds,
    step=st.none() | st.integers(1, 4),
    excluded=st.booleans() | st.lists(st.integers(0, 5)),
)
def test_counts_as_slice_and_set_say(
    rows: list[list[int]], start: Any, stop: Any, step: Any, excluded: Any
) -> None:
    positions = range(10)[slice(start, stop, step)]
    values = {
        "context_size": 10,
        "seqpos_slice": [start, stop, step],
        "exclude_special_tokens": excluded,
    }
    if not positions:
        with pytest.raises(UserError, match="none of the 10 positions"):
            make_config(TokenSelection, values)
        return
    tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2, pad_token_id=None)
    tokenizer.sep_token_id = 3
    excluded_ids = {1, 2, 3} if excluded is True else set(excluded or [])
    selection = make_config(TokenSelection, values)
    for special in (False, True):
        counts = selection.counts(torch.tensor(rows), tokenizer, special)
        out = excluded_ids - {1, 2} if special else excluded_ids | {1, 2}
        assert counts.tolist() == [
            [i in positions and token not in out for i, token in enumerate(row)]
            for row in rows
        ]
