"""Scaffold SAEs in inference form."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from torch import nn
from torch.autograd import forward_ad
from typing_extensions import override

from saelens_scaffold.kernels.choice import Kernels, choose_kernels
from saelens_scaffold.kernels.inference import decode_few, jumprelu_encode
from saelens_scaffold.saes import scaffold


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


class ScaffoldJumpReLUSAE(scaffold.ScaffoldMixin, JumpReLUSAE):
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
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """
        Scaffold coordinates and sparse activations.

        Args:
            x: Activations, shape (..., d_in).

        Returns:
            concat[z, f], shape (..., d_sae).
        """
        kernels = self._kernels()
        if (
            kernels is None
            or scaffold.is_hooked(self.hook_sae_acts_pre)
            or torch.is_autocast_enabled(x.device.type)
        ):
            return super().encode(x)
        rank = self.cfg.scaffold_rank
        sae_in = self.process_sae_in(x)
        # relu(h) > threshold means h > max(threshold, 0)
        cuts = torch.cat([self.threshold[:rank], self.threshold[rank:].clamp_min(0)])
        block = kernels.block_elements(x.device)
        flat = sae_in.reshape(-1, self.cfg.d_in)
        acts = jumprelu_encode(flat, self.W_enc, self.b_enc, cuts, block)
        return self.hook_sae_acts_post(acts.view(*sae_in.shape[:-1], self.cfg.d_sae))

    @override
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """
        Args:
            feature_acts: concat[z, f], shape (..., d_sae).

        Returns:
            The reconstruction, shape (..., d_in).
        """
        rank = self.cfg.scaffold_rank
        kernels = self._kernels()
        # SAELens's decode accepts sparse tensors
        if kernels is None or feature_acts.layout is not torch.strided:
            return super().decode(feature_acts)
        acts = feature_acts.reshape(-1, self.cfg.d_sae)
        dictionary = decode_few(acts[:, rank:], self.W_dec[rank:], kernels)
        if dictionary is None:
            return super().decode(feature_acts)
        out = torch.addmm(dictionary, acts[:, :rank], self.W_dec[:rank])
        return self._finish_decode(out.view(*feature_acts.shape[:-1], self.cfg.d_in))

    def _kernels(self) -> ModuleType | None:
        """The sparse kernels for the current context, or None for dense code."""
        if (
            torch.is_grad_enabled()
            # compiled code, vmap, jvp and forward-mode gradients allow neither reading
            # the number of active latents nor writing into a tensor
            or torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
        ):
            return None
        return choose_kernels(self.cfg.kernels, self.W_enc.device, worthwhile=True)

    @override
    def to_inference(self) -> "ScaffoldJumpReLUSAE":
        return self
