"""`saelens-scaffold export`: checkpoints become SAEs that compute what was trained."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from safetensors.torch import load_file, save_file

from saelens_scaffold import (
    ResumableTrainingRunner,
    ScaffoldBatchTopKTrainingSAEConfig,
    ScaffoldMatryoshkaTrainingSAEConfig,
    load_scaffold_sae,
)
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.models import load_embedded_model, load_stdlib_text
from saelens_scaffold.saes.runner_config import n_sparsity_tokens
from saelens_scaffold.saes.validation import InvalidSAEError
from saelens_scaffold.training.export import export_checkpoint
from saelens_scaffold_cli import main

HOOK = "blocks.1.hook_resid_post"
D_IN, D_SAE, RANK, K = 256, 128, 4, 8
WEIGHTS = "sae_weights.safetensors"
SAE_FIELDS: dict[str, Any] = {
    "d_in": D_IN,
    "d_sae": D_SAE,
    "normalize_activations": "expected_average_only_in",
}
TOP_K: dict[str, Any] = {**SAE_FIELDS, "k": K, "topk_threshold_lr": 0.2}
SCAFFOLD: dict[str, Any] = {**TOP_K, "scaffold_rank": RANK}
RUNNER: dict[str, Any] = {
    "model_name": "py-neox",
    "dataset_path": "python-stdlib",
    "streaming": False,
    "context_size": 64,
    "n_batches_in_buffer": 16,
    "store_batch_size_prompts": 8,
    "training_tokens": 16 * 512,
    "train_batch_size_tokens": 512,
    # as evaluations
    "exclude_special_tokens": True,
    "lr": 1e-3,
    "n_batches_for_norm_estimate": 2,
    "n_checkpoints": 1,
    "save_final_checkpoint": True,
    "logger": LoggingConfig(log_to_wandb=False),
}
SAES: dict[str, Any] = {
    "scaffold": ScaffoldBatchTopKTrainingSAEConfig(**SCAFFOLD),
    "activation": ScaffoldBatchTopKTrainingSAEConfig(
        **SCAFFOLD, sparse_encoder_input="activation", calibrate_threshold=False
    ),
    "nested": ScaffoldMatryoshkaTrainingSAEConfig(
        **SCAFFOLD, matryoshka_widths=[32, D_SAE]
    ),
    "batchtopk": BatchTopKTrainingSAEConfig(**TOP_K),
    "unscaled norms": BatchTopKTrainingSAEConfig(
        **TOP_K, rescale_acts_by_decoder_norm=False
    ),
    "topk": TopKTrainingSAEConfig(**SAE_FIELDS, k=K),
    "jumprelu": JumpReLUTrainingSAEConfig(**SAE_FIELDS),
    "standard": StandardTrainingSAEConfig(**SAE_FIELDS),
    "whitened": BatchTopKTrainingSAEConfig(
        **{**TOP_K, "normalize_activations": "covariance_whitening"}
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SAEs of many architectures, trained by SAELens, with checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    MultiSAETrainingRunner(
        MultiSAETrainingRunnerConfig(
            saes=copy.deepcopy(SAES),  # folding changes them
            hook_names=HOOK,
            checkpoint_path=str(folder / "checkpoints"),
            output_path=str(folder / "saes"),
            **RUNNER,
        ),
        override_dataset=load_stdlib_text("train"),
        override_model=load_embedded_model(),
    ).run()
    return folder


def checkpoint_of(folder: Path, name: str, final: bool = False) -> Path:
    pattern = "final_*" if final else "[0-9]*"
    (found,) = folder.glob(f"checkpoints/*/{pattern}/{name}")
    return found


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    """Activations that the language model has, and SAEs read: at no other scale."""
    model = load_embedded_model()
    texts = load_stdlib_text("test")[:8]["text"]
    tokens = model.to_tokens(texts, prepend_bos=False)[:, :64]
    _, cache = model.run_with_cache(tokens, names_filter=HOOK)
    return cache[HOOK].flatten(0, 1)


def reference(checkpoint: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and reconstruction of a checkpoint in plain torch, in double precision."""
    w = {k: v.double() for k, v in load_file(checkpoint / WEIGHTS).items()}
    cfg = json.loads((checkpoint / "cfg.json").read_text())
    scale = json.loads((checkpoint / "activation_scaler.json").read_text())
    x = x.double()
    if scale["has_whitening"]:
        white = load_file(checkpoint / "activation_whitening.safetensors")
        y = (x - white["mean"]) @ white["matrix"]
    else:
        y = x * scale["scaling_factor"]
    r = cfg.get("scaffold_rank", 0)
    A, B = w["W_enc"][:, :r], w["W_dec"][:r]
    y_bar = y - w["b_dec"] * cfg["apply_b_dec_to_input"]
    z = y_bar @ A
    read = y_bar - z @ B if cfg.get("sparse_encoder_input") == "residual" else y_bar
    h = read @ w["W_enc"][:, r:] + w["b_enc"][r:]
    norms = w["W_dec"][r:].norm(dim=1)
    rescales = cfg.get("rescale_acts_by_decoder_norm", False)
    selected = h * norms if rescales else h
    if cfg["architecture"] == "topk":
        least = selected.topk(K, dim=1).values[:, -1:]
        fires = (selected >= least) & (h > 0)
    elif "topk" in cfg["architecture"] or "matryoshka" in cfg["architecture"]:
        threshold = w["topk_threshold"]
        if (calibrated := w.get("calibrated_threshold", threshold)) >= 0:
            threshold = calibrated
        fires = (selected > threshold) & (h > 0)
    else:
        fires = (h > w.get("threshold", torch.zeros(()))) & (h > 0)
    f = h * fires
    out = z @ B + f @ w["W_dec"][r:] + w["b_dec"]
    if scale["has_whitening"]:
        out = out @ white["inverse_matrix"] + white["mean"]
    else:
        out = out / scale["scaling_factor"]
    return torch.cat([z, f], dim=1), out


@pytest.mark.parametrize("name", SAES)
def test_an_exported_checkpoint_computes_what_its_tensors_say(
    name: str, folder: Path, x: torch.Tensor, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(folder, name)
    export_checkpoint(checkpoint, tmp_path / "sae")

    sae: Any = load_scaffold_sae(tmp_path / "sae")
    with torch.no_grad():
        acts = sae.encode(x).to_dense().double()
        out = sae.decode(acts.float()).double()
    expected_acts, expected_out = reference(checkpoint, x)
    assert torch.equal(acts != 0, expected_acts != 0)
    assert expected_acts.count_nonzero() > len(x)
    # latents have no scale but that of what they write
    norms = load_file(checkpoint / WEIGHTS)["W_dec"].double().norm(dim=1)
    written = acts * sae.W_dec.detach().double().norm(dim=1)
    if name != "whitened":
        scaler = json.loads((checkpoint / "activation_scaler.json").read_text())
        expected = expected_acts * norms / scaler["scaling_factor"]
        torch.testing.assert_close(written, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out, expected_out, rtol=1e-3, atol=1e-3)
    assert sae.cfg.normalize_activations == "none"


@pytest.mark.parametrize("name", SAES)
def test_a_final_checkpoint_is_the_saved_sae(
    name: str, folder: Path, tmp_path: Path
) -> None:
    export_checkpoint(checkpoint_of(folder, name, final=True), tmp_path / "sae")
    saved = load_file(folder / "saes" / name / WEIGHTS)
    exported = load_file(tmp_path / "sae" / WEIGHTS)
    assert saved.keys() == exported.keys()
    for tensor in saved:
        torch.testing.assert_close(exported[tensor], saved[tensor], rtol=1e-6, atol=0)


def test_metadata_that_a_checkpoint_lacks_are_those_of_the_runner(
    folder: Path, tmp_path: Path
) -> None:
    whole = json.loads((checkpoint_of(folder, "scaffold") / "cfg.json").read_text())
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(checkpoint_of(folder, "scaffold").parent, checkpoints)
    cfg = {**whole, "metadata": {"sae_lens_version": "6.0.0"}}
    (checkpoints / "scaffold" / "cfg.json").write_text(json.dumps(cfg))

    sae = export_checkpoint(checkpoints / "scaffold", tmp_path / "sae")
    for field in ("model_name", "hook_name", "context_size", "exclude_special_tokens"):
        assert sae.cfg.metadata[field] == whole["metadata"][field] is not None
    # the folder of all SAEs has the configuration of their runner
    assert n_sparsity_tokens({}, folder / "saes" / "scaffold") == 16 * 512
    assert n_sparsity_tokens({}, folder / "saes") is None
    details = sae.cfg.metadata.training_architecture_details
    assert details["k"] == K and details["topk_threshold_lr"] == 0.2


@pytest.mark.parametrize("form", ["jumprelu", "sparse"])
def test_plain_forms(form: Any, folder: Path, x: torch.Tensor, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(folder, "scaffold")
    plain = export_checkpoint(checkpoint, tmp_path / "plain", form)
    assert plain.cfg.architecture() == "jumprelu"
    acts, out = reference(checkpoint, x)
    with torch.no_grad():
        if form == "jumprelu":
            torch.testing.assert_close(plain(x).double(), out, rtol=1e-3, atol=1e-3)
        fires = plain.encode(x)[:, 2 * RANK if form == "jumprelu" else 0 :] != 0
    assert torch.equal(fires, acts[:, RANK:] != 0)

    saved, again = str(tmp_path / "saved"), str(tmp_path / "again")
    export_checkpoint(checkpoint, saved)
    assert main(["export", saved, again]) == 2
    assert main(["export", saved, again, f"--form={form}"]) == 0
    weights = load_file(tmp_path / "again" / WEIGHTS)
    assert weights.keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(weights[name], value), name
    for plain_already in (again, str(checkpoint_of(folder, "topk"))):
        assert (
            main(["export", plain_already, str(tmp_path / "x"), "--form=sparse"]) == 2
        )

    with pytest.raises(UserError, match="form 'sparse' is of scaffold SAEs"):
        export_checkpoint(checkpoint_of(folder, "topk"), tmp_path / "x", "sparse")
    assert not (tmp_path / "x").exists()


def test_train_export_and_evaluate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    ResumableTrainingRunner(
        LanguageModelSAERunnerConfig(
            sae=copy.deepcopy(SAES["scaffold"]),
            hook_name=HOOK,
            checkpoint_path=str(tmp_path / "checkpoints"),
            output_path=None,
            **{**RUNNER, "training_tokens": 40 * 512},
        ),
        override_dataset=load_stdlib_text("train"),
        override_model=load_embedded_model(),
    ).run()
    (checkpoint,) = tmp_path.glob("checkpoints/*/[0-9]*")
    capsys.readouterr()

    assert main(["export", str(checkpoint), str(tmp_path / "sae")]) == 0
    said = capsys.readouterr().out
    assert f"scaffold_rank {RANK}, k {K}, the activations' scale of 0." in said
    assert "Its threshold is calibrated on 10,752 tokens of the training." in said
    assert main(["export", str(checkpoint), str(tmp_path / "sae")]) == 2
    assert "exists already" in capsys.readouterr().err

    evaluate = ["eval", "dense_latents", "--sae_path", str(tmp_path / "sae")]
    evaluate += ["--dataset", "python-stdlib", "--output_path", str(tmp_path / "out")]
    assert main([*evaluate, "--set", "dense_latents.n_tokens=10000"]) == 0
    (file,) = (tmp_path / "out" / "dense_latents").glob("*.json")
    metrics = json.loads(file.read_text())["eval_result_metrics"]
    # without the scale most latents would fire; how many do depends on the text
    assert K / 2 < metrics["sparsity"]["l0_sparse"] < 2 * K


def test_what_is_not_calibrated_or_not_known_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(checkpoint_of(folder, "batchtopk"), tmp_path / "own")
    cfg = json.loads((tmp_path / "own" / "cfg.json").read_text())
    # as SAETrainer saves it, which knows no language model
    del cfg["metadata"]["model_name"]
    (tmp_path / "own" / "cfg.json").write_text(json.dumps(cfg))

    assert main(["export", str(tmp_path / "own"), str(tmp_path / "sae")]) == 0
    said = capsys.readouterr()
    assert "the training's running average, not calibrated" in said.out
    assert said.err == "model_name is not known; set it in cfg.json\n"
    sae = load_scaffold_sae(tmp_path / "sae")
    assert sae.cfg.metadata.threshold_calibration["estimator"] == "running_average"


# --- what cannot be used as it is ---


def refusals(directory: Path) -> list[Any]:
    """Everything that takes an SAE, with an SAE that it must refuse."""
    from saelens_scaffold import upload_scaffold_saes
    from saelens_scaffold.evals.rank import suggest_rank
    from saelens_scaffold.evals.saes import load_saes, resolve_saes

    path = str(directory)
    return [
        lambda: load_scaffold_sae(path),
        lambda: resolve_saes(load_saes([path]), "cpu", "float32"),
        lambda: suggest_rank(sae_path=path, dataset="python-stdlib", output_path="x"),
        lambda: upload_scaffold_saes(path, "user/saes", dry_run=True),
    ]


@pytest.mark.parametrize("name", ["scaffold", "batchtopk", "standard", "whitened"])
@pytest.mark.parametrize("advised", [False, True])
def test_nothing_takes_an_sae_whose_scale_is_missing(
    name: str, advised: bool, folder: Path, tmp_path: Path
) -> None:
    """Whether a checkpoint, or what `save_inference_model` makes of one."""
    directory = checkpoint_of(folder, name)
    if advised:
        TrainingSAE.load_from_disk(directory).save_inference_model(tmp_path / "sae")
        directory = tmp_path / "sae"
    for use in refusals(directory):
        with pytest.raises(InvalidSAEError, match="saelens-scaffold export") as error:
            use()
        assert "\n" not in str(error.value)


def test_saes_in_memory_whose_scale_is_missing_are_refused(folder: Path) -> None:
    from saelens_scaffold import upload_scaffold_saes
    from saelens_scaffold.evals.saes import resolve_saes

    for name in "scaffold", "batchtopk":
        sae = TrainingSAE.load_from_disk(checkpoint_of(folder, name))
        for use in (
            lambda sae=sae: resolve_saes([("a", sae)], "cpu", "float32"),
            lambda sae=sae: upload_scaffold_saes({"a": sae}, "user/saes", dry_run=True),
        ):
            with pytest.raises(InvalidSAEError, match="SAE 'a': normalize_activations"):
                use()


def test_what_a_broken_checkpoint_lacks_is_said(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"

    def said(**files: Any) -> str:
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(checkpoint_of(folder, "scaffold"), broken)
        for name, change in files.items():
            (file,) = broken.glob(f"{name}.*")
            change(file)
        with pytest.raises(UserError) as error:
            export_checkpoint(broken, tmp_path / "sae")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]
        assert str(broken) in str(error.value)
        return str(error.value)

    def scale(value: object) -> Any:
        return lambda file: file.write_text(json.dumps({"scaling_factor": value}))

    def with_weights(**changed: torch.Tensor) -> Any:
        return lambda file: save_file({**load_file(file), **changed}, file)

    for lose in scale(None), Path.unlink:
        assert "no activation_scaler.json with the scale" in said(
            activation_scaler=lose
        )
    for value in 0, -1.0, float("nan"), "1", True:
        assert f"scaling_factor is {value!r}" in said(activation_scaler=scale(value))
    assert "JSON" in said(activation_scaler=lambda f: f.write_text("{"))
    assert WEIGHTS in said(sae_weights=lambda f: f.unlink())
    assert "Error" in said(sae_weights=lambda f: f.write_bytes(b"no weights"))
    assert "b_dec" in said(sae_weights=with_weights(b_dec=torch.zeros(3)))
    nan = torch.full((D_IN,), torch.nan)
    assert "b_dec has values" in said(sae_weights=with_weights(b_dec=nan))
