"""A scaffold for an SAE that exists, against plain PyTorch on all tokens in memory."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from eval_helpers import D_MODEL, HOOK, eval_sae, write_texts
from helpers import D_IN, D_SAE, activations, scaffold_sae, train
from saelens_scaffold import ScaffoldJumpReLUSAE, absorb, load_scaffold_sae
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.dense_latents import DenseLatentsEvalConfig
from saelens_scaffold.evals.runner import run_eval
from saelens_scaffold.evals.saes import load_saes
from saelens_scaffold.models import load_stdlib_text
from saelens_scaffold.saes.absorption import (
    absorb_scaffold,
    jumprelu_form,
)
from saelens_scaffold.saes.facts import weights_sha256
from saelens_scaffold_cli import main

CLASSES: dict[str, tuple[Any, Any]] = {
    "standard": (StandardSAE, StandardSAEConfig),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
    "gated": (GatedSAE, GatedSAEConfig),
    "topk": (TopKSAE, TopKSAEConfig),
}


def plain_sae(architecture: str, seed: int = 0, **fields: Any) -> SAE[Any]:
    """An untrained SAE whose every weight matters."""
    sae_class, cfg_class = CLASSES[architecture]
    metadata = SAEMetadata(model_name="py-neox", hook_name=fields.pop("hook_name", "h"))
    cfg = cfg_class(**{"d_in": D_IN, "d_sae": D_SAE, "metadata": metadata, **fields})
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    sae = sae_class(cfg)
    with torch.no_grad():
        for name, of in sae.named_parameters():
            of.copy_(torch.randn(of.shape, generator=g) * of.std().nan_to_num(0.3))
            if name != "W_enc":
                of.add_(0.2 * torch.randn(of.shape, generator=g))
        if architecture == "jumprelu":
            sae.threshold.abs_()
    return sae


def optimum(x: torch.Tensor, error: torch.Tensor, rank: int) -> torch.Tensor:
    """Predictions of reduced-rank regression with an intercept, by SVD in float64."""
    x, error = x.double(), error.double()
    inputs = torch.cat([x - x.mean(0), torch.ones(len(x), 1)], dim=1)
    fitted = inputs @ torch.linalg.lstsq(inputs, error).solution
    mean = error.mean(0)
    u, s, vh = torch.linalg.svd(fitted - mean, full_matrices=False)
    return mean + u[:, :rank] * s[:rank] @ vh[:rank]


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_it_adds_the_optimum_of_reduced_rank_regression(
    architecture: str, apply_b_dec_to_input: bool
):
    sae = plain_sae(architecture, apply_b_dec_to_input=apply_b_dec_to_input)
    x = activations(1000)
    before = sae(x).detach()
    for rank in 0, 1, 5:
        absorbed = absorb_scaffold(sae, x.split(64), rank)
        assert absorbed.cfg.scaffold_rank == rank
        expected = before + optimum(x, x - before, rank)
        assert torch.allclose(absorbed(x).double(), expected, atol=1e-4)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_the_dictionary_stays_as_it_is(architecture: str, apply_b_dec_to_input: bool):
    sae = plain_sae(architecture, apply_b_dec_to_input=apply_b_dec_to_input)
    x = activations(1000)
    acts = sae.encode(x)
    absorbed = absorb_scaffold(sae, [x], rank=3)
    assert torch.allclose(absorbed.encode(x)[:, 3:], acts, atol=1e-4)
    assert ((absorbed.encode(x)[:, 3:] > 0) == (acts > 0)).float().mean() > 0.9999
    assert torch.equal(absorbed.W_dec[3:], sae.W_dec)
    assert torch.allclose(absorbed.to_jumprelu()(x), absorbed(x), atol=1e-4)
    assert torch.allclose(absorbed.sparse_sae().encode(x), acts, atol=1e-4)
    assert torch.allclose(absorbed.encode(x)[:, :3].mean(0), torch.zeros(3), atol=1e-3)


@pytest.mark.parametrize("rescale", [True, False])
def test_topk_becomes_a_threshold_at_which_k_latents_fire(rescale: bool):
    sae = plain_sae("topk", k=4, rescale_acts_by_decoder_norm=rescale)
    x = activations(2000)
    with pytest.raises(UserError, match="give activations to calibrate"):
        absorb_scaffold(sae, [x], rank=2)
    form = jumprelu_form(sae, x)
    acts, own = form.encode(x), sae.encode(x)
    # the activations of whatever fires in both are those of the SAE
    norms = sae.W_dec.norm(dim=1) if rescale else torch.ones(D_SAE)
    in_both = (acts > 0) & (own > 0)
    assert in_both.sum() > 0.5 * (own > 0).sum()
    assert torch.allclose(acts[in_both], own[in_both], atol=1e-4)
    assert torch.allclose(form.W_dec * norms[:, None], sae.W_dec, atol=1e-5)
    assert (acts > 0).sum() == 4 * len(x)
    metadata: Any = form.cfg.metadata
    assert metadata.k == 4 and metadata.threshold_calibration["n_tokens"] == len(x)

    absorbed = absorb_scaffold(sae, [x], rank=2, calibration=x)
    expected = form(x) + optimum(x, x - form(x), 2)
    assert torch.allclose(absorbed(x).double(), expected, atol=1e-4)


@pytest.mark.parametrize("norm", ["constant_norm_rescale", "layer_norm"])
def test_with_run_time_normalisation_the_normalised_errors_count(norm: Any):
    sae = plain_sae("jumprelu", normalize_activations=norm)
    x = activations(1000) * torch.linspace(0.5, 5, 1000)[:, None]
    before = sae(x).detach()
    # normalised activations have sum 0, up to rounding
    exact = x.double()
    mean, size = torch.zeros(1), exact.norm(dim=1, keepdim=True) / D_IN**0.5
    if norm == "layer_norm":
        mean, size = exact.mean(1, keepdim=True), exact.std(1, keepdim=True)
    absorbed = absorb_scaffold(sae, x.split(100), rank=4)
    expected = optimum((exact - mean) / size, (exact - before) / size, 4) * size
    assert torch.allclose(absorbed(x).double(), before + expected, atol=1e-2, rtol=1e-3)
    assert torch.allclose(absorbed.to_jumprelu()(x), absorbed(x), atol=1e-3)


def test_heads_are_read_as_the_sae_reads_them():
    fields: Any = {"hook_name": "blocks.0.attn.hook_z", "reshape_activations": "hook_z"}
    sae, flat = plain_sae("standard", **fields), plain_sae("standard")
    x = activations(500)
    absorbed = absorb_scaffold(sae, [x.view(500, 4, D_IN // 4)], rank=3)
    expected = absorb_scaffold(flat, [x], rank=3)(x)
    heads = absorbed(x.view(500, 4, D_IN // 4))
    assert torch.allclose(heads.flatten(1), expected, atol=1e-4)


def test_a_scaffold_that_is_there_stays_and_grows():
    sae = train(scaffold_sae())
    x, whole = activations(1000), sae.to_inference()
    absorbed = absorb_scaffold(sae, [x], rank=2)
    assert absorbed.cfg.scaffold_rank == 2 + whole.cfg.scaffold_rank
    expected = whole(x) + optimum(x, x - whole(x), 2)
    assert torch.allclose(absorbed(x).double(), expected, atol=1e-3)
    assert torch.allclose(absorbed.encode(x)[:, 2:], whole.encode(x), atol=1e-3)


def test_the_scaffold_takes_the_place_of_latents_that_are_taken_out():
    sae = plain_sae("standard")
    x = activations(1000)
    frequency = (sae.encode(x) > 0).float().mean(0)
    dense = frequency.topk(10).indices
    absorbed = absorb_scaffold(sae, [x], rank=4, drop_latents=dense)
    kept = torch.ones(D_SAE).index_fill(0, dense, 0.0)
    left = sae.decode(sae.encode(x) * kept)
    assert absorbed.cfg.d_sae == D_SAE - 10 + 4
    expected = left + optimum(x, x - left, 4)
    assert torch.allclose(absorbed(x).double(), expected, atol=1e-4)


def test_a_batchtopk_sae_goes_through_in_the_form_in_which_it_is_saved(tmp_path: Any):
    cfg = BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=4)
    sae: Any = train(BatchTopKTrainingSAE(cfg))
    sae.save_inference_model(tmp_path)
    saved = SAE.load_from_disk(tmp_path)
    x = activations(2000)
    absorbed = absorb_scaffold(saved, [x], rank=3)
    assert torch.allclose(absorbed.encode(x)[:, 3:], saved.encode(x), atol=1e-4)

    def error(of: Any) -> torch.Tensor:
        held_out = activations(2000, seed=1)
        return (held_out - of(held_out)).pow(2).sum()

    assert error(absorbed) < error(saved)


def test_half_precision_is_left_for_single():
    sae = plain_sae("standard").to(dtype=torch.bfloat16)
    x = activations(500)
    absorbed = absorb_scaffold(sae, [x], rank=1)
    assert absorbed.cfg.dtype == "float32"
    exact = plain_sae("standard")
    exact.load_state_dict(sae.state_dict())
    assert torch.allclose(absorbed.encode(x)[:, 1:], exact.encode(x), atol=1e-4)


@pytest.mark.parametrize("architecture", ["abstopk", "matching_pursuit"])
def test_architectures_without_a_jumprelu_form_are_refused(architecture: str):
    sae_class, cfg_class = SAE_CLASS_REGISTRY[architecture]
    sae: Any = sae_class(cfg_class(d_in=D_IN, d_sae=D_SAE))
    with pytest.raises(UserError, match=f"'{architecture}' has no JumpReLU form"):
        absorb_scaffold(sae, [activations(100)], rank=1)


def test_there_are_more_tokens_than_dimensions():
    with pytest.raises(UserError, match="more than 16 tokens.* there are 16"):
        absorb_scaffold(plain_sae("standard"), [activations(16)], rank=1)


def test_weights_of_an_unknown_scale_are_refused():
    sae = plain_sae("standard", normalize_activations="expected_average_only_in")
    with pytest.raises(UserError, match="normalize_activations"):
        absorb_scaffold(sae, [activations(100)], rank=1)


def release(of: str, sae: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An SAE in the files of a release, loaded by SAELens's loader of these."""
    weights = {name: tensor.detach() for name, tensor in sae.state_dict().items()}
    overrides = {"d_in": D_MODEL, "d_sae": sae.cfg.d_sae, "model_name": "py-neox"}
    overrides |= {"hook_name": HOOK, "context_size": 64}
    path.mkdir()
    if of == "gemma_scope":
        names = {"W_enc": "w_enc", "W_dec": "w_dec"}
        arrays: Any = {names.get(name, name): t.numpy() for name, t in weights.items()}
        np.savez(path / "params.npz", **arrays)
        loader: Any = pretrained_sae_loaders.gemma_2_sae_huggingface_loader
        folder = "google/gemma-scope-2b-pt-res", "layer_0/width_16k/average_l0_1"
    else:
        encoder = {
            "encoder.weight": weights["W_enc"].T,
            "encoder.bias": weights["b_enc"],
            "decoder.weight": weights["W_dec"].T,
            "b_dec": weights["b_dec"],
            "threshold": torch.tensor(0.7),
        }
        torch.save(encoder, path / "ae.pt")
        trainer = {"dict_class": "BatchTopKSAE", "layer": 0, "lm_name": "py-neox"}
        trainer |= {"activation_dim": D_MODEL, "dict_size": sae.cfg.d_sae}
        config = {"trainer": trainer, "buffer": {"ctx_len": 64}}
        (path / "config.json").write_text(json.dumps(config))
        loader = pretrained_sae_loaders.dictionary_learning_sae_huggingface_loader_1
        folder = "adamkarvonen/saebench", "trainer_0"

    def download(filename: str, **_: Any) -> str:
        return str(path / Path(filename).name)

    def converter(path: Any, device: str, cfg_overrides: Any) -> Any:
        return loader(*folder, device=device, cfg_overrides=overrides)[:2]

    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", download)
    return SAE.load_from_disk(path, converter=converter)


def at_hook(architecture: str) -> Any:
    """An SAE of the embedded model."""
    own = eval_sae()
    if architecture == "jumprelu":
        return own
    fields: Any = {"k": 12} if architecture == "topk" else {}
    sae = plain_sae(architecture, d_in=D_MODEL, d_sae=96, hook_name=HOOK, **fields)
    sae.cfg.metadata.context_size = 64
    weights = {
        name: of for name, of in own.state_dict().items() if name in sae.state_dict()
    }
    sae.load_state_dict(weights, strict=False)
    return sae


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Text to fit on, and other text."""
    folder = tmp_path_factory.mktemp("text")
    pieces = [row["text"][:20_000] for row in load_stdlib_text("test")]  # type: ignore[index]
    write_texts(folder / "train.jsonl", pieces[:8])
    write_texts(folder / "test.jsonl", pieces[8:16])
    return {
        "dataset": str(folder),
        "held_out_split": "test",
        "n_tokens": 5000,
        "held_out_tokens": 4000,
        "device": "cpu",
    }


def dense_latents(sae: Path, text: dict[str, Any]) -> dict[str, Any]:
    """What the evaluation says of an SAE on the held-out text."""
    config = DenseLatentsEvalConfig(
        model_name="py-neox",
        dataset=text["dataset"],
        dataset_split="test",
        n_tokens=text["held_out_tokens"],
        n_bootstrap=2,
    )
    results = run_eval("dense_latents", config, load_saes([sae]), "cpu", sae.parent)
    (result,) = results.values()
    return result["eval_result_metrics"]


@pytest.mark.parametrize(
    "source", ["standard", "topk", "gated", "jumprelu", "gemma_scope", "sae_bench"]
)
def test_held_out_text_is_explained_no_worse(
    source: str, tmp_path: Path, text: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    sae = (
        release(source, eval_sae(), tmp_path / "release", monkeypatch)
        if "_" in source
        else at_hook(source)
    )
    sae.save_model(tmp_path / "sae")
    absorb.run(str(tmp_path / "sae"), output_path=str(tmp_path / "new"), **text)
    numbers = json.loads((tmp_path / "new" / "absorb.json").read_text())
    curve, rank = numbers["explained_variance_by_rank"], numbers["rank"]
    before, after = (dense_latents(tmp_path / name, text) for name in ("sae", "new"))

    def explained(metrics: dict[str, Any]) -> float:
        return metrics["reconstruction_quality"]["explained_variance"]

    assert explained(after) == pytest.approx(curve[rank], abs=1e-5)
    assert explained(before) == pytest.approx(
        numbers["explained_variance_before"], abs=1e-5
    )
    assert explained(after) > explained(before) and 0 < rank < D_MODEL // 4
    assert after["sparsity"]["scaffold_rank"] == rank
    if source != "topk":
        l0 = before["sparsity"]["l0_sparse"]
        assert after["sparsity"]["l0_sparse"] == pytest.approx(l0, abs=1e-3)
    absorbed = load_scaffold_sae(tmp_path / "new")
    assert isinstance(absorbed, ScaffoldJumpReLUSAE)
    metadata: Any = absorbed.cfg.metadata
    assert metadata.absorbed["weights_sha256"] == weights_sha256(sae)
    x = torch.randn(50, D_MODEL)
    loaded = SAE.load_from_disk(tmp_path / "new")
    assert torch.equal(loaded(x), absorbed(x))
    assert torch.allclose(absorbed.to_jumprelu()(x), absorbed(x), atol=1e-4)


def test_the_command(
    tmp_path: Path, text: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    eval_sae().save_model(tmp_path / "sae")
    fields = {**text, "n_tokens": 3000, "rank": 6, "drop_dense": 0.3}
    options = [word for name, v in fields.items() for word in (f"--{name}", str(v))]
    new, sae = str(tmp_path / "new"), str(tmp_path / "sae")
    assert main(["absorb", sae, "--output_path", new, *options]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\| 6 +\| .* \| chosen \|", printed)
    assert "scaffold_rank 6" in printed and "dense latents taken out" in printed

    metrics = dense_latents(tmp_path / "new", text)
    absorbed = SAE.load_from_disk(new)
    n_dropped: Any = absorbed.cfg.metadata.n_dropped_latents
    assert absorbed.cfg.d_sae == 96 + 6 - n_dropped and n_dropped > 0
    assert metrics["sparsity"]["l0_sparse"] < 0.35 * (96 - n_dropped)

    assert main(["upload", f"x={new}", "--repo_id", "user/saes", "--dry-run"]) == 0
    assert "scaffold_jumprelu" in capsys.readouterr().out


def test_heads_of_the_model(tmp_path: Path, text: dict[str, Any]):
    fields: Any = {"reshape_activations": "hook_z"}
    sae = eval_sae(hook_name="blocks.0.attn.hook_z", **fields)
    sae.cfg.metadata.model_name = None  # told instead
    sae.save_model(tmp_path / "sae")
    new, fields = tmp_path / "new", {**text, "model_name": "py-neox", "rank": 5}
    absorb.run(str(tmp_path / "sae"), output_path=str(new), **fields)
    numbers = json.loads((new / "absorb.json").read_text())
    found = dense_latents(new, text)["reconstruction_quality"]
    expected = numbers["explained_variance_by_rank"][5]
    assert found["explained_variance"] == pytest.approx(expected, abs=1e-5)


def test_a_scaffold_that_fits_too_few_tokens_is_made_smaller(
    tmp_path: Path, text: dict[str, Any]
):
    """Of 300 tokens, a map of 200 ranks reproduces the errors, and no others."""
    sae = eval_sae()
    sae.threshold.data.fill_(1.0)
    sae.save_model(tmp_path / "sae")
    few = {**text, "n_tokens": 300, "rank": 250}
    said = absorb.run(str(tmp_path / "sae"), output_path=str(tmp_path / "new"), **few)
    numbers = json.loads((tmp_path / "new" / "absorb.json").read_text())
    assert numbers["rank"] < 250
    assert numbers["explained_variance"] >= numbers["explained_variance_before"]
    assert "as rank 250 explains less of held-out text" in said


def test_held_out_text_of_the_same_split_follows(tmp_path: Path, text: dict[str, Any]):
    eval_sae().save_model(tmp_path / "sae")
    found: list[dict[str, Any]] = []
    for split in "train", None:
        fields = {**text, "held_out_split": split, "n_tokens": 1000, "rank": 2}
        new = tmp_path / str(split)
        absorb.run(str(tmp_path / "sae"), output_path=str(new), **fields)
        found.append(json.loads((new / "absorb.json").read_text()))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("of_input", "of_ranks", "rank", "chosen"),
    [
        (0.5, [0.5, 0.7, 0.8, 0.82, 0.83], None, 2),  # the knee
        (0.5, [0.5, 0.7, 0.8, 0.82, 0.83], 4, 4),
        (0.5, [0.5, 0.6, 0.4], 2, 1),  # smaller
        (0.5, [0.2, 0.4, 0.45, 0.55, 0.6], None, 3),  # the first that is enough
    ],
)
def test_how_a_rank_is_chosen(
    of_input: float, of_ranks: list[float], rank: int | None, chosen: int
):
    assert absorb._chosen_rank(absorb.Curve(of_input, of_ranks), rank) == chosen


def test_no_rank_that_is_worse_is_chosen():
    curve = absorb.Curve(0.5, [0.2, 0.4, 0.6])
    with pytest.raises(UserError, match="rank 1 .*the smallest rank that does is 2"):
        absorb._chosen_rank(curve, 1)
    with pytest.raises(UserError, match="no rank of the curve does"):
        absorb._chosen_rank(curve._replace(of_input=0.7), None)
