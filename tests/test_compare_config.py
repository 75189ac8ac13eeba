"""The configuration of `saelens-scaffold compare`, and the SAEs that it means."""

import re
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.compare.config import (
    CompareConfig,
    ConfigChanged,
    check_unchanged,
    keep_config,
    read_config,
)
from saelens_scaffold.compare.grid import (
    check_training,
    runs_of,
)
from saelens_scaffold.compare.table import plan_text
from saelens_scaffold.compare.training import plan_waves
from saelens_scaffold.training.runner import initial_sae

CONFIG: dict[str, Any] = {
    "model_name": "py-neox",
    "hook_name": "blocks.0.hook_resid_post",
    "dataset_path": "python-stdlib",
    "sae": {"d_in": 256, "d_sae": 64, "matryoshka_widths": [16, 64]},
    "grid": {
        "architecture": ["batchtopk", "scaffold_batchtopk", "scaffold_matryoshka"],
        "k": [4, 8],
        "scaffold_rank": [2, 4],
        "seed": [0, 1],
    },
    "training": {
        "training_tokens": 4096,
        "train_batch_size_tokens": 1024,
        "context_size": 64,
    },
    "evaluations": {"dense_latents": {"n_tokens": 1000}, "core": None},
}


def config(**changes: Any) -> CompareConfig:
    return CompareConfig(**{**CONFIG, **changes})


def grid(**axes: Any) -> CompareConfig:
    sae = CONFIG["sae"]
    if axes.get("architecture") == ["batchtopk"]:
        sae = {name: sae[name] for name in ("d_in", "d_sae")}
        axes = {"scaffold_rank": None, **axes}
    whole = {**CONFIG["grid"], **axes}
    return config(sae=sae, grid={axis: v for axis, v in whole.items() if v is not None})


def test_every_combination_once_and_only_axes_that_an_architecture_has() -> None:
    runs = runs_of(config())
    # batchtopk has no rank: 2 k x 2 seeds; the scaffolds 2 k x 2 ranks x 2 seeds each
    assert len(runs) == 4 + 8 + 8
    assert len({run.name for run in runs}) == len(runs)
    (run,) = (r for r in runs if r.name == "batchtopk-k_8-seed_1")
    assert run.config.architecture() == "batchtopk"
    assert (run.config.d_sae, run.config.k) == (64, 8)  # type: ignore[attr-defined]
    assert run.arm.label == "batchtopk k=8"
    assert not hasattr(run.config, "scaffold_rank")
    (run,) = (
        r for r in runs if r.name == "scaffold_matryoshka-k_4-scaffold_rank_2-seed_0"
    )
    assert run.config.matryoshka_widths == [16, 64]  # type: ignore[attr-defined]
    assert run.scaffold_rank == 2
    assert run.nominal_l0_total == 4 + 2


def test_same_seed_same_weights() -> None:
    runs = {run.name: run for run in runs_of(grid(scaffold_rank=[2]))}

    def initial(name: str) -> Any:
        return initial_sae(runs[name].config, runs[name].seed)

    plain = initial("batchtopk-k_4-seed_0")
    twin = initial("scaffold_batchtopk-k_8-scaffold_rank_2-seed_0")
    other = initial("batchtopk-k_4-seed_1")
    assert torch.equal(plain.W_dec, twin.W_dec)
    assert torch.equal(plain.W_enc, twin.W_enc)
    assert not torch.equal(plain.W_dec, other.W_dec)


def test_kernels_of_plain_saes_are_a_field_of_all() -> None:
    sae = {"d_in": 256, "d_sae": 64}
    plain = {"architecture": ["batchtopk"], "k": [4]}
    (run,) = runs_of(config(sae={**sae, "kernels": "reference"}, grid=plain))
    assert not hasattr(run.config, "kernels")
    with pytest.raises(UserError, match="kernels must be one of 'auto', .*got 'dense'"):
        runs_of(config(sae={**sae, "kernels": "dense"}, grid=plain))


def test_fields_of_the_runner_and_hook_points_are_axes_too(tmp_path: Path) -> None:
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    runs = runs_of(
        grid(
            architecture=["batchtopk"],
            k=[4],
            lr=[1e-3, 1e-4],
            hook_name=hooks,
            seed=[0],
        )
    )
    assert {(run.hook_name, run.training["lr"]) for run in runs} == {
        (hook, lr) for hook in hooks for lr in (1e-3, 1e-4)
    }
    # one learning rate to a runner, both hook points on one pass of the language model
    waves = plan_waves(tmp_path, tmp_path, runs)
    assert [[run.training["lr"] for run in wave] for wave in waves] == [
        [1e-3, 1e-3],
        [1e-4, 1e-4],
    ]
    assert [len(wave) for wave in plan_waves(tmp_path, tmp_path, runs, 1)] == [1] * 4


def test_plain_saes_start_at_the_mean_unless_told_otherwise() -> None:
    centred = {run.name: run.centre_b_dec for run in runs_of(config())}
    assert centred["batchtopk-k_4-seed_0"]
    assert not centred["scaffold_batchtopk-k_4-scaffold_rank_2-seed_0"]
    both = runs_of(grid(architecture=["batchtopk"], b_dec_init=["mean", "zeros"]))
    assert {run.centre_b_dec for run in both} == {True, False}
    assert not any(run.centre_b_dec for run in runs_of(config(b_dec_init="zeros")))
    # a scaffold starts there itself only if it is there, and started by PCA
    inits = {"scaffold_rank": [0, 2], "scaffold_init": ["pca", "random", "zeros"]}
    scaffolds = runs_of(grid(architecture=["scaffold_matryoshka"], k=[4], **inits))
    assert {
        (run.scaffold_rank, run.arm.axes["scaffold_init"])
        for run in scaffolds
        if not run.centre_b_dec
    } == {(2, "pca")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {"k": [4]}}, "architecture"),
        (
            {"grid": {"architecture": ["batchtopk"], "k": []}},
            "grid.k is []: List should have at least 1 item",
        ),
        (
            {"training": {"learning_rate": 1.0}},
            "there is no field of training 'learning_rate'",
        ),
        (
            {"training": {"save_final_checkpoint": True}},
            "field of training 'save_final_che",
        ),
        (
            {"grid": {"architecture": ["topk"], "k": [4, 4.0]}},
            "grid.k is [4, 4.0]: Value error, it has the value 4.0 twice",
        ),
        ({"training": {"trainng_tokens": 1}}, "did you mean 'training_tokens'"),
        ({"sae": {"d_in": 256, "k": 4}}, "k is in the grid and fixed as well"),
        (
            {"evaluations": {}},
            "evaluations is {}: Dictionary should have at least 1 item",
        ),
        (
            {"evaluation_seeds": []},
            "evaluation_seeds is []: List should have at least 1",
        ),
        ({"saes_per_wave": 0}, "saes_per_wave is 0: Input should be greater than 0"),
        ({"confidence": 1.5}, "confidence is 1.5"),
        ({"confidence": "much"}, "confidence is 'much'"),
        ({"b_dec_init": "median"}, "b_dec_init is 'median'"),
        ({"hook_nam": "x"}, "hook_nam"),
        ({"evaluation_data": {"data": "x"}}, "evaluation_data.data"),
    ],
)
def test_bad_fields_are_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump({**CONFIG, **changes}))
    with pytest.raises(ValueError) as raised:
        read_config(file)
    assert message in str(raised.value)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"architecture": ["batch_topk"]}, "did you mean 'batchtopk'"),
        ({"scafold_rank": [2]}, "did you mean 'scaffold_rank'"),
        ({"scaffold_rank": [64]}, "scaffold_rank must be from 0 to 63"),
        ({"seed": ["one"]}, "seed must be an int, got 'one'"),
        ({"seed": [True]}, "seed must be an int, got True"),
        ({"k": ["many"]}, "batchtopk k=many"),
        ({"b_dec_init": ["median"]}, "b_dec_init must be 'mean' or 'zeros'"),
    ],
)
def test_combinations_that_make_no_sae_are_named(
    axes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as raised:
        runs_of(grid(**axes))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name": "no-such-model"}, "there is no language model 'no-such-model'"),
        (
            {"hook_name": "blocks.7.hook_resid_post"},
            "names layer 7; py-neox has layers 0 to 3",
        ),
        (
            {"sae": {"d_in": 128, "d_sae": 64, "matryoshka_widths": [16, 64]}},
            "d_in is 128",
        ),
        (
            {"training": {**CONFIG["training"], "training_tokens": 0}},
            "training_tokens is 0; it must be at least train_batch_size_tokens",
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
                ("train_batch_size_tokens", 0, "train_batch_size_tokens is 0; it must"),
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
        check_training(changed, runs_of(changed))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("- a", "must be a mapping"),
        ("model_name: x", "the field hook_name is missing"),
    ],
)
def test_files_that_are_no_configuration(
    text: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "experiment.yaml"
    with pytest.raises(UserError, match="there is no configuration"):
        read_config(file)
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(file)


def test_numbers_are_numbers_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(CONFIG) + "confidence: 9e-1\ntitle: 1e-3x\n")
    read = read_config(file)
    assert (read.confidence, read.title) == (0.9, "1e-3x")


def test_long_values_make_names_that_files_can_have() -> None:
    plugins: list[dict[str, Any]] = [
        {},
        {"live_metrics": {"window": 200}, "decorrelation": {"coefficient": 0.1}},
    ]
    plugins.append({**plugins[1], "orthonormal_decoder": {}})
    names = [run.name for run in runs_of(grid(scaffold_plugins=plugins))]
    assert len(set(names)) == len(names) == 4 + 3 * 16
    assert max(map(len, names)) < 200


def test_what_is_kept_is_read_as_the_same_and_a_change_is_refused(
    tmp_path: Path,
) -> None:
    kept = tmp_path / "experiment" / "compare.yaml"
    keep_config(config(), kept)
    assert read_config(kept) == config()
    check_unchanged(read_config(kept), kept)
    changed = config(sae={**CONFIG["sae"], "d_sae": 128})
    with pytest.raises(ValueError) as raised:
        check_unchanged(changed, kept)
    assert "-  d_sae: 64" in str(raised.value)
    assert "+  d_sae: 128" in str(raised.value)
    assert yaml.safe_load(kept.read_text()) == asdict(config())


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ({"sae": dict(reversed([*CONFIG["sae"].items()]))}, True),
        ({"training": dict(reversed([*CONFIG["training"].items()]))}, True),
        ({"title": "Another", "confidence": 0.9, "evaluations": {"core": None}}, True),
        ({"baselines": {}, "evaluation_seeds": [7]}, True),
        # names of SAEs follow the axes' order
        ({"grid": dict(reversed([*CONFIG["grid"].items()]))}, False),
        ({"b_dec_init": "zeros"}, False),
        ({"dataset_path": "./other.jsonl"}, False),
    ],
)
def test_only_what_decides_the_training_is_held_fast(
    changes: dict[str, Any], is_same: bool, tmp_path: Path
) -> None:
    keep_config(config(), tmp_path / "compare.yaml")
    expected = nullcontext() if is_same else pytest.raises(ConfigChanged)
    with expected:
        check_unchanged(config(**changes), tmp_path / "compare.yaml")


def test_what_will_be_compared_with_what() -> None:
    said = plan_text(config(), runs_of(config()), []).splitlines()
    k4 = (
        "batchtopk k=4 (same k), "
        "batchtopk (same l0_total, interpolated between k=4 and 8)"
    )
    assert f"  scaffold_batchtopk k=4 scaffold_rank=2 with {k4}" in said
    k8 = (
        "batchtopk k=8 (same k), batchtopk (out of range, l0_total 10.0 is not within "
        "4.0 to 8.0: train batchtopk with k=10)"
    )
    assert f"  scaffold_batchtopk k=8 scaffold_rank=2 with {k8}" in said
    narrow = plan_text(config(max_bracket=1.5), runs_of(config()), [])
    assert "bracket too wide, k=4 (l0_total 4.0) and k=8 (l0_total 8.0)" in narrow
    matryoshka = "scaffold_matryoshka k=4 scaffold_rank=2"
    assert f"  {matryoshka} with nothing: it has no partner" in said
    alone = grid(architecture=["scaffold_matryoshka"])
    assert "none, as the grid has no SAE together with its baseline" in plan_text(
        alone, runs_of(alone), []
    )


@pytest.mark.sae_bench
def test_experiments_that_come_with_the_project_make_sense() -> None:
    with pytest.raises(UserError) as error:
        read_config("paper/another")
    names = re.findall(r"paper/[\w-]+", str(error.value).partition(";")[2])
    assert {"paper/py-neox", "paper/gemma-2-2b-layer-12"} <= {*names}
    for name in names:
        experiment = read_config(name)
        architectures = {run.arm.architecture for run in runs_of(experiment)}
        assert {"scaffold_batchtopk", "scaffold_matryoshka"} < architectures
        # every figure of the abstract of arXiv 2606.14040
        published = {figure.value for figure in experiment.reference}
        assert published == {
            *("up to -84 %", "x 7.5", "x 2.8", "x 2.9", "98.7 %", "chance"),
            *("virtually unchanged", "improves", "no number"),
        }
