"""Scaffold SAEs in inference form."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig
from torch import nn
from typing_extensions import override

from saelens_scaffold.kernels.choice import Kernels
from saelens_scaffold.saes import scaffold
from saelens_scaffold.saes.jumprelu_on_kernels import JumpReLUOnKernels


@dataclass
class ScaffoldJumpReLUSAEConfig(JumpReLUSAEConfig):
    """
    Configuration class for a ScaffoldJumpReLUSAE.

    Args:
        scaffold_rank (int): Number of linear latents, the first ones of d_sae.
        kernels (Literal["auto", "reference", "torch", "triton"]): Implementation of encode
            and decode without gradients. "auto" uses sparse kernels, "reference" is
            SAELens's dense code. "triton" becomes "auto", which is the same where Triton
            runs, since the SAE may be used on another machine. The environment variable
            SAELENS_SCAFFOLD_KERNELS overrides it. See docs/kernels.md.
        d_in (int): Input dimension (dimensionality of the activations being encoded).
            Inherited from SAEConfig.
        d_sae (int): Number of latents, those of the scaffold included. Inherited from
            SAEConfig.
    """

    scaffold_rank: int = 24
    kernels: Kernels = "auto"

    @override
    @classmethod
    def architecture(cls) -> str:
        return "scaffold_jumprelu"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        scaffold.check_scaffold_config(self, "kernels")
        if self.kernels == "triton":
            self.kernels = "auto"


class ScaffoldJumpReLUSAE(scaffold.ScaffoldMixin, JumpReLUOnKernels):
    """
    A JumpReLU SAE whose first `scaffold_rank` latents are linear (arXiv 2606.14040).

    Both scaffold training architectures are saved in this form, with any residual
    encoder input folded into the weights:

        [z, h] = (x - b_dec) W_enc + b_enc
        f      = h where h > threshold, else 0
        x̂      = [z, f] W_dec + b_dec

    As a JumpReLU, a linear latent has the identity as its activation function, and
    threshold -inf.
    """

    cfg: ScaffoldJumpReLUSAEConfig  # type: ignore[assignment]

    @override
    def get_activation_fn(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return scaffold.ScaffoldActivation(self.cfg.scaffold_rank, nn.ReLU())

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.threshold.data[: self.cfg.scaffold_rank] = -torch.inf

    @override
    def to_inference(self) -> "ScaffoldJumpReLUSAE":
        return self
