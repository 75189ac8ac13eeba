"""SAELens, TransformerLens and SAEBench see the whole SAE, on a real language model."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    ActivationsStore,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.synthetic import (
    SyntheticModelConfig,
    SyntheticSAERunner,
    SyntheticSAERunnerConfig,
)
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file
from transformer_lens import HookedTransformer

from forked import Forked
from helpers import scaffold_config
from saelens_scaffold import (
    ScaffoldBatchTopKTrainingSAE,
    ScaffoldBatchTopKTrainingSAEConfig,
    ScaffoldJumpReLUSAE,
    ScaffoldMatryoshkaTrainingSAEConfig,
)
from saelens_scaffold.models import (
    EMBEDDED_MODEL_NAME,
    load_embedded_model,
    load_stdlib_text,
    register_embedded_model,
    write_stdlib_dataset,
)

HOOK = "blocks.1.hook_resid_post"
SAE_KWARGS: dict[str, Any] = {
    "d_in": 256,
    "d_sae": 256,
    "k": 8,
    "scaffold_rank": 4,
    "topk_threshold_lr": 0.2,
    "normalize_activations": "expected_average_only_in",
}
RUNNER_KWARGS: dict[str, Any] = {
    "model_name": EMBEDDED_MODEL_NAME,
    "streaming": False,
    "context_size": 64,
    "n_batches_in_buffer": 16,
    "store_batch_size_prompts": 8,
    "training_tokens": 16 * 512,
    "train_batch_size_tokens": 512,
    "lr": 1e-3,
    "n_batches_for_norm_estimate": 2,
}


def logging_off() -> LoggingConfig:
    return LoggingConfig(log_to_wandb=False)


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return load_embedded_model()


@pytest.fixture(scope="module")
def trained(
    model: HookedTransformer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ScaffoldJumpReLUSAE]:
    """Both architectures, trained by SAELens in lockstep, saved and loaded."""
    directory = tmp_path_factory.mktemp("saes")
    torch.manual_seed(0)
    MultiSAETrainingRunner(
        MultiSAETrainingRunnerConfig(
            saes={
                "batchtopk": ScaffoldBatchTopKTrainingSAEConfig(**SAE_KWARGS),
                "matryoshka": ScaffoldMatryoshkaTrainingSAEConfig(
                    **SAE_KWARGS, matryoshka_widths=[32, 256]
                ),
            },
            hook_names=HOOK,
            checkpoint_path=None,
            output_path=str(directory),
            logger=logging_off(),
            **RUNNER_KWARGS,
        ),
        override_dataset=load_stdlib_text("train"),
        override_model=model,
    ).run()
    return {
        name: ScaffoldJumpReLUSAE.load_from_disk(directory / name)
        for name in ("batchtopk", "matryoshka")
    }


def reconstruct(sae: Any, x: torch.Tensor) -> torch.Tensor:
    """The formula of the saved form, in plain torch."""
    r = sae.cfg.scaffold_rank
    x_bar = x - sae.b_dec
    z = x_bar @ sae.W_enc[:, :r]
    h = x_bar @ sae.W_enc[:, r:] + sae.b_enc[r:]
    f = h.relu() * (h > sae.threshold[r:])
    return z @ sae.W_dec[:r] + f @ sae.W_dec[r:] + sae.b_dec


def cross_entropy(
    model: HookedTransformer, tokens: torch.Tensor, change: Callable[..., Any] | None
) -> torch.Tensor:
    """Per token, with the residual stream at the hook point changed."""
    hooks: list[Any] = []
    if change is not None:
        hooks = [(HOOK, lambda x, hook: change(x))]  # noqa: ARG005
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    ).view(len(tokens), -1)


def residual_stream(model: HookedTransformer, tokens: torch.Tensor) -> torch.Tensor:
    return model.run_with_cache(tokens, names_filter=HOOK)[1][HOOK]


@pytest.fixture
def used_tokens(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """All token batches that an evaluation draws from its ActivationsStore."""
    drawn: list[torch.Tensor] = []
    original = ActivationsStore.get_batch_tokens

    def record(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        drawn.append(original(self, *args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(ActivationsStore, "get_batch_tokens", record)
    return drawn


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka"])
@torch.no_grad()
def test_saelens_run_evals_sees_the_whole_reconstruction(
    name: str,
    trained: dict[str, ScaffoldJumpReLUSAE],
    model: HookedTransformer,
    used_tokens: list[torch.Tensor],
):
    sae = trained[name]
    store = ActivationsStore.from_sae(
        model,
        sae,
        load_stdlib_text("test"),
        context_size=64,
        store_batch_size_prompts=4,
        streaming=False,
    )
    n = 2
    metrics, _ = run_evals(
        sae,
        store,
        model,
        ActivationScaler(),
        get_eval_everything_config(4, n, n),
        exclude_special_tokens=False,
    )
    # first the batches of the cross-entropies, then those of the variances
    tokens = torch.cat(used_tokens[:n])
    behaviour = metrics["model_performance_preservation"]
    for key, change in (
        ("ce_loss_without_sae", None),
        ("ce_loss_with_sae", lambda x: reconstruct(sae, x)),
        ("ce_loss_with_ablation", torch.zeros_like),
    ):
        expected = cross_entropy(model, tokens, change).mean()
        assert behaviour[key] == pytest.approx(float(expected), rel=1e-4)
    x = residual_stream(model, torch.cat(used_tokens[n:])).flatten(0, 1)
    residual = (x - reconstruct(sae, x)).pow(2).sum()
    expected = 1 - residual / (x - x.mean(0)).pow(2).sum()
    quality = metrics["reconstruction_quality"]
    assert quality["explained_variance"] == pytest.approx(float(expected), rel=1e-3)
    # all scaffold latents fire on every token, and SAELens counts them
    sparse = sae.encode(x)[:, sae.cfg.scaffold_rank :]
    l0_total = float((sparse != 0).sum(1).float().mean()) + sae.cfg.scaffold_rank
    assert metrics["sparsity"]["l0"] == pytest.approx(l0_total, rel=1e-3)


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka"])
@torch.no_grad()
def test_hooked_sae_transformer(
    name: str, trained: dict[str, ScaffoldJumpReLUSAE], model: HookedTransformer
):
    sae = trained[name]
    hooked = HookedSAETransformer.from_pretrained_no_processing(
        register_embedded_model()
    )
    tokens = torch.randint(1, 4096, (3, 40), generator=torch.Generator().manual_seed(0))
    clean: torch.Tensor = model(tokens)
    with_error = hooked.run_with_saes(tokens, saes=[sae], use_error_term=True)
    torch.testing.assert_close(with_error, clean, atol=1e-3, rtol=1e-3)
    without_error: Any = hooked.run_with_saes(tokens, saes=[sae])
    expected = model.run_with_hooks(
        tokens,
        fwd_hooks=[(HOOK, lambda x, hook: reconstruct(sae, x))],  # noqa: ARG005
    )
    torch.testing.assert_close(without_error, expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(without_error, clean, atol=1e-1)


@pytest.mark.sae_bench
@torch.no_grad()
def test_saebench_core_sees_the_whole_reconstruction(
    trained: dict[str, ScaffoldJumpReLUSAE],
    model: HookedTransformer,
    used_tokens: list[torch.Tensor],
    tmp_path: Path,
):
    from sae_bench.evals.core import main as core

    sae = trained["batchtopk"]
    dataset = write_stdlib_dataset(tmp_path / "text", "test")
    n = 2
    results = core.multiple_evals(
        [("scaffold", sae)],
        n_eval_reconstruction_batches=n,
        n_eval_sparsity_variance_batches=n,
        eval_batch_size_prompts=4,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        dataset=str(dataset),
        context_size=64,
        output_folder=str(tmp_path / "results"),
        device="cpu",
    )
    # SAEBench logs an exception and goes on: no result means that it failed
    assert len(results) == 1
    assert len(list((tmp_path / "results").glob("*.json"))) == 1
    metrics = results[0]["metrics"]

    tokens = torch.cat(used_tokens[:n])
    is_text = tokens != 0  # not BOS, EOS or padding, which are one token
    for key, change in (
        ("ce_loss_without_sae", None),
        ("ce_loss_with_sae", lambda x: reconstruct(sae, x)),
    ):
        losses = cross_entropy(model, tokens, change)[is_text[:, :-1]]
        assert metrics["model_performance_preservation"][key] == pytest.approx(
            float(losses.mean()), rel=1e-4
        )
    # "Legacy" is the mean of each token's share. SAEBench 0.6.0's other explained
    # variance subtracts a squared second moment where the squared mean belongs.
    shares: list[torch.Tensor] = []
    for batch in used_tokens[n:]:
        x = residual_stream(model, batch)[batch != 0]
        residual = (x - reconstruct(sae, x)).pow(2).sum(1)
        shares.append(1 - residual / (x - x.mean(0)).pow(2).sum(1))
    quality = metrics["reconstruction_quality"]
    assert quality["explained_variance_legacy"] == pytest.approx(
        float(torch.cat(shares).mean()), rel=1e-3
    )


def test_the_language_model_runner_trains_resumes_and_fine_tunes(
    model: HookedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    starts: list[ScaffoldBatchTopKTrainingSAE] = []
    initialize = ScaffoldBatchTopKTrainingSAE.initialize_scaffold

    def count(self: Any, sae_in: torch.Tensor) -> None:
        starts.append(self)
        initialize(self, sae_in)

    monkeypatch.setattr(ScaffoldBatchTopKTrainingSAE, "initialize_scaffold", count)

    def run(**overrides: Any) -> Any:
        cfg = LanguageModelSAERunnerConfig(
            sae=ScaffoldBatchTopKTrainingSAEConfig(**SAE_KWARGS),
            hook_name=HOOK,
            checkpoint_path=str(tmp_path / "checkpoints"),
            output_path=None,
            logger=logging_off(),
            **{**RUNNER_KWARGS, **overrides},
        )
        runner = LanguageModelSAETrainingRunner(
            cfg, override_dataset=load_stdlib_text("train"), override_model=model
        )
        return runner.run()

    run(n_checkpoints=1)
    assert len(starts) == 1
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/*")
    resumed = run(resume_from_checkpoint=str(checkpoint), n_checkpoints=0)
    assert len(starts) == 1
    assert bool(resumed.scaffold_is_initialized)
    run(from_pretrained_path=str(checkpoint), compile_sae=False)
    assert len(starts) == 1


def interruptible_runner(directory: str, **overrides: Any) -> MultiSAETrainingRunner:
    return MultiSAETrainingRunner(
        MultiSAETrainingRunnerConfig(
            saes={"sae": ScaffoldBatchTopKTrainingSAEConfig(**SAE_KWARGS)},
            hook_names=HOOK,
            checkpoint_path=directory,
            output_path=None,
            logger=logging_off(),
            **{**RUNNER_KWARGS, **overrides},
        ),
        override_dataset=load_stdlib_text("train"),
        override_model=load_embedded_model(),
    )


def _train_and_say_when(directory: str) -> None:
    forward = ScaffoldBatchTopKTrainingSAE.training_forward_pass

    def announce(self: Any, step_input: Any) -> Any:
        if step_input.n_training_steps == 12:
            print("STEP 12", flush=True)
        return forward(self, step_input)

    ScaffoldBatchTopKTrainingSAE.training_forward_pass = announce  # type: ignore[method-assign]
    interruptible_runner(directory, training_tokens=10**7).run()


def test_sigterm_then_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    process = Forked(_train_and_say_when, str(tmp_path))
    process.wait_until(lambda: "STEP 12" in process.stdout)
    process.send_signal(signal.SIGTERM)
    assert process.wait() != 0
    (checkpoint,) = tmp_path.glob("*/*")
    saved = torch.load(checkpoint / "sae" / "trainer_state.pt")
    assert saved["n_training_steps"] >= 12

    def not_again(self: Any, sae_in: torch.Tensor) -> None:
        raise AssertionError("the scaffold was initialised a second time")

    monkeypatch.setattr(ScaffoldBatchTopKTrainingSAE, "initialize_scaffold", not_again)
    runner = interruptible_runner(
        str(tmp_path),
        training_tokens=saved["n_training_samples"] + 3 * 512,
        resume_from_checkpoint=str(checkpoint),
    )
    sae: Any = runner.saes["sae"]
    at_resumption: dict[str, torch.Tensor] = {}
    forward = sae.training_forward_pass

    def look(step_input: Any) -> Any:
        if not at_resumption:
            at_resumption.update({k: v.clone() for k, v in sae.state_dict().items()})
        return forward(step_input)

    sae.training_forward_pass = look
    runner.run()
    checkpointed = load_file(checkpoint / "sae" / "sae_weights.safetensors")
    assert set(checkpointed) == set(at_resumption)
    for name, value in checkpointed.items():
        assert torch.equal(at_resumption[name], value), name
    assert float(checkpointed["topk_threshold"]) > 0


def test_synthetic_runner(tmp_path: Path):
    cfg = scaffold_config(d_in=20, d_sae=64, k=4, scaffold_rank=3)
    result = SyntheticSAERunner(
        SyntheticSAERunnerConfig(
            synthetic_model=SyntheticModelConfig(
                num_features=40, hidden_dim=20, seed=0
            ),
            sae=cfg,
            training_samples=30 * 256,
            batch_size=256,
            lr=3e-3,
            eval_samples=1024,
            checkpoint_path=None,
            output_path=str(tmp_path),
            logger=logging_off(),
        )
    ).run()
    assert result.final_eval is not None
    # SAELens's evaluator calls decode(encode(x)), so it sees the scaffold's part
    assert result.final_eval.explained_variance > 0.5
    saved = json.loads((tmp_path / "cfg.json").read_text())
    assert saved["architecture"] == "scaffold_jumprelu"
    assert saved["scaffold_rank"] == 3
    assert isinstance(SAE.load_from_disk(tmp_path), ScaffoldJumpReLUSAE)
