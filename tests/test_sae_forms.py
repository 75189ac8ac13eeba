"""The forms that an SAE comes in, all of which are judged as one."""

import copy
import importlib
import warnings
from pathlib import Path
from random import sample
from typing import Any

import pytest
import torch
from sae_bench.evals.absorption import common as absorption_common
from sae_bench.evals.absorption import feature_absorption
from sae_bench.evals.absorption.vocab import get_alpha_tokens
from sae_bench.evals.sparse_probing import probe_training
from sae_bench.sae_bench_utils import general_utils
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading.pretrained_saes_directory import (
    PretrainedSAELookup,
    get_pretrained_saes_directory,
)
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes import transcoder as transcoders
from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKSAEConfig
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.matching_pursuit_sae import (
    MatchingPursuitSAE,
    MatchingPursuitSAEConfig,
)
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.temporal_sae import TemporalSAE, TemporalSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from eval_helpers import D_MODEL, eval_sae
from hub_fixtures import REPO, some_activations
from saelens_scaffold import upload_scaffold_saes
from saelens_scaffold._util.configs import make_config, validating
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals import runner
from saelens_scaffold.evals.jobs import Job
from saelens_scaffold.evals.registry import EVALUATIONS
from saelens_scaffold.evals.saebench import passthrough
from saelens_scaffold.evals.saes import load_saes, resolve_saes
from saelens_scaffold.models import load_embedded_model
from saelens_scaffold.saes.forms import fold_decoder_norms
from saelens_scaffold_cli import main

SCALE = 3.7  # of activations
METADATA = eval_sae().cfg.metadata


@torch.no_grad()
def unfolded(sae: Any) -> Any:
    """The same SAE with decoder rows of any norm, by the definition of a JumpReLU SAE."""
    other = copy.deepcopy(sae)
    norms = torch.linspace(0.3, 4.1, sae.cfg.d_sae)[torch.randperm(sae.cfg.d_sae)]
    other.W_dec.mul_(norms[:, None])
    other.W_enc.div_(norms)
    other.b_enc.div_(norms)
    other.threshold.div_(norms)
    return other


@torch.no_grad()
def scale_not_folded(sae: Any) -> Any:
    """What reads activations x * SCALE, and writes them, as SAELens trains an SAE."""
    other = copy.deepcopy(sae)
    other.W_enc.div_(SCALE)
    other.W_dec.mul_(SCALE)
    other.b_dec.mul_(SCALE)
    other.cfg.normalize_activations = "expected_average_only_in"
    return other


@pytest.fixture
def forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """(release, id) or (name, SAE) pairs of one SAE, plain and with a scaffold."""

    def load(
        repo_id: str, folder_name: str, device: str, cfg_overrides: Any, **_: Any
    ) -> tuple[Any, Any, None]:
        folder = Path(repo_id, folder_name)
        return (*loaders.sae_lens_disk_loader(folder, device, cfg_overrides), None)

    monkeypatch.setitem(loaders.NAMED_PRETRAINED_SAE_LOADERS, "folder", load)
    pairs: dict[str, list[Any]] = {}
    for rank in (0, 4):
        torch.manual_seed(rank)
        sae = eval_sae(rank=rank)
        scaled = unfolded(scale_not_folded(sae))
        saes, release = tmp_path / f"rank-{rank}", f"release-{rank}"
        unfolded(sae).save_model(saes / f"disk-{rank}")
        sae.save_model(saes / "folded")
        scaled.save_model(saes / "scaled")
        lookup = PretrainedSAELookup(
            release=release,
            repo_id=str(saes),
            model="py-neox",
            conversion_func="folder",
            saes_map={"folded": "folded", "scaled": "scaled"},
            expected_var_explained={},
            expected_l0={},
            neuronpedia_id={},
            config_overrides=None,
            norm_scaling_factor={"scaled": SCALE},
        )
        monkeypatch.setitem(get_pretrained_saes_directory(), release, lookup)
        scaled.fold_activation_norm_scaling_factor(SCALE)
        pairs[f"rank {rank}"] = [
            (f"folded-{rank}", sae),
            (f"memory-{rank}", unfolded(sae)),
            (f"after-training-{rank}", scaled),
            *load_saes([saes / f"disk-{rank}"]),
            (release, "folded"),
            (release, "scaled"),
        ]
    return pairs


def job(name: str, folder: Path, fields: dict[str, Any]) -> Job:
    evaluation = EVALUATIONS[name]
    implementation = evaluation.load()
    config_class = validating(implementation.config_class)
    fields = {**evaluation.defaults, "model_name": "py-neox", **fields}
    paths = (folder / "results", folder / "artifacts")
    config = make_config(config_class, fields)
    return Job(evaluation, implementation, config, "cpu", *paths, dataset_split="test")


FIELDS: dict[str, dict[str, Any]] = {
    "dense_latents": {
        "dataset": "python-stdlib",
        "dataset_split": "test",
        "n_tokens": 1000,
        "n_bootstrap": 5,
    },
    "scaffold_ablation": {
        "dataset": "python-stdlib",
        "dataset_split": "test",
        "n_fit_tokens": 2000,
        "n_tokens": 600,
        "n_bootstrap": 5,
        "n_aligned_latents": [5],
        "include_special_tokens": False,
        "topics": False,
        "n_random_draws": 1,
    },
    "dark_matter": {
        "dataset": "python-stdlib",
        "dataset_split": "test",
        "n_fit_tokens": 600,
        "n_tokens": 300,
        "n_bootstrap": 5,
        "scaling": False,
    },
    "core": {
        "dataset": "python-stdlib",
        "n_eval_reconstruction_batches": 1,
        "n_eval_sparsity_variance_batches": 1,
        "batch_size_prompts": 2,
        "context_size": 64,
    },
    "sparse_probing": {
        "dataset_names": ["python-stdlib"],
        "probe_train_set_size": 60,
        "probe_test_set_size": 40,
        "context_length": 24,
        "k_values": [1, 5],
    },
    "tpp": {
        "dataset_names": ["python-stdlib"],
        "train_set_size": 60,
        "test_set_size": 40,
        "context_length": 24,
        "n_values": [2, 10],
        "probe_epochs": 2,
    },
    "absorption": {
        "max_k_value": 2,
        "k_sparse_probe_num_epochs": 2,
        "min_GT_probe_f1": 0.0,
        "min_feats_for_eval": 1,
        "precalc_k_sparse_probe_sae_acts": True,
        "llm_batch_size": 64,
    },
}


@pytest.fixture
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Absorption spells four words of each letter, in any order, as tokenizers have them."""
    by_letter: dict[str, list[str]] = {}
    tokenizer: Any = load_embedded_model().tokenizer
    for word in sorted(get_alpha_tokens(tokenizer)):
        by_letter.setdefault(word.strip()[0].lower(), []).append(word)
    few = [word for words in by_letter.values() for word in words[:4]]
    for module in (absorption_common, feature_absorption):
        monkeypatch.setattr(module, "get_alpha_tokens", lambda _: sample(few, len(few)))


@pytest.fixture
def picks(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The latents that sparse probing picks, one list after another."""
    found: list[list[int]] = []
    own = probe_training.get_top_k_mean_diff_mask

    def pick(acts: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
        mask = own(acts, labels, k)
        if len(mask) < D_MODEL:  # no channels of the language model
            found.append((~mask).nonzero().flatten().tolist())
        return mask

    monkeypatch.setattr(probe_training, "get_top_k_mean_diff_mask", pick)
    return found


@pytest.mark.usefixtures("few_words")
@pytest.mark.parametrize("name", FIELDS)
def test_all_forms_of_an_sae_have_the_same_numbers(
    name: str, forms: dict[str, list[Any]], tmp_path: Path, picks: list[list[int]]
) -> None:
    # other evaluations take longer for each SAE
    start = {"dense_latents": 0, "absorption": 4, "scaffold_ablation": 4}.get(name, 3)
    ranks = ["rank 4"] if start == 4 else list(forms)
    # a text at the boundary of a probe, which is optimised to a tolerance, counts either way
    absolute = 1 / 40 if name == "sparse_probing" else 1e-4
    for rank in ranks:
        pairs = forms[rank][start:]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Decoder weights are not normalized")
            outcome = runner.run(job(name, tmp_path, FIELDS[name]), pairs)
        assert outcome.error is None, outcome.error
        first, *others = map(numbers, outcome.results.values())
        assert len(others) == len(pairs) - 1
        for other in others:
            assert other == pytest.approx(first, rel=1e-4, abs=absolute, nan_ok=True)
        if name == "sparse_probing":
            # for 5 classes and two k, first those of an SAE that stands in
            of_saes = [picks[i : i + 10] for i in range(10, len(picks), 10)]
            assert len(of_saes) == len(pairs)
            assert all(of_sae == of_saes[0] for of_sae in of_saes)
            picks.clear()


def numbers(result: dict[str, Any]) -> dict[str, float]:
    """Every number of a result by its path."""

    def flat(value: Any, path: str) -> dict[str, float]:
        if not isinstance(value, (dict, list)):
            return {path: value} if isinstance(value, (int, float)) else {}
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, of in items for k, v in flat(of, f"{path}.{key}").items()}

    parts = ("eval_result_metrics", "eval_result_details")
    return flat({part: result[part] for part in parts}, "")


def sae_of(cls: Any, config_class: Any, **fields: Any) -> Any:
    """An SAE with decoder rows of any norm and, where it has them, biases."""
    torch.manual_seed(0)
    sae = cls(config_class(d_in=D_MODEL, d_sae=40, metadata=METADATA, **fields))
    for name, weights in sae.named_parameters():
        weights.data = torch.randn_like(weights) * (1 if "W_" in name else 0.1)
    return sae


ARCHITECTURES = {
    "standard": lambda: sae_of(StandardSAE, StandardSAEConfig),
    "layer_norm": lambda: sae_of(
        StandardSAE, StandardSAEConfig, normalize_activations="layer_norm"
    ),
    "gated": lambda: sae_of(GatedSAE, GatedSAEConfig),
    "jumprelu": lambda: unfolded(eval_sae()),
    "scaffold_jumprelu": lambda: unfolded(eval_sae(rank=4)),
    "topk": lambda: sae_of(
        TopKSAE, TopKSAEConfig, k=5, rescale_acts_by_decoder_norm=True
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folding_changes_nothing_but_the_scale_of_latents(name: str) -> None:
    sae, x = ARCHITECTURES[name](), some_activations()
    norms, acts = sae.W_dec.norm(dim=1), sae.encode(x)
    if name == "topk":  # whose activations have the scale of unit norm already
        norms = torch.ones_like(norms)
    before = sae.decode(acts)
    assert fold_decoder_norms(sae)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(()))
    assert torch.allclose(sae.encode(x), acts * norms, rtol=1e-4, atol=1e-4)
    assert torch.allclose(sae.decode(sae.encode(x)), before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dead_decoder_rows_stay_zero(name: str, dtype: str) -> None:
    x, sae = some_activations(), ARCHITECTURES[name]()
    sae.W_dec[7:9] = 0
    expected = sae.decode(sae.encode(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # SAEBench's, of norms
        judged = resolve_saes([("sae", sae)], "cpu", dtype)[0].sae
    norms = judged.W_dec.float().norm(dim=1)
    assert not norms[7:9].any()
    assert torch.allclose(norms[9:], torch.ones(()), atol=1e-3)
    out = judged.decode(judged.encode(x.to(judged.dtype)))
    assert out.isfinite().all()
    if name == "topk":  # SAELens divides by the norms
        assert expected.isnan().all()
    elif dtype == "float32":
        assert torch.allclose(out, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_norms_that_decide_which_latents_are_active_stay() -> None:
    saes = {
        "topk": sae_of(TopKSAE, TopKSAEConfig, k=5),
        "abstopk": sae_of(AbsTopKSAE, AbsTopKSAEConfig, k=5),
        "pursuit": sae_of(
            MatchingPursuitSAE, MatchingPursuitSAEConfig, max_iterations=3
        ),
    }
    for name, sae in saes.items():
        before = {key: weights.clone() for key, weights in sae.state_dict().items()}
        with pytest.warns(
            UserWarning, match=f"SAE '{name}': .* norms stay as they are"
        ):
            (resolved,) = resolve_saes([(name, sae)], "cpu", "float32")
        for key, weights in resolved.sae.state_dict().items():
            assert torch.equal(weights, before[key])
    # a common factor, as that of an activation scale, decides nothing
    for name in ("topk", "abstopk"):
        sae, x = saes[name], some_activations()
        sae.W_dec.data = torch.nn.functional.normalize(sae.W_dec) * SCALE
        acts, out = sae.encode(x), sae.decode(sae.encode(x))
        assert fold_decoder_norms(sae)
        assert torch.allclose(sae.encode(x), acts * SCALE, rtol=1e-4)
        assert torch.allclose(sae.decode(sae.encode(x)), out, rtol=1e-4, atol=1e-4)


def test_half_precision_is_folded_before_it_is_rounded() -> None:
    """All forms of an SAE differ by one rounding in the dtype of the language model."""
    sae = eval_sae(rank=4)
    judged = resolve_saes([("a", sae), ("b", unfolded(sae))], "cpu", "bfloat16")
    a, b = (of.sae.state_dict() for of in judged)
    for name in a:
        assert a[name].dtype == torch.bfloat16
        assert torch.allclose(a[name], b[name], rtol=2**-7)


def test_sae_bench_gets_the_same_tensors_whatever_the_form(
    forms: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every evaluation: what each main module loads."""
    loaded: list[dict[str, torch.Tensor]] = []

    def load(*args: Any, **_: Any) -> None:
        for release, sae in next(arg for arg in args if isinstance(arg, list)):
            found: Any = general_utils.load_and_format_sae(release, sae, "cpu")
            _, sae, sparsity = found
            assert sparsity is None
            assert sae.cfg.model_name == "py-neox"
            loaded.append(sae.state_dict())

    # the text is for them, and is not read
    monkeypatch.setattr(passthrough, "_text_for_saelens", lambda *_: "text")
    # unlearning is for models that are not here
    monkeypatch.setattr(passthrough._Passthrough, "check", lambda *_: None)
    pairs = forms["rank 4"]
    names = [n for n, of in EVALUATIONS.items() if "passthrough" in of.implementation]
    assert len(names) == 8
    for name in names:
        package = "scr_and_tpp" if name == "scr" else name
        module = importlib.import_module(f"sae_bench.evals.{package}.main")
        entry = "multiple_evals" if name == "core" else "run_eval"
        monkeypatch.setattr(module, entry, load)
        error = runner.run(job(name, tmp_path, {}), pairs).error
        assert "wrote no result" in str(error)  # and raised nothing
        first, *others = loaded
        assert len(others) == len(pairs) - 1
        assert (
            len(first["W_dec"]) == {"whole": 96, "sparse": 92}[EVALUATIONS[name].view]
        )
        for other in others:
            assert other.keys() == first.keys()
            for key, weights in first.items():
                assert torch.allclose(other[key], weights, rtol=1e-5, atol=1e-6)
        loaded.clear()


def test_results_of_unfolded_saes_are_uploaded_with_them(tmp_path: Path) -> None:
    for rank in (0, 4):
        unfolded(eval_sae(rank=rank)).save_model(tmp_path / "saes" / f"rank_{rank}")
    argv = [
        "eval",
        "dense_latents,sparse_probing",
        *("--sae_path", *(str(path) for path in sorted(tmp_path.glob("saes/*")))),
        "--dataset=python-stdlib",
        "--device=cpu",
        f"--output_path={tmp_path}/eval_results",
        f"--artifacts_path={tmp_path}/artifacts",
        "--set=dense_latents.n_tokens=1000",
        "--set=dense_latents.n_bootstrap=5",
        "--set=sparse_probing.probe_train_set_size=40",
        "--set=sparse_probing.probe_test_set_size=20",
    ]
    assert main(argv) == 0
    summary = upload_scaffold_saes(
        tmp_path / "saes",
        REPO,
        eval_results=tmp_path / "eval_results",
        show_progress=False,
        dry_run=True,
    )
    assert not summary.left_out
    for sae in ("rank_0", "rank_4"):
        for name in ("dense_latents", "sparse_probing"):
            assert f"{sae}/eval_results/{name}.json" in summary.files


NO_AUTOENCODERS = {
    "transcoder": (transcoders.Transcoder, transcoders.TranscoderConfig),
    "skip_transcoder": (transcoders.SkipTranscoder, transcoders.SkipTranscoderConfig),
    "jumprelu_transcoder": (
        transcoders.JumpReLUTranscoder,
        transcoders.JumpReLUTranscoderConfig,
    ),
    "jumprelu_skip_transcoder": (
        transcoders.JumpReLUSkipTranscoder,
        transcoders.JumpReLUSkipTranscoderConfig,
    ),
    "temporal": (TemporalSAE, TemporalSAEConfig),
}
MLP_IN, MLP_OUT = "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"


@pytest.mark.parametrize("name", [*NO_AUTOENCODERS, "hook_name_out"])
def test_what_is_no_autoencoder_is_refused_in_every_command(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the widths are the same, as they are here."""
    metadata = copy.deepcopy(METADATA)
    said = f"is a transcoder (architecture '{name}', from {MLP_IN} to {MLP_OUT}), whose"
    if name == "temporal":
        fields: dict[str, Any] = {"bottleneck_factor": 2}
        said = "is a temporal SAE (architecture 'temporal'), which reads"
    else:
        fields = {"apply_b_dec_to_input": False}
        metadata.hook_name, metadata.hook_name_out = MLP_IN, MLP_OUT
    if name == "hook_name_out":  # a transcoder as an older format has it
        said = said.replace(name, "standard")
    elif name != "temporal":
        fields |= {"d_out": D_MODEL}
    of = NO_AUTOENCODERS.get(name, (StandardSAE, StandardSAEConfig))
    sae = of[0](of[1](d_in=D_MODEL, d_sae=32, metadata=metadata, **fields))
    sae.save_model(tmp_path / "sae")
    eval_sae().save_model(tmp_path / "good")
    text = ["--dataset=python-stdlib", f"--output_path={tmp_path}/out", "--device=cpu"]
    paths = ["--sae_path", str(tmp_path / "good"), str(tmp_path / "sae")]
    commands = [["eval", evaluation, *paths, *text] for evaluation in EVALUATIONS]
    commands += [
        ["rank", f"--sae_path={tmp_path}/sae", *text],
        ["upload", f"sae={tmp_path}/sae", f"--repo_id={REPO}", "--dry-run"],
    ]
    for command in commands:
        assert main(command) == 2
        *progress, line = capsys.readouterr().err.strip().splitlines()
        assert not progress or command[0] == "upload"
        assert f"'sae': it {said}" in line
        assert line.endswith("only")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="'memory': it is a t"):
        resolve_saes([("memory", sae)], "cpu", "float32")
    # so that `train` and `compare` know none of them
    assert name not in SAE_TRAINING_CLASS_REGISTRY
