"""The language model of an evaluation, cut in two at the SAEs' hook point."""

import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any, TypeVar

import torch
from transformer_lens import HookedTransformer

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.kept import Kept
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.models.language_models import (
    HookPoint,
    LanguageModel,
    residual_post,
)
from saelens_scaffold.models.pooling import NamedHook, pooling_hooks

T = TypeVar("T")


def choose_device(device: str | None) -> str:
    """
    The device that was asked for, else a GPU where there is one.

    Raises:
        UserError: It cannot be used.
    """
    if device is None:
        if torch.backends.mps.is_available():
            return "mps"
        # SAEBench's setting, before the first allocation: contexts differ in length
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        return "cuda" if torch.cuda.is_available() else "cpu"
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
        kept: Keeps what it computes below; by default nothing is kept.

    Attributes:
        point: The hook point in this model.

    Raises:
        UserError: The model has no such hook point, or it is in no layer.
    """

    def __init__(self, model: LanguageModel, hook_name: str, kept: Kept | None = None):
        self.model = model
        self._kept = Kept(max_bytes=0) if kept is None else kept
        self.hook_name = hook_name
        self.point = HookPoint(model, hook_name)
        self.point.check(model)
        # What the rerun of a batch starts with: the output of a layer is the next one's
        # input, any other hook point is met on the way through its own layer.
        self._layer = self.point.layer + self.point.is_residual_post
        self._in_tuples: bool | None = None

    @torch.no_grad()
    def below(self, tokens: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """
        Run the layers up to the hook point, once for a batch.

        Args:
            tokens: Shape (batch, seq).

        Returns:
            Activations at the hook point, shape (batch, seq, d_in), heads flattened; and
            what `above` goes on from.
        """
        return self.once("below", lambda: self._below(tokens), tokens)

    def once(self, what: Hashable, make: Callable[[], T], *given: torch.Tensor) -> T:
        """What is the same for all SAEs: as `Kept`, for this hook point."""
        return self._kept((what, self.hook_name), make, *given)

    def _below(self, tokens: torch.Tensor) -> tuple[torch.Tensor, Any]:
        if isinstance(self.model, HookedTransformer):
            if self.point.is_residual_post:
                x = self.model(tokens, stop_at_layer=self._layer)
                return x, x
            start = f"blocks.{self._layer}.hook_resid_pre"
            found = activations_at(self.model, tokens, [self.hook_name, start])
            return found[self.hook_name], found[start]
        names = [self.hook_name]
        if self._layer and not self.point.is_residual_post:
            names.append(residual_post(self.model, self._layer - 1))
        last_skipped = self.model.blocks[max(self._layer - 1, 0)]
        with last_skipped.register_forward_hook(self._note_form):
            found = activations_at(self.model, tokens, names)
        return found[self.hook_name], (tokens, found[names[-1]])

    def _note_form(self, _: Any, __: Any, output: Any) -> None:
        """Layers of transformers 4 return tuples, those of 5 tensors."""
        self._in_tuples = isinstance(output, tuple)

    @torch.no_grad()
    def above(
        self,
        start: Any,
        x: torch.Tensor,
        final_residual: bool = False,
        further_hooks: Sequence[NamedHook] = (),
    ) -> torch.Tensor:
        """
        Run the layers above the hook point from other activations there.

        Args:
            start: What `below` returned second.
            x: The activations to go on with, shape (batch, seq, d_in).
            final_residual: Whether to stop after the last layer.
            further_hooks: Hooks of a HookedTransformer above the hook point.

        Returns:
            Logits, shape (batch, seq, d_vocab), or the residual stream after the last layer.
        """
        n_layers, hooks = self.model.cfg.n_layers, []
        if self.point.is_residual_post:
            if final_residual and self._layer == n_layers:
                return x
            start = x if isinstance(self.model, HookedTransformer) else (start[0], x)
        else:
            hooks.append((self.point.name, partial(_replace, replacement=x)))
        if isinstance(self.model, HookedTransformer):
            stop = n_layers if final_residual else None
            layers: Any = {"start_at_layer": self._layer, "stop_at_layer": stop}
            hooks += further_hooks
            return self.model.run_with_hooks(start, fwd_hooks=hooks, **layers)
        tokens, residual = start
        if self._in_tuples is None:
            self._below(tokens[:1])  # which notes the form of outputs
        skipped = list(self.model.blocks)[: self._layer]
        outputs = _skipping(skipped, residual, bool(self._in_tuples))
        with outputs, self.model.hooks(fwd_hooks=hooks):
            if not final_residual:
                return self.model(tokens)
            last = residual_post(self.model, n_layers - 1)
            return activations_at(self.model, tokens, [last])[last]

    def pooled_above(
        self, start: Any, x: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """
        The mean over tokens of the residual stream after the last layer.

        Args:
            start: As for `above`.
            x: As for `above`.
            weights: Weight of each token, of sum 1 in each sequence, or 0 where no token
                counts, shape (batch, seq).

        Returns:
            Shape (batch, d_model), float32.
        """
        hooks: list[NamedHook] = []
        is_below_last = self.point.layer < self.model.cfg.n_layers - 1
        if isinstance(self.model, HookedTransformer) and is_below_last:
            hooks = pooling_hooks(self.model, weights)
        last = self.above(start, x, final_residual=True, further_hooks=hooks)
        return pooled(last, weights)


def pooled(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean over tokens, shape (batch, d), float32, with weights of shape (batch, seq)."""
    return (x.float() * weights[..., None]).sum(dim=1)


@contextmanager
def _skipping(
    layers: Sequence[torch.nn.Module], output: torch.Tensor, in_tuples: bool
) -> Iterator[None]:
    """
    Layers that compute nothing, and of which the last has this output.

    transformers runs all of a model's layers in a loop, with masks and positions that it
    makes of the tokens' shape, so that a run that begins at a layer is one with the others
    skipped.
    """

    def forward(hidden: torch.Tensor, *_: Any, **__: Any) -> Any:
        return (hidden,) if in_tuples else hidden

    for layer in layers:
        # by itself, since the bridge's modules hand attributes on to others
        vars(layer)["forward"] = forward
    if layers:
        vars(layers[-1])["forward"] = lambda *_, **__: forward(output)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


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
        self._hooked, self._tokens = hooked, tokens
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

    def among(self, others: "HookedBatch") -> torch.Tensor:
        """
        Mask of this one's `x` in that of others, which may change these tokens and more.

        Args:
            others: The same run.
        """
        return self._counts[others._counts]

    def once(self, what: Hashable, make: Callable[[], T], *given: torch.Tensor) -> T:
        """As `HookedModel.once`, for this batch and the tokens that may be changed."""
        return self._hooked.once(what, make, self._tokens, self._counts, *given)

    def full_with(self, x: torch.Tensor) -> torch.Tensor:
        """`full`, with other activations of the tokens that count."""
        full = self.full.clone()
        full[self._counts] = x.to(full.dtype)
        return full

    def above(self, full: torch.Tensor) -> torch.Tensor:
        """The logits of `HookedModel.above`, from these activations."""
        return self._hooked.above(self._start, full)

    def pooled_above(self, full: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As `HookedModel.pooled_above`, from these activations."""
        return self._hooked.pooled_above(self._start, full, weights)


@torch.no_grad()
def kept_activations_at(
    model: LanguageModel,
    tokens: torch.Tensor,
    hook_names: Sequence[str],
    kept: Kept | None,
) -> dict[str, torch.Tensor]:
    """As `activations_at`, unless they are kept."""
    if kept is None:
        return activations_at(model, tokens, hook_names)
    what = ("activations", *hook_names)
    return kept(what, lambda: activations_at(model, tokens, hook_names), tokens)


@torch.no_grad()
def activations_at(
    model: LanguageModel, tokens: torch.Tensor, hook_names: Sequence[str]
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
    points = {hook_name: HookPoint(model, hook_name) for hook_name in hook_names}
    last = max(point.layer for point in points.values())
    _, cache = model.run_with_cache(
        tokens,
        stop_at_layer=last + 1,
        names_filter=[point.name for point in points.values()],
    )
    return {name: cache[point.name].flatten(2) for name, point in points.items()}


def by_hook_point(
    model: LanguageModel, saes: Sequence[SelectedSAE], kept: Kept | None = None
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
            at = HookedModel(model, hook_name, kept)
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
