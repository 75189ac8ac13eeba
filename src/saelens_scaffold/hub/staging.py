"""The files of an SAE as they are in the repository."""

import json
from pathlib import Path
from typing import Any

import torch
from sae_lens import constants
from sae_lens.saes.sae import SAE
from safetensors.torch import load_file, save_file

from saelens_scaffold.hub.local_paths import without_directories
from saelens_scaffold.hub.sources import Upload, UploadedSAE
from saelens_scaffold.saes.facts import weights_sha256
from saelens_scaffold.saes.loading import load_scaffold_sae
from saelens_scaffold.saes.sae_ids import PLAIN_FORM, RESULTS_FOLDER
from saelens_scaffold.training.measurement import Measurement

_CONFIGURATIONS = ("eval_config", "sae_cfg_dict")
"""Parts of an evaluation result that may name local paths. The rest may quote text that
only looks like a path."""


def write_files(upload: Upload, uploaded: UploadedSAE, folder: Path) -> dict[str, Path]:
    """
    Write all files of an SAE, in both forms.

    Args:
        upload: The upload.
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
    hint = f'SAE.from_pretrained("{upload.repo_id}", "{sae_id}")'
    if uploaded.in_scaffold_form:
        hint = f"pip install saelens-scaffold; then import saelens_scaffold, and {hint}"
    if uploaded.in_scaffold_form and upload.jumprelu:
        plain_hint = f'SAE.from_pretrained("{upload.repo_id}", "{sae_id}/{PLAIN_FORM}")'
        hint += f". Or without that package, as a plain SAE with the same outputs: {plain_hint}"
        plain_sparsity = None
        if sparsity is not None:
            # Together, the two halves of a linear latent fire as often as it does; how
            # often each of them does was not counted.
            linear, sparse = sparsity.tensor_split([uploaded.rank])
            plain_sparsity = torch.cat([linear, linear, sparse])
        plain = folder / PLAIN_FORM
        _save(sae.to_jumprelu(), plain_sparsity, plain, plain_hint, measured)
    _save(sae, sparsity, folder, hint, measured)
    runner_cfg = uploaded.directory / constants.RUNNER_CFG_FILENAME
    if runner_cfg.exists():
        content = json.loads(runner_cfg.read_text(encoding="utf-8"))
        _write_json(without_directories(content), folder / runner_cfg.name)
    for result in uploaded.results:
        about = {k: v for k, v in result.content.items() if k in _CONFIGURATIONS}
        file, number = folder / RESULTS_FOLDER / f"{result.evaluation}.json", 1
        while file.exists():
            number += 1
            file = file.with_name(f"{result.evaluation}-{number}.json")
        _write_json({**result.content, **without_directories(about)}, file)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {f"{sae_id}/{path.relative_to(folder).as_posix()}": path for path in files}


def _save(
    sae: SAE[Any],
    log_sparsity: torch.Tensor | None,
    folder: Path,
    how_to_load: str,
    measured: dict[str, Any] | None,
) -> None:
    """Save an SAE with further metadata, and without local paths in them."""
    sae.save_model(folder)
    file = folder / constants.SAE_CFG_FILENAME
    cfg = json.loads(file.read_text(encoding="utf-8"))
    cfg["metadata"] |= {"how_to_load": how_to_load, "measured": measured}
    cfg["metadata"] |= {"weights_sha256": weights_sha256(sae)}
    cfg["metadata"] = without_directories(cfg["metadata"])
    file.write_text(json.dumps(cfg), encoding="utf-8")
    if log_sparsity is not None:
        sparsity = {"sparsity": log_sparsity.contiguous()}
        save_file(sparsity, folder / constants.SPARSITY_FILENAME)


def _write_json(content: Any, file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")
