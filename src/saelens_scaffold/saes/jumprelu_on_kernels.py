"""JumpReLU SAEs that encode and decode in the sparse kernels."""

from copy import copy
from types import ModuleType
from typing import Any

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import SAE
from torch import nn
from torch.autograd import forward_ad
from typing_extensions import override

from saelens_scaffold.kernels.choice import choose_kernels
from saelens_scaffold.kernels.inference import decode_few, jumprelu_encode
from saelens_scaffold.saes.facts import scaffold_rank
from saelens_scaffold.saes.scaffold import finish_decode, is_hooked


def inference_on_kernels(sae: SAE[Any]) -> SAE[Any]:
    """
    An SAE that encodes and decodes in the sparse kernels, if it is SAELens's JumpReLU SAE;
    else the SAE itself.

    It shares everything with that SAE: weights, hooks and configuration.
    """
    # not subclasses, which may do anything
    if type(sae) is not JumpReLUSAE or type(sae.activation_fn) is not nn.ReLU:
        return sae
    shared = copy(sae)
    shared.__class__ = JumpReLUOnKernels  # which has no state of its own
    return shared


class JumpReLUOnKernels(JumpReLUSAE):
    """
    A JumpReLU SAE, plain or with a scaffold, which uses the sparse kernels where no
    gradients are computed, and SAELens's code elsewhere.
    """

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
            or is_hooked(self.hook_sae_acts_pre)
            or torch.is_autocast_enabled(x.device.type)
        ):
            return super().encode(x)
        rank = scaffold_rank(self)
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
        rank = scaffold_rank(self)
        kernels = self._kernels()
        # SAELens's decode accepts sparse tensors
        if kernels is None or feature_acts.layout is not torch.strided:
            return super().decode(feature_acts)
        acts = feature_acts.reshape(-1, self.cfg.d_sae)
        written = decode_few(acts[:, rank:], self.W_dec[rank:], kernels)
        if written is None:
            return super().decode(feature_acts)
        if rank > 0:
            written = torch.addmm(written, acts[:, :rank], self.W_dec[:rank])
        written = written.view(*feature_acts.shape[:-1], self.cfg.d_in)
        return finish_decode(self, written)

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
        asked = getattr(self.cfg, "kernels", "auto")
        return choose_kernels(asked, self.W_enc.device, worthwhile=True)
