"""The files of an SAE as they are in the repository."""

import json
from pathlib import Path
from typing import Any

import torch
from sae_lens import constants
from sae_lens.saes.sae import SAE
from safetensors.torch import load_file, save_file

from saelens_scaffold.hub.local_paths import without_directories
from saelens_scaffold.hub.plan import UploadPlan
from saelens_scaffold.hub.sources import UploadedSAE
from saelens_scaffold.saes.facts import weights_sha256
from saelens_scaffold.saes.loading import load_scaffold_sae
from saelens_scaffold.saes.sae_ids import PLAIN_FORM, RESULTS_FOLDER
from saelens_scaffold.training.measurement import Measurement

_CONFIGURATIONS = ("eval_config", "sae_cfg_dict")
"""Parts of an evaluation result that may name local paths. The rest may quote text that
only looks like a path."""


def write_files(
    plan: UploadPlan, uploaded: UploadedSAE, folder: Path
) -> dict[str, Path]:
    """
    Write all files of an SAE, in both forms.

    Args:
        plan: The upload.
        uploaded: The SAE.
        folder: Where to write them.

    Returns:
        The files by path in the repository.
    """
    sae: Any = load_scaffold_sae(uploaded.directory)
    sae_id, measurement = uploaded.sae_id, Measurement.of(sae)
    # null: nothing was measured of these weights
    measured = measurement.to_metadata() if measurement else None
    sparsity = None
    if uploaded.sparsity_file is not None:
        sparsity = load_file(uploaded.sparsity_file)["sparsity"]
    hint = f'SAE.from_pretrained("{plan.repo_id}", "{sae_id}")'
    if uploaded.in_scaffold_form:
        hint = f"pip install saelens-scaffold; then import saelens_scaffold, and {hint}"
    if uploaded.in_scaffold_form and plan.jumprelu:
        plain_hint = f'SAE.from_pretrained("{plan.repo_id}", "{sae_id}/{PLAIN_FORM}")'
        hint += (
            ". Or without that package, as a plain SAE with the same outputs: "
            f"{plain_hint}"
        )
        plain = folder / PLAIN_FORM
        _save(sae.to_jumprelu(), plain, how_to_load=plain_hint, measured=measured)
        if sparsity is not None:
            # Together, the two halves of a linear latent fire as often as it does; how
            # often each of them does was not counted.
            linear, sparse = sparsity.tensor_split([uploaded.rank])
            _save_sparsity(torch.cat([linear, linear, sparse]), plain)
    _save(sae, folder, how_to_load=hint, measured=measured)
    if sparsity is not None:
        _save_sparsity(sparsity, folder)
    runner_cfg = uploaded.directory / constants.RUNNER_CFG_FILENAME
    if runner_cfg.exists():
        content = json.loads(runner_cfg.read_text(encoding="utf-8"))
        _write_json(without_directories(content), folder / runner_cfg.name)
    for name, content in _published_results(uploaded).items():
        _write_json(content, folder / RESULTS_FOLDER / name)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {f"{sae_id}/{path.relative_to(folder).as_posix()}": path for path in files}


def _save(sae: SAE[Any], folder: Path, **metadata: Any) -> None:
    """Save an SAE with further metadata, and without local paths in them."""
    sae.save_model(folder)
    file = folder / constants.SAE_CFG_FILENAME
    cfg = json.loads(file.read_text(encoding="utf-8"))
    metadata["weights_sha256"] = weights_sha256(sae)
    cfg["metadata"] = without_directories({**cfg["metadata"], **metadata})
    file.write_text(json.dumps(cfg), encoding="utf-8")


def _save_sparsity(log_sparsity: torch.Tensor, folder: Path) -> None:
    sparsity = {"sparsity": log_sparsity.contiguous()}
    save_file(sparsity, folder / constants.SPARSITY_FILENAME)


def _published_results(uploaded: UploadedSAE) -> dict[str, Any]:
    """An SAE's evaluation results by file name, without local paths."""
    published: dict[str, Any] = {}
    for result in uploaded.results:
        name, number = f"{result.evaluation}.json", 1
        while name in published:
            number += 1
            name = f"{result.evaluation}-{number}.json"
        about = {k: v for k, v in result.content.items() if k in _CONFIGURATIONS}
        published[name] = {**result.content, **without_directories(about)}
    return published


def _write_json(content: Any, file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")
