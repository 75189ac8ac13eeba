"""What a plugin can do to the training of a scaffold SAE.

All hooks are called by the SAE itself, so they fire in every runner of SAELens and in any
training loop of one's own. A plugin implements those that it needs; each implementation
takes only the arguments that it uses.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pluggy
import torch

if TYPE_CHECKING:
    from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

    from saelens_scaffold.compare.metrics import ComparisonMetric
    from saelens_scaffold.evals.registry import Evaluation
    from saelens_scaffold.saes import ScaffoldBatchTopKTrainingSAE

PROJECT_NAME = "saelens_scaffold"
"""Name of the pluggy project, and group of the entry points."""

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)

MetricValue = float | torch.Tensor | Callable[[], float | torch.Tensor]


class ScaffoldStart(NamedTuple):
    """
    Where a scaffold starts.

    Attributes:
        A: Encoder, shape (d_in, r).
        B: Decoder, shape (r, d_in).
        b_dec: Decoder bias, shape (d_in,); None leaves it as it is.
    """

    A: torch.Tensor
    B: torch.Tensor
    b_dec: torch.Tensor | None = None


class ScaffoldSpecs:
    """The hooks of the bottleneck's life, in the order in which they are called."""

    @hookspec(firstresult=True)
    def initialize_scaffold(
        self, sae: "ScaffoldBatchTopKTrainingSAE", sae_in: torch.Tensor
    ) -> "ScaffoldStart | None":
        """
        Start the scaffold from the activations of the first training step.

        The first plugin that returns something wins; if none does, `scaffold_init`
        decides. Called once in an SAE's life, not again after resuming.

        Args:
            sae: The SAE, as it was initialised.
            sae_in: Activations of the first step, shape (n_tokens, d_in).
        """

    @hookspec
    def before_training_forward_pass(
        self, sae: "ScaffoldBatchTopKTrainingSAE", step_input: "TrainStepInput"
    ) -> None:
        """
        Before each training forward pass; `step_input.n_training_steps` counts them.

        What is set in `step_input` holds for the step.
        """

    @hookspec
    def training_losses(
        self,
        sae: "ScaffoldBatchTopKTrainingSAE",
        step_input: "TrainStepInput",
        output: "TrainStepOutput",
    ) -> "Mapping[str, torch.Tensor] | None":
        """
        Named losses to add to a step.

        Returns:
            Scalars with a gradient. Each is added to the loss and to `output.losses`, under
            its name, so that SAELens logs it and shows it in the progress bar.
        """

    @hookspec
    def training_metrics(
        self,
        sae: "ScaffoldBatchTopKTrainingSAE",
        step_input: "TrainStepInput",
        output: "TrainStepOutput",
    ) -> "Mapping[str, MetricValue] | None":
        """
        Named metrics of a step.

        Returns:
            Scalars, or functions that give one: SAELens calls these only in steps that
            are logged. Each is added to `output.metrics` under its name.
        """

    @hookspec
    def before_optimizer_step(
        self, sae: "ScaffoldBatchTopKTrainingSAE", n_training_steps: int
    ) -> None:
        """Before the optimizer changes the weights; gradients are there, and clipped."""

    @hookspec
    def after_optimizer_step(
        self, sae: "ScaffoldBatchTopKTrainingSAE", n_training_steps: int
    ) -> None:
        """After the optimizer has changed the weights, without gradients: for projections."""

    @hookspec
    def training_ended(self, sae: "ScaffoldBatchTopKTrainingSAE") -> None:
        """
        After the last step, before anything is folded into the weights or
        `save_inference_model` saves the SAE. Once, if it was trained in this process.

        An SAE is not told when a training ends in which neither follows: with
        normalize_activations="none" and no output_path, this is never called.
        """

    @hookspec
    def before_saving_inference(
        self,
        sae: "ScaffoldBatchTopKTrainingSAE",
        state_dict: dict[str, torch.Tensor],
    ) -> None:
        """
        Before the inference form is made, by `save_inference_model` or `to_inference`.

        Args:
            sae: The SAE.
            state_dict: Its weights in the training form. They share memory with the
                parameters: replace them rather than writing into them.
        """


class EvaluationSpecs:
    """The hooks of `saelens-scaffold eval` and `saelens-scaffold compare`."""

    @hookspec
    def evaluations(self) -> "Sequence[Evaluation] | None":
        """
        Further evaluations, which `saelens-scaffold eval` then knows by name.

        Called for every installed plugin, chosen or not, since an evaluation changes no
        SAE.
        """

    @hookspec
    def comparison_metrics(self) -> "Sequence[ComparisonMetric] | None":
        """
        Further metrics, by which `saelens-scaffold compare` then compares SAEs.

        Called for every installed plugin, chosen or not, as `evaluations` is.
        """


def plugin_manager(*specs: Any) -> pluggy.PluginManager:
    """An empty plugin manager with these specifications."""
    manager = pluggy.PluginManager(PROJECT_NAME)
    for spec in specs:
        manager.add_hookspecs(spec)
    return manager
