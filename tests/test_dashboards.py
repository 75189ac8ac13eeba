"""sae-dashboard and Neuronpedia's exporter, as docs/dashboards.md says."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dashboard_venv import NotInstallable, dashboard_python
from eval_helpers import HOOK, eval_sae
from saelens_scaffold.models import load_embedded_model, load_stdlib_text
from saelens_scaffold_cli import main
from test_readme import code_blocks, working_in

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "dashboards.md"
PATCH = ROOT / "docs" / "upstream" / "sae-dashboard-unknown-architectures.patch"
FORMS = ("my-jumprelu", "my-sparse")
N_LATENTS = 6

BEYOND = """
import importlib.util, json, shutil, subprocess, sys
from pathlib import Path
import sae_dashboard, torch
from sae_dashboard import feature_data_generator
from saelens_scaffold import load_scaffold_sae

def same(sae, before):
    weights = sae.state_dict()
    return all(
        weights[name].shape == w.shape and torch.allclose(weights[name], w)
        for name, w in before.items()
    )

# the scaffold SAE itself
sae = load_scaffold_sae("my-scaffold-sae")
sae.fold_W_dec_norm()  # as sae-dashboard does, which changes no output
before = {name: value.clone() for name, value in sae.state_dict().items()}
cfg = SaeVisConfig(hook_point=sae.cfg.metadata.hook_name, features=range(6))
try:
    SaeVisRunner(cfg).run(encoder=sae, model=model, tokens=tokens)
except ValueError as error:
    refusal = [type(error).__name__, str(error)]
intact = same(sae, before)

# an architecture of SAELens that it does not know, without and with the patch
from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKSAEConfig
def damaged_by(module):
    other = AbsTopKSAE(AbsTopKSAEConfig(d_in=8, d_sae=32, k=2))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    try:
        with module.FeatureMaskingContext(other, [1, 2]):
            pass
    except ValueError as error:
        return str(error), other.W_enc.shape, same(other, before)

def patched(name):
    spec = importlib.util.spec_from_file_location(f"patched_{name}", copy / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

copy = Path("sae_dashboard").resolve()
shutil.copytree(Path(sae_dashboard.__file__).parent, copy)
subprocess.run(["patch", "-p1", "-s", "-i", sys.argv[1]], check=True)
fixed = patched("feature_data_generator")
plain = SAE.load_from_disk("my-jumprelu")
before = {name: value.clone() for name, value in plain.state_dict().items()}
with fixed.FeatureMaskingContext(plain, [3, 9]):
    cut = [torch.equal(plain.W_enc, before["W_enc"][:, [3, 9]])]
    cut += [
        torch.equal(getattr(plain, name), before[name][[3, 9]])
        for name in ("W_dec", "b_enc", "threshold")
    ]
fixed_runner = patched("neuronpedia/neuronpedia_runner").NeuronpediaRunner
cfg = NeuronpediaRunnerConfig(
    sae_set="patched",
    sae_path="my-jumprelu",
    from_local_sae=True,
    outputs_dir="neuronpedia",
    huggingface_dataset_path="./stdlib-text",
)
loaded = fixed_runner(cfg).model

Path("beyond.json").write_text(json.dumps({
    "refusal": refusal,
    "intact": intact,
    "unpatched": damaged_by(feature_data_generator),
    "patched": damaged_by(fixed),
    "cut": cut,
    "restored": same(plain, before),
    "model_is_unprocessed": all(
        torch.equal(a, b)
        for a, b in zip(loaded.parameters(), model.parameters(), strict=True)
    ),
}))
"""


@pytest.fixture(scope="module")
def python() -> Path:
    try:
        return dashboard_python()
    except NotInstallable as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"sae-dashboard cannot be installed: {error}")


@pytest.fixture(scope="module")
def folder(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which what the page says has run."""
    folder = tmp_path_factory.mktemp("dashboards")
    export = code_blocks(PAGE, "bash")[0]
    with working_in(folder):
        eval_sae(rank=4).save_model("my-scaffold-sae")
        for command in export.splitlines():
            assert main(command.split()[1:]) == 0
    program = "\n".join([*code_blocks(PAGE, "python"), BEYOND])
    (folder / "page.py").write_text(program, encoding="utf-8")
    result = subprocess.run(
        [python, "page.py", str(PATCH)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def beyond(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "beyond.json").read_text())


@torch.no_grad()
def maxima(sae: Path, tokens: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The largest activation of each latent, by the definition of a JumpReLU SAE."""
    weights = load_file(sae / "sae_weights.safetensors")
    x = load_embedded_model()(tokens, stop_at_layer=1)
    assert HOOK == "blocks.0.hook_resid_post"
    pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    acts = torch.where(pre > weights["threshold"], pre.relu(), 0)
    return (acts * weights["W_dec"].norm(dim=1))[counted].amax(0)


@pytest.mark.parametrize("form", FORMS)
def test_dashboards(folder: Path, form: str) -> None:
    texts = list(load_stdlib_text("test")["text"][:16])
    tokens = load_embedded_model().to_tokens(texts, prepend_bos=True)[:, :64]
    expected = maxima(folder / form, tokens, torch.ones_like(tokens).bool())
    html = (folder / f"{form}.html").read_text(encoding="utf-8")
    shown, _ = json.JSONDecoder().raw_decode(html, html.index('{"AGGDATA"'))
    assert [*shown["DASHBOARD_DATA"]] == [str(i) for i in range(N_LATENTS)]
    largest = torch.tensor(shown["AGGDATA"]["max"])
    torch.testing.assert_close(largest, expected[:N_LATENTS], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_neuronpedias_export(folder: Path, form: str) -> None:
    (exported,) = (folder / "neuronpedia").glob(f"py-neox_{form}_{HOOK}_*")
    batch = json.loads((exported / "batch-0.json").read_text())
    assert (batch["model_id"], batch["sae_set"], batch["layer"]) == ("py-neox", form, 0)
    tokens = torch.load(exported / "tokens_32.pt")
    assert tokens.shape == (32, 64)
    expected = maxima(folder / form, tokens, tokens != 0)
    features = batch["features"]
    assert [of["feature_index"] for of in features] == [*range(N_LATENTS)]
    for feature, largest in zip(features, expected, strict=False):
        values = [value for of in feature["activations"] for value in of["values"]]
        assert max(values, default=0) == pytest.approx(largest.item(), abs=1e-3)


def test_a_scaffold_sae_is_refused_and_stays_whole(beyond: dict[str, Any]) -> None:
    kind, message = beyond["refusal"]
    assert kind == "UserError"
    assert message in PAGE.read_text(encoding="utf-8")
    assert beyond["intact"]


def test_the_patch_does_what_its_rationale_says(beyond: dict[str, Any]) -> None:
    assert beyond["unpatched"] == ["Invalid architecture", [8, 2], False]
    message, *left = beyond["patched"]
    assert "'abstopk'; supported are standard, " in message
    assert left == [[8, 32], True]
    assert beyond["cut"] == [True] * 4 and beyond["restored"]
    assert beyond["model_is_unprocessed"]
