"""The Hub of the tests, and SAEs to put there."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from eval_helpers import D_MODEL, eval_sae
from hub_server import WRITE_TOKEN, HubServer
from saelens_scaffold import load_scaffold_sae, upload_scaffold_saes
from saelens_scaffold._util.compat import release
from saelens_scaffold._util.errors import UserError

REPO = "user/saes"

RUNNER_CFG = {
    "training_tokens": 1_000_000,
    "train_batch_size_tokens": 1000,
    # of the 1,000 steps, the last 200 are in the last window
    "feature_sampling_window": 400,
    "resume_from_checkpoint": None,
    "sae_lens_training_version": "6.54.12",
}

SCAFFOLD_FILES = {
    "cfg.json",
    "sae_weights.safetensors",
    "jumprelu/cfg.json",
    "jumprelu/sae_weights.safetensors",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running Hub, which huggingface_hub's client in this process talks to."""
    if release("huggingface-hub") < (1, 31):
        too_old = "needs huggingface-hub >= 1.31; "
        with pytest.raises(UserError, match=too_old):
            upload_scaffold_saes({"a": eval_sae(rank=4)}, REPO)
        with pytest.raises(UserError, match=too_old):
            load_scaffold_sae(REPO, "a")
        pytest.skip("there is no more to it than this error")
    with HubServer().running() as server:
        # They are read from the environment once, when huggingface_hub is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # Xet is another service than the Hub, which this server does not have.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        sleep = time.sleep
        monkeypatch.setattr(time, "sleep", lambda s: sleep(min(s, 0.01)))
        yield server


def hub_environment(server: HubServer, home: Path) -> dict[str, str]:
    """What a process of its own needs to talk to it."""
    return {
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home),
        "HF_TOKEN": WRITE_TOKEN,
    }


def save_sae(folder: Path, rank: int = 4, sparsity: bool = True, **kwargs: Any) -> Any:
    """An SAE, saved as SAELens's runner saves one."""
    sae = eval_sae(rank=rank, **kwargs)
    sae.cfg.metadata.dataset_path = "NeelNanda/pile-10k"
    sae.save_model(folder)
    (folder / "runner_cfg.json").write_text(json.dumps(RUNNER_CFG))
    if sparsity:
        # a tenth of the sparse latents fires on a fifth of the tokens, others on 1 %
        frequencies = torch.full((sae.cfg.d_sae,), 0.01)
        frequencies[rank : rank + 9] = 0.2
        frequencies[:rank] = 1.0
        save_file({"sparsity": frequencies.log10()}, folder / "sparsity.safetensors")
    return sae


def some_activations(n: int = 50) -> torch.Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(7))


def paths_in(server: HubServer, sae_id: str, revision: str = "main") -> set[str]:
    """The files of an SAE's folder that are visible, relative to it."""
    files = server.repositories[REPO].files(revision)
    prefix = f"{sae_id}/"
    return {path.removeprefix(prefix) for path in files if path.startswith(prefix)}
