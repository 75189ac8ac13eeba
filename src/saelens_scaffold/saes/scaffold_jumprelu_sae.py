"""The inference form of every scaffold SAE."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from torch import nn
from typing_extensions import override

from saelens_scaffold.saes.scaffold import ScaffoldActivation, ScaffoldMixin


@dataclass
class ScaffoldJumpReLUSAEConfig(JumpReLUSAEConfig):
    """
    Configuration class for a ScaffoldJumpReLUSAE.

    Args:
        scaffold_rank (int): How many latents, counted from the first, are the linear
            scaffold.
        d_in (int): Input dimension (dimensionality of the activations being encoded).
            Inherited from SAEConfig.
        d_sae (int): Number of latents, those of the scaffold included. Inherited from
            SAEConfig.
    """

    scaffold_rank: int = 24

    @override
    @classmethod
    def architecture(cls) -> str:
        return "scaffold_jumprelu"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.scaffold_rank < self.d_sae:
            raise ValueError(
                f"scaffold_rank must be from 0 to d_sae - 1 = {self.d_sae - 1}, "
                f"got {self.scaffold_rank!r}."
            )


class ScaffoldJumpReLUSAE(ScaffoldMixin, JumpReLUSAE):
    """
    A JumpReLU SAE whose first `scaffold_rank` latents are linear (arXiv 2606.14040).

    Both scaffold training architectures are saved in this form, with any residual
    encoder input folded into the weights:

        [z, h] = (x - b_dec) W_enc + b_enc
        f      = h where h > threshold, else 0
        x̂      = [z, f] W_dec + b_dec

    In JumpReLU's terms a linear latent has the identity for an activation function and
    a threshold of minus infinity.
    """

    cfg: ScaffoldJumpReLUSAEConfig  # type: ignore[assignment]

    @override
    def get_activation_fn(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return ScaffoldActivation(self.cfg.scaffold_rank, nn.ReLU())

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.threshold.data[: self.cfg.scaffold_rank] = -torch.inf

    @override
    def to_inference(self) -> "ScaffoldJumpReLUSAE":
        return self
