"""Choosing latents of the dictionary: aligned with a subspace, or random of like frequency."""

import torch

from saelens_scaffold.saes.subspaces import share_in_subspace


def most_aligned(
    decoder: torch.Tensor, alive: torch.Tensor, basis: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The alive latents, most aligned with a subspace first.

    Args:
        decoder: Decoder directions, shape (n, d_in).
        alive: Which latents fire at all, shape (n,). The direction of one that never
            fires means nothing.
        basis: Orthonormal rows that span the subspace, shape (r, d_in).

    Returns:
        Their indices, and the cosines of their decoder directions with the subspace,
        both of shape (n_alive,).
    """
    # on the CPU, since MPS has no double precision
    indices = alive.cpu().nonzero()[:, 0]
    cosines = share_in_subspace(decoder.cpu()[indices], basis.cpu()).sqrt()
    order = cosines.argsort(descending=True, stable=True)
    return indices[order], cosines[order]


def matched_frequency(
    fired: torch.Tensor, chosen: torch.Tensor, generator: torch.Generator
) -> torch.Tensor | None:
    """
    Other alive latents that fire about as often as the chosen ones.

    Each chosen latent, in random order, gets the unused latent outside the choice whose
    log frequency is nearest to its own, ties broken at random.

    Args:
        fired: Tokens on which each latent fired, shape (n,).
        chosen: Indices of the chosen latents, all alive, shape (m,).
        generator: Of the random order, on the CPU.

    Returns:
        Indices, shape (m,); None if there are fewer than m other alive latents.
    """
    fired, chosen = fired.cpu(), chosen.cpu()
    others = fired > 0
    others[chosen] = False
    candidates = others.nonzero()[:, 0]
    if len(candidates) < len(chosen):
        return None
    candidates = candidates[torch.randperm(len(candidates), generator=generator)]
    distances_to = fired[candidates].double().log()
    free = torch.ones(len(candidates), dtype=torch.bool)
    matched = torch.empty_like(chosen)
    for i in torch.randperm(len(chosen), generator=generator).tolist():
        distance = (distances_to - fired[chosen[i]].double().log()).abs()
        best = int(distance.where(free, torch.inf).argmin())
        free[best] = False
        matched[i] = candidates[best]
    return matched
