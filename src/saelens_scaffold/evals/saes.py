"""The SAEs that an evaluation is run on: where they come from, and what is judged."""

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast, get_args

import torch
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import SAEMetadata
from sae_lens.util import str_to_dtype

from saelens_scaffold._util.errors import UserError, one_line
from saelens_scaffold._util.untrusted import file_name
from saelens_scaffold.evals.base import View
from saelens_scaffold.models.language_models import ModelClass
from saelens_scaffold.saes import (
    ScaffoldJumpReLUSAE,
    ScaffoldJumpReLUSAEConfig,
    validation,
)
from saelens_scaffold.saes.directories import sae_directories
from saelens_scaffold.saes.facts import scaffold_rank, weights_sha256
from saelens_scaffold.saes.forms import fold_decoder_norms
from saelens_scaffold.saes.jumprelu_on_kernels import inference_on_kernels
from saelens_scaffold.saes.metadata import check_metadata
from saelens_scaffold.saes.runner_config import complete_metadata
from saelens_scaffold.saes.scaffold import ScaffoldMixin, build_sae

PAPER_RANK = 24
"""Rank of the scaffold in arXiv 2606.14040, for Gemma-2-2B layer 12."""

SelectedSAEs = Sequence[tuple[str, Any]]
"""What SAEBench calls `selected_saes`: (release, sae_id) or (name, SAE object) pairs."""


CUSTOM_SAE_ID = "custom_sae"
"""SAEBench's id of every SAE that it is given as an object."""


def label_of(release: str, sae_id: str) -> str:
    """What a table calls an SAE."""
    return release if sae_id == CUSTOM_SAE_ID else f"{release}/{sae_id}"


@dataclass
class SelectedSAE:
    """
    One SAE of an evaluation.

    Attributes:
        release: Its SAELens release, or the name it was given.
        sae_id: Its id in the release, or "custom_sae", as in SAEBench.
        sae: The SAE.
        subspace_rank: Rank of the subspaces (PCA, random) that its scaffold is compared
            with: the rank of its scaffold; for a plain SAE the largest in the call, so
            that tables line up, else 24, the paper's.
    """

    release: str
    sae_id: str
    sae: SAE[Any]
    subspace_rank: int = PAPER_RANK

    @property
    def key(self) -> str:
        """What SAEBench's `run_eval` calls it in what it returns."""
        return f"{self.release}_{self.sae_id}"

    @property
    def label(self) -> str:
        """What a table calls it."""
        return label_of(self.release, self.sae_id)

    @property
    def rank(self) -> int:
        """Rank of its scaffold, 0 for a plain SAE."""
        return scaffold_rank(self.sae)

    @property
    def hook_name(self) -> str:
        """The hook point it was trained at."""
        return str(self.sae.cfg.metadata.hook_name)

    @property
    def file_name(self) -> str:
        """Name of the file with its result, as in SAEBench."""
        return result_file_name(self.release, self.sae_id)


def result_file_name(release: str, sae_id: str = CUSTOM_SAE_ID) -> str:
    """Name of the file with an SAE's result, as in SAEBench; UserError if it cannot be one."""
    return file_name(f"{release}_{sae_id}_eval_results.json".replace("/", "_"))


def load_saes(paths: Sequence[str | os.PathLike[str]]) -> list[tuple[str, SAE[Any]]]:
    """
    Load SAEs from their directories, each under a name of its own.

    Args:
        paths: Directories that SAELens's `save_model` or `save_inference_model` wrote, or
            directories with such below them.

    Returns:
        `selected_saes` for any `run_eval` of SAEBench or of this package. A name is the
        last part of the path, and as many more as tell the SAEs apart: "BatchTopK", or
        "seed-0/BatchTopK" and "seed-1/BatchTopK".

    Raises:
        UserError: A directory holds no SAE.
        InvalidSAEError: A scaffold SAE's files cannot be used.
        UserError: A directory is named twice, or holds no SAE that SAELens can read.
    """
    directories = [
        directory for path in paths for _, directory in sae_directories(Path(path))
    ]
    selected: list[tuple[str, SAE[Any]]] = []
    for directory, name in zip(directories, _names(directories), strict=True):
        _check_form(directory)
        try:
            sae = SAE.load_from_disk(directory)
        except Exception as error:  # SAELens checks little of what files may hold
            raise UserError(
                f"{directory}: SAELens cannot load this SAE: {type(error).__name__}: "
                f"{one_line(error):.500}"
            ) from error
        with validation.named(directory):
            check_metadata(vars(sae.cfg.metadata))
            complete_metadata(sae.cfg.metadata, directory)
            check_metadata(vars(sae.cfg.metadata))
        selected.append((name, sae))
    return selected


def select_saes(
    sae_path: Sequence[str] = (),
    sae_regex_pattern: str | None = None,
    sae_block_pattern: str | None = None,
    model_name: str | None = None,
) -> list[tuple[str, Any]]:
    """
    The SAEs that a command line names, from disk and from SAELens's releases.

    Args:
        sae_path: Directories of SAEs.
        sae_regex_pattern: Regular expression of SAELens releases.
        sae_block_pattern: Regular expression of the ids in these releases.
        model_name: Language model of SAEs that do not name theirs.

    Raises:
        UserError: No SAE is named, a pattern matches none, or one cannot be read.
    """
    selected: list[tuple[str, Any]] = [*load_saes(sae_path)]
    if sae_regex_pattern is not None and sae_block_pattern is not None:
        selected += _released_saes(sae_regex_pattern, sae_block_pattern)
    elif sae_regex_pattern is not None or sae_block_pattern is not None:
        raise UserError("--sae_regex_pattern and --sae_block_pattern go together")
    if not selected:
        raise UserError(
            "no SAE is named; give --sae_path DIR..., or --sae_regex_pattern and "
            "--sae_block_pattern"
        )
    # SAEBench loads no SAE that does not name its model.
    for _, sae in selected:
        if model_name and not isinstance(sae, str) and not sae.cfg.metadata.model_name:
            sae.cfg.metadata.model_name = model_name
    return selected


def _released_saes(release: str, sae_id: str) -> list[tuple[str, Any]]:
    try:
        releases, ids = re.compile(release), re.compile(sae_id)
    except re.error as error:
        raise UserError(f"not a regular expression: {error}") from error
    found = [
        (name, of_release)
        for name, lookup in get_pretrained_saes_directory().items()
        if releases.fullmatch(name)
        for of_release in lookup.saes_map
        if ids.fullmatch(of_release)
    ]
    if not found:
        raise UserError(
            f"no SAE of SAELens's releases matches the release {release!r} and the id "
            f"{sae_id!r} (in full)"
        )
    return found


def _check_form(directory: Path) -> None:
    """Check scaffold SAEs, and that others have a form that SAELens can load as an SAE."""
    file = directory / SAE_CFG_FILENAME
    cfg = validation.read_json_object(file, validation.MAX_CFG_BYTES)
    architecture = cfg.get("architecture")  # none in the files of older SAELens
    is_plain = architecture in [*SAE_CLASS_REGISTRY] or not validation.is_checkpoint(
        cfg
    )
    if architecture == ScaffoldJumpReLUSAEConfig.architecture() or not is_plain:
        validation.check_sae_directory(directory)


def resolve_saes(
    selected_saes: SelectedSAEs, device: str, dtype: str, view: View = "whole"
) -> list[SelectedSAE]:
    """
    Load what is named, and bring every SAE into the form that is judged.

    Args:
        selected_saes: (release, sae_id) or (name, SAE object) pairs, as in SAEBench.
        device: Where the SAEs are wanted.
        dtype: Their dtype, as in "float32", or "" for that which they have. SAEBench's
            evaluations use that of the language model.
        view: "sparse" for `sparse_sae()` of scaffold SAEs, "whole" for the SAEs
            themselves. Plain SAEs are the same in both.

    Returns:
        The SAEs, in order, with decoder rows of unit norm. `cfg.metadata.weights_sha256` of
        each tells its weights in that dtype, before their norms were folded.

    Raises:
        UserError: There is none, two have the same name, or one lacks a hook point.
        InvalidSAEError: One cannot be used as it is.
    """
    if not selected_saes:
        raise UserError("selected_saes is empty; name at least one SAE")
    resolved: list[SelectedSAE] = []
    for release, sae_or_id in selected_saes:
        try:
            sae_id, sae = _loaded(release, sae_or_id, device)
            with validation.named(f"SAE {release!r}"):
                validation.check_can_be_used(sae)
            sae = _formatted(release, sae, view)
        except validation.InvalidSAEError:
            raise
        except ValueError as error:
            raise UserError(f"SAE {release!r}: {error}") from error
        wanted = str_to_dtype(dtype) if dtype else sae.dtype
        # Of the weights as they are given, by which `upload` finds their results.
        # SAEBench's results carry the metadata.
        sae.cfg.metadata.weights_sha256 = weights_sha256(sae, wanted)
        sae.to(device=device, dtype=torch.promote_types(sae.dtype, torch.float32))
        if not fold_decoder_norms(sae):
            warnings.warn(
                f"SAE {release!r}: its decoder's norms stay as they are, since it selects "
                "latents by them; what is ranked by activations depends on them",
                stacklevel=1,
            )
        sae.to(dtype=wanted)
        resolved.append(SelectedSAE(release, sae_id, sae))
    largest = max(sae.rank for sae in resolved)
    for sae in resolved:
        sae.subspace_rank = sae.rank or largest or PAPER_RANK

    files = [sae.file_name for sae in resolved]
    twice = sorted({file for file in files if files.count(file) > 1})
    if twice:
        raise UserError(
            f"two SAEs have the same name, and so would their results: {twice}; "
            "give each a name of its own"
        )
    return resolved


def _loaded(release: str, sae_or_id: Any, device: str) -> tuple[str, SAE[Any]]:
    """SAEBench's id of an SAE, and the SAE."""
    if not isinstance(sae_or_id, str):
        return CUSTOM_SAE_ID, sae_or_id
    sae, _, _ = SAE.from_pretrained_with_cfg_and_sparsity(
        release=release, sae_id=sae_or_id, device=device
    )
    return sae_or_id, sae


def _formatted(release: str, sae: SAE[Any], view: View) -> SAE[Any]:
    """An SAE, whose metadata are checked, in the form that is judged."""
    judged = sae
    if isinstance(sae, ScaffoldMixin):
        judged = sae.to_inference()
    elif isinstance(sae, JumpReLUSAE) and sae.cfg.metadata.scaffold_view == "whole":
        judged = _scaffold_of_plain_form(sae)
        if judged is None:
            judged = sae
            rank = sae.cfg.metadata.scaffold_rank
            warnings.warn(
                f"SAE {release!r}: its metadata say that it is a scaffold SAE of rank {rank}, "
                "but its first latents are not pairs of opposites; it is judged as the plain "
                "SAE that it is",
                stacklevel=1,
            )
    if view == "sparse" and isinstance(judged, ScaffoldMixin):
        judged = judged.sparse_sae()
    _complete_layer(judged.cfg.metadata)
    return inference_on_kernels(judged)


def _complete_layer(metadata: SAEMetadata) -> None:
    """
    Raises:
        ValueError: The SAE's metadata do not say what it was trained on.
    """
    for name in ("hook_name", "model_name"):
        if metadata[name] is None:
            raise ValueError(f"its metadata have no {name}")
    layer = re.search(r"\d+", str(metadata.hook_name))
    if metadata.hook_layer is None:
        if layer is None:
            raise ValueError(f"its hook_name {metadata.hook_name!r} is in no layer")
        metadata.hook_layer = int(layer[0])


def _scaffold_of_plain_form(sae: JumpReLUSAE) -> ScaffoldJumpReLUSAE | None:
    """
    Undo `to_jumprelu`: its first 2 r latents are r linear ones and their opposites.

    Returns:
        The scaffold SAE; None if the weights are not of that form, whatever the metadata
        say: it may have been trained further, or come from anybody.
    """
    rank = sae.cfg.metadata.scaffold_rank
    if rank is None or 2 * rank >= sae.cfg.d_sae or rank >= sae.cfg.d_in:
        return None
    latents = (sae.W_enc.T, sae.b_enc, sae.W_dec)
    if sae.threshold[: 2 * rank].any() or not all(
        _are_opposites(weights[:rank], weights[rank : 2 * rank]) for weights in latents
    ):
        return None
    of_sae = {field.name: getattr(sae.cfg, field.name) for field in fields(sae.cfg)}
    of_sae |= {"d_sae": sae.cfg.d_sae - rank, "scaffold_rank": rank}
    cfg = ScaffoldJumpReLUSAEConfig(**of_sae)

    def without_opposites(latents: torch.Tensor) -> torch.Tensor:
        return torch.cat([latents[:rank], latents[2 * rank :]])

    threshold = without_opposites(sae.threshold).detach().clone()
    threshold[:rank] = -torch.inf
    weights = {
        "W_enc": without_opposites(sae.W_enc.T).T,
        "b_enc": without_opposites(sae.b_enc),
        "threshold": threshold,
        "W_dec": without_opposites(sae.W_dec),
        "b_dec": sae.b_dec,
    }
    return build_sae(ScaffoldJumpReLUSAE, cfg, weights)


def _are_opposites(latents: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether the one are the other's opposites, shape (r, ...), up to a latent's rounding."""
    sums, sizes = (latents + others).abs(), latents.abs()
    if sizes.ndim > 1:
        sizes = sizes.amax(dim=1, keepdim=True)
    return bool((sums <= 4 * torch.finfo(latents.dtype).eps * sizes).all())


def _names(directories: list[Path]) -> list[str]:
    """The shortest ends of the paths, one directory or more, that tell them apart."""
    parts = [directory.resolve().parts for directory in directories]
    if len(set(parts)) < len(parts):
        raise UserError(f"the same SAE is named twice: {[*map(str, directories)]}")

    def shortest_end(own: tuple[str, ...]) -> str:
        for start in range(len(own) - 1, -1, -1):
            end = own[start:]
            if sum(other[-len(end) :] == end for other in parts) == 1:
                return "/".join(end)
        raise AssertionError("no two paths are equal")

    return [shortest_end(own) for own in parts]


def common_model_name(selected_saes: SelectedSAEs) -> str:
    """
    The language model that the SAEs were trained on, as their metadata have it.

    Raises:
        UserError: They name none, or several.
    """
    named = {
        name: get_pretrained_saes_directory()[name].model
        if isinstance(sae, str)
        else sae.cfg.metadata.model_name
        for name, sae in selected_saes
    }
    models = {model for model in named.values() if model}
    if not models:
        raise UserError("the SAEs do not tell their language model; name it: --model")
    if len(models) > 1:
        raise UserError(
            f"the SAEs were trained on different language models: {named}; evaluate those "
            "of one model together, or name it: --model"
        )
    return models.pop()


def common_model_class(saes: Sequence[SAE[Any]]) -> ModelClass:
    """
    The class of the language model that SAEs were trained on, as their metadata have it;
    HookedTransformer where they have none.

    Raises:
        UserError: They name several, or one that nothing can be evaluated on.
    """
    named = {sae.cfg.metadata.model_class_name or "HookedTransformer" for sae in saes}
    known = get_args(ModelClass)
    if len(named) > 1 or not named <= {*known}:
        raise UserError(
            f"model_class_name of the SAEs is {' and '.join(sorted(named))}; name one class "
            f"to evaluate them on, {', '.join(known)}: --model_class_name"
        )
    return cast(ModelClass, named.pop())
