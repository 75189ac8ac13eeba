"""Activation function and views that all scaffold SAEs share."""

import copy
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAE
from torch import nn
from transformer_lens.hook_points import HookPoint

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.saes.subspaces import orthonormal_basis

if TYPE_CHECKING:
    from saelens_scaffold.saes.scaffold_jumprelu_sae import ScaffoldJumpReLUSAE


class ScaffoldActivation(nn.Module):
    """
    The identity on the first `rank` latents, `sparse_activation` on the others.

    Scaffold latents are linear coordinates: signed, always active, and not among the k
    (arXiv 2606.14040).
    """

    def __init__(self, rank: int, sparse_activation: nn.Module):
        super().__init__()
        self.rank = rank
        self.sparse_activation = sparse_activation

    def forward(self, hidden_pre: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_pre: Pre-activations, shape (..., d_sae).

        Returns:
            Activations, shape (..., d_sae).
        """
        # One split: the gradient of each slice would be a tensor of hidden_pre's size.
        scaffold, sparse = hidden_pre.split(
            [self.rank, hidden_pre.shape[-1] - self.rank], dim=-1
        )
        return torch.cat([scaffold, self.sparse_activation(sparse)], dim=-1)


# Base class for the type checker only, so that the mixin can call SAELens's methods.
_SAE = SAE[Any] if TYPE_CHECKING else object


class ScaffoldMixin(_SAE):
    """
    The scaffold's part of the reconstruction, and views as plain SAELens SAEs.

    For SAELens SAE classes whose first `cfg.scaffold_rank` latents are linear.
    """

    b_enc: nn.Parameter

    @abstractmethod
    def to_inference(self) -> "ScaffoldJumpReLUSAE":
        """The inference form of this SAE, at the same activation scale."""

    def scaffold(self, x: torch.Tensor, fix_gauge: bool = False) -> torch.Tensor:
        """
        The scaffold's part of the reconstruction: s = z B with z = (x - b_dec) A.

        A = W_enc[:, :r] and B = W_dec[:r] for r = `cfg.scaffold_rank`. The
        reconstruction `decode(encode(x))` is s plus the sparse dictionary's part plus
        `b_dec` (arXiv 2606.14040).

        s is unique only up to a constant: `b_dec` + c B with z - c gives the same
        reconstruction for every c. Centred, s - E[s], it does not depend on that gauge.

        Args:
            x: Activations as the SAE takes them, shape (..., d_in), or
                (..., n_heads, d_head) for `reshape_activations="hook_z"`.
            fix_gauge: Whether to return s in the gauge where `b_dec` is orthogonal to the
                rows of B: s plus the projection of `b_dec` onto them.

        Returns:
            s, of the shape and scale of x.
        """
        rank = self.cfg.scaffold_rank
        s = self.scaffold_coordinates(x) @ self.W_dec[:rank]
        if fix_gauge:
            # on the CPU, since MPS has no double precision
            basis = orthonormal_basis(self.W_dec[:rank].cpu()).to(s)
            s = s + (self.b_dec @ basis.T) @ basis
        # An affine map undoes run-time normalisation. To s, one summand of the
        # reconstruction, only its linear part applies.
        s_and_zero = torch.stack([s, torch.zeros_like(s)])
        s, offset = self.run_time_activation_norm_fn_out(s_and_zero)
        return self.reshape_fn_out(s - offset, self.d_head)

    def scaffold_coordinates(self, x: torch.Tensor) -> torch.Tensor:
        """
        The scaffold's coordinates z = (x - b_dec) A.

        In inference form they are the first latents of `encode`.

        Args:
            x: Activations, as for `scaffold`.

        Returns:
            z, shape (..., r), signed.
        """
        rank = self.cfg.scaffold_rank
        # b_dec makes an encoder bias of the scaffold redundant, so it is not trained. It
        # is zero unless whitening is folded with apply_b_dec_to_input=False.
        b_enc = self.b_enc[:rank].detach()
        return self.process_sae_in(x) @ self.W_enc[:, :rank] + b_enc

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """
        As PyTorch's, but a weight keeps its shape.

        sae-dashboard cuts weights to single latents, which here are not those of an
        architecture it knows, and leaves them cut when it then fails.

        Raises:
            UserError: A weight would be replaced by one of another shape.
        """
        old = self._parameters.get(name)
        if old is not None and param is not None and old.shape != param.shape:
            raise UserError(
                f"{name} of a scaffold SAE stays {tuple(old.shape)}, and cannot become "
                f"{tuple(param.shape)}; a program that cuts weights needs a plain form: "
                "saelens-scaffold export SAE OUTPUT --form jumprelu"
            )
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        """Width and rank, for `repr`."""
        cfg = self.cfg
        return f"d_in={cfg.d_in}, d_sae={cfg.d_sae}, scaffold_rank={cfg.scaffold_rank}"

    def sparse_sae(self) -> JumpReLUSAE:
        """
        The sparse dictionary alone, as a plain SAELens `jumprelu` SAE.

        Its d_sae - r latents are this SAE's latents r, r + 1, ..., with the same
        activations. Its reconstruction lacks the scaffold's part, so use it to judge
        single dictionary latents (sparse probing, TPP, absorption, automated
        interpretation), not the reconstruction. The weights are copies.
        """
        sae = self.to_inference()
        rank = sae.cfg.scaffold_rank
        return _plain_jumprelu(
            sae,
            view="sparse",
            W_enc=sae.W_enc[:, rank:],
            b_enc=sae.b_enc[rank:],
            threshold=sae.threshold[rank:],
            W_dec=sae.W_dec[rank:],
        )

    def to_jumprelu(self) -> JumpReLUSAE:
        """
        The whole SAE as a plain SAELens `jumprelu` SAE, which loads without this package.

        A linear latent u is a pair of opposite ReLU latents, u = relu(u) - relu(-u),
        so the reconstruction is the same. It has d_sae + r latents: r scaffold
        latents, their r opposites, then the sparse dictionary. The weights are copies.
        """
        sae = self.to_inference()
        rank = sae.cfg.scaffold_rank

        def with_opposites(latents: torch.Tensor) -> torch.Tensor:
            return torch.cat([latents[:rank], -latents[:rank], latents[rank:]])

        threshold = sae.threshold[rank:]
        return _plain_jumprelu(
            sae,
            view="whole",
            W_enc=with_opposites(sae.W_enc.T).T,
            b_enc=with_opposites(sae.b_enc),
            threshold=torch.cat([threshold.new_zeros(2 * rank), threshold]),
            W_dec=with_opposites(sae.W_dec),
        )


def finish_decode(sae: SAE[Any], written: torch.Tensor) -> torch.Tensor:
    """The reconstruction from the sum of the latents' contributions, shape (..., d_in)."""
    sae_out_pre = sae.hook_sae_recons(written + sae.b_dec)
    sae_out_pre = sae.run_time_activation_norm_fn_out(sae_out_pre)
    return sae.reshape_fn_out(sae_out_pre, sae.d_head)


def is_hooked(point: HookPoint) -> bool:
    """Whether a hook point has hooks."""
    return bool(point._forward_hooks or point._backward_hooks)


def check_scaffold_config(cfg: Any, *choices: str) -> None:
    """
    Check the `scaffold_rank` of an SAE configuration, and fields of a `Literal` type.

    Args:
        cfg: The configuration.
        choices: Names of the fields.

    Raises:
        ValueError: The rank is not an integer from 0 to min(d_in, d_sae) - 1, or a value
            is not allowed.
    """
    rank, max_rank = cfg.scaffold_rank, min(cfg.d_in, cfg.d_sae) - 1
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise ValueError(f"scaffold_rank must be an int, got {rank!r}.")
    if not 0 <= rank <= max_rank:
        raise ValueError(
            f"scaffold_rank must be from 0 to {max_rank} (less than d_in={cfg.d_in} and "
            f"d_sae={cfg.d_sae}), got {rank}."
        )
    for name in choices:
        allowed, value = get_args(get_type_hints(type(cfg))[name]), getattr(cfg, name)
        if value not in allowed:
            listed = ", ".join(map(repr, allowed))
            raise ValueError(f"{name} must be one of {listed}, got {value!r}.")


@torch.no_grad()
def build_sae(
    sae_class: Callable[[Any], SAE[Any]],
    cfg: Any,
    state_dict: dict[str, torch.Tensor],
    copies: bool = True,
) -> Any:
    """
    An SAE of `sae_class` that owns copies of the given weights, or has these themselves.

    Built on the meta device first, as SAELens loads SAEs, so that no memory, time or
    random numbers go into an initialisation that is thrown away.
    """
    cfg = copy.deepcopy(cfg)
    device, cfg.device = cfg.device, "meta"
    sae = sae_class(cfg)
    owned = {name: t.detach() for name, t in state_dict.items()}
    if copies:
        owned = {name: t.clone().contiguous() for name, t in owned.items()}
    sae.load_state_dict(owned, assign=True)
    return sae.to(device=device)


def _plain_jumprelu(
    sae: "ScaffoldJumpReLUSAE", view: str, **weights: torch.Tensor
) -> JumpReLUSAE:
    scaffold_cfg = copy.deepcopy(sae.cfg)
    values = {f.name: getattr(scaffold_cfg, f.name) for f in fields(JumpReLUSAEConfig)}
    cfg = JumpReLUSAEConfig(**{**values, "d_sae": len(weights["W_dec"])})
    cfg.metadata.scaffold_view = view
    cfg.metadata.scaffold_rank = sae.cfg.scaffold_rank
    return build_sae(JumpReLUSAE, cfg, {**weights, "b_dec": sae.b_dec})
