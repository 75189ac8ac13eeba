"""Changes to the activations at the hook point, by name, and what they cost the model."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from sae_lens import SAE

from saelens_scaffold.evals.intervals import SequenceBootstrap, estimates
from saelens_scaffold.evals.losses import CleanPredictions, predicting_text
from saelens_scaffold.evals.model import HookedBatch, HookedModel
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.evals.scaffold_ablation import ScaffoldAblationEvalConfig
from saelens_scaffold.evals.scaffold_ablation import eval_output as output
from saelens_scaffold.evals.scaffold_ablation.fit import Fit, SAEFit, matched_frequency
from saelens_scaffold.evals.tokens import TokenStream
from saelens_scaffold.saes.facts import ActiveLatents
from saelens_scaffold.saes.scaffold import ScaffoldMixin
from saelens_scaffold.saes.subspaces import orthonormal_basis

WITH_SPECIAL_TOKENS = "_with_special_tokens"
"""Suffix of the names of interventions that include special tokens."""

DESCRIPTIONS: dict[str, dict[str, str]] = yaml.safe_load(
    Path(__file__).with_name("interventions.yaml").read_text(encoding="utf-8")
)
"""What interventions do, by kind and name."""


class Batch:
    """
    The activations of a batch, and what SAEs make of them, computed once.

    Args:
        x: Activations of the tokens that count, shape (n_tokens, d_in).
        whole: A batch that has these among others, for all of which SAEs are run.
        among: Mask of these in it.
    """

    def __init__(
        self,
        x: torch.Tensor,
        whole: "Batch | None" = None,
        among: torch.Tensor | None = None,
    ):
        self.x, self._whole, self._among = x, whole, among
        self._encoded: dict[SAE[Any], tuple[ActiveLatents, torch.Tensor]] = {}

    def reconstruction(self, sae: SAE[Any]) -> torch.Tensor:
        """x̂, shape (n_tokens, d_in)."""
        if self._whole is not None:
            return self._whole.reconstruction(sae)[self._among]
        return self._encode(sae)[0].decode(sae)

    def part_of(self, sae: SAE[Any], latents: torch.Tensor) -> torch.Tensor:
        """
        What some latents add to the reconstruction.

        Args:
            sae: The SAE.
            latents: Mask, shape (d_sae,).

        Returns:
            Shape (n_tokens, d_in).
        """
        if self._whole is not None:
            return self._whole.part_of(sae, latents)[self._among]
        active, nothing = self._encode(sae)
        return active.decode(sae, latents) - nothing

    def _encode(self, sae: SAE[Any]) -> tuple[ActiveLatents, torch.Tensor]:
        """Its active latents, and what the decoder adds by itself."""
        if sae not in self._encoded:
            active = ActiveLatents(sae.encode(self.x))
            none = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=self.x.device)
            # with run-time normalisation it differs by token
            self._encoded[sae] = active, active.decode(sae, none)
        return self._encoded[sae]


T = TypeVar("T")

Change = Callable[[Batch], torch.Tensor]

Identity = tuple[str | int | None, ...]


@dataclass
class Intervention:
    """
    One change, in as many draws as it needs.

    Attributes:
        name: The name it is reported by.
        changes: From the activations to the changed ones, one for each draw.
        kind: "reference", "scaffold", "geometry" or "dictionary".
        size: Number of dimensions or latents that are removed, if that says something.
        given: What defines it besides its name, if it is the same for all SAEs; else None.
        description: What it does, in words; by default that in `DESCRIPTIONS`.
        special_tokens: Whether it changes BOS, EOS and padding as well, and is fitted on
            them.
    """

    name: str
    changes: list[Change]
    kind: str = "reference"
    size: int | None = None
    given: tuple[torch.Tensor, ...] | None = None
    description: str = ""
    special_tokens: bool = False

    def __post_init__(self) -> None:
        self.description = self.description or DESCRIPTIONS[self.kind][self.name]

    def fitted_with(self, special_tokens: bool) -> "Intervention":
        """The same, on special tokens as well if it was fitted on them."""
        if not special_tokens:
            return self
        return replace(self, name=self.name + WITH_SPECIAL_TOKENS, special_tokens=True)

    def identity(self, sae_key: str = "") -> Identity:
        """What tells it from others. SAEs share an intervention that is of the model."""
        return (self.name, self.size, sae_key if self.given is None else None)

    def fields(self) -> dict[str, Any]:
        """What the evaluation's output says of it."""
        return {
            "intervention": self.name,
            "description": self.description,
            "special_tokens": self.special_tokens,
            "size": self.size,
        }


CLEAN = Intervention("clean", [lambda batch: batch.x], given=())


def distinct(
    group: Sequence[SelectedSAE],
    changes: Mapping[str, list[Intervention]],
    runs: Mapping[bool, HookedBatch],
) -> Iterator[tuple[Identity, Intervention, Batch]]:
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
    batches = _batches(runs)  # a baseline is encoded once for all
    for sae in group:
        for change in changes[sae.key]:
            identity = change.identity(sae.key)
            if identity not in found:
                found.add(identity)
                yield identity, change, batches[change.special_tokens]


def _batches(runs: Mapping[bool, HookedBatch]) -> dict[bool, Batch]:
    if True not in runs:
        return {False: Batch(runs[False].x)}
    whole, part = Batch(runs[True].x), runs[False]
    return {True: whole, False: Batch(part.x, whole, part.among(runs[True]))}


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
        change.fitted_with(special)
        for special, fit in fits.items()
        for change in _interventions(config, fit, fit.saes[sae_key])
    ]


def _interventions(
    config: ScaffoldAblationEvalConfig, fit: Fit, of: SAEFit
) -> Iterator[Intervention]:
    generator = torch.Generator().manual_seed(config.random_seed)
    mean = of.like_weights(fit.moments.mean)
    basis, rank, sae = of.scaffold_basis, of.pca_rank, of.sae.sae
    yield Intervention("sae_reconstruction", [lambda batch: batch.reconstruction(sae)])
    zero: Change = lambda batch: torch.zeros_like(batch.x)  # noqa: E731
    yield Intervention("zero_ablation", [zero], given=())
    as_mean: Change = lambda batch: mean.expand_as(batch.x)  # noqa: E731
    yield Intervention("mean_ablation", [as_mean], given=(mean,))
    if basis is not None:
        yield from _of_scaffold(of, basis)
    bases = {
        "pca": [fit.directions[:rank]],
        "random": [
            orthonormal_basis(torch.randn(rank, len(mean), generator=generator))
            for _ in range(config.n_random_draws)
        ],
        "outlier_dimensions": [torch.eye(len(mean))[fit.outliers[:rank].cpu()]],
    }
    for name, draws in bases.items():
        like = [of.like_weights(draw) for draw in draws]
        removal = partial(Intervention, kind="geometry", size=rank, given=(mean, *like))
        yield removal(f"{name}_mean_ablated", [_projection(b, mean) for b in like])
        yield removal(f"{name}_projected_out", [_projection(b) for b in like])
    if basis is not None:
        yield from _of_dictionary(config, of, basis, generator)
        if of.baseline is not None:
            own = of.baseline
            yield from _of_dictionary(config, own, basis, generator, "baseline_")


def _of_scaffold(of: SAEFit, basis: torch.Tensor) -> Iterator[Intervention]:
    sae, mean = of.sae.sae, of.like_weights(of.scaffold_mean)
    assert isinstance(sae, ScaffoldMixin)
    fixed = partial(sae.scaffold, fix_gauge=True)
    removals: dict[str, Change] = {
        "mean_ablated": lambda batch: batch.x - fixed(batch.x) + mean,
        "projected_out": _projection(of.like_weights(basis)),
        "subtracted_gauge_fixed": lambda batch: batch.x - fixed(batch.x),
        "subtracted": lambda batch: batch.x - sae.scaffold(batch.x),
    }
    for name, change in removals.items():
        yield Intervention(f"scaffold_{name}", [change], "scaffold", of.sae.rank)


def _of_dictionary(
    config: ScaffoldAblationEvalConfig,
    of: SAEFit,
    basis: torch.Tensor,
    generator: torch.Generator,
    prefix: str = "",
) -> Iterator[Intervention]:
    aligned, cosines = of.most_aligned(basis)
    owner = f"the baseline {of.sae.label}" if prefix else "the SAE itself"

    def removal(how: str, which: object, *draws: torch.Tensor) -> Intervention:
        said = DESCRIPTIONS["dictionary"][how].format(owner=owner, which=which)
        name, size = f"{prefix}{how}_{which}_latents", len(draws[0])
        changes = [without_latents(of, draw) for draw in draws]
        return Intervention(name, changes, "dictionary", size, description=said)

    for n in config.n_aligned_latents:
        if n > len(aligned):  # would be all that are alive, under another name
            continue
        yield removal("aligned", n, aligned[:n])
        draws = [
            matched_frequency(of.firing.fired, aligned[:n], generator)
            for _ in range(config.n_random_draws)
        ]
        matched = [draw for draw in draws if draw is not None]
        if matched:
            yield removal("matched", n, *matched)
    for cosine in config.aligned_cosines:
        n = int((cosines > cosine).sum())
        if n > 0:
            yield removal("aligned_above", f"{cosine:g}", aligned[:n])


def _projection(basis: torch.Tensor, keep: torch.Tensor | None = None) -> Change:
    """Take the coordinates along orthonormal rows away, or replace them by a point's."""

    def change(batch: Batch) -> torch.Tensor:
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
    return lambda batch: batch.x - batch.part_of(sae, mask)


# ---- what they cost the language model in next-token prediction


@torch.no_grad()
def measure_losses(
    config: ScaffoldAblationEvalConfig,
    hooked: HookedModel,
    stream: TokenStream,
    group: Sequence[SelectedSAE],
    changes: Mapping[str, list[Intervention]],
) -> tuple[dict[Identity, torch.Tensor], int]:
    """
    Run the language model with every intervention.

    Args:
        config: Number of tokens and replicates.
        hooked: The language model at the SAEs' hook point.
        stream: The text, from where it is to be evaluated on.
        group: The SAEs.
        changes: The interventions on each SAE, by its key.

    Returns:
        Cross-entropy and KL of the clean run and of each intervention, by its identity, in
        the sample and every bootstrap replicate, shape (2, 1 + n_replicates), float64; and
        the number of predictions.
    """
    bootstrap = SequenceBootstrap(config.n_bootstrap, config.random_seed)
    n_predictions = torch.zeros(1 + config.n_bootstrap, dtype=torch.float64)
    sums: defaultdict[Identity, torch.Tensor] = defaultdict(
        lambda: torch.zeros(2, 1 + config.n_bootstrap, dtype=torch.float64)
    )
    for tokens, counts in stream.batches(config.n_tokens, "Ablating"):
        weights = bootstrap.draw(len(tokens)).double()
        run = HookedBatch(hooked, tokens, counts)
        counts = predicting_text(tokens, counts, stream.tokenizer)
        clean = CleanPredictions(run.above(run.full), tokens, counts)
        n_predictions += weights @ clean.n_predictions
        batch = {CLEAN.identity(): clean.losses}
        runs = {False: run}
        if config.include_special_tokens:
            runs[True] = run.changing(stream.counts(tokens, special=True))
        for identity, change, of in distinct(group, changes, runs):
            changed = runs[change.special_tokens]
            losses = partial(_mean_losses, change, of, changed, clean)
            batch[identity] = once("losses", change, changed, losses, counts)
        for identity, losses in batch.items():
            sums[identity] += torch.stack([weights @ loss for loss in losses])
    means = {identity: of / n_predictions for identity, of in sums.items()}
    return means, int(n_predictions[0])


def _mean_losses(
    change: Intervention, of: Batch, run: HookedBatch, clean: CleanPredictions
) -> torch.Tensor:
    draws = (run.above(run.full_with(draw(of))) for draw in change.changes)
    return torch.stack([clean.compare(logits) for logits in draws]).mean(dim=0)


def once(
    what: str,
    change: Intervention,
    run: HookedBatch,
    make: Callable[[], T],
    *given: torch.Tensor,
) -> T:
    """
    What comes of an intervention on a batch; of one that is the same for all SAEs, what
    came of it for others.

    Args:
        what: Comes of it.
        change: The intervention.
        run: The batch, of which it changes activations.
        make: Computes it.
        given: What it depends on besides.
    """
    if change.given is None:
        return make()
    return run.once((what, change.name), make, *change.given, *given)


def result_details(
    losses: Mapping[Identity, torch.Tensor],
    sae: SelectedSAE,
    changes: Sequence[Intervention],
    confidence: float,
) -> Iterator[output.ScaffoldAblationResultDetail]:
    """Cross-entropy and KL of the clean run and of each intervention on an SAE."""
    clean_ce, _ = losses[CLEAN.identity()]
    for change in [CLEAN, *changes]:
        ce, kl = losses[change.identity(sae.key)]
        figures = {"ce": ce, "ce_ratio": ce / clean_ce, "delta_ce": ce - clean_ce}
        yield output.ScaffoldAblationResultDetail(
            kind=change.kind,
            n_draws=len(change.changes),
            **change.fields(),
            **estimates(confidence, **figures, kl=kl),
        )
