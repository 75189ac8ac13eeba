"""SAEs trained in sparse kernels against the same in SAELens's dense code."""

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch.autograd import forward_ad

from helpers import (
    D_IN,
    D_SAE,
    RANK,
    K,
    activations,
    batches,
    scaffold_config,
    scaffold_sae,
    train,
    trainer_for,
)
from saelens_scaffold import ScaffoldBatchTopKTrainingSAE
from saelens_scaffold.kernels import choice, torch_ops
from saelens_scaffold.kernels.lazy import SparseActivations
from saelens_scaffold.plugins import manager as plugins
from saelens_scaffold.plugins.hookspecs import hookimpl
from saelens_scaffold.saes.sparse_step import _before_step

ARCHITECTURES = ["scaffold_batchtopk", "scaffold_matryoshka"]


def step(
    sae: ScaffoldBatchTopKTrainingSAE, x: torch.Tensor, dead: torch.Tensor | None
) -> TrainStepOutput:
    return sae.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients={},
            dead_neuron_mask=dead,
            n_training_steps=0,
            is_logging_step=True,
        )
    )


def twins(architecture: str, **overrides: Any) -> list[ScaffoldBatchTopKTrainingSAE]:
    """The same trained SAE twice, to be continued in sparse kernels and in dense code."""
    sae = scaffold_sae(architecture, kernels="reference", **overrides)
    train(sae, steps=10)
    saes = [copy.deepcopy(sae) for _ in range(2)]
    for sae, kernels in zip(saes, ("torch", "reference"), strict=True):
        sae.cfg.kernels = kernels
    return saes


def assert_same_gradients(
    saes: list[ScaffoldBatchTopKTrainingSAE], tolerance: float
) -> None:
    sparse, dense = (dict(sae.named_parameters()) for sae in saes)
    for name, reference in dense.items():
        ours, theirs = sparse[name].grad, reference.grad
        assert ours is not None and theirs is not None
        error = (ours.double() - theirs.double()).norm()
        assert error <= tolerance * theirs.double().norm(), name


@pytest.mark.parametrize("dead", [None, 0.1, 0.6, 1.0])
@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("scaffold_batchtopk", {}),
        ("scaffold_batchtopk", {"scaffold_rank": 0}),
        ("scaffold_batchtopk", {"sparse_encoder_input": "activation"}),
        ("scaffold_batchtopk", {"rescale_acts_by_decoder_norm": False}),
        ("scaffold_batchtopk", {"apply_b_dec_to_input": False}),
        ("scaffold_batchtopk", {"normalize_activations": "expected_average_only_in"}),
        ("scaffold_matryoshka", {}),
        ("scaffold_matryoshka", {"use_matryoshka_aux_loss": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)]
)
def test_a_step_is_that_of_the_reference(
    architecture: str,
    overrides: dict[str, Any],
    dead: float | None,
    dtype: str,
    tolerance: float,
):
    saes = twins(architecture, dtype=dtype, **overrides)
    x = activations(100, seed=77).to(saes[0].dtype)
    is_dead = None if dead is None else torch.rand(D_SAE) < dead
    outputs = [step(sae, x, is_dead) for sae in saes]
    ours, theirs = outputs
    assert isinstance(ours.feature_acts, SparseActivations)
    assert not isinstance(theirs.feature_acts, SparseActivations)
    assert ours.losses.keys() == theirs.losses.keys()
    for name, loss in theirs.losses.items():
        torch.testing.assert_close(ours.losses[name], loss)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.sae_out, theirs.sae_out)
    torch.testing.assert_close(ours.feature_acts + 0, theirs.feature_acts)
    torch.testing.assert_close(ours.hidden_pre + 0, theirs.hidden_pre)
    torch.testing.assert_close(saes[0].topk_threshold, saes[1].topk_threshold)
    assert ours.metrics["l0_sparse"]() == theirs.metrics["l0_sparse"]()  # type: ignore[operator]
    for output in outputs:
        output.loss.backward()
    assert_same_gradients(saes, tolerance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_about_as_precise_as_dense_code(
    architecture: str, autocast: bool
):
    # Rounding decides who wins the last places of k, and otherwise in any code, so that
    # it is the distance from the precise gradients that is compared.
    sparse, dense = twins(architecture)
    precise = copy.deepcopy(dense).to(torch.float64)
    x, dead = activations(1000, seed=77), torch.arange(D_SAE) % 2 == 0
    for sae in (sparse, dense, precise):
        if not autocast and sae is not precise:
            sae.to(torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            step(sae, x.to(sae.dtype), dead).loss.backward()
    for name, exact in precise.named_parameters():
        assert exact.grad is not None
        errors = [
            (sae.get_parameter(name).grad.double() - exact.grad).norm()  # type: ignore[union-attr]
            for sae in (sparse, dense)
        ]
        assert errors[0] <= 2 * errors[1], name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dead_feature_window", [2, 1000])
@pytest.mark.parametrize("elements", [10**6, 500])  # in one block, and in many
def test_the_first_20_steps_are_those_of_the_reference(
    architecture: str,
    dead_feature_window: int,
    elements: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(torch_ops.BLOCK_ELEMENTS, "cpu", elements)
    losses, trainers = [], []
    for kernels in ("torch", "reference"):
        sae = scaffold_sae(architecture, kernels=kernels)
        trainer = trainer_for(
            sae, 20, batches(), dead_feature_window=dead_feature_window
        )
        data = itertools.islice(batches(), 20)
        losses.append([trainer.step(batch).loss.item() for batch in data])
        trainers.append(trainer)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    # the trainer's statistics as well
    sparse, dense = trainers
    assert torch.equal(sparse.act_freq_scores, dense.act_freq_scores)
    assert torch.equal(
        sparse.n_forward_passes_since_fired, dense.n_forward_passes_since_fired
    )


def test_a_trainer_never_makes_the_activations_dense():
    sae = scaffold_sae()
    trainer = trainer_for(sae, 5, batches())
    output = trainer.step(next(batches()))
    log = trainer.build_train_step_log_dict(output, 128)
    assert log["metrics/l0"] == pytest.approx(K + RANK)
    assert log["metrics/l0_sparse"] == pytest.approx(K)
    for lazy in (output.feature_acts, output.hidden_pre):
        assert lazy._made is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_of_ones_own_on_activations_and_pre_activations(architecture: str):
    saes = twins(architecture)
    x = activations(100, seed=77)
    for sae in saes:
        output = step(sae, x, None)
        own = output.feature_acts.abs().sum() + output.hidden_pre.pow(2).sum()
        (output.loss + own).backward()
    assert_same_gradients(saes, 1e-5)


def test_gradients_that_the_loss_does_not_have_are_not_kept():
    output = step(scaffold_sae(kernels="torch"), activations(100), None)
    for lazy in (output.feature_acts, output.hidden_pre):
        with pytest.raises(RuntimeError, match="retain_grad .* kernels='reference'"):
            lazy.retain_grad()
        with pytest.raises(RuntimeError, match="register_hook .*'hook_sae_acts_post'"):
            lazy.register_hook(lambda grad: grad)


def test_pre_activations_are_not_those_of_changed_weights():
    sae = scaffold_sae()
    output = trainer_for(sae, 5, batches()).step(next(batches()))
    with pytest.raises(RuntimeError, match="before the optimizer's step"):
        output.hidden_pre.sum()


def test_pre_activations_are_not_those_of_changed_weights_where_biases_are_frozen():
    sae = scaffold_sae(kernels="torch")
    sae.b_enc.requires_grad_(False)
    sae.b_dec.requires_grad_(False)
    optimizer = torch.optim.Adam(sae.parameters())
    output = step(sae, activations(100), None)
    output.loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="before the optimizer's step"):
        output.hidden_pre.sum()


def test_weights_that_are_not_numbers_have_not_changed():
    sae = scaffold_sae(kernels="torch")
    x = activations(100)
    step(sae, x, None)
    sae.b_enc.data[RANK] = torch.nan
    assert step(sae, x, None).hidden_pre[:, RANK].isnan().all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_second_derivatives_are_refused(architecture: str):
    sparse, dense = twins(architecture)
    for sae in (sparse, dense):
        loss = step(sae, activations(20), None).loss
        weights = [sae.W_enc, sae.W_dec]
        if sae is dense:
            grads = torch.autograd.grad(loss, weights, create_graph=True)
            sum(grad.pow(2).sum() for grad in grads).backward()  # type: ignore[union-attr]
            continue
        with pytest.raises(RuntimeError, match="no second.*use kernels='reference'"):
            torch.autograd.grad(loss, weights, create_graph=True)
        with pytest.raises(RuntimeError, match="no second.*use kernels='reference'"):
            step(sae, activations(20), None).loss.backward(create_graph=True)


def test_few_positive_pre_activations():
    saes = twins("scaffold_batchtopk", k=40.0)
    x = activations(100, seed=77)
    hidden_pre = step(saes[1], x, None).hidden_pre[:, RANK:]
    for sae in saes:
        sae.b_enc.data -= hidden_pre.quantile(0.8).detach()
    outputs = [step(sae, x, None) for sae in saes]
    active = int((outputs[1].feature_acts[:, RANK:] > 0).sum())
    assert 0 < active < 40 * 100
    torch.testing.assert_close(outputs[0].feature_acts + 0, outputs[1].feature_acts)
    for output in outputs:
        output.loss.backward()
    assert_same_gradients(saes, 1e-5)


def test_nothing_active():
    sae = scaffold_sae(kernels="torch")
    x = activations(100)
    step(sae, x, None)
    sae.b_enc.data -= 1e6
    output = step(sae, x, None)
    output.loss.backward()
    assert float(output.metrics["l0_sparse"]()) == 0  # type: ignore[operator]
    assert sae.W_enc.grad is not None
    assert sae.W_enc.grad.isfinite().all() and sae.W_enc.grad[:, :RANK].any()


def test_a_loss_that_is_not_a_number_is_one_in_kernels_too():
    sae = scaffold_sae(kernels="torch")
    x = activations(100)
    step(sae, x, None)
    x[5, 3] = torch.nan
    assert step(sae, x, None).loss.isnan()


HOOK_POINTS = [
    "hook_sae_input",
    "hook_sae_acts_pre",
    "hook_sae_acts_post",
    "hook_sae_recons",
]


@pytest.mark.parametrize("point", HOOK_POINTS)
def test_hooks_do_what_they_do_in_dense_code(point: str):
    saes = twins("scaffold_batchtopk")
    x, dead = activations(100, seed=77), torch.ones(D_SAE, dtype=torch.bool)
    outputs, factors = [], []
    for sae in saes:
        factor = torch.tensor(0.5, requires_grad=True)

        def scaled(
            tensor: torch.Tensor, hook: Any, factor: torch.Tensor = factor
        ) -> torch.Tensor:
            assert type(tensor) is torch.Tensor
            return factor * tensor

        with sae.hooks(fwd_hooks=[(point, scaled)]):
            outputs.append(step(sae, x, dead))
        outputs[-1].loss.backward()
        factors.append(factor)
    for name, loss in outputs[1].losses.items():
        torch.testing.assert_close(outputs[0].losses[name], loss)
    assert factors[0].grad is not None
    torch.testing.assert_close(factors[0].grad, factors[1].grad)
    assert_same_gradients(saes, 1e-5)


def test_hooks_that_a_plugin_attaches_before_a_step_fire_in_it():
    sae = scaffold_sae(kernels="torch")
    seen: list[torch.Size] = []

    class Watches:
        @hookimpl
        def before_training_forward_pass(
            self, sae: ScaffoldBatchTopKTrainingSAE
        ) -> None:
            sae.reset_hooks()
            sae.add_hook(
                "hook_sae_acts_post", lambda tensor, hook: seen.append(tensor.shape)
            )

    plugins.plugins_of(sae).register(Watches())
    step(sae, activations(100), None)
    assert seen == [(100, D_SAE)]


def zero(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
    return 0 * tensor


@pytest.mark.parametrize(
    "x",
    [
        activations(100, seed=77).requires_grad_(),
        activations(100, seed=77).view(4, 25, D_IN),
        activations(0),
    ],
    ids=["requires a gradient", "tokens of several texts", "no tokens"],
)
def test_batches_that_are_left_to_dense_code(x: torch.Tensor):
    grads = []
    for sae in twins("scaffold_batchtopk"):
        output = step(sae, x, None)
        output.loss.backward()
        assert output.feature_acts.shape == (*x.shape[:-1], D_SAE)
        grads.append((output.loss.detach(), x.grad, sae.W_enc.grad))
        x.grad = None
    torch.testing.assert_close(*grads, equal_nan=True)


def test_activation_functions_of_ones_own_get_dense_code():
    class Doubled(BatchTopK):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    saes = twins("scaffold_batchtopk")
    x = activations(100, seed=77)
    acts = []
    for sae in saes:
        sae.activation_fn.sparse_activation = Doubled(K)  # type: ignore[union-attr]
        acts.append(step(sae, x, None).feature_acts + 0)
    torch.testing.assert_close(*acts)


# ---- which kernels


def is_sparse(sae: ScaffoldBatchTopKTrainingSAE) -> bool:
    return isinstance(step(sae, activations(50), None).feature_acts, SparseActivations)


def test_kernels_are_chosen_where_they_gain_something(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(choice.ENVIRONMENT_VARIABLE, raising=False)
    assert is_sparse(scaffold_sae())
    assert not is_sparse(scaffold_sae(kernels="reference"))
    assert not is_sparse(scaffold_sae(scaffold_rank=0)), "SAELens's, to the last bit"
    assert is_sparse(scaffold_sae(scaffold_rank=0, kernels="torch"))
    assert not is_sparse(scaffold_sae(k=30.0)), "not much fewer than all"
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, "reference")
    assert not is_sparse(scaffold_sae(kernels="torch"))
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match="SAELENS_SCAFFOLD_KERNELS .* got 'fast'"):
        is_sparse(scaffold_sae())


def test_the_choice_is_checked_and_saved():
    with pytest.raises(ValueError, match="kernels must be one of 'auto'.* got 'fast'"):
        scaffold_config(kernels="fast")
    cfg = scaffold_config(kernels="reference")
    assert type(cfg).from_dict(cfg.to_dict()).kernels == "reference"  # type: ignore[attr-defined]
    assert scaffold_sae(kernels="reference").to_inference().cfg.kernels == "reference"


def test_triton_is_asked_for_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choice, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="pip install triton"):
        is_sparse(scaffold_sae(kernels="triton"))


@pytest.mark.parametrize(
    ("has_triton", "capability", "message"),
    [
        (False, (9, 0), "Triton is not installed"),
        (True, (6, 1), "does not support GeForce, which is too old"),
    ],
)
def test_on_cuda_without_triton_pytorch_s_operations_run_and_a_warning_says_so_once(
    has_triton: bool,
    capability: tuple[int, int],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv(choice.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(choice, "has_triton", lambda: has_triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GeForce")
    choice._warn_of_no_triton.cache_clear()
    with pytest.warns(UserWarning, match=message) as warned:
        for _ in range(3):
            ops = choice.choose_kernels("auto", torch.device("cuda"), worthwhile=True)
            assert ops is torch_ops
    assert len(warned) == 1


def test_elsewhere_dense_code_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(choice.ENVIRONMENT_VARIABLE, raising=False)
    assert choice.choose_kernels("auto", torch.device("mps"), worthwhile=True) is None


# ---- Adam


@pytest.mark.parametrize(
    ("kernels", "options", "fused"),
    [
        ("torch", {}, True),
        ("reference", {}, None),
        ("torch", {"foreach": True}, None),
        ("torch", {"fused": False}, False),
    ],
)
def test_adam_is_fused_unless_something_else_was_chosen(
    kernels: str, options: dict[str, Any], fused: bool | None
):
    sae = scaffold_sae(kernels=kernels)
    optimizer = torch.optim.Adam(sae.parameters(), **options)
    other = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    step(sae, activations(100), None).loss.backward()
    optimizer.step()
    other.step()
    assert optimizer.param_groups[0]["fused"] is fused
    assert other.param_groups[0]["fused"] is None


@pytest.mark.parametrize(
    ("dtype", "device_of_steps", "fused"),
    [
        # the same in one pass, which in bfloat16, rounded once, it is not
        ("bfloat16", "cpu", None),
        # those of a run that was begun in plain Adam, on a GPU, are on the CPU
        ("float32", "meta", None),
        ("float32", "cpu", True),
    ],
)
def test_adam_is_fused_where_that_is_the_same(
    dtype: str, device_of_steps: str, fused: bool | None
):
    sae = scaffold_sae(kernels="torch", dtype=dtype)
    optimizer = torch.optim.Adam(sae.parameters())
    step(sae, activations(100).to(sae.dtype), None)
    for p in sae.parameters():
        optimizer.state[p]["step"] = torch.zeros((), device=device_of_steps)
    _before_step(optimizer)
    assert optimizer.param_groups[0]["fused"] is fused


def test_a_run_that_was_begun_in_dense_code_is_continued_in_kernels(tmp_path: Any):
    first = scaffold_sae(kernels="reference")
    data = batches()
    trainer = trainer_for(first, 10, data)
    trainer.fit()
    trainer.save_checkpoint("half", base_path=tmp_path)
    continued = []
    for kernels in ("torch", "reference"):
        sae = scaffold_sae(kernels=kernels)
        trainer = trainer_for(sae, 20, batches())
        trainer.load_trainer_state(tmp_path / "half")
        sae.load_weights_from_checkpoint(tmp_path / "half")
        continued.append(trainer.fit())
    for name, value in continued[1].named_parameters():
        torch.testing.assert_close(
            continued[0].get_parameter(name), value, atol=1e-4, rtol=1e-4
        )


# ---- inference


@pytest.mark.parametrize("shape", [(50, D_IN), (3, 7, D_IN), (D_IN,)])
@pytest.mark.parametrize(
    "overrides", [{}, {"apply_b_dec_to_input": False}, {"dtype": "bfloat16"}], ids=str
)
def test_inference_is_that_of_the_reference(
    shape: tuple[int, ...], overrides: dict[str, Any]
):
    sparse = train(scaffold_sae(**overrides), steps=20).to_inference()
    # thresholds below 0 as well
    sparse.threshold.data[RANK::2] -= 3
    dense = copy.deepcopy(sparse)
    sparse.cfg.kernels, dense.cfg.kernels = "torch", "reference"
    x = activations(100).flatten()[: torch.Size(shape).numel()].view(shape)
    with torch.no_grad():
        acts = dense.encode(x)
        torch.testing.assert_close(sparse.encode(x), acts)
        for n_latents in (RANK, RANK + 2, D_SAE):
            few = acts.clone()
            few[..., n_latents:] = 0
            torch.testing.assert_close(sparse.decode(few), dense.decode(few))
        torch.testing.assert_close(sparse(x), dense(x))
    # gradients are those of every latent, active or not
    acts.requires_grad_()
    sparse.decode(acts).sum().backward()
    torch.testing.assert_close(acts.grad, sparse.W_dec.sum(1).expand(acts.shape))


def test_inference_with_run_time_normalisation():
    sae = scaffold_sae(normalize_activations="layer_norm", aux_loss_coefficient=0.0)
    sparse = train(sae, steps=20).to_inference()
    dense = copy.deepcopy(sparse)
    sparse.cfg.kernels, dense.cfg.kernels = "torch", "reference"
    # SAELens keeps its normalisation's functions on the SAE that made them
    dense._setup_activation_normalization()
    x = activations(100)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), dense(x))


def test_hooks_and_autocast_at_inference():
    sae = train(scaffold_sae(), steps=10).to_inference()
    dense = copy.deepcopy(sae)
    dense.cfg.kernels = "reference"
    x = activations(50)
    with torch.no_grad():
        with sae.hooks(fwd_hooks=[("hook_sae_acts_pre", zero)]):
            assert (sae.encode(x) == 0).all()
        with sae.hooks(fwd_hooks=[("hook_sae_recons", zero)]):
            assert (sae(x) == 0).all()
        acts = dense.encode(x)
        decoded = dense.decode(acts)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(sae.encode(x), dense.encode(x))
            torch.testing.assert_close(
                sae.decode(acts).float(), decoded, rtol=2e-2, atol=1e-1
            )


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.compile(f, backend="eager", fullgraph=True)(x),
        lambda f, x: torch.func.vmap(f)(x),
        lambda f, x: torch.func.jvp(f, (x,), (x,))[1],
        lambda f, x: tangent_of(f, x),
    ],
    ids=["compile", "vmap", "jvp", "forward-mode"],
)
def test_transformations_get_dense_code(transform: Any):
    sparse = train(scaffold_sae(), steps=10).to_inference()
    dense = copy.deepcopy(sparse)
    sparse.cfg.kernels, dense.cfg.kernels = "torch", "reference"
    x = activations(20)
    for part in (lambda sae: sae.encode, lambda sae: sae):
        with torch.no_grad():
            ours, theirs = (transform(part(sae), x) for sae in (sparse, dense))
        torch.testing.assert_close(ours, theirs)


def tangent_of(function: Any, x: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        output = function(forward_ad.make_dual(x, x))
        tangent = forward_ad.unpack_dual(output).tangent
    assert tangent is not None
    return tangent


def test_no_warning_is_given_on_a_cpu():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_sparse(scaffold_sae())
