"""Changes to the activations at the hook point, each under the name it is reported by."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from sae_lens import SAE

from saelens_scaffold.evals.language_model import HookedBatch
from saelens_scaffold.evals.scaffold_ablation import ScaffoldAblationEvalConfig
from saelens_scaffold.evals.scaffold_ablation.fit import Fit, SAEFit
from saelens_scaffold.evals.scaffold_ablation.latents import matched_frequency
from saelens_scaffold.evals.selected_saes import SelectedSAE
from saelens_scaffold.saes.firing import ActiveLatents
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
"""Suffix of the names of interventions that include special tokens."""

Change = Callable[[SAEBatch], torch.Tensor]

Identity = tuple[str | int | None, ...]


@dataclass
class Intervention:
    """
    One change, in as many draws as it needs.

    Attributes:
        name: The name it is reported by.
        description: What it does, in words.
        changes: From the activations to the changed ones, one for each draw.
        kind: "reference", "scaffold", "geometry" or "dictionary".
        size: Number of dimensions or latents that are removed, if that says something.
        of_model: Whether it is the same for all SAEs, given its name and size.
        special_tokens: Whether it changes BOS, EOS and padding as well, and is fitted on
            them.
    """

    name: str
    description: str
    changes: list[Change]
    kind: str = "reference"
    size: int | None = None
    of_model: bool = False
    special_tokens: bool = False

    def including_special_tokens(self) -> "Intervention":
        """The same, if it was fitted on special tokens as well, for all tokens."""
        name = f"{self.name}{WITH_SPECIAL_TOKENS}"
        return replace(self, name=name, special_tokens=True)

    def identity(self, sae_key: str = "") -> Identity:
        """What tells it from others. SAEs share an intervention that is of the model."""
        return (self.name, self.size, None if self.of_model else sae_key)


CLEAN = Intervention("clean", "nothing changed", [lambda batch: batch.x], of_model=True)


def distinct(
    group: Sequence[SelectedSAE],
    changes: Mapping[str, list[Intervention]],
    runs: Mapping[bool, HookedBatch],
) -> Iterator[tuple[Identity, Intervention, SAEBatch]]:
    """
    Interventions on a batch, once if several SAEs share one.

    Args:
        group: The SAEs.
        changes: The interventions on each SAE, by its key.
        runs: The batch without special tokens under False, and with them under True if
            there are interventions that include them.

    Yields:
        An intervention's identity, the intervention, and the activations it changes.
    """
    found: set[Identity] = set()
    for sae in group:
        batches = {special: SAEBatch(run.x, sae.sae) for special, run in runs.items()}
        for change in changes[sae.key]:
            identity = change.identity(sae.key)
            if identity not in found:
                found.add(identity)
                yield identity, change, batches[change.special_tokens]


def interventions(
    config: ScaffoldAblationEvalConfig, fits: dict[bool, Fit], sae_key: str
) -> list[Intervention]:
    """
    All interventions on one SAE's hook point.

    Args:
        config: Which ones.
        fits: Statistics without special tokens under False, and with them under True if
            they are included.
        sae_key: Key of the SAE.
    """
    return [
        change.including_special_tokens() if special else change
        for special, fit in fits.items()
        for change in _interventions(config, fit, fit.saes[sae_key])
    ]


def _interventions(
    config: ScaffoldAblationEvalConfig, fit: Fit, of: SAEFit
) -> Iterator[Intervention]:
    generator = torch.Generator().manual_seed(config.random_seed)
    mean = of.like_weights(fit.mean)
    basis = of.scaffold_basis
    yield from _references(mean)
    if basis is not None:
        yield from _of_scaffold(of, basis)
    random = [
        orthonormal_basis(torch.randn(of.pca_rank, len(mean), generator=generator))
        for _ in range(config.n_random_draws)
    ]
    yield from _of_geometry(fit, of, mean, random)
    if basis is not None:
        yield from _of_dictionary(config, of, basis, generator)
        if of.baseline is not None:
            own = of.baseline
            yield from _of_dictionary(config, own, basis, generator, "baseline_")


def _references(mean: torch.Tensor) -> Iterator[Intervention]:
    yield Intervention(
        "sae_reconstruction",
        "the SAE's reconstruction in place of the activations",
        [lambda batch: batch.reconstruction],
    )
    yield Intervention(
        "zero_ablation",
        "zeros in place of the activations",
        [lambda batch: torch.zeros_like(batch.x)],
        of_model=True,
    )
    yield Intervention(
        "mean_ablation",
        "their mean in place of the activations",
        [lambda batch: mean.expand_as(batch.x)],
        of_model=True,
    )


def _of_scaffold(of: SAEFit, basis: torch.Tensor) -> Iterator[Intervention]:
    removal = partial(Intervention, kind="scaffold", size=of.sae.rank)
    mean = of.like_weights(of.scaffold_mean)
    yield removal(
        "scaffold_mean_ablated",
        "x - s(x) + E[s]: the scaffold's part of the reconstruction replaced by its mean",
        [lambda batch: batch.x - batch.scaffold(fix_gauge=True) + mean],
    )
    yield removal(
        "scaffold_projected_out",
        "the span of the scaffold's decoder rows projected out of x",
        [_projection(of.like_weights(basis))],
    )
    yield removal(
        "scaffold_subtracted_gauge_fixed",
        "x - s(x), with s(x) as it is where b_dec is orthogonal to the scaffold's span",
        [lambda batch: batch.x - batch.scaffold(fix_gauge=True)],
    )
    yield removal(
        "scaffold_subtracted",
        "x - s(x), with s(x) in the gauge of the weights: how much of the span's constant "
        "part is in b_dec, and so stays, is a convention",
        [lambda batch: batch.x - batch.scaffold(fix_gauge=False)],
    )


def _of_geometry(
    fit: Fit, of: SAEFit, mean: torch.Tensor, random: list[torch.Tensor]
) -> Iterator[Intervention]:
    rank = of.pca_rank
    removal = partial(Intervention, kind="geometry", size=rank, of_model=True)
    outliers = torch.eye(len(mean))[fit.outliers[:rank].cpu()]
    largest = "the dimensions of the residual stream with the largest root mean square"
    for name, what, draws in (
        ("pca", "the top principal directions", [fit.directions[:rank]]),
        ("random", "as many random directions", random),
        ("outlier_dimensions", largest, [outliers]),
    ):
        bases = [of.like_weights(basis) for basis in draws]
        yield removal(
            f"{name}_mean_ablated",
            f"the coordinates of x along {what} replaced by their mean",
            [_projection(basis, mean) for basis in bases],
        )
        yield removal(
            f"{name}_projected_out",
            f"{what} projected out of x",
            [_projection(basis) for basis in bases],
        )


def _of_dictionary(
    config: ScaffoldAblationEvalConfig,
    of: SAEFit,
    basis: torch.Tensor,
    generator: torch.Generator,
    prefix: str = "",
) -> Iterator[Intervention]:
    aligned, cosines = of.most_aligned(basis)
    owner = f"the baseline {of.sae.label}" if prefix else "the SAE itself"
    whose = f"the sparse latents of {owner}"
    for n in config.n_aligned_latents:
        if n > len(aligned):  # would be all that are alive, under another name
            continue
        removal = partial(Intervention, kind="dictionary", size=n)
        yield removal(
            f"{prefix}aligned_{n}_latents",
            f"{whose} most aligned with the scaffold's subspace set to zero",
            [without_latents(of, aligned[:n])],
        )
        draws = [
            matched_frequency(of.fired, aligned[:n], generator)
            for _ in range(config.n_random_draws)
        ]
        matched = [without_latents(of, draw) for draw in draws if draw is not None]
        if matched:
            yield removal(
                f"{prefix}matched_{n}_latents",
                "as many others of these latents that fire as often set to zero",
                matched,
            )
    for cosine in config.aligned_cosines:
        n = int((cosines > cosine).sum())
        if n > 0:
            yield Intervention(
                f"{prefix}aligned_above_{cosine:g}_latents",
                f"{whose} whose cosine with the scaffold's subspace is above {cosine:g} "
                "set to zero",
                [without_latents(of, aligned[:n])],
                kind="dictionary",
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
        of: Statistics of the SAE.
        latents: Indices among its sparse latents.
    """
    sae = of.sae.sae
    mask = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=sae.device)
    mask[of.sae.rank + latents.to(sae.device)] = True

    def change(batch: SAEBatch) -> torch.Tensor:
        return batch.x - batch.by(sae).part_of(mask)

    return change
