"""The files of an SAE as they are in the repository."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import RUNNER_CFG_FILENAME, SPARSITY_FILENAME
from sae_lens.saes.sae import SAE
from safetensors.torch import save_file

from saelens_scaffold.hub.evaluation_results import file_names
from saelens_scaffold.hub.local_paths import without_directories
from saelens_scaffold.hub.sources import UploadedSAE
from saelens_scaffold.saes.digest import weights_sha256
from saelens_scaffold.saes.sae_ids import PLAIN_FORM, RESULTS_FOLDER
from saelens_scaffold.saes.scaffold import ScaffoldMixin

_CONFIGURATIONS = ("eval_config", "sae_cfg_dict")
"""What of an evaluation result says how it came about."""


def write_files(
    uploaded: UploadedSAE, folder: Path, hf_repo_id: str, jumprelu: bool
) -> None:
    """
    Write all files of an SAE, in both forms.

    Args:
        uploaded: The SAE.
        folder: Where to write them: the SAE's folder in the repository, as it will be.
        hf_repo_id: The repository, which the configurations name.
        jumprelu: Whether to write a scaffold SAE's plain form as well.
    """
    sae = uploaded.load()
    # null says that nothing was measured of these weights
    measured = uploaded.measurement.to_metadata() if uploaded.measurement else None

    def save(sae: SAE[Any], folder: Path, hint: str) -> None:
        _save(sae, folder, how_to_load=hint, measured=measured)

    save(sae, folder, how_to_load(uploaded, hf_repo_id, jumprelu))
    if uploaded.log_sparsity is not None:
        _save_sparsity(uploaded.log_sparsity, folder)
    if uploaded.runner_cfg is not None:
        runner_cfg = json.loads(uploaded.runner_cfg.read_text(encoding="utf-8"))
        _write_json(without_directories(runner_cfg), folder / RUNNER_CFG_FILENAME)
    if uploaded.results:
        (folder / RESULTS_FOLDER).mkdir()
        names = file_names(uploaded.results)
        for name, result in zip(names, uploaded.results, strict=True):
            # not in all of it, where text that was read may look like a path
            about = {k: v for k, v in result.content.items() if k in _CONFIGURATIONS}
            content = {**result.content, **without_directories(about)}
            _write_json(content, folder / RESULTS_FOLDER / name)

    if jumprelu and isinstance(sae, ScaffoldMixin):
        plain = folder / PLAIN_FORM
        save(sae.to_jumprelu(), plain, _load_call(uploaded, hf_repo_id, plain=True))
        if uploaded.log_sparsity is not None:
            scaffold, sparse = uploaded.log_sparsity.tensor_split([uploaded.rank])
            # Between them, the two halves of a linear latent fire as often as it does;
            # how often each does was not counted.
            _save_sparsity(torch.cat([scaffold, scaffold, sparse]), plain)


def how_to_load(uploaded: UploadedSAE, hf_repo_id: str, jumprelu: bool) -> str:
    """What the configuration says to those who read it because the SAE does not load."""
    call = _load_call(uploaded, hf_repo_id)
    if not uploaded.in_scaffold_form:
        return call
    text = f"pip install saelens-scaffold; then import saelens_scaffold, and {call}"
    if jumprelu:
        plain = _load_call(uploaded, hf_repo_id, plain=True)
        text += (
            f". Or without that package, as a plain SAE with the same outputs: {plain}"
        )
    return text


def _load_call(uploaded: UploadedSAE, hf_repo_id: str, plain: bool = False) -> str:
    sae_id = f"{uploaded.sae_id}/{PLAIN_FORM}" if plain else uploaded.sae_id
    return f'SAE.from_pretrained("{hf_repo_id}", "{sae_id}")'


def _save(sae: SAE[Any], folder: Path, **metadata: Any) -> None:
    cfg = sae.cfg
    try:
        sae.cfg = copy.deepcopy(cfg)  # that of an SAE of the user's stays as it is
        metadata["weights_sha256"] = weights_sha256(sae)
        for name, value in {**sae.cfg.metadata.to_dict(), **metadata}.items():
            setattr(sae.cfg.metadata, name, without_directories(value))
        sae.save_model(folder)
    finally:
        sae.cfg = cfg


def _write_json(content: Any, file: Path) -> None:
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _save_sparsity(log_sparsity: torch.Tensor, folder: Path) -> None:
    save_file({"sparsity": log_sparsity.contiguous()}, folder / SPARSITY_FILENAME)
