"""A loss on the correlation between the contributions of scaffold and dictionary."""

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

from saelens_scaffold.plugins.hookspecs import hookimpl
from saelens_scaffold.saes import ScaffoldBatchTopKTrainingSAE as ScaffoldSAE


class Decorrelation:
    """
    Add `coefficient` times the correlation between the contributions of the scaffold and
    the dictionary to the reconstruction, as the loss "scaffold_decorrelation".

    With the centred contributions S (scaffold) and D (dictionary) over a batch, both of
    shape (n_tokens, d_in), it is their RV coefficient (Robert and Escoufier, 1976),
    ‖SᵀD‖² / (‖SᵀS‖ ‖DᵀD‖) with Frobenius norms, from 0 to 1.

    Args:
        coefficient: Weight of the loss, relative to a squared error summed over d_in.
    """

    fit_for_shards = True

    def __init__(self, coefficient: float):
        if coefficient <= 0:
            raise ValueError(f"coefficient is {coefficient}; it must be above 0")
        self.coefficient = coefficient

    @hookimpl
    def training_losses(
        self, sae: ScaffoldSAE, step_input: TrainStepInput, output: TrainStepOutput
    ) -> dict[str, torch.Tensor]:
        with torch.autocast(output.sae_out.device.type, enabled=False):
            scaffold = sae.scaffold(step_input.sae_in).flatten(0, -2).float()
            # still with the bias, which centring removes
            dictionary = output.sae_out.flatten(0, -2).float() - scaffold
            S, D = (part - part.mean(dim=0) for part in (scaffold, dictionary))
            bound = (S.T @ S).norm() * (D.T @ D).norm()
            correlation = (S.T @ D).pow(2).sum() / bound.clamp_min(1e-12)
        return {"scaffold_decorrelation": self.coefficient * correlation}
