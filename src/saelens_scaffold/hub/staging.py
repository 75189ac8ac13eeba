"""The files of an SAE as they are in the repository."""

import json
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.saes.sae import SAE
from safetensors.torch import save_file

from saelens_scaffold.hub.local_paths import without_directories
from saelens_scaffold.hub.plan import UploadPlan
from saelens_scaffold.hub.sources import UploadedSAE
from saelens_scaffold.saes.digest import weights_sha256
from saelens_scaffold.saes.sae_ids import PLAIN_FORM, RESULTS_FOLDER

_CONFIGURATIONS = {"eval_config", "sae_cfg_dict"}
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
    sae: Any = uploaded.load()
    sae_id, log_sparsity = uploaded.sae_id, uploaded.log_sparsity
    hint = f'SAE.from_pretrained("{plan.repo_id}", "{sae_id}")'
    plain_hint = f'SAE.from_pretrained("{plan.repo_id}", "{sae_id}/{PLAIN_FORM}")'
    if uploaded.in_scaffold_form:
        hint = f"pip install saelens-scaffold; then import saelens_scaffold, and {hint}"
    if uploaded.in_scaffold_form and plan.jumprelu:
        hint += (
            ". Or without that package, as a plain SAE with the same outputs: "
            f"{plain_hint}"
        )
        if log_sparsity is not None:
            # Together, the two halves of a linear latent fire as often as it does; how
            # often each of them does was not counted.
            scaffold, sparse = log_sparsity.tensor_split([uploaded.rank])
            log_sparsity = torch.cat([scaffold, scaffold, sparse])
        _save(
            uploaded, sae.to_jumprelu(), folder / PLAIN_FORM, plain_hint, log_sparsity
        )
    _save(uploaded, sae, folder, hint, uploaded.log_sparsity)
    if uploaded.runner_cfg is not None:
        runner_cfg = json.loads(uploaded.runner_cfg.read_text(encoding="utf-8"))
        _write_json(without_directories(runner_cfg), folder / RUNNER_CFG_FILENAME)
    for name, content in _published_results(uploaded).items():
        _write_json(content, folder / RESULTS_FOLDER / name)
    return {
        f"{sae_id}/{file.relative_to(folder).as_posix()}": file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _save(
    uploaded: UploadedSAE,
    sae: SAE[Any],
    folder: Path,
    how_to_load: str,
    log_sparsity: torch.Tensor | None,
) -> None:
    """Save one form of an SAE, with metadata that may be published."""
    sae.save_model(folder)
    file = folder / SAE_CFG_FILENAME
    cfg = json.loads(file.read_text(encoding="utf-8"))
    measurement = uploaded.measurement
    cfg["metadata"] |= {
        "how_to_load": how_to_load,
        # null: nothing was measured of these weights
        "measured": measurement.to_metadata() if measurement else None,
        "weights_sha256": weights_sha256(sae),
    }
    cfg["metadata"] = without_directories(cfg["metadata"])
    file.write_text(json.dumps(cfg), encoding="utf-8")
    if log_sparsity is not None:
        sparsity = {"sparsity": log_sparsity.contiguous()}
        save_file(sparsity, folder / SPARSITY_FILENAME)


def _published_results(uploaded: UploadedSAE) -> dict[str, Any]:
    """An SAE's evaluation results, by file name."""
    published: dict[str, Any] = {}
    for result in uploaded.results:
        name, number = f"{result.evaluation}.json", 1
        while name in published:
            number += 1
            name = f"{result.evaluation}-{number}.json"
        published[name] = {
            key: without_directories(value) if key in _CONFIGURATIONS else value
            for key, value in result.content.items()
        }
    return published


def _write_json(content: Any, file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")
