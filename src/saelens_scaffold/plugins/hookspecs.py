"""Specifications of the hooks that a plugin can implement.

The SAE itself calls the training hooks, so they fire in every SAELens runner and in any
custom training loop. A plugin implements the hooks it needs; each implementation takes only
the arguments that it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import pluggy
import torch

if TYPE_CHECKING:
    from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

    from saelens_scaffold.compare.metrics import ComparisonMetric
    from saelens_scaffold.evals.base import Evaluation
    from saelens_scaffold.saes import ScaffoldBatchTopKTrainingSAE as ScaffoldSAE

PROJECT_NAME = "saelens_scaffold"
"""Name of the pluggy project and of the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)

MetricValue = float | torch.Tensor | Callable[[], float | torch.Tensor]


class ScaffoldStart(NamedTuple):
    """
    Initial weights of a scaffold.

    Attributes:
        A: Encoder, shape (d_in, r).
        B: Decoder, shape (r, d_in).
        b_dec: Decoder bias, shape (d_in,); None keeps the SAE's.
    """

    A: torch.Tensor
    B: torch.Tensor
    b_dec: torch.Tensor | None = None


# Training hooks, in the order of their calls.


@hookspec(firstresult=True)
def initialize_scaffold(sae: ScaffoldSAE, sae_in: torch.Tensor) -> ScaffoldStart | None:
    """
    Start the scaffold from the activations of the first training step.

    The first plugin that returns a start wins; if none does, `scaffold_init` decides.
    Called once per SAE, not again after resuming.

    Args:
        sae: The SAE in its initial state.
        sae_in: Activations of the first step, shape (n_tokens, d_in).
    """


@hookspec
def before_training_forward_pass(sae: ScaffoldSAE, step_input: TrainStepInput) -> None:
    """
    Called before each training forward pass, number `step_input.n_training_steps`.

    Changes of `step_input` apply to the step.
    """


@hookspec
def training_losses(
    sae: ScaffoldSAE, step_input: TrainStepInput, output: TrainStepOutput
) -> Mapping[str, torch.Tensor] | None:
    """
    Named losses to add to the loss of a step.

    Returns:
        Scalars with a gradient. Each is added to the loss, and to `output.losses`
        under its name, so that SAELens logs it and shows it in the progress bar.
    """


@hookspec
def training_metrics(
    sae: ScaffoldSAE, step_input: TrainStepInput, output: TrainStepOutput
) -> Mapping[str, MetricValue] | None:
    """
    Named metrics of a step.

    Returns:
        Scalars, or functions that return one, which SAELens calls in logged steps
        only. Each is added to `output.metrics` under its name.
    """


@hookspec
def before_optimizer_step(sae: ScaffoldSAE, n_training_steps: int) -> None:
    """Called before the optimizer changes the weights, with clipped gradients."""


@hookspec
def after_optimizer_step(sae: ScaffoldSAE, n_training_steps: int) -> None:
    """Called after the optimizer has changed the weights, without gradients."""


@hookspec
def training_ended(sae: ScaffoldSAE) -> None:
    """
    Called after the last step, before a normalisation is folded into the weights or
    `save_inference_model` saves the SAE; once, if it was trained in this process.

    An SAE does not learn of the end of a training in which neither follows: with
    normalize_activations="none" and no output_path, this is never called.
    """


@hookspec
def before_saving_inference(
    sae: ScaffoldSAE, state_dict: dict[str, torch.Tensor]
) -> None:
    """
    Called before `save_inference_model` or `to_inference` makes the inference form.

    Args:
        sae: The SAE.
        state_dict: Weights in training form. They share memory with the parameters,
            so replace them instead of writing into them.
    """


# Hooks of `saelens-scaffold eval` and `saelens-scaffold compare`.


@hookspec
def evaluations() -> Sequence[Evaluation] | None:
    """
    Further evaluations for `saelens-scaffold eval`.

    Called for every installed plugin, chosen or not, made without options. A plugin
    that fails is left out, with a warning.
    """


@hookspec
def comparison_metrics() -> Sequence[ComparisonMetric] | None:
    """
    Further metrics for `saelens-scaffold compare`.

    Called for every installed plugin, chosen or not, made without options. A plugin
    that fails is left out, with a warning.
    """
