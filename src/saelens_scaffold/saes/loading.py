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

from saelens_scaffold._util.compat import release
from saelens_scaffold._util.errors import UserError, one_line
from saelens_scaffold._util.untrusted import without_token
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
        UserError: The id or the dtype is invalid, or the Hub does not give the files.
    """
    if dtype not in (None, *constants.DTYPE_MAP):
        allowed = ", ".join(constants.DTYPE_MAP)
        raise UserError(f"dtype is {dtype!r:.100}; allowed are {allowed}")

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
        UserError: The folder's name is no SAE's id, or the Hub does not give the files.
    """
    folder = check_sae_path(folder_name)

    def download(name: str, max_bytes: int, revision: str | None = None) -> str:
        path = f"{folder}/{name}"
        try:
            return bounded_download(
                repo_id, path, max_bytes, revision, force_download=force_download
            )
        except UserError:
            raise
        except (HTTP_ERROR, OSError, ValueError) as error:
            is_missing = isinstance(
                error, (errors.RemoteEntryNotFoundError, errors.OfflineModeIsEnabled)
            )
            # Neither the message nor the cause, which may repeat what the server says:
            # it knows the token.
            raise (MissingFileError if is_missing else UserError)(
                f"{repo_id}: {path} cannot be downloaded: {_reason(error)}"
            ) from None

    # As SAELens does, by the branch: huggingface_hub then notes which commit that is, and
    # finds it again without a connection.
    cfg_path = Path(download(constants.SAE_CFG_FILENAME, validation.MAX_CFG_BYTES))
    cfg = validation.read_config(cfg_path)
    # All files are of one commit, whatever is pushed in the meantime.
    commit = cfg_path.parents[folder.count("/") + 1].name
    max_bytes = validation.max_weights_bytes(cfg)
    download(constants.SAE_WEIGHTS_FILENAME, max_bytes, commit)
    sparsity_path = None
    with suppress(MissingFileError):
        max_bytes = validation.MAX_HEADER_BYTES + 8 * cfg["d_sae"]
        sparsity_path = download(constants.SPARSITY_FILENAME, max_bytes, commit)
    cfg, weights = checked_disk_loader(cfg_path.parent, device, cfg_overrides)
    sparsity = load_file(sparsity_path, device)["sparsity"] if sparsity_path else None
    return cfg, weights, sparsity


class MissingFileError(UserError):
    """A file is neither in the repository nor in the cache."""


class OldHubClientError(UserError):
    """huggingface_hub is too old."""


def check_hub_client() -> None:
    """
    See that huggingface_hub can limit a download and name its errors.

    Raises:
        OldHubClientError: It cannot.
    """
    if release("huggingface-hub") < (1, 31):
        raise OldHubClientError(
            "uploading to the Hub, and loading SAEs from it, needs huggingface-hub >= 1.31; "
            f"{hf.__version__} is installed"
        )


def bounded_download(
    repo_id: str,
    path: str,
    max_bytes: int,
    revision: str | None,
    *,
    force_download: bool = False,
    token: str | bool | None = None,
) -> str:
    """
    Download a file of the Hub, of limited size whatever the Hub says.

    Returns:
        Its path in the cache.

    Raises:
        InvalidSAEError: It is larger.
        MissingFileError: There was no such file, and there is no connection now.
        OldHubClientError: huggingface_hub cannot limit it.
    """
    check_hub_client()
    where: dict[str, Any] = {"repo_id": repo_id, "filename": path, "revision": revision}
    size = None
    try:
        size = hf.get_hf_file_metadata(hf.hf_hub_url(**where), token=token).size
    except errors.RemoteEntryNotFoundError:
        pass  # hf_hub_download raises it again, and notes it in the cache
    except (HTTP_ERROR, OSError):
        cached = hf.try_to_load_from_cache(**where)
        if isinstance(cached, str):
            _check_size(f"{repo_id}: {path}", Path(cached).stat().st_size, max_bytes)
            return cached
        if cached is not None:
            raise MissingFileError(f"{repo_id} has no {path}") from None
        raise
    if size is not None:
        _check_size(f"{repo_id}: {path}", size, max_bytes)

    class BoundedProgress(hf.utils.tqdm):
        """The progress bar of a download, told of all bytes before they are written."""

        def __init__(self, *args: Any, name: str | None = None, **kwargs: Any):
            super().__init__(*args, name=name, **kwargs)
            self._received = 0
            # Xet has a second bar, for what is transferred to make the file
            self._is_of_file = not str(name).endswith(".transfer")

        def update(self, n: float | None = 1) -> bool | None:
            self._received += int(n or 0)
            if self._is_of_file:
                _check_size(f"{repo_id}: {path}", self._received, max_bytes)
            return super().update(n)

    return hf.hf_hub_download(
        **where,
        force_download=force_download,
        token=token,
        tqdm_class=BoundedProgress,
    )


def _check_size(name: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise validation.InvalidSAEError(
            f"{name} has {size} bytes or more, over the {max_bytes} allowed"
        )


def _reason(error: Exception) -> str:
    """What went wrong in a request to the Hub, in no words of the server's."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return (
            f"the Hub answers {status}: there is no such repository or file, or your token "
            "(`hf auth login`) gives no access"
        )
    if status is not None:
        return f"the Hub answers {status}; try again later"
    return f"{type(error).__name__}: {without_token(one_line(error)):.300}"
