"""The change proposed to SAELens, on a copy of the SAELens that is installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import sae_lens

from eval_helpers import eval_sae

PATCH = Path(__file__).parents[1] / "docs/upstream/saelens-plugin-architectures.patch"

PROGRAM = """
import json, sys
from pathlib import Path
import sae_lens
from sae_lens import SAE
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.registry import SAE_CLASS_REGISTRY, get_sae_class
from sae_lens.loading import pretrained_sae_loaders as loaders
folder = Path(sys.argv[1])
assert Path(sae_lens.__file__).is_relative_to(folder), sae_lens.__file__
assert "saelens_scaffold" not in sys.modules
get_sae_class("jumprelu")
assert "saelens_scaffold" not in sys.modules  # nothing is imported that is not asked for

said = []
try:
    SAE.load_from_disk(folder / "unknown")
except KeyError as error:
    said.append(str(error))

# the error comes before the weights are asked for
asked = []
def download(repo_id, filename, force_download=False):
    asked.append(filename)
    return str(folder / filename)
loaders.hf_hub_download = download
try:
    SAE.from_pretrained("user/saes", "unknown")
except KeyError as error:
    said.append(str(error))
assert asked == ["unknown/cfg.json"], asked

# an installed package's architectures, without importing it
sae = SAE.load_from_disk(folder / "scaffold")
cfg = _parse_cfg_args(["--architecture", "scaffold_batchtopk", "--scaffold_rank", "3"])
print(json.dumps([said, type(sae).__name__, sae.cfg.scaffold_rank, cfg.sae.scaffold_rank]))
"""


def test_the_patch_does_what_its_rationale_says(tmp_path: Path) -> None:
    installed = Path(sae_lens.__file__).parent
    shutil.copytree(
        installed, tmp_path / "sae_lens", ignore=shutil.ignore_patterns("__pycache__")
    )
    # outside any repository git applies a patch to the files below the current directory
    subprocess.run(
        ["git", "apply", "-p1", str(PATCH)],
        cwd=tmp_path,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
        check=True,
    )
    sae = eval_sae(rank=4)
    sae.save_model(tmp_path / "scaffold")
    sae.save_model(tmp_path / "unknown")
    cfg = json.loads((tmp_path / "unknown" / "cfg.json").read_text())
    cfg["architecture"] = "no_such_architecture"
    cfg["metadata"]["how_to_load"] = 'SAE.from_pretrained("user/saes", "x/jumprelu")'
    (tmp_path / "unknown" / "cfg.json").write_text(json.dumps(cfg))

    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env={
            **os.environ,
            "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    said, name, rank, trained_rank = json.loads(result.stdout.splitlines()[-1])
    assert len(said) == 2
    for message in said:
        assert "Unknown SAE architecture 'no_such_architecture'" in message
        assert "jumprelu, " in message
        assert 'SAE.from_pretrained("user/saes", "x/jumprelu")' in message
    assert (name, rank, trained_rank) == ("ScaffoldJumpReLUSAE", 4, 3)
