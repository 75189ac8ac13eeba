"""A scaffold for an SAE that exists: reduced-rank regression of its error on its input."""

import copy
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from sae_lens.saes.sae import SAEConfig
from sae_lens.util import dtype_to_str

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.saes import (
    ScaffoldJumpReLUSAE,
    ScaffoldJumpReLUSAEConfig,
    validation,
)
from saelens_scaffold.saes.calibration import threshold_at_l0
from saelens_scaffold.saes.facts import scaffold_rank, tokens_at_once, weights_sha256
from saelens_scaffold.saes.least_squares import LeastSquares
from saelens_scaffold.saes.scaffold import ScaffoldMixin, build_sae

_WITH_JUMPRELU_FORM = ("standard", "topk", "jumprelu", "gated", "scaffold_jumprelu")
_OF_OTHER_WEIGHTS = ("weights_sha256", "measured", "scaffold_view", "scaffold_rank")


class Scaffold(NamedTuple):
    """
    The map x -> (x - mean_x) A B + mean_error, at the scale at which an SAE's weights are.

    Attributes:
        A: Encoder, shape (d_in, r).
        B: Decoder, shape (r, d_in).
        mean_x: Mean activation, shape (d_in,).
        mean_error: What it adds to the mean reconstruction, shape (d_in,).
    """

    A: torch.Tensor
    B: torch.Tensor
    mean_x: torch.Tensor
    mean_error: torch.Tensor

    def of_rank(self, rank: int) -> "Scaffold":
        """Its first coordinates; of a reduced-rank regression, that of a smaller rank."""
        return self._replace(A=self.A[:, :rank], B=self.B[:rank])


class ScaledError(NamedTuple):
    """
    An SAE's input and error, at the scale at which its weights are.

    Attributes:
        x: Shape (n_tokens, d_in).
        error: Input minus reconstruction, shape (n_tokens, d_in).
        scale: What either is multiplied by to have the scale of the activations, shape
            (n_tokens, 1): 1 without run-time normalisation.
    """

    x: torch.Tensor
    error: torch.Tensor
    scale: torch.Tensor


@torch.no_grad()
def absorb_scaffold(
    sae: SAE[Any],
    batches: Iterable[torch.Tensor],
    rank: int,
    drop_latents: torch.Tensor | None = None,
    calibration: torch.Tensor | None = None,
) -> ScaffoldJumpReLUSAE:
    """
    Give an SAE the best scaffold that one pass over activations can give.

    The scaffold is the reduced-rank regression of the SAE's error on its input. The
    dictionary stays as it is. With run-time normalisation, the errors of the normalised
    activations count.

    Args:
        sae: An SAE in inference form: `standard`, `topk`, `jumprelu`, `gated` or
            `scaffold_jumprelu`; see `jumprelu_form`.
        batches: Activations as the SAE takes them, shape (n_tokens, d_in), or
            (n_tokens, n_heads, d_head) for `reshape_activations="hook_z"`.
        rank: Rank of the scaffold. That of an SAE with a scaffold grows by as much.
        drop_latents: Indices of latents that the scaffold takes the place of.
        calibration: Activations to find the threshold of a `topk` SAE on.

    Raises:
        UserError: The SAE has no such form, or there are not more tokens than dimensions.
    """
    base = jumprelu_form(sae, calibration)
    if drop_latents is not None:
        base = without_latents(base, drop_latents)
    sums = LeastSquares(base.cfg.d_in, base.cfg.d_in, base.W_dec.device)
    for x in batches:
        scaled = scaled_error(base, x)
        sums.update(scaled.x, scaled.error)
    absorbed = add_scaffold(base, fitted_scaffold(sums).of_rank(rank))
    metadata: Any = absorbed.cfg.metadata
    metadata.absorbed |= {"rank": rank, "n_tokens": sums.n}
    return absorbed


def fitted_scaffold(sums: LeastSquares) -> Scaffold:
    """
    The best scaffold of every rank, from the moments of inputs and errors.

    Raises:
        UserError: There are not more tokens than dimensions.
    """
    d_in = len(sums.mean_x)
    if sums.n <= d_in:
        raise UserError(
            f"a scaffold at {d_in} dimensions needs more than {d_in} tokens, and says "
            f"little with fewer than {10 * d_in}; there are {sums.n}"
        )
    return Scaffold(*sums.reduced_rank(), sums.mean_x, sums.mean_y)


@torch.no_grad()
def scaled_error(sae: ScaffoldJumpReLUSAE, x: torch.Tensor) -> ScaledError:
    """
    An SAE's error on a batch, without holding the activations of all its latents.

    Args:
        sae: The SAE.
        x: Activations as the SAE takes them, shape (n_tokens, ...).
    """
    parts: list[ScaledError] = []
    for part in x.to(sae.W_dec).split(tokens_at_once(sae)):
        error = (part - sae.decode(sae.encode(part))).flatten(1)
        b_dec = sae.b_dec * sae.cfg.apply_b_dec_to_input
        scaled = sae.process_sae_in(part) + b_dec
        # run-time normalisation is undone by an affine map
        one, zero = sae.run_time_activation_norm_fn_out(
            torch.stack([torch.ones_like(error[:, :1]), torch.zeros_like(error[:, :1])])
        )
        parts.append(ScaledError(scaled, error / (one - zero), one - zero))
    return ScaledError(*map(torch.cat, zip(*parts, strict=True)))


@torch.no_grad()
def jumprelu_form(
    sae: SAE[Any], calibration: torch.Tensor | None = None
) -> ScaffoldJumpReLUSAE:
    """
    An SAE as a `scaffold_jumprelu` SAE with the scaffold that it has, of rank 0 if none.

    It has the latents and outputs of the SAE, in single precision at least. `standard` is
    a JumpReLU with the threshold 0, and so is `gated` with one threshold for each latent,
    as gate and magnitude read the same direction. `topk` is none: its fixed k becomes the
    threshold at which k latents fire per token on average. Weights that are the same are
    shared with the SAE, not copied.

    Args:
        sae: An SAE in inference form.
        calibration: Activations to find the threshold of a `topk` SAE on.

    Raises:
        UserError: The SAE has no such form.
        InvalidSAEError: The scale of its activations is not known.
    """
    validation.check_scale_is_known(sae.cfg.normalize_activations)
    if isinstance(sae, ScaffoldMixin):
        sae = sae.to_inference()
    check_has_jumprelu_form(sae)
    dtype = torch.promote_types(sae.dtype, torch.float32)
    own: Any = sae.cfg
    values = {f.name: getattr(own, f.name) for f in fields(SAEConfig)}
    cfg = ScaffoldJumpReLUSAEConfig(
        **copy.deepcopy({**values, "dtype": dtype_to_str(dtype)}),
        scaffold_rank=scaffold_rank(sae),
    )
    for name in _OF_OTHER_WEIGHTS:
        vars(cfg.metadata).pop(name, None)
    architecture, metadata = own.architecture(), cfg.metadata
    metadata.absorbed = {
        "architecture": architecture,
        "weights_sha256": weights_sha256(sae),
    }
    weights = {name: of.to(dtype) for name, of in sae.state_dict().items()}
    if architecture == "gated":
        ratio = weights.pop("r_mag").exp()
        weights["W_enc"] = weights["W_enc"] * ratio
        weights["b_enc"] = weights.pop("b_mag")
        # gate: x W_enc + b_gate > 0; magnitude: relu(exp(r_mag) x W_enc + b_mag)
        weights["threshold"] = weights["b_enc"] - ratio * weights.pop("b_gate")
    elif architecture in ("standard", "topk"):
        weights["threshold"] = torch.zeros_like(weights["b_enc"])
    if getattr(own, "rescale_acts_by_decoder_norm", False):
        norms = sae.get_W_dec_norm().to(dtype)
        weights["W_enc"], weights["b_enc"] = (
            weights[name] * norms for name in ("W_enc", "b_enc")
        )
        weights["W_dec"] = weights["W_dec"] / norms[:, None]
    form = build_sae(ScaffoldJumpReLUSAE, cfg, weights, copies=False)
    if architecture == "topk":
        _calibrate(form, own.k, calibration)
    return form


def check_has_jumprelu_form(sae: SAE[Any]) -> None:
    """
    Raises:
        UserError: The SAE has no such form.
    """
    architecture = sae.cfg.architecture()
    if architecture not in _WITH_JUMPRELU_FORM:
        raise UserError(
            f"architecture {architecture!r} has no JumpReLU form, as "
            f"{', '.join(_WITH_JUMPRELU_FORM)} have (BatchTopK SAEs are saved as jumprelu)"
        )


def _calibrate(
    sae: ScaffoldJumpReLUSAE, k: int, activations: torch.Tensor | None
) -> None:
    """Set the threshold at which k latents fire per token, and say so in the metadata."""
    if activations is None or len(activations) == 0:
        raise UserError(
            "a topk SAE selects k latents of each token, which no threshold does; give "
            "activations to calibrate one on"
        )
    blocks = activations.split(tokens_at_once(sae))
    acts = (sae.encode(x) for x in blocks)
    sae.threshold.fill_(threshold_at_l0(k, acts, len(activations)))
    metadata: Any = sae.cfg.metadata
    metadata.k = float(k)
    metadata.threshold_calibration = {
        "estimator": "activations",
        "n_tokens": len(activations),
    }


@torch.no_grad()
def without_latents(
    sae: ScaffoldJumpReLUSAE, latents: torch.Tensor
) -> ScaffoldJumpReLUSAE:
    """
    An SAE without some latents of its dictionary.

    Args:
        sae: The SAE.
        latents: Their indices among all latents.

    Raises:
        UserError: They are all of its dictionary.
    """
    kept = torch.ones(sae.cfg.d_sae, dtype=torch.bool, device=sae.W_dec.device)
    kept[latents] = False
    if not kept[sae.cfg.scaffold_rank :].any():
        raise UserError("no latent of the dictionary would be left; take out fewer")
    smaller = _with_latents(
        sae,
        sae.cfg.scaffold_rank,
        W_enc=sae.W_enc[:, kept],
        b_enc=sae.b_enc[kept],
        threshold=sae.threshold[kept],
        W_dec=sae.W_dec[kept],
        b_dec=sae.b_dec,
    )
    smaller.cfg.metadata.n_dropped_latents = int((~kept).sum())
    return smaller


@torch.no_grad()
def add_scaffold(sae: ScaffoldJumpReLUSAE, scaffold: Scaffold) -> ScaffoldJumpReLUSAE:
    """
    The SAE whose reconstruction is that of an SAE plus a scaffold.

    Its first latents are the scaffold's coordinates, centred; then come the SAE's latents,
    which fire as they did.

    Args:
        sae: The SAE; see `jumprelu_form`.
        scaffold: At the scale of its weights.
    """
    A, B, mean_x, mean_error = scaffold
    b_dec = sae.b_dec + mean_error.to(sae.b_dec)
    # what the encoders subtract from x, and what they subtract more than before
    subtracted = b_dec.to(mean_x) * sae.cfg.apply_b_dec_to_input
    shift = (b_dec - sae.b_dec) * sae.cfg.apply_b_dec_to_input
    b_scaffold = ((subtracted - mean_x) @ A).to(sae.b_enc)
    return _with_latents(
        sae,
        sae.cfg.scaffold_rank + len(B),
        W_enc=torch.cat([A.to(sae.W_enc), sae.W_enc], dim=1),
        b_enc=torch.cat([b_scaffold, sae.b_enc + shift @ sae.W_enc]),
        threshold=torch.cat([torch.full_like(b_scaffold, -torch.inf), sae.threshold]),
        W_dec=torch.cat([B.to(sae.W_dec), sae.W_dec]),
        b_dec=b_dec,
    )


def _with_latents(
    sae: ScaffoldJumpReLUSAE, rank: int, **weights: torch.Tensor
) -> ScaffoldJumpReLUSAE:
    """An SAE with other weights, the first `rank` latents linear."""
    values = {f.name: getattr(sae.cfg, f.name) for f in fields(sae.cfg)}
    sizes = {"d_sae": len(weights["W_dec"]), "scaffold_rank": rank}
    cfg = ScaffoldJumpReLUSAEConfig(**copy.deepcopy({**values, **sizes}))
    return build_sae(ScaffoldJumpReLUSAE, cfg, weights, copies=False)
