"""Changes to the activations at the hook point, each under the name it is reported by."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from sae_lens import SAE

from saelens_scaffold.evals.scaffold_ablation.eval_config import (
    ScaffoldAblationEvalConfig,
)
from saelens_scaffold.evals.scaffold_ablation.fit import ModelFit, SAEFit
from saelens_scaffold.evals.scaffold_ablation.latents import (
    counts_above,
    matched_frequency,
    most_aligned_of,
)
from saelens_scaffold.saes.active_latents import ActiveLatents
from saelens_scaffold.saes.scaffold import ScaffoldMixin
from saelens_scaffold.saes.subspaces import orthonormal_basis


class SAEBatch:
    """
    The activations of a batch, and what one SAE makes of them, computed once.

    Args:
        x: Activations of the tokens that count, shape (n_tokens, d_in).
        sae: The SAE.
    """

    def __init__(self, x: torch.Tensor, sae: SAE[Any]):
        self.x = x
        self._sae = sae
        self._by_others: dict[int, SAEBatch] = {}

    def by(self, sae: SAE[Any]) -> "SAEBatch":
        """The same activations, and what this or another SAE makes of them."""
        if sae is self._sae:
            return self
        return self._by_others.setdefault(id(sae), SAEBatch(self.x, sae))

    @cached_property
    def reconstruction(self) -> torch.Tensor:
        """x̂, shape (n_tokens, d_in)."""
        return self._active.decode(self._sae)

    def scaffold(self, fix_gauge: bool) -> torch.Tensor:
        """s(x), as it is or in the fixed gauge, shape (n_tokens, d_in)."""
        assert isinstance(self._sae, ScaffoldMixin)
        return self._sae.scaffold(self.x, fix_gauge)

    def part_of(self, latents: torch.Tensor) -> torch.Tensor:
        """
        What some latents add to the reconstruction.

        Args:
            latents: Mask, shape (d_sae,).

        Returns:
            Shape (n_tokens, d_in).
        """
        return self._active.decode(self._sae, latents) - self._nothing

    @cached_property
    def _active(self) -> ActiveLatents:
        return ActiveLatents(self._sae.encode(self.x))

    @cached_property
    def _nothing(self) -> torch.Tensor:
        # what the decoder adds by itself; with run-time normalisation it differs by token
        return self._active.decode(
            self._sae,
            torch.zeros(self._sae.cfg.d_sae, dtype=torch.bool, device=self.x.device),
        )


WITH_SPECIAL_TOKENS = "_with_special_tokens"
"""What the names of interventions end in that include special tokens."""

Change = Callable[[SAEBatch], torch.Tensor]


@dataclass
class Intervention:
    """
    One change, in as many draws as it needs.

    Attributes:
        name: What it is reported by.
        kind: "reference", "scaffold", "geometry" or "dictionary".
        description: What it does, in words.
        changes: From the activations to the changed ones, one for each draw.
        size: Number of dimensions or latents that are removed, if that says something.
        of_model: Whether it is the same for all SAEs, given its name and size.
        special_tokens: Whether it changes BOS, EOS and padding as well, and is fitted on
            them.
    """

    name: str
    kind: str
    description: str
    changes: list[Change]
    size: int | None = None
    of_model: bool = False
    special_tokens: bool = False

    def including_special_tokens(self) -> "Intervention":
        """The same, if it was fitted on special tokens as well, for all tokens."""
        name = f"{self.name}{WITH_SPECIAL_TOKENS}"
        return replace(self, name=name, special_tokens=True)


def interventions(
    config: ScaffoldAblationEvalConfig,
    fit: ModelFit,
    of: SAEFit,
    rank: int,
    baseline: SAEFit | None = None,
) -> list[Intervention]:
    """
    All interventions on one SAE's hook point.

    Args:
        config: Which ones.
        fit: Of the activations.
        of: Of the SAE.
        rank: How many dimensions the geometric ones remove.
        baseline: Of the plain SAE whose latents are ablated, too, if there is one.
    """
    sae = of.sae.sae
    dtype, device = sae.dtype, sae.device

    def like_x(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=device, dtype=dtype)

    generator = torch.Generator().manual_seed(config.random_seed)
    found = [*_references(like_x(fit.mean))]
    basis = of.scaffold_basis
    if basis is not None:
        found += _of_scaffold(like_x(of.scaffold_mean), like_x(basis), of.sae.rank)
    found += _of_geometry(config, fit, rank, like_x, generator)
    if basis is not None:
        found += _of_dictionary(config, of, basis, generator)
        if baseline is not None:
            found += _of_dictionary(config, baseline, basis, generator, "baseline_")
    return found


def _references(mean: torch.Tensor) -> Iterator[Intervention]:
    yield Intervention(
        "sae_reconstruction",
        "reference",
        "the SAE's reconstruction in place of the activations",
        [lambda batch: batch.reconstruction],
    )
    yield Intervention(
        "zero_ablation",
        "reference",
        "zeros in place of the activations",
        [lambda batch: torch.zeros_like(batch.x)],
        of_model=True,
    )
    yield Intervention(
        "mean_ablation",
        "reference",
        "their mean in place of the activations",
        [lambda batch: mean.expand_as(batch.x)],
        of_model=True,
    )


def _of_scaffold(
    scaffold_mean: torch.Tensor, basis: torch.Tensor, rank: int
) -> Iterator[Intervention]:
    yield Intervention(
        "scaffold_mean_ablated",
        "scaffold",
        "x - s(x) + E[s]: the scaffold's part of the reconstruction replaced by its mean",
        [lambda batch: batch.x - batch.scaffold(fix_gauge=True) + scaffold_mean],
        size=rank,
    )
    yield Intervention(
        "scaffold_projected_out",
        "scaffold",
        "the span of the scaffold's decoder rows projected out of x",
        [_projection(basis)],
        size=rank,
    )
    yield Intervention(
        "scaffold_subtracted_gauge_fixed",
        "scaffold",
        "x - s(x), with s(x) as it is where b_dec is orthogonal to the scaffold's span",
        [lambda batch: batch.x - batch.scaffold(fix_gauge=True)],
        size=rank,
    )
    yield Intervention(
        "scaffold_subtracted",
        "scaffold",
        "x - s(x), with s(x) in the gauge of the weights: how much of the span's constant "
        "part is in b_dec, and so stays, is a convention",
        [lambda batch: batch.x - batch.scaffold(fix_gauge=False)],
        size=rank,
    )


def _of_geometry(
    config: ScaffoldAblationEvalConfig,
    fit: ModelFit,
    rank: int,
    like_x: Callable[[torch.Tensor], torch.Tensor],
    generator: torch.Generator,
) -> Iterator[Intervention]:
    d_in = len(fit.mean)
    mean = like_x(fit.mean)
    subspaces = {
        "pca": ("the top principal directions", [fit.directions[:rank]]),
        "random": (
            "as many random directions",
            [
                orthonormal_basis(torch.randn(rank, d_in, generator=generator))
                for _ in range(config.n_random_draws)
            ],
        ),
        "outlier_dimensions": (
            "the dimensions of the residual stream with the largest root mean square",
            [torch.eye(d_in)[fit.outliers[:rank].cpu()]],
        ),
    }
    for name, (what, draws) in subspaces.items():
        bases = [like_x(basis) for basis in draws]
        yield Intervention(
            f"{name}_mean_ablated",
            "geometry",
            f"the coordinates of x along {what} replaced by their mean",
            [_projection(basis, mean) for basis in bases],
            size=rank,
            of_model=True,
        )
        yield Intervention(
            f"{name}_projected_out",
            "geometry",
            f"{what} projected out of x",
            [_projection(basis) for basis in bases],
            size=rank,
            of_model=True,
        )


def _of_dictionary(
    config: ScaffoldAblationEvalConfig,
    of: SAEFit,
    basis: torch.Tensor,
    generator: torch.Generator,
    prefix: str = "",
) -> Iterator[Intervention]:
    aligned, cosines = most_aligned_of(of, basis)
    owner = f"the baseline {of.sae.label}" if prefix else "the SAE itself"
    whose = f"the sparse latents of {owner}"
    for n in config.n_aligned_latents:
        if n > len(aligned):  # would be all that are alive, under another name
            continue
        latents = aligned[:n]
        yield Intervention(
            f"{prefix}aligned_{n}_latents",
            "dictionary",
            f"{whose} most aligned with the scaffold's subspace set to zero",
            [without_latents(of, latents)],
            size=n,
        )
        draws = [
            matched_frequency(of.fired, latents, generator)
            for _ in range(config.n_random_draws)
        ]
        matched = [draw for draw in draws if draw is not None]
        if matched:
            yield Intervention(
                f"{prefix}matched_{n}_latents",
                "dictionary",
                "as many others of these latents that fire as often set to zero",
                [without_latents(of, draw) for draw in matched],
                size=n,
            )
    for cosine, n in zip(
        config.aligned_cosines,
        counts_above(config.aligned_cosines, cosines),
        strict=True,
    ):
        if n > 0:
            yield Intervention(
                f"{prefix}aligned_above_{cosine:g}_latents",
                "dictionary",
                f"{whose} whose cosine with the scaffold's subspace is above {cosine:g} "
                "set to zero",
                [without_latents(of, aligned[:n])],
                size=n,
            )


def _projection(basis: torch.Tensor, keep: torch.Tensor | None = None) -> Change:
    """Take the coordinates along orthonormal rows away, or replace them by a point's."""

    def change(batch: SAEBatch) -> torch.Tensor:
        x = batch.x if keep is None else batch.x - keep
        return batch.x - (x @ basis.T) @ basis

    return change


def without_latents(of: SAEFit, latents: torch.Tensor) -> Change:
    """
    Take away what some sparse latents add; the reconstruction error stays in.

    Args:
        of: Of the SAE.
        latents: Indices among its sparse latents.
    """
    sae = of.sae.sae
    mask = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=sae.device)
    mask[of.sae.rank + latents.to(sae.device)] = True

    def change(batch: SAEBatch) -> torch.Tensor:
        return batch.x - batch.by(sae).part_of(mask)

    return change
