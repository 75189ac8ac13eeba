"""What can be told of any SAELens SAE: rank, weights, k, and how its latents fire."""

from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from sae_lens import SAE
from torch.nn.functional import normalize

from saelens_scaffold.saes.subspaces import ActivationMoments

L0_TOLERANCE = 0.1
"""Relative difference between measured L0 and k up to which there is no warning."""


def scaffold_rank(sae: SAE[Any]) -> int:
    """Number of linear latents; 0 without a scaffold."""
    return int(getattr(sae.cfg, "scaffold_rank", 0))


def weights_sha256(sae: SAE[Any], dtype: torch.dtype | None = None) -> str:
    """
    SHA-256 hash of an SAE's weights, the same on every device.

    Args:
        sae: The SAE.
        dtype: Data type to convert the weights to first; None for their own.
    """
    digest = sha256()
    for name, weights in sorted(sae.state_dict().items()):
        weights = weights.detach().to(dtype=dtype or weights.dtype)
        digest.update(f"{name}{tuple(weights.shape)}{weights.dtype}".encode())
        weights = weights.cpu().flatten().contiguous().view(torch.uint8)
        digest.update(weights.numpy().data)
    return digest.hexdigest()


def trained_k(metadata: Any) -> float | None:
    """
    The k in an SAE's metadata: SAELens's object, or the dictionary from a file.

    None if there is none, or latents that fired have been taken out.
    """
    if metadata.get("n_dropped_latents"):
        return None
    details = metadata.get("training_architecture_details")
    for k in (metadata.get("k"), details.get("k") if isinstance(details, dict) else 0):
        if isinstance(k, (int, float)) and not isinstance(k, bool) and k > 0:
            return float(k)
    return None


def l0_warning(name: str, l0_sparse: float, n_tokens: int, metadata: Any) -> str | None:
    """
    Warning about an SAE whose L0 differs from the k it was trained with.

    Args:
        name: Name of the SAE.
        l0_sparse: Active sparse latents per token, measured in inference form.
        n_tokens: Number of tokens it was measured on.
        metadata: The SAE's metadata, which hold k.

    Returns:
        One line; None if the difference is at most `L0_TOLERANCE` of k, or k is unknown.
    """
    k = trained_k(metadata)
    if k is None or abs(l0_sparse - k) <= L0_TOLERANCE * k:
        return None
    calibration = metadata.get("threshold_calibration")
    estimator = calibration.get("estimator") if isinstance(calibration, dict) else None
    remedy = (
        "Its threshold was calibrated on a sample of the training, and texts differ: "
        "measure on more tokens of such text (`saelens-scaffold eval dense_latents`), "
        "or train on more."
        if estimator == "training_activations"
        else "Its threshold is a running average, which lags in short trainings: train "
        "for more steps, or where it is calibrated at the end (scaffold architectures, "
        "and `saelens-scaffold compare`)."
    )
    return (
        f"{name}: l0_sparse is {l0_sparse:.1f}, measured in inference form on "
        f"{n_tokens:,} tokens, but k was {k:g} in training ({l0_sparse / k - 1:+.0%}). "
        f"State and compare it at the measured l0_sparse, not at k. {remedy}"
    )


DENSE_THRESHOLD = 0.1
"""Share of the tokens above which a latent is dense (arXiv 2506.15679)."""

# Activations at once: few enough to stay in a CPU's cache, and to be small relative to the
# weights on a GPU.
_ACTIVATIONS_ON_CPU, _ACTIVATIONS_ON_GPU = 2**21, 2**26
# Share of active latents below which a sparse product is faster.
_SPARSE_BELOW = 0.05
_SPARSE_DTYPES = (torch.float32, torch.float64)


def tokens_at_once(sae: SAE[Any]) -> int:
    """Number of tokens whose activations are to be held at once."""
    on_cpu = sae.W_dec.device.type == "cpu"
    at_once = _ACTIVATIONS_ON_CPU if on_cpu else _ACTIVATIONS_ON_GPU
    return max(1, at_once // sae.cfg.d_sae)


class ActiveLatents:
    """
    The nonzero activations of a batch.

    Args:
        acts: Activations, shape (n_tokens, d_sae).

    Attributes:
        token: Index of each one's token, shape (n_active,).
        latent: Index of each one's latent, shape (n_active,).
        values: The activations, shape (n_active,).
    """

    def __init__(self, acts: torch.Tensor):
        self._shape = acts.shape
        self.token, self.latent = acts.nonzero(as_tuple=True)
        self.values = acts[self.token, self.latent]
        # sparse products do not exist on MPS, nor everywhere in half precision
        may_be_sparse = acts.device.type != "mps" and acts.dtype in _SPARSE_DTYPES
        is_sparse = may_be_sparse and len(self.values) < _SPARSE_BELOW * acts.numel()
        self._dense = None if is_sparse else acts

    def decode(self, sae: SAE[Any], kept: torch.Tensor | None = None) -> torch.Tensor:
        """
        The SAE's `decode`, with a sparse product where that is faster.

        Args:
            sae: The SAE of these activations.
            kept: Mask of the latents to decode, shape (d_sae,). By default all.

        Returns:
            Shape (n_tokens, d_in).
        """
        if self._dense is not None:
            return sae.decode(self._dense if kept is None else self._dense * kept)
        indices, values = torch.stack([self.token, self.latent]), self.values
        if kept is not None:
            of_kept = kept[self.latent]
            indices, values = indices[:, of_kept], values[of_kept]
        acts = torch.sparse_coo_tensor(
            indices, values, self._shape, is_coalesced=True, check_invariants=False
        )
        return sae.decode(acts)


@torch.no_grad()
def reconstruct(sae: SAE[Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        sae: The SAE.
        x: Activations, shape (n_tokens, d_in).

    Returns:
        x̂, shape (n_tokens, d_in), and the number of sparse latents active on each token,
        shape (n_tokens,).
    """
    rank, parts = scaffold_rank(sae), []
    for part in x.split(tokens_at_once(sae)):
        active = ActiveLatents(sae.encode(part))
        token = active.token[active.latent >= rank]
        l0 = torch.bincount(token, minlength=len(part))
        parts.append((active.decode(sae), l0))
    reconstructions, l0s = zip(*parts, strict=True)
    return torch.cat(reconstructions), torch.cat(l0s)


def antipodality(
    encoder: torch.Tensor, decoder: torch.Tensor, latents: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How close each latent is to one half of an antipodal pair (arXiv 2506.15679).

    That is the largest product of the cosines of encoder and decoder with another latent.
    Only latents that are opposite in both count, as a copy has a product of 1 too.

    Args:
        encoder: Encoder directions of all latents, shape (n, d_in).
        decoder: Decoder directions of all latents, shape (n, d_in).
        latents: Indices, shape (m,).

    Returns:
        The products and the other latents, both of shape (m,). A latent without an
        opposite has the product 0.
    """
    encoder, decoder = (normalize(rows.float(), dim=1) for rows in (encoder, decoder))
    of_encoder = encoder[latents] @ encoder.T
    of_decoder = decoder[latents] @ decoder.T
    products = of_encoder * of_decoder * ((of_encoder < 0) & (of_decoder < 0))
    best = products.max(dim=1)
    return best.values, best.indices


class FiringStatistics:
    """
    Firing frequencies of the sparse latents of one SAE, and its reconstruction error.

    The memory does not depend on the number of tokens.

    Attributes:
        fired: Tokens on which each sparse latent fired, shape (n_sparse,), int64.
        activation_sums: Sum of each one's activations, shape (n_sparse,), float64.
        replicate_fired: `fired` in every bootstrap replicate, shape
            (1 + n_replicates, n_sparse), the sample itself first.
        squared_errors: Sum of |x - x̂|² in every replicate, shape (1 + n_replicates,).
    """

    def __init__(self, sae: SAE[Any], n_replicates: int):
        self.sae = sae
        self.rank = scaffold_rank(sae)
        device = sae.W_dec.device
        n_sparse = sae.cfg.d_sae - self.rank
        # MPS has no float64
        double = torch.float32 if device.type == "mps" else torch.float64
        self.fired = torch.zeros(n_sparse, dtype=torch.int64, device=device)
        self.activation_sums = torch.zeros(n_sparse, dtype=double, device=device)
        self.replicate_fired = torch.zeros(1 + n_replicates, n_sparse, device=device)
        self.squared_errors = torch.zeros(1 + n_replicates, dtype=double, device=device)

    @torch.no_grad()
    def update(
        self, x: torch.Tensor, sequence: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """
        Args:
            x: Activations of the tokens that count, shape (n_tokens, d_in).
            sequence: Index of each token's sequence in the batch, shape (n_tokens,).
            weights: Weight of each sequence in each replicate, shape
                (1 + n_replicates, n_sequences).
        """
        n_sequences, n_sparse = weights.shape[1], len(self.fired)
        counts = torch.zeros(n_sequences * n_sparse, device=x.device)
        errors = torch.zeros(n_sequences, device=x.device)
        n_tokens = tokens_at_once(self.sae)
        for part, of in zip(x.split(n_tokens), sequence.split(n_tokens), strict=True):
            active = ActiveLatents(self.sae.encode(part))
            error = (part - active.decode(self.sae)).float().pow(2).sum(dim=1)
            errors.index_add_(0, of, error)

            in_dictionary = active.latent >= self.rank
            token = active.token[in_dictionary]
            latent = active.latent[in_dictionary] - self.rank
            values = active.values[in_dictionary].to(self.activation_sums.dtype)
            places = of[token] * n_sparse + latent
            counts += torch.bincount(places, minlength=len(counts))
            self.fired += torch.bincount(latent, minlength=n_sparse)
            self.activation_sums.index_add_(0, latent, values)
        weights = weights.to(x.device)
        self.replicate_fired += weights @ counts.view(n_sequences, n_sparse)
        self.squared_errors += (weights @ errors).to(self.squared_errors.dtype)

    def update_unsampled(self, x: torch.Tensor) -> None:
        """`update` without replicates."""
        one_sequence = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.update(x, one_sequence, torch.ones(1, 1))


class TextStatistics:
    """
    Sums over the tokens that all SAEs of a hook point share.

    Attributes:
        moments: Mean and covariance of the activations.
        n_sequences: Number of sequences.
        replicate_tokens: Number of tokens in every replicate, shape (1 + n_replicates,),
            the sample itself first.
    """

    def __init__(self, d_in: int, n_replicates: int, device: torch.device | str):
        self.moments = ActivationMoments(d_in, device)
        self.n_sequences = 0
        self.replicate_tokens = torch.zeros(1 + n_replicates, dtype=torch.float64)
        self._sums = torch.zeros(1 + n_replicates, d_in, dtype=torch.float64)
        self._squares = torch.zeros(1 + n_replicates, dtype=torch.float64)

    def update(
        self, x: torch.Tensor, sequence: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """See `FiringStatistics.update`."""
        self.moments.update(x)
        shifted = x.float() - self.moments.shift.to(x.device)
        n_sequences = weights.shape[1]
        sums = torch.zeros(n_sequences, x.shape[1], device=x.device)
        sums.index_add_(0, sequence, shifted)
        squares = torch.zeros(n_sequences, device=x.device)
        squares.index_add_(0, sequence, shifted.pow(2).sum(dim=1))
        tokens = torch.bincount(sequence, minlength=n_sequences)
        self.n_sequences += n_sequences
        double = weights.double()
        self.replicate_tokens += double @ tokens.cpu().double()
        self._sums += double @ sums.cpu().double()
        self._squares += double @ squares.cpu().double()

    @cached_property
    def principal_directions(self) -> torch.Tensor:
        """Orthonormal rows, largest variance first, shape (d_in, d_in); after all updates."""
        return self.moments.principal_directions()[1].cpu()

    @property
    def replicate_variances(self) -> torch.Tensor:
        """Sum of |x - E[x]|² in every replicate, shape (1 + n_replicates,)."""
        return self._squares - self._sums.pow(2).sum(dim=1) / self.replicate_tokens
