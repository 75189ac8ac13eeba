"""SAEs from anybody: their metadata are checked, and their weights are what is judged."""

import json
import traceback
import warnings
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import SAEMetadata

from eval_helpers import D_MODEL, HOOK, eval_sae, evaluation_names
from hub_fixtures import REPO, hub, save_sae, some_activations
from hub_server import ENDLESS, WRITE_TOKEN, Blob, HubServer
from saelens_scaffold import load_scaffold_sae, upload_scaffold_saes
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.saes import load_saes, resolve_saes
from saelens_scaffold.saes.loading import checked_huggingface_loader
from saelens_scaffold.saes.validation import InvalidSAEError
from saelens_scaffold_cli import main
from test_upload_validation import WEIGHTS, little_time_and_memory

__all__ = ["hub"]  # a fixture


def judged(sae: Any) -> Any:
    (selected,) = resolve_saes([("sae", sae)], "cpu", "")
    return selected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pairs_of_opposites_are_a_scaffold(dtype: str) -> None:
    original = eval_sae(rank=4)
    plain = original.to_jumprelu().to(dtype=getattr(torch, dtype))
    plain.W_dec.data[5] *= 1 + torch.finfo(plain.dtype).eps  # rounding
    assert judged(plain).rank == 4


def lesser_bias(sae: JumpReLUSAE) -> None:
    sae.b_enc.data[5] = 0.1


def firing_later(sae: JumpReLUSAE) -> None:
    sae.threshold.data[2] = 0.1


def other_encoder(sae: JumpReLUSAE) -> None:
    sae.W_enc.data[:, 1] += 0.01 * torch.randn(D_MODEL)


def other_decoder(sae: JumpReLUSAE) -> None:
    sae.W_dec.data[7, 3] += 0.01
    sae.W_dec.data[0] *= 1e6  # its rounding is not that of other latents


def rank_of_another(sae: JumpReLUSAE) -> None:
    sae.cfg.metadata.scaffold_rank = 5


def too_large_rank(sae: JumpReLUSAE) -> None:
    sae.cfg.metadata.scaffold_rank = 10**15


def no_rank(sae: JumpReLUSAE) -> None:
    sae.cfg.metadata.scaffold_rank = None


CHANGES = [lesser_bias, firing_later, other_encoder, other_decoder, rank_of_another]


@pytest.mark.parametrize("change", [*CHANGES, too_large_rank, no_rank])
def test_what_is_no_pair_of_opposites_is_judged_as_it_is(change: Any) -> None:
    plain = eval_sae(rank=4).to_jumprelu()
    change(plain)
    x = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(0))
    acts = x - plain.b_dec
    acts = acts @ plain.W_enc + plain.b_enc
    acts = acts.relu() * (acts > plain.threshold)
    expected = acts @ plain.W_dec + plain.b_dec
    with pytest.warns(UserWarning, match="not pairs of opposites") as warned:
        found = judged(plain)
    assert all("\n" not in str(warning.message) for warning in warned)
    assert found.rank == 0
    scale = expected.abs().max().item()
    torch.testing.assert_close(found.sae(x), expected, rtol=1e-4, atol=1e-5 * scale)


BAD = [
    ("context_size", 1.5),
    ("context_size", "64"),
    ("context_size", 0),
    ("context_size", True),
    ("model_name", ["py-neox"]),
    ("hook_name", {"a": 1}),
    ("hook_name", "blocks.0\n\x1b[2J"),
    ("hook_layer", "0"),
    ("hook_head_index", -1),
    ("prepend_bos", "yes"),
    ("sequence_separator_token", 2.5),
    ("sequence_separator_token", "space"),
    ("disable_concat_sequences", 1),
    ("exclude_special_tokens", [-3]),
    ("seqpos_slice", [0, 1, 2, 3]),
    ("seqpos_slice", "None"),
    ("model_from_pretrained_kwargs", [1]),
    ("scaffold_view", "all"),
    ("scaffold_rank", -1),
    ("scaffold_rank", 2.0),
    ("k", float("inf")),
    ("k", "12"),
    ("dataset_path", 3),
    ("weights_sha256", 0),
    ("n_sparsity_tokens", -2),
    ("measured", []),
    ("to_dict", "x"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_metadata_are_checked_by_one_schema(
    tmp_path: Path, name: str, value: Any
) -> None:
    sae = eval_sae()
    vars(sae.cfg.metadata)[name] = value
    with pytest.raises(InvalidSAEError, match=rf"^SAE 'sae': metadata.*{name}"):
        judged(sae)
    sae = eval_sae()
    config = sae.cfg.to_dict() | {"metadata": {**vars(sae.cfg.metadata), name: value}}
    sae.save_model(tmp_path / "sae")
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=name):
        load_saes([tmp_path / "sae"])


def test_unknown_metadata_and_those_of_saelens_pass(tmp_path: Path) -> None:
    sae = eval_sae()
    values = {
        "seqpos_slice": (None,),
        "exclude_special_tokens": [0, 5],
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
        "hook_head_index": None,
        "dataset_path": "",
        "neuronpedia_id": "gpt2-small/0-res-jb",
        "of_another_package": {"anything": [1, None]},
    }
    vars(sae.cfg.metadata).update(values)
    sae.save_model(tmp_path / "sae")
    ((_, loaded),) = load_saes([tmp_path / "sae"])
    judged(loaded)
    assert loaded.cfg.metadata.of_another_package == {"anything": [1, None]}


@pytest.mark.parametrize(
    "evaluation",
    evaluation_names("dense_latents", "core", "autointerp", "sparse_probing"),
)
@pytest.mark.parametrize("context_size", [1, 1.5])
def test_context_sizes_that_cannot_be(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    evaluation: str,
    context_size: float,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    sae = eval_sae()
    sae.cfg.metadata.context_size = context_size
    sae.save_model(tmp_path / "sae")
    text = ["--dataset", "python-stdlib", "--output_path", str(tmp_path / "o")]
    argv = ["eval", evaluation, "--sae_path", str(tmp_path / "sae"), *text]
    assert main(argv) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"context_size is {context_size}" in said


@pytest.fixture
def published(hub: HubServer, tmp_path: Path) -> Any:
    sae = save_sae(tmp_path / "sae")
    upload_scaffold_saes({"sae": sae}, REPO, show_progress=False)
    return sae


OFFLINE = [("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")]


@pytest.mark.parametrize("setting", OFFLINE, ids=["offline", "unreachable"])
def test_what_was_loaded_loads_offline(
    published: Any,
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    setting: tuple[str, Any],
) -> None:
    x = some_activations()
    expected = load_scaffold_sae(REPO, "sae")(x)
    cache = Path(constants.HF_HUB_CACHE) / f"models--{REPO.replace('/', '--')}"
    assert (cache / "refs" / "main").read_text() == hub.repositories[REPO].refs["main"]
    monkeypatch.setattr(constants, *setting)
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    torch.testing.assert_close(load_scaffold_sae(REPO, "sae")(x), expected)
    torch.testing.assert_close(SAE.from_pretrained(REPO, "sae")(x), expected)
    checked = SAE.from_pretrained(REPO, "sae", converter=checked_huggingface_loader)
    torch.testing.assert_close(checked(x), expected)
    with pytest.raises(UserError, match=f"{REPO}: other/cfg.json cannot be downloaded"):
        load_scaffold_sae(REPO, "other")


@pytest.mark.parametrize(
    "requests", [r"/sae/cfg.json", r"/sae_weights.safetensors|GET /cdn", r"GET /cdn"]
)
def test_a_file_that_does_not_end_is_not_stored(
    published: Any, hub: HubServer, requests: str
) -> None:
    hub.fail(requests, ENDLESS, times=100)
    with pytest.raises(InvalidSAEError, match=r"^user/saes: sae/\S+ has \d+ bytes"):
        load_scaffold_sae(REPO, "sae")
    # huggingface_hub reads 10 MB at once, and there are buffers below it
    assert hub.endless_bytes < 50 * 2**20
    stored = [f for f in Path(constants.HF_HUB_CACHE).rglob("*") if f.is_file()]
    assert sum(file.stat().st_size for file in stored) < 2**20
    hub.heal()
    x = some_activations()
    torch.testing.assert_close(load_scaffold_sae(REPO, "sae")(x), published(x))


def test_the_dry_runs_view_of_a_card_is_bounded(
    published: Any, hub: HubServer, tmp_path: Path
) -> None:
    options: Any = {"show_progress": False, "dry_run": True}
    readme = hub.repositories[REPO].files()["README.md"].content.decode()
    done = upload_scaffold_saes({"sae": published}, REPO, **options)
    assert done.readme_outcome == "unchanged"
    for content in (b"\xff" * 100, b"\xff\n" * 2**20):
        repository = hub.repositories[REPO]
        files = {**repository.files(), "README.md": Blob(content, False)}
        repository.commit("main", "Another card", files)
        try:
            done = upload_scaffold_saes({"sae": published}, REPO, **options)
        except UserError as error:
            assert "README.md has 2097152 bytes or more" in str(error)
            assert len(content) == 2**21
        else:
            assert done.readme_outcome == "kept"
            assert readme.splitlines()[-1] in str(done.readme_diff)
    repository.commit("main", "Anew", {**files, "README.md": Blob(b"", False)})
    hub.fail(r"README.md", ENDLESS, times=100)
    with pytest.raises(UserError, match="README.md has"):
        upload_scaffold_saes({"sae": published}, REPO, **options)
    assert hub.endless_bytes < 50 * 2**20


@pytest.mark.parametrize("dtype", ["nonsense", "", 3])
def test_dtypes_are_known(tmp_path: Path, dtype: Any) -> None:
    eval_sae().save_model(tmp_path)
    with pytest.raises(UserError, match=r"^dtype is .*; allowed are float32, "):
        load_scaffold_sae(tmp_path, dtype=dtype)
    assert load_scaffold_sae(tmp_path, dtype="float16").dtype == torch.float16


@pytest.mark.parametrize("status", [401, 403, 404, 418, 500])
def test_what_the_hub_says_is_not_repeated(
    published: Any, hub: HubServer, status: int
) -> None:
    said = f"no, {WRITE_TOKEN}"
    hub.fail("(GET|HEAD) /user", status, times=100, X_Error_Message=said)
    with pytest.raises(UserError, match=f"the Hub answers {status}") as error:
        load_scaffold_sae(REPO, "sae")
    shown = "".join(traceback.format_exception(error.value))
    assert WRITE_TOKEN not in shown
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be downloaded"):
        load_scaffold_sae("a/b/c", "sae")


def small_sae(architecture: str) -> Any:
    sae_class, cfg_class = SAE_CLASS_REGISTRY[architecture]
    of_class: dict[str, Any] = {
        "topk": {"k": 3},
        "abstopk": {"k": 3},
        "temporal": {"n_heads": 2, "bottleneck_factor": 2},
        "scaffold_jumprelu": {"scaffold_rank": 2},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metadata = SAEMetadata(model_name="py-neox", hook_name=HOOK, context_size=64)
        sizes: dict[str, Any] = {"d_in": 8, "d_sae": 16, "metadata": metadata}
        if "transcoder" in architecture:
            sizes |= {"d_out": 8, "apply_b_dec_to_input": False}
        sae = sae_class(cfg_class(**sizes, **of_class.get(architecture, {})))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weights in sae.state_dict().items():
            weights.copy_(torch.rand(weights.shape, generator=g))
            if name == "threshold" and architecture == "scaffold_jumprelu":
                weights[:2] = -torch.inf
    return sae


@cache
def sound(architecture: str) -> tuple[str, bytes]:
    """The configuration and the weights' file of an SAE."""
    with TemporaryDirectory() as folder:
        config, weights = Path(folder, "cfg.json"), Path(folder, WEIGHTS)
        small_sae(architecture).save_model(folder)
        return config.read_text(), weights.read_bytes()


def nested(depth: int) -> Any:
    value: Any = 1
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    return value


HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**63, 10**30, 10**400, -(2**63)]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["whole", "sparse", "hook_z", "layer_norm", "x" * 10_000, "6\n7"]),
    st.sampled_from(["6." + "1" * 5_000, "6.junk", "6.0.0-rc.0", "7!6.1", "5.9"]),
    st.lists(st.integers() | st.none(), max_size=4),
    st.integers(1, 900).map(nested),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)
METADATA = sorted({name for name, _ in BAD} | {"hook_name_out", "sae_lens_version"})
ENCODINGS = [*["utf-8"] * 5, "utf-8-sig", "utf-16", "utf-32", "latin-1"]

TRAPS = [
    ("jumprelu", "utf-8-sig", {}, {}, "cfg.json is not JSON"),
    ("jumprelu", "utf-16", {}, {}, "cfg.json is not JSON"),
    ("gated", "utf-8", {"reshape_activations": "hook_z"}, {}, "hook_name is 'blocks.0"),
    ("jumprelu", "utf-8", {}, {"sae_lens_version": "6." + "1" * 5_000}, "version"),
    ("jumprelu", "utf-8", {}, {"anything": nested(500)}, "nested more than 32 deep"),
    ("temporal", "utf-8", {"n_heads": 0}, {}, "n_heads"),
    ("temporal", "utf-8", {"n_attn_layers": 10**8}, {}, "n_attn_layers"),
    ("topk", "utf-8", {"k": 17}, {}, "k is 17"),
]


@pytest.mark.parametrize(
    ("architecture", "encoding", "fields", "metadata", "said"), TRAPS
)
def test_traps_are_said(
    tmp_path: Path,
    architecture: str,
    encoding: str,
    fields: dict[str, Any],
    metadata: dict[str, Any],
    said: str,
) -> None:
    text, weights = sound(architecture)
    config = {**json.loads(text), **fields}
    config["metadata"] |= metadata
    (tmp_path / "cfg.json").write_bytes(json.dumps(config).encode(encoding))
    (tmp_path / WEIGHTS).write_bytes(weights)
    with little_time_and_memory(), pytest.raises(InvalidSAEError, match=said) as error:
        load_scaffold_sae(tmp_path)
    assert len(str(error.value)) < 1_000


@st.composite
def hostile_files(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """cfg.json and weights of an SAE with one or two hostile fields."""
    text, weights = sound(draw(st.sampled_from(sorted(SAE_CLASS_REGISTRY))))
    config = json.loads(text)
    metadata = config["metadata"]
    for _ in range(draw(st.integers(1, 2))):
        where, names = draw(
            st.sampled_from([(config, sorted(config)), (metadata, METADATA)])
        )
        where[draw(st.sampled_from(names))] = draw(HOSTILE)
    text = json.dumps(config, ensure_ascii=False)
    encoding = draw(st.sampled_from(ENCODINGS))
    return text.encode(encoding, errors="replace"), weights


def sae_is_read(files: tuple[bytes, bytes], folder: Path) -> bool:
    """Whether both entry points load an SAE as it is; else they refuse it in one line."""
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_bytes(files[0])
    (folder / WEIGHTS).write_bytes(files[1])

    def load() -> Any:
        return load_scaffold_sae(folder)

    def select() -> Any:
        (selected,) = resolve_saes(load_saes([folder]), "cpu", "")
        return selected.sae

    n_read = 0
    for use in (load, select):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                sae = use()
            except UserError as error:
                assert len(str(error)) < 2_000
                assert "\n" not in str(error)
                continue
        if use is load:
            for name, expected in safetensors.torch.load(files[1]).items():
                assert torch.equal(sae.state_dict()[name].to(expected), expected), name
        assert json.dumps(sae.cfg.to_dict())
        n_read += 1
    return n_read == 2


@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(files=hostile_files())
def test_hostile_files_are_one_line_or_load_as_they_are(
    files: tuple[bytes, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with little_time_and_memory():
        sae_is_read(files, tmp_path_factory.getbasetemp() / "hostile")
