"""Loading SAEs that may be anybody's: checked first, then loaded by SAELens.

The loaders here are what SAELens calls converters: `SAE.from_pretrained(repo, sae_id,
converter=checked_huggingface_loader)` and `SAE.load_from_disk(path,
converter=checked_disk_loader)`.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from sae_lens import SAE
from sae_lens.constants import (
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.loading.pretrained_sae_loaders import (
    get_sae_lens_config_from_disk,
    read_sae_components_from_disk,
    sae_lens_disk_loader,
)
from safetensors.torch import load_file

from saelens_scaffold.saes.sae_ids import check_sae_path
from saelens_scaffold.saes.validation import (
    MAX_CFG_BYTES,
    MAX_HEADER_BYTES,
    InvalidSAEError,
    check_sae_directory,
    check_sparsity_file,
    check_weights_file,
    max_weights_bytes,
    read_config,
)

HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""What a broken connection raises: HTTPError of httpx or, from huggingface_hub 2 on, of
httpx2. huggingface_hub shows neither, and its own errors derive from it."""


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
    held against the weights before anything is downloaded, or memory allocated.

    Args:
        repo_id_or_path: A repository of the Hub, as "user/repo", or the directory of an
            SAE.
        sae_id: Its id in the repository, as "layer_12" or "layer_12/jumprelu"; None for
            a directory.
        device: Where to put it.
        dtype: Its dtype, as "float32"; None for that in which it was saved.
        force_download: Whether to download what is in the cache already.

    Returns:
        The SAE, in evaluation form.

    Raises:
        InvalidSAEError: The files cannot be used, and why.
        ValueError: The id is none.
        HfHubHTTPError: The Hub does not give the files.
    """
    if sae_id is None:
        return SAE.load_from_disk(
            repo_id_or_path, device=device, dtype=dtype, converter=checked_disk_loader
        )

    def converter(
        path: str | Path, device: str, cfg_overrides: dict[str, Any] | None
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        cfg, state_dict, _ = checked_huggingface_loader(
            str(path), sae_id, device, force_download, cfg_overrides
        )
        return cfg, state_dict

    # load_from_disk and not from_pretrained, which knows no dtype but a given one
    return SAE.load_from_disk(
        str(repo_id_or_path), device=device, dtype=dtype, converter=converter
    )


def checked_disk_loader(
    path: str | Path,
    device: str = "cpu",
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
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
    check_sae_directory(path)
    return sae_lens_disk_loader(path, device, cfg_overrides)


def checked_huggingface_loader(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor | None]:
    """
    A converter for `SAE.from_pretrained` that checks each file before the next.

    Args:
        repo_id: A repository of the Hub.
        folder_name: The SAE's folder in it.
        device: Where to put the weights.
        force_download: Whether to download what is in the cache already.
        cfg_overrides: Fields of the configuration to replace.

    Returns:
        The configuration, the weights, and the log10 of the latents' firing frequencies,
        if there is a file with those.

    Raises:
        InvalidSAEError: The files cannot be used, and why.
        ValueError: The folder's name is no SAE's id.
        HfHubHTTPError: The Hub does not give the files.
    """
    folder = check_sae_path(folder_name)

    def download(name: str, max_bytes: int, revision: str | None) -> Path:
        return _download(
            repo_id, f"{folder}/{name}", max_bytes, revision, force_download
        )

    cfg_path = download(SAE_CFG_FILENAME, MAX_CFG_BYTES, None)
    cfg = read_config(cfg_path)
    # The other files are those of the same commit, whatever happens in the meantime.
    commit = cfg_path.parents[folder.count("/") + 1].name
    weights_path = download(SAE_WEIGHTS_FILENAME, max_weights_bytes(cfg), commit)
    check_weights_file(weights_path, cfg)
    log_sparsity = None
    try:
        max_bytes = MAX_HEADER_BYTES + 8 * cfg["d_sae"]
        sparsity_path = download(SPARSITY_FILENAME, max_bytes, commit)
    except (EntryNotFoundError, OfflineModeIsEnabled):
        pass
    else:
        check_sparsity_file(sparsity_path, cfg["d_sae"])
        log_sparsity = load_file(sparsity_path, device)["sparsity"]

    cfg = get_sae_lens_config_from_disk(cfg_path.parent, device, cfg_overrides)
    cfg, state_dict = read_sae_components_from_disk(cfg, weights_path, device)
    return cfg, state_dict, log_sparsity


def _download(
    repo_id: str,
    filename: str,
    max_bytes: int,
    revision: str | None,
    force_download: bool,
) -> Path:
    """Download a file if it is no larger than that, or find it in the cache."""
    url = hf_hub_url(repo_id, filename, revision=revision)
    try:
        metadata = get_hf_file_metadata(url)
    except EntryNotFoundError:
        raise
    except (HTTP_ERROR, OSError) as error:
        try:
            return Path(
                hf_hub_download(
                    repo_id, filename, revision=revision, local_files_only=True
                )
            )
        except LocalEntryNotFoundError:
            raise error from None
    if metadata.size is not None and metadata.size > max_bytes:
        raise InvalidSAEError(
            f"{repo_id}: {filename} has {metadata.size} bytes; by the configuration it "
            f"has {max_bytes} at most"
        )
    return Path(
        hf_hub_download(
            repo_id,
            filename,
            revision=metadata.commit_hash or revision,
            force_download=force_download,
        )
    )
