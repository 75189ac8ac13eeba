"""Loading SAEs that may come from anybody: checked first, then loaded by SAELens.

The loaders here are SAELens converters: `SAE.from_pretrained(repo, sae_id,
converter=checked_huggingface_loader)` and `SAE.load_from_disk(path,
converter=checked_disk_loader)`.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub as hf
import torch
from huggingface_hub import errors
from sae_lens import SAE, constants
from sae_lens.loading import pretrained_sae_loaders
from safetensors.torch import load_file

from saelens_scaffold.saes import validation
from saelens_scaffold.saes.sae_ids import check_sae_path

HTTP_ERROR: type[Exception] = errors.HfHubHTTPError.__bases__[0]
"""Error of a broken connection: HTTPError of httpx or, from huggingface_hub 2 on, of
httpx2. huggingface_hub exports neither, but its own errors derive from it."""

Weights = dict[str, torch.Tensor]


def load_scaffold_sae(
    repo_id_or_path: str | Path,
    sae_id: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    force_download: bool = False,
) -> SAE[Any]:
    """
    Load an SAE, scaffold or plain, that need not be trusted.

    As `SAE.from_pretrained` and `SAE.load_from_disk` do, but everything is checked
    first: only safetensors files are read, the configuration is data, and its sizes are
    compared with the weights before anything is downloaded, or memory allocated.

    Args:
        repo_id_or_path: A repository of the Hub, as "user/repo", or the directory of an
            SAE.
        sae_id: Its id in the repository, as "layer_12" or "layer_12/jumprelu"; None for
            a directory.
        device: Where to put it.
        dtype: Its dtype, as "float32"; None for that in which it was saved.
        force_download: Whether to download again what is in the cache.

    Returns:
        The SAE, in evaluation form.

    Raises:
        InvalidSAEError: The files cannot be used, and why.
        UserError: The id is invalid.
        HfHubHTTPError: The Hub does not give the files.
    """

    def from_hub(repo_id: Any, device: str, cfg_overrides: Any) -> tuple[Any, Weights]:
        return checked_huggingface_loader(
            str(repo_id), str(sae_id), device, force_download, cfg_overrides
        )[:2]

    # load_from_disk also for the Hub, as from_pretrained needs a dtype
    converter: Any = checked_disk_loader if sae_id is None else from_hub
    return SAE.load_from_disk(repo_id_or_path, device, dtype, converter)


def checked_disk_loader(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], Weights]:
    """
    A converter for `SAE.load_from_disk` that checks the files first.

    Args:
        path: The directory of an SAE.
        device: Where to put the weights.
        cfg_overrides: Fields of the configuration to replace.

    Returns:
        The configuration and the weights.

    Raises:
        InvalidSAEError: The files cannot be used, and why.
    """
    validation.check_sae_directory(path)
    return pretrained_sae_loaders.sae_lens_disk_loader(path, device, cfg_overrides)


def checked_huggingface_loader(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], Weights, torch.Tensor | None]:
    """
    A converter for `SAE.from_pretrained` that checks each file before the next.

    Args:
        repo_id: A repository of the Hub.
        folder_name: The SAE's folder in it.
        device: Where to put the weights.
        force_download: Whether to download again what is in the cache.
        cfg_overrides: Fields of the configuration to replace.

    Returns:
        The configuration, the weights, and the log10 of the latents' firing frequencies,
        if there is a file with those.

    Raises:
        InvalidSAEError: The files cannot be used, and why.
        UserError: The folder's name is no SAE's id.
        HfHubHTTPError: The Hub does not give the files.
    """
    folder = check_sae_path(folder_name)

    def download(name: str, max_bytes: int, revision: str | None = None) -> str:
        path = f"{folder}/{name}"
        try:
            url = hf.hf_hub_url(repo_id, path, revision=revision)
            metadata = hf.get_hf_file_metadata(url)
        except errors.EntryNotFoundError:
            raise
        except (HTTP_ERROR, OSError):
            cached = hf.try_to_load_from_cache(repo_id, path, revision=revision)
            if not isinstance(cached, str):
                raise
            return cached
        if metadata.size is not None and metadata.size > max_bytes:
            raise validation.InvalidSAEError(
                f"{repo_id}: {path} has {metadata.size} bytes, over the {max_bytes} allowed"
            )
        commit = metadata.commit_hash or revision
        return hf.hf_hub_download(
            repo_id, path, revision=commit, force_download=force_download
        )

    cfg_path = Path(download(constants.SAE_CFG_FILENAME, validation.MAX_CFG_BYTES))
    cfg = validation.read_config(cfg_path)
    # All files are of one commit, whatever is pushed in the meantime.
    commit = cfg_path.parents[folder.count("/") + 1].name
    max_bytes = validation.max_weights_bytes(cfg)
    download(constants.SAE_WEIGHTS_FILENAME, max_bytes, commit)
    sparsity_path = None
    with suppress(errors.EntryNotFoundError, errors.OfflineModeIsEnabled):
        max_bytes = validation.MAX_HEADER_BYTES + 8 * cfg["d_sae"]
        sparsity_path = download(constants.SPARSITY_FILENAME, max_bytes, commit)
    cfg, weights = checked_disk_loader(cfg_path.parent, device, cfg_overrides)
    sparsity = load_file(sparsity_path, device)["sparsity"] if sparsity_path else None
    return cfg, weights, sparsity
