"""Training schedule of the scaffold."""

import warnings
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE, TrainStepInput

from saelens_scaffold.plugins.hookspecs import hookimpl


class ScaffoldSchedule:
    """
    Train the scaffold alone at first, freeze it later, or give it its own learning rate.

    Args:
        alone_until: Number of steps in which the scaffold is trained alone: no sparse
            latent fires or is trained. No dead latents are revived for twice as long,
            since until then a latent has been silent for lack of opportunity.
        frozen_from: Step from which the scaffold's encoder and decoder are frozen. None
            never freezes them.
        lr_factor: The scaffold's learning rate as a multiple of the SAE's.
    """

    fit_for_shards = True

    def __init__(
        self,
        alone_until: int = 0,
        frozen_from: int | None = None,
        lr_factor: float = 1.0,
    ):
        for name, value, least in (
            ("alone_until", alone_until, 0),
            ("frozen_from", frozen_from, alone_until),
            ("lr_factor", lr_factor, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self.alone_until = alone_until
        self.frozen_from = frozen_from
        self.lr_factor = lr_factor
        self._alone = False
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None

    @hookimpl
    def before_training_forward_pass(
        self, sae: Any, step_input: TrainStepInput
    ) -> None:
        step = step_input.n_training_steps
        # set in every step, so that a resumed run is in the right phase
        self._alone = step < self.alone_until
        sae.activation_fn.sparse_activation.k = 0 if self._alone else sae.cfg.k
        if step < 2 * self.alone_until:
            step_input.dead_neuron_mask = None

    @hookimpl
    def before_optimizer_step(self, sae: TrainingSAE, n_training_steps: int) -> None:
        if self._factor(n_training_steps) != 1:
            self._before = tuple(part.detach().clone() for part in _scaffold(sae))  # type: ignore[assignment]

    # first, so that other plugins' changes of the weights are not part of the step
    @hookimpl(tryfirst=True)
    def after_optimizer_step(self, sae: TrainingSAE, n_training_steps: int) -> None:
        if self._before is None:
            return
        # Scale the step, since Adam's steps do not depend on the scale of the gradient.
        factor = self._factor(n_training_steps)
        for before, now in zip(self._before, _scaffold(sae), strict=True):
            now.copy_(torch.lerp(before, now, factor))
        self._before = None

    @hookimpl
    def training_ended(self, sae: Any) -> None:
        sae.activation_fn.sparse_activation.k = sae.cfg.k

    @hookimpl
    def before_saving_inference(self) -> None:
        if self._alone:
            warnings.warn(
                f"schedule: the training has not passed alone_until={self.alone_until} "
                "steps, so the dictionary of this SAE is untrained"
            )

    def _factor(self, n_training_steps: int) -> float:
        frozen = self.frozen_from is not None and n_training_steps >= self.frozen_from
        return 0.0 if frozen else self.lr_factor


def _scaffold(sae: TrainingSAE) -> tuple[torch.Tensor, torch.Tensor]:
    rank = sae.cfg.scaffold_rank
    return sae.W_enc[:, :rank], sae.W_dec[:rank]
