"""Runs of a language model that SAEs share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from saelens_scaffold.evals.kept import Kept
from saelens_scaffold.models.language_models import HookPoint, LanguageModel


class SharedRuns:
    """
    A language model for SAEBench, which takes SAE after SAE to the same text.

    What does not depend on the SAE is computed once, with the same operations and so to the
    last bit: the activations that the probing evaluations read; for core, what the model
    makes of them and of zeros. The layers above the hook point run once for each of core's
    SAEs, those below it not again.

    For core this is so for the residual stream after a layer; else, and with padding on the
    left, whose mask depends on the tokens, the model runs as ever.

    Args:
        model: The language model.
        kept: Activations of its runs so far, on its device; by default none. Outputs, which
            are far larger, are kept as long as this lasts.
    """

    def __init__(self, model: LanguageModel, kept: Kept | None = None):
        self._model: Any = model
        self._n_layers = model.cfg.n_layers
        self._kept = Kept() if kept is None else kept
        self._outputs = Kept(self._kept.max_bytes)
        self._shares = getattr(model.tokenizer, "padding_side", None) == "right"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, tokens: torch.Tensor, **options: Any) -> Any:
        """The model's output, of a clean run."""
        if not self._shares:
            return self._model(tokens, **options)
        return self._output(
            "clean",
            tokens,
            options,
            lambda: self._model(tokens, stop_at_layer=self._n_layers),
        )

    def run_with_cache(
        self, tokens: torch.Tensor, names_filter: Sequence[str], **options: Any
    ) -> tuple[Any, Any]:
        """The model's, of one hook point."""
        (name,) = names_filter
        layer = self._layer_after(name)
        if layer is None or options.get("stop_at_layer") != layer:
            return self._model.run_with_cache(
                tokens, names_filter=names_filter, **options
            )
        x = self._below(tokens, layer)
        return x, {name: x}

    def run_with_hooks(
        self,
        tokens: torch.Tensor,
        fwd_hooks: list[tuple[Any, Callable[..., torch.Tensor]]],
        **options: Any,
    ) -> Any:
        """The model's, with one hook, which changes nothing if the model stops at a layer."""
        ((name, hook),) = fwd_hooks
        if "stop_at_layer" in options:
            return hook(self._read(tokens, name, options), hook=None)
        layer = self._layer_after(name)
        if layer is None:
            return self._model.run_with_hooks(tokens, fwd_hooks=fwd_hooks, **options)
        x = hook(self._below(tokens, layer), hook=self._model.hook_dict[name])

        def above() -> torch.Tensor:
            layers: Any = {"start_at_layer": layer, "stop_at_layer": self._n_layers}
            return self._model(x, **layers)

        if x.any():
            return self._from(above(), tokens, options)
        return self._output(("zeros", layer), tokens, options, above)

    def _read(
        self, tokens: torch.Tensor, name: str, options: dict[str, Any]
    ) -> torch.Tensor:
        """Activations at a hook point, of a run that has these options."""

        def make() -> torch.Tensor:
            read: list[torch.Tensor] = []
            hooks = [(name, lambda x, hook: read.append(x))]  # noqa: ARG005
            self._model.run_with_hooks(tokens, fwd_hooks=hooks, **options)
            return read[0]

        return self._kept((name, *sorted(options.items())), make, tokens)

    def _layer_after(self, name: str) -> int | None:
        """The layer whose input a hook point is, if what is behind it can be run alone."""
        point = HookPoint(self._model, name)
        return point.layer + 1 if self._shares and point.is_residual_post else None

    def _below(self, tokens: torch.Tensor, layer: int) -> torch.Tensor:
        """What layer `layer` gets, shape (batch, seq, d_model)."""
        return self._kept(
            ("below", layer), lambda: self._model(tokens, stop_at_layer=layer), tokens
        )

    def _output(
        self,
        what: Any,
        tokens: torch.Tensor,
        options: dict[str, Any],
        last: Callable[[], torch.Tensor],
    ) -> Any:
        """The output that belongs to a residual stream after the last layer."""

        def make() -> Any:
            residual = self._kept((what, "last"), last, tokens)
            return self._from(residual, tokens, options)

        return self._outputs((what, *sorted(options.items())), make, tokens)

    def _from(
        self, last: torch.Tensor, tokens: torch.Tensor, options: dict[str, Any]
    ) -> Any:
        return self._model(
            last, start_at_layer=self._n_layers, tokens=tokens, **options
        )
