"""The language model of an evaluation, cut in two at the SAEs' hook point."""

import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_bench.sae_bench_utils import general_utils
from transformer_lens import HookedTransformer
from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

from saelens_scaffold._util.errors import UserError, loading
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.models import EMBEDDED_MODEL_NAME, register_embedded_model
from saelens_scaffold.models.local import official_name, register_local_model


def load_language_model(
    model_name: str, device: str, dtype: str = "float32"
) -> HookedTransformer:
    """
    Load a model as SAEBench does, its weights unprocessed.

    Args:
        model_name: Of TransformerLens, "py-neox" for the embedded model, or the directory
            of a local model.
        device: Where to put it.
        dtype: As in "float32".

    Raises:
        UserError: TransformerLens knows no such model, or its files cannot be had.
    """
    name, torch_dtype = known_model_name(model_name), general_utils.str_to_dtype(dtype)
    load = HookedTransformer.from_pretrained_no_processing
    with loading(model_name):
        return load(name, device=device, dtype=torch_dtype)


def known_model_name(model_name: str) -> str:
    """
    Make a model known to TransformerLens, if it is local or the embedded one.

    Returns:
        Its name, without a slash if it is local: SAEBench makes file names of it.

    Raises:
        UserError: No model is named, or the directory cannot be registered.
        UserError: A local model lacks a file.
    """
    if not model_name:
        raise UserError(
            "model_name is empty; give a model of TransformerLens, the directory of a "
            f"local model, or {EMBEDDED_MODEL_NAME!r}"
        )
    if model_name == EMBEDDED_MODEL_NAME:
        return register_embedded_model()
    if Path(model_name).is_dir():
        return register_local_model(model_name, name=_slashless_name(model_name))
    return model_name


def _slashless_name(directory: str) -> str:
    name = Path(directory).resolve().name
    known = {official.lower() for official in OFFICIAL_MODEL_NAMES}
    short = {official.rpartition("/")[2] for official in known}
    # a copy of a model that TransformerLens knows must not take its name
    return f"{name}-local" if name.lower() in known | short else name


def check_model_name(model_name: str) -> None:
    """
    See, without loading it, that a language model can be loaded by its name.

    Raises:
        UserError: TransformerLens knows no such model, or a local one lacks a file.
    """
    official_name(known_model_name(model_name))


def choose_device(device: str | None) -> str:
    """
    The device that was asked for, else the one that SAEBench chooses.

    Raises:
        UserError: It cannot be used.
    """
    if device is None:
        with redirect_stdout(sys.stderr):
            return general_utils.setup_environment()
    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"device {device!r} cannot be used: {error}") from error
    return device


class HookedModel:
    """
    A language model at one hook point.

    Args:
        model: The language model.
        hook_name: The hook point, as in "blocks.12.hook_resid_post".

    Raises:
        UserError: The model has no such hook point, or it is in no layer.
    """

    def __init__(self, model: HookedTransformer, hook_name: str):
        layer = re.match(r"blocks\.(\d+)\.", hook_name)
        if hook_name not in model.hook_dict or layer is None:
            examples = [n for n in model.hook_dict if n.endswith("hook_resid_post")]
            raise UserError(
                f"the model {model.cfg.model_name} has no hook point {hook_name!r}; it has, "
                f"for instance, {examples[0]} to {examples[-1]}"
            )
        self.model = model
        self.hook_name = hook_name
        self.is_residual_post = hook_name.endswith(".hook_resid_post")
        # What the rerun of a batch starts with: the output of a layer is the next one's
        # input, any other hook point is met on the way through its own layer.
        self._layer = int(layer[1]) + self.is_residual_post

    @torch.no_grad()
    def below(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Run the layers up to the hook point, once for a batch.

        Args:
            tokens: Shape (batch, seq).

        Returns:
            Activations at the hook point, shape (batch, seq, d_in), heads flattened; and
            the residual stream that `above` goes on from, shape (batch, seq, d_model).
        """
        if self.is_residual_post:
            x = self.model(tokens, stop_at_layer=self._layer)
            return x, x
        start = f"blocks.{self._layer}.hook_resid_pre"
        found = activations_at(self.model, tokens, [self.hook_name, start])
        return found[self.hook_name], found[start]

    @torch.no_grad()
    def above(
        self, start: torch.Tensor, x: torch.Tensor, stop_at_layer: int | None = None
    ) -> torch.Tensor:
        """
        Run the layers above the hook point from other activations there.

        Args:
            start: What `below` returned second.
            x: The activations to go on with, shape (batch, seq, d_in).
            stop_at_layer: As in TransformerLens: the residual stream before that layer,
                instead of the logits.

        Returns:
            Logits, shape (batch, seq, d_vocab), or the residual stream.
        """
        layers: Any = {"start_at_layer": self._layer, "stop_at_layer": stop_at_layer}
        if self.is_residual_post:
            return self.model(x, **layers)
        replace = (self.hook_name, partial(_replace, replacement=x))
        return self.model.run_with_hooks(start, fwd_hooks=[replace], **layers)


class HookedBatch:
    """
    A batch, run once up to the hook point, and on from there at will.

    Args:
        hooked: The language model at the hook point.
        tokens: Shape (batch, seq).
        counts: Mask of the tokens whose activations may be changed, shape (batch, seq).

    Attributes:
        full: Activations of all tokens, shape (batch, seq, d_in).
        x: Those that count, shape (n_tokens, d_in).

    Raises:
        UserError: Activations that count are NaN or infinite.
    """

    def __init__(self, hooked: HookedModel, tokens: torch.Tensor, counts: torch.Tensor):
        self._hooked = hooked
        self.full, self._start = hooked.below(tokens)
        self._select(counts)

    def _select(self, counts: torch.Tensor) -> None:
        self._counts = counts
        self.x = self.full[counts]
        check_finite(self.x, self._hooked.hook_name)

    def changing(self, counts: torch.Tensor) -> "HookedBatch":
        """
        The same run, of which the activations of other tokens may be changed.

        Args:
            counts: Mask of those tokens, shape (batch, seq).
        """
        batch = copy(self)
        batch._select(counts)
        return batch

    def full_with(self, x: torch.Tensor) -> torch.Tensor:
        """`full`, with other activations of the tokens that count."""
        full = self.full.clone()
        full[self._counts] = x.to(full.dtype)
        return full

    def above(
        self, full: torch.Tensor, stop_at_layer: int | None = None
    ) -> torch.Tensor:
        """As `HookedModel.above`, from these activations."""
        return self._hooked.above(self._start, full, stop_at_layer)


@torch.no_grad()
def activations_at(
    model: HookedTransformer, tokens: torch.Tensor, hook_names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """
    Activations at hook points, from one run of the layers below the last of them.

    Args:
        model: The language model.
        tokens: Shape (batch, seq).
        hook_names: Hook points in layers, as in "blocks.12.hook_resid_post".

    Returns:
        Shape (batch, seq, d_in) for each hook point, heads flattened.
    """
    layers = [int(hook_name.split(".")[1]) for hook_name in hook_names]
    _, cache = model.run_with_cache(
        tokens, stop_at_layer=max(layers) + 1, names_filter=list(hook_names)
    )
    return {hook_name: cache[hook_name].flatten(2) for hook_name in hook_names}


def by_hook_point(
    model: HookedTransformer, saes: Sequence[SelectedSAE]
) -> list[tuple[HookedModel, list[SelectedSAE]]]:
    """
    Group SAEs by hook point, and see that each fits the model there.

    Raises:
        UserError: A hook point does not exist, an SAE's d_in is not the width of the
            model there, or what the model computes there is not finite.
    """
    groups: dict[str, list[SelectedSAE]] = {}
    for sae in saes:
        groups.setdefault(sae.hook_name, []).append(sae)
    hooked: list[tuple[HookedModel, list[SelectedSAE]]] = []
    for hook_name, group in groups.items():
        try:
            at = HookedModel(model, hook_name)
        except ValueError as error:
            raise UserError(f"SAE {group[0].label!r}: {error}") from error
        # any token does: this is about shapes
        tokens = torch.zeros(1, 2, dtype=torch.long, device=model.cfg.device)
        width = at.below(tokens)[0].shape[-1]
        for sae in group:
            if sae.sae.cfg.d_in != width:
                raise UserError(
                    f"SAE {sae.label!r} has d_in {sae.sae.cfg.d_in}, but "
                    f"{model.cfg.model_name} has width {width} at {hook_name}; "
                    "it was trained on another model or hook point"
                )
            if sae.sae.cfg.reshape_activations == "hook_z":
                sae.sae.turn_off_forward_pass_hook_z_reshaping()
        hooked.append((at, group))
    return hooked


def check_finite(x: torch.Tensor, hook_name: str) -> None:
    """
    Raises:
        UserError: Activations are NaN or infinite.
    """
    if not x.isfinite().all():
        raise UserError(
            f"the language model's activations at {hook_name} are NaN or infinite on this "
            "text; check its weights, and its dtype (float16 overflows in some models: "
            "try llm_dtype float32 or bfloat16)"
        )


def _replace(x: torch.Tensor, hook: Any, replacement: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    return replacement.reshape(x.shape)
