"""Plain BatchTopK and Matryoshka SAEs, trained in the sparse kernels."""

from dataclasses import fields
from typing import Any

from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from typing_extensions import override

from saelens_scaffold.kernels.choice import Kernels
from saelens_scaffold.saes import scaffold_batchtopk_sae as scaffold_batchtopk
from saelens_scaffold.saes import scaffold_matryoshka_sae as scaffold_matryoshka
from saelens_scaffold.saes.scaffold import build_sae, is_hooked
from saelens_scaffold.saes.sparse_step import is_worthwhile, kernels_for


def on_kernels(sae: TrainingSAE[Any], kernels: Kernels = "auto") -> TrainingSAE[Any]:
    """
    An SAE whose training steps run in the sparse kernels, if it is SAELens's plain BatchTopK
    or Matryoshka SAE; else, or where they gain nothing, the SAE itself.

    It is an instance of SAELens's class, with the same weights, and is saved as such an SAE.
    Its training is SAELens's up to rounding.

    Args:
        sae: The SAE, which is used up.
        kernels: Which ones; "reference" is SAELens's own code.
    """
    of_class = {
        BatchTopKTrainingSAE: BatchTopKOnKernels,
        MatryoshkaBatchTopKTrainingSAE: MatryoshkaOnKernels,
    }
    # not subclasses, which may do anything
    plain = of_class.get(type(sae))
    if plain is None or kernels == "reference":
        return sae
    # of which scaffold SAEs refuse what SAELens's losses do not support
    at_run_time = sae.cfg.normalize_activations in (
        "layer_norm",
        "constant_norm_rescale",
    )
    if at_run_time or not is_worthwhile(sae.cfg.k, sae.cfg.d_sae):
        return sae
    on_kernels: BatchTopKOnKernels = build_sae(
        plain, sae.cfg, sae.state_dict(), copies=False
    )
    on_kernels.attach(kernels)
    return on_kernels


class BatchTopKOnKernels(BatchTopKTrainingSAE):
    """
    A BatchTopK SAE that is trained by its twin, the scaffold SAE of rank 0 that has the same
    parameters.

    Where the kernels cannot be used, as with hooks, a step is SAELens's.
    """

    _twin: scaffold_batchtopk.ScaffoldBatchTopKTrainingSAE
    _twin_class: type[Any] = scaffold_batchtopk.ScaffoldBatchTopKTrainingSAE
    _twin_config: type[Any] = scaffold_batchtopk.ScaffoldBatchTopKTrainingSAEConfig

    def attach(self, kernels: Kernels) -> None:
        """Make the twin."""
        values = {
            field.name: getattr(self.cfg, field.name) for field in fields(self.cfg)
        }
        values |= {"device": "meta", "scaffold_rank": 0, "scaffold_init": "random"}
        twin = self._twin_class(self._twin_config(**values, kernels=kernels))
        twin.trains_plain_sae = True
        # the parameters that this SAE has, also after some are replaced
        twin._parameters = self._parameters
        # a plain attribute: as a submodule it would be part of the state that is saved
        vars(self)["_twin"] = twin

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        twin = self._twin
        is_watched = any(is_hooked(point) for point in self.hook_dict.values())
        if is_watched or kernels_for(twin, step_input.sae_in) is None:
            return super().training_forward_pass(step_input)
        twin.topk_threshold = self.topk_threshold
        output = twin.training_forward_pass(step_input)
        self.topk_threshold = twin.topk_threshold
        del output.metrics["l0_sparse"]  # which is l0, of SAELens's trainer
        return output


class MatryoshkaOnKernels(BatchTopKOnKernels, MatryoshkaBatchTopKTrainingSAE):
    """As `BatchTopKOnKernels`, with Matryoshka's levels."""

    _twin_class = scaffold_matryoshka.ScaffoldMatryoshkaTrainingSAE
    _twin_config = scaffold_matryoshka.ScaffoldMatryoshkaTrainingSAEConfig
