"""Hostile and damaged files: each a clear error of ours, at once, without much memory."""

import copy
import json
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from safetensors.torch import load, save, save_file

from eval_helpers import eval_sae
from hub_fixtures import REPO, hub, save_sae
from hub_server import Blob, HubServer
from saelens_scaffold import load_scaffold_sae, upload_scaffold_saes
from saelens_scaffold.saes.loading import (
    checked_disk_loader,
    checked_huggingface_loader,
)
from saelens_scaffold.saes.sae_ids import check_sae_id, check_sae_path, sae_id_of_path
from saelens_scaffold.saes.validation import InvalidSAEError, check_config

__all__ = ["hub"]  # a fixture

MEMORY = 500 * 2**20
SECONDS = 2
HAS_MEMORY_LIMIT = sys.platform == "linux"  # elsewhere, the system does not keep to it

CFG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
D_IN, D_SAE, RANK = 8, 20, 3

SAE_CFG = {
    "architecture": "scaffold_jumprelu",
    "d_in": D_IN,
    "d_sae": D_SAE,
    "scaffold_rank": RANK,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {
        "sae_lens_version": "6.54.12",
        "model_name": "gpt2",
        "hook_name": "blocks.0.hook_resid_post",
    },
}


def sound_weights() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    threshold = torch.rand(D_SAE, generator=g)
    threshold[:RANK] = -torch.inf
    return {
        "W_enc": torch.randn(D_IN, D_SAE, generator=g),
        "W_dec": torch.randn(D_SAE, D_IN, generator=g),
        "b_enc": torch.zeros(D_SAE),
        "b_dec": torch.zeros(D_IN),
        "threshold": threshold,
    }


def write(folder: Path, cfg: Any, weights: dict[str, torch.Tensor] | bytes) -> None:
    folder.mkdir(exist_ok=True)
    (folder / CFG).write_text(cfg if isinstance(cfg, str) else json.dumps(cfg))
    if isinstance(weights, bytes):
        (folder / WEIGHTS).write_bytes(weights)
    else:
        save_file(weights, folder / WEIGHTS)


@contextmanager
def little_time_and_memory() -> Iterator[None]:
    """No more address space than that, and an alarm after the time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = soft
    if HAS_MEMORY_LIMIT:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY

    def ring(signum: int, frame: object) -> None:
        raise AssertionError("it hangs")

    previous = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, previous)


def test_the_limits_are_limits() -> None:
    memory = pytest.raises((RuntimeError, MemoryError))
    with little_time_and_memory(), memory if HAS_MEMORY_LIMIT else nullcontext():
        torch.zeros(2 * MEMORY, dtype=torch.uint8)
    with pytest.raises(AssertionError, match="hangs"), little_time_and_memory():
        time.sleep(2 * SECONDS)


# Mutations: each makes a pair that cannot be used, of one that can

Mutation = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]

FIELDS = sorted(set(SAE_CFG) - {"device", "metadata"})
REQUIRED = ["architecture", "d_in", "d_sae", "scaffold_rank", "dtype", "metadata"]
TENSORS = sorted(sound_weights())
HUGE = [2**28 + 1, 2**31, 2**40, 2**63, 10**18, 10**300, -1, 0, -(2**63)]

of_wrong_type = st.one_of(
    st.none(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
names = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=30
)


@st.composite
def cfg_field_of_wrong_type(draw: st.DrawFn) -> Mutation:
    name = draw(st.sampled_from(FIELDS))
    value = draw(of_wrong_type.filter(lambda v: v != SAE_CFG[name]))
    return lambda cfg, weights: cfg.__setitem__(name, value)


@st.composite
def cfg_without_field(draw: st.DrawFn) -> Mutation:
    name = draw(st.sampled_from(REQUIRED))
    return lambda cfg, weights: cfg.pop(name)


@st.composite
def cfg_with_unknown_field(draw: st.DrawFn) -> Mutation:
    name = draw(names.filter(lambda n: n not in SAE_CFG))
    value = draw(of_wrong_type)
    if name == "finetuning_scaling_factor":
        name += "_"
    return lambda cfg, weights: cfg.__setitem__(name, value)


@st.composite
def absurd_size(draw: st.DrawFn) -> Mutation:
    name = draw(st.sampled_from(["d_in", "d_sae"]))
    value = draw(st.one_of(st.sampled_from(HUGE), st.integers(D_SAE + 1, 2**28)))
    return lambda cfg, weights: cfg.__setitem__(name, value)


@st.composite
def other_size(draw: st.DrawFn) -> Mutation:
    name = draw(st.sampled_from(["d_in", "d_sae", "scaffold_rank"]))
    value = draw(st.integers(-5, 60).filter(lambda v: v != SAE_CFG[name]))
    return lambda cfg, weights: cfg.__setitem__(name, value)


@st.composite
def bad_metadata(draw: st.DrawFn) -> Mutation:
    key, value = draw(
        st.one_of(
            st.tuples(st.just("sae_lens_version"), of_wrong_type.filter(str)),
            st.tuples(
                st.sampled_from(
                    ["__class__", "__dict__", "to_dict", "get", "__init__"]
                ),
                of_wrong_type,
            ),
        )
    )
    if key == "sae_lens_version" and isinstance(value, str):
        value = f"x{value}"
    return lambda cfg, weights: cfg["metadata"].__setitem__(key, value)


@st.composite
def not_finite(draw: st.DrawFn) -> Mutation:
    name = draw(st.sampled_from(TENSORS))
    value = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    first = RANK if name == "threshold" else 0
    size = sound_weights()[name].numel()
    index = draw(st.integers(first, size - 1))
    return lambda cfg, weights: weights[name].view(-1).__setitem__(index, value)


@st.composite
def finite_linear_threshold(draw: st.DrawFn) -> Mutation:
    index = draw(st.integers(0, RANK - 1))
    value = draw(st.sampled_from([0.0, 1.0, torch.inf, torch.nan]))
    return lambda cfg, weights: weights["threshold"].__setitem__(index, value)


@st.composite
def other_shape(draw: st.DrawFn) -> Mutation:
    name = draw(st.sampled_from(TENSORS))
    shape = draw(
        st.lists(st.integers(0, 40), max_size=4).filter(
            lambda s: tuple(s) != sound_weights()[name].shape
        )
    )
    return lambda cfg, weights: weights.__setitem__(name, torch.zeros(shape))


@st.composite
def other_dtype(draw: st.DrawFn) -> Mutation:
    name = draw(st.sampled_from(TENSORS))
    dtype = draw(
        st.sampled_from(
            [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
            + [torch.uint8, torch.float8_e4m3fn]
        )
    )
    return lambda cfg, weights: weights.__setitem__(name, weights[name].to(dtype))


@st.composite
def without_tensor(draw: st.DrawFn) -> Mutation:
    name = draw(st.sampled_from(TENSORS))
    return lambda cfg, weights: weights.pop(name)


@st.composite
def with_further_tensor(draw: st.DrawFn) -> Mutation:
    name = draw(
        names.filter(lambda n: n not in (*TENSORS, "__metadata__"))
        | st.just("scaling_factor")
    )
    return lambda cfg, weights: weights.__setitem__(name, torch.zeros(3))


def _header(tensors: Any, length: int | None = None) -> bytes:
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


@st.composite
def damaged_weights_file(draw: st.DrawFn) -> Mutation:
    kind = draw(
        st.sampled_from(["cut", "noise", "length", "offsets", "overflow", "header"])
    )
    share = draw(st.floats(0, 0.99))
    noise = draw(st.binary(max_size=200))
    length = draw(st.integers(2**20 + 1, 2**64 - 1))
    size = draw(st.sampled_from([2**40, 2**62, 2**63, 2**64 - 1]))

    def damage(cfg: dict[str, Any], weights: dict[str, torch.Tensor]) -> bytes:
        whole = save(weights)
        entry = {"dtype": "F32", "shape": [D_IN, D_SAE], "data_offsets": [0, size]}
        if kind == "cut":
            return whole[: int(share * len(whole))]
        if kind == "noise":
            return noise
        if kind == "length":
            return struct.pack("<Q", length) + whole[8:]
        if kind == "offsets":
            return _header(dict.fromkeys(weights, entry)) + bytes(1000)
        if kind == "overflow":
            huge = {**entry, "shape": [2**32, 2**32, 2**32]}
            return _header(dict.fromkeys(weights, huge)) + bytes(1000)
        return _header(b"[" * 100_000) + bytes(1000)

    return damage


@st.composite
def damaged_cfg_file(draw: st.DrawFn) -> Mutation:
    text = draw(
        st.one_of(
            st.sampled_from(
                ["", "{", "[]", "null", "NaN", "3", '"cfg"', "[" * 100_000]
                + ['{"a":' * 50_000, '{"d_in": ' + "9" * 5_000 + "}"]
                + [" " * (2**20 + 1), "\x00" * 100]
            ),
            st.text(max_size=50).filter(lambda t: not t.strip().startswith("{")),
        )
    )
    return lambda cfg, weights: text


mutations = st.one_of(
    cfg_field_of_wrong_type(),
    cfg_without_field(),
    cfg_with_unknown_field(),
    absurd_size(),
    other_size(),
    bad_metadata(),
    not_finite(),
    finite_linear_threshold(),
    other_shape(),
    other_dtype(),
    without_tensor(),
    with_further_tensor(),
    damaged_weights_file(),
    damaged_cfg_file(),
)


def test_what_one_field_may_be_is_not_what_others_may() -> None:
    check_config({**SAE_CFG, "normalize_activations": "constant_norm_rescale"})
    with pytest.raises(InvalidSAEError, match="reshape_activations: Input should be"):
        check_config({**SAE_CFG, "reshape_activations": "constant_norm_rescale"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutated") / "sae"
    write(folder, SAE_CFG, sound_weights())
    # what is only done once, as imports, is not what is limited
    load_scaffold_sae(folder)
    upload_scaffold_saes({"sae": folder}, REPO, show_progress=False, dry_run=True)
    return folder


@settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(mutation=mutations)
def test_mutated_pairs_are_errors(mutation: Mutation, folder: Path) -> None:
    cfg: Any = copy.deepcopy(SAE_CFG)
    weights: Any = sound_weights()
    changed = mutation(cfg, weights)
    if isinstance(changed, bytes):
        weights = changed
    elif isinstance(changed, str) and cfg == SAE_CFG:
        cfg = changed
    write(folder, cfg, weights)
    for use in (
        lambda: load_scaffold_sae(folder),
        lambda: SAE.load_from_disk(folder, converter=checked_disk_loader),
        lambda: upload_scaffold_saes(
            {"sae": folder}, REPO, show_progress=False, dry_run=True
        ),
    ):
        with little_time_and_memory(), pytest.raises(InvalidSAEError) as error:
            use()
        message = str(error.value)
        assert "sae" in message  # it says which
        assert len(message) < 2_000


def test_the_unmutated_pair_loads(tmp_path: Path) -> None:
    write(tmp_path / "sae", SAE_CFG, sound_weights())
    with little_time_and_memory():
        sae = load_scaffold_sae(tmp_path / "sae")
    assert torch.equal(sae.W_dec, sound_weights()["W_dec"])
    half = load_scaffold_sae(tmp_path / "sae", dtype="float16")
    assert half.W_dec.dtype == torch.float16


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_flipped_bytes_are_errors_of_ours_or_harmless(
    data: st.DataObject, folder: Path
) -> None:
    write(folder, SAE_CFG, sound_weights())
    file = folder / data.draw(st.sampled_from([CFG, WEIGHTS]))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(
            st.integers(0, 255)
        )
    file.write_bytes(content)
    with little_time_and_memory():
        try:
            sae = load_scaffold_sae(folder)
        except InvalidSAEError:
            return
        sae(torch.zeros(2, D_IN))


path_tricks = st.one_of(
    st.sampled_from(
        [
            "",
            ".",
            "..",
            "/",
            "../x",
            "a/../b",
            "/etc",
            "a//b",
            "a/",
            "~/x",
            "a\\b",
            "C:/x",
        ]
        + [
            "a/./b",
            "a\0b",
            "a b",
            "a\nb",
            "ä",
            ".git",
            "a/.git/config",
            "-x",
            "%2e%2e/x",
        ]
        + ["a/jumprelu", "jumprelu", "a/eval_results/b", "x" * 97, "a?b", "a#b", "a*"]
    ),
    st.lists(st.sampled_from(["..", ".", "", "a", "\\", "%2f"]), min_size=2, max_size=6)
    .map("/".join)
    .filter(lambda p: set(p.split("/")) != {"a"}),
    st.text(max_size=20).map(lambda text: f"{text}/../{text}"),
    st.none(),
    st.integers(),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(sae_id=path_tricks)
def test_path_tricks_in_ids_are_errors(sae_id: Any, folder: Path) -> None:
    write(folder, SAE_CFG, sound_weights())
    with little_time_and_memory():
        with pytest.raises(ValueError, match="SAE id") as error:
            upload_scaffold_saes({sae_id: folder}, REPO, dry_run=True)
        assert len(str(error.value)) < 500
        if isinstance(sae_id, str) and not sae_id.endswith("a/jumprelu"):
            with pytest.raises(ValueError, match="SAE id"):
                checked_huggingface_loader(REPO, sae_id)


@given(
    sae_id=st.lists(st.from_regex(r"\A[\w.,=+-]{1,20}\Z", alphabet="ab0_.,=+-"))
    .map("/".join)
    .filter(bool)
)
def test_ids_are_paths_below_the_repository(sae_id: str) -> None:
    if any(part[0] in ".,=+-" or part[-1] in ".-" for part in sae_id.split("/")):
        with pytest.raises(ValueError, match="SAE id"):
            check_sae_id(sae_id)
        return
    assert check_sae_id(sae_id) == sae_id
    path = Path("/repo", sae_id)
    assert path.resolve() == path and path.is_relative_to("/repo")
    assert check_sae_path(f"{sae_id}/jumprelu") == f"{sae_id}/jumprelu"
    assert sae_id_of_path(Path(sae_id)) == sae_id


@given(name=st.text(max_size=40).filter(lambda text: "/" not in text))
def test_every_directory_gives_an_id(name: str) -> None:
    assert check_sae_id(sae_id_of_path(Path(f"a{name}b")))


def test_other_forms_of_the_same_trap(tmp_path: Path) -> None:
    """What is no file, what is sparse on the disk, and what comes beside the weights."""
    write(tmp_path / "sae", SAE_CFG, sound_weights())
    sparsity = tmp_path / "sae" / SPARSITY
    for tensors in (
        {"sparsity": torch.zeros(D_SAE + 1)},
        {"sparsity": torch.zeros(D_SAE, dtype=torch.int64)},
        {"other": torch.zeros(D_SAE)},
        {"sparsity": torch.full((D_SAE,), torch.nan)},
    ):
        save_file(tensors, sparsity)
        with pytest.raises(InvalidSAEError, match="sparsity"):
            load_scaffold_sae(tmp_path / "sae")
    sparsity.unlink()

    weights = tmp_path / "sae" / WEIGHTS
    with open(weights, "r+b") as file:
        file.truncate(2**40)  # a terabyte, of which the disk holds nothing
    with little_time_and_memory(), pytest.raises(InvalidSAEError, match="cut off"):
        load_scaffold_sae(tmp_path / "sae")
    weights.unlink()
    os.mkfifo(weights)  # whoever opens it waits for ever
    with little_time_and_memory(), pytest.raises(InvalidSAEError, match="no file"):
        load_scaffold_sae(tmp_path / "sae")
    weights.unlink()
    torch.save(sound_weights(), weights)  # a pickle
    with pytest.raises(InvalidSAEError, match="no safetensors file"):
        load_scaffold_sae(tmp_path / "sae")

    (tmp_path / "sae" / CFG).write_text(
        json.dumps({**SAE_CFG, "architecture": "scaffold_batchtopk"})
    )
    with pytest.raises(InvalidSAEError, match="saelens-scaffold export"):
        load_scaffold_sae(tmp_path / "sae")
    old = {**SAE_CFG, "metadata": {"sae_lens_version": "5.1.0"}}
    (tmp_path / "sae" / CFG).write_text(json.dumps(old))
    with pytest.raises(InvalidSAEError, match="save it again"):
        load_scaffold_sae(tmp_path / "sae")


def test_evaluations_load_scaffold_saes_checked(tmp_path: Path) -> None:
    from saelens_scaffold.evals.saes import load_saes

    sae = save_sae(tmp_path / "sae")
    assert load_saes([tmp_path / "sae"])[0][0] == "sae"
    sae.W_enc.data[0, 0] = torch.nan
    sae.save_model(tmp_path / "sae")
    with pytest.raises(InvalidSAEError, match="W_enc has values that are not finite"):
        load_saes([tmp_path / "sae"])


def test_a_hostile_repository(hub: HubServer) -> None:
    """The weights are not even asked for where the configuration is no good."""
    upload_scaffold_saes({"sae": eval_sae(rank=4)}, REPO, show_progress=False)
    repository = hub.repositories[REPO]
    sound = repository.files()
    cfg = json.loads(sound["sae/cfg.json"].content)

    def replaced(path: str, content: bytes) -> None:
        is_lfs = path.endswith(".safetensors")
        blob = Blob(content, is_lfs)
        hub.store(blob)
        repository.commit("main", "hostile", {**sound, path: blob})
        hub.requests.clear()

    def load_it() -> None:
        with little_time_and_memory():
            load_scaffold_sae(REPO, "sae")

    replaced("sae/cfg.json", json.dumps({**cfg, "d_sae": 2**40}).encode())
    with pytest.raises(InvalidSAEError, match="d_sae"):
        load_it()
    assert not [line for line in hub.requests if WEIGHTS in line]

    replaced("sae/cfg.json", b"[" * 2**21)
    with pytest.raises(InvalidSAEError, match="cfg.json has 2097152 bytes or more"):
        load_it()
    assert not [line for line in hub.requests if line.startswith("GET")]

    replaced(f"sae/{WEIGHTS}", bytes(4 * 2**20))
    with pytest.raises(InvalidSAEError, match=f"{WEIGHTS} has 4194304 bytes or more"):
        load_it()
    assert not [line for line in hub.requests if line.startswith("GET /cdn")]

    weights = load(sound[f"sae/{WEIGHTS}"].content)
    weights["b_dec"][7] = torch.nan
    replaced(f"sae/{WEIGHTS}", save(weights))
    with pytest.raises(InvalidSAEError, match="b_dec has values that are not finite"):
        load_it()
    with pytest.raises(InvalidSAEError, match="b_dec has values that are not finite"):
        SAE.from_pretrained(REPO, "sae", converter=checked_huggingface_loader)

    repository.commit("main", "sound", sound)
    load_it()
