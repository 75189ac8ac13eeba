"""Estimates of memory, and the waves that follow from them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sae_bench")

from saelens_scaffold.compare.grid import runs_of  # noqa: E402
from saelens_scaffold.compare.memory import Estimate, estimate  # noqa: E402
from test_compare_config import CONFIG, config, grid  # noqa: E402

RUNS = runs_of(config())


@given(
    st.lists(st.integers(1, 100), min_size=len(RUNS), max_size=len(RUNS)),
    st.integers(0, 50),
    st.integers(1, 400),
)
def test_every_sae_is_in_one_wave_and_every_wave_fits(
    sizes: list[int], shared: int, available: int
) -> None:
    per_sae = {run.name: size for run, size in zip(RUNS, sizes, strict=True)}
    needs = Estimate(per_sae, shared, llm_flops=1, sae_flops={})
    if max(sizes) + shared > available:
        with pytest.raises(ValueError, match="--memory_gb"):
            needs.waves(RUNS, available)
        return
    waves = needs.waves(RUNS, available)
    assert [run for wave in waves for run in wave] == RUNS
    for wave, following in zip(waves, [*waves[1:], None], strict=True):
        used = shared + sum(per_sae[run.name] for run in wave)
        assert used <= available
        if following is not None:  # and no wave could have been larger
            assert used + per_sae[following[0].name] > available


def test_estimate_counts_weights_and_operations() -> None:
    (run,) = runs_of(grid(architecture=["batchtopk"], k=[4], seed=[0]))
    needs = estimate(config(), [run])
    weights = 2 * 256 * 64 + 64 + 256
    # weights, gradients, and Adam's two moments, in float32; and what SAELens keeps of a
    # step, pre-activations and activations of a batch of 1,024 tokens
    assert needs.per_sae == {run.name: 4 * 4 * weights + 2 * 4 * 1024 * 64}
    assert needs.sae_flops == {run.name: 6.0 * weights * 4096}
    # py-neox has 4 layers, of which the first is run, and 2 operations a weight and token
    per_layer = 4 * 256 * 256 + 2 * 256 * 1024
    assert needs.llm_flops == pytest.approx(2 * per_layer * 4096, rel=0.01)
    assert needs.seconds([[run]], tflops=1e-6) == pytest.approx(
        (needs.llm_flops + needs.sae_flops[run.name]) / 1e6
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name": "no-such-model"}, "there is no language model 'no-such-model'"),
        (
            {"hook_name": "blocks.7.hook_resid_post"},
            "layer 7; py-neox has the layers 0 to 3",
        ),
        (
            {"sae": {"d_in": 128, "d_sae": 64, "matryoshka_widths": [16, 64]}},
            "d_in is 128",
        ),
        (
            {"training": {**CONFIG["training"], "training_tokens": 0}},
            "training_tokens is 0: Input should be greater than or equal to 1",
        ),
        ({"training": {"lr_scheduler_name": 3, "context_size": "x"}}, "context_size"),
        *(
            ({"training": {**CONFIG["training"], field: value}}, message)
            for field, value, message in (
                ("dtype", "floaty", "dtype is 'floaty': Value error, Invalid dtype"),
                (
                    "model_from_pretrained_kwargs",
                    {"dtype": "floaty"},
                    "model_from_pretrained_kwargs has the dtype 'floaty'; allowed are",
                ),
                ("n_checkpoints", "many", "n_checkpoints is 'many': Input should be"),
                ("adam_beta1", 2.0, "adam_beta1 is 2.0: Input should be less than 1"),
                ("activations_mixing_fraction", 7, "activations_mixing_fraction is 7"),
                ("lr", float("nan"), "lr is nan"),
                ("lr_warm_up_steps", 5, "lr_warm_up_steps is 5 and lr_decay_steps 0"),
                ("training_tokens", 1000, "at least train_batch_size_tokens"),
                ("prepend_bos", 1, "prepend_bos is 1: Input should be a valid bool"),
            )
        ),
    ],
)
def test_what_cannot_be_trained_is_said_before(
    changes: dict[str, Any], message: str
) -> None:
    changed = config(**changes)
    with pytest.raises(ValueError) as raised:
        estimate(changed, runs_of(changed))
    assert message in str(raised.value)


def test_the_largest_runner_of_all_must_fit() -> None:
    def shared(sizes: list[int], **more: Any) -> int:
        training = {**CONFIG["training"], **more}
        changed = config(
            training=training, grid={**CONFIG["grid"], "n_batches_in_buffer": sizes}
        )
        return estimate(changed, runs_of(changed)).shared

    small, large = shared([32]), shared([3200])
    assert shared([32, 3200]) == shared([3200, 32]) == large
    # three copies of so many more sequences of 64 tokens, of dimension 256, in float32
    assert large - small == 3 * (3200 - 32) * 64 * 256 * 4
    half = {"model_from_pretrained_kwargs": {"dtype": "bf16"}}
    assert shared([32], **half) < small
