"""What interventions cost the language model in next-token prediction."""

from dataclasses import dataclass
from typing import Any

import torch

from saelens_scaffold.evals.bootstrap import SequenceBootstrap, interval
from saelens_scaffold.evals.language_model import HookedBatch, HookedModel
from saelens_scaffold.evals.scaffold_ablation.eval_config import (
    ScaffoldAblationEvalConfig,
)
from saelens_scaffold.evals.scaffold_ablation.eval_output import (
    CrossEntropyMetrics,
    DictionaryAlignment,
    ScaffoldAblationResultDetail,
)
from saelens_scaffold.evals.scaffold_ablation.interventions import (
    Intervention,
    SAEBatch,
)
from saelens_scaffold.evals.scaffold_ablation.predictions import (
    CleanPredictions,
    ReplicateLosses,
    SequenceLosses,
)
from saelens_scaffold.evals.selected_saes import SelectedSAE
from saelens_scaffold.evals.text_data import TokenStream

PAPER_ALIGNED_LATENTS = 787
"""How many aligned latents the paper (arXiv 2606.14040) ablates for its headline."""

# Headline metric: the intervention whose ratio it is. The ends of its interval go with it
# where the metric has them.
_RATIOS = {
    f"ce_ratio_{name}": name
    for name in (
        "scaffold_mean_ablated",
        "pca_mean_ablated",
        "random_mean_ablated",
        "scaffold_projected_out",
        "pca_projected_out",
        "random_projected_out",
        "scaffold_subtracted_gauge_fixed",
    )
} | {"ce_ratio_reconstruction": "sae_reconstruction"}


@dataclass
class Losses:
    """
    Losses in every bootstrap replicate, of the clean run and of each SAE's interventions.

    Attributes:
        n_predictions: Shape (1 + n_replicates,), float64.
        clean: Of the clean run.
        changed: Of the interventions by name, for each SAE by its key.
    """

    n_predictions: torch.Tensor
    clean: ReplicateLosses
    changed: dict[str, dict[str, ReplicateLosses]]


@torch.no_grad()
def measure_losses(
    config: ScaffoldAblationEvalConfig,
    hooked: HookedModel,
    group: list[SelectedSAE],
    stream: TokenStream,
    changes: dict[str, list[Intervention]],
) -> Losses:
    """
    Run the language model with every intervention.

    Args:
        config: The configuration.
        hooked: The language model at the SAEs' hook point.
        group: The SAEs.
        stream: The text, from where it is to be evaluated on.
        changes: The interventions on each SAE, by its key.
    """
    bootstrap = SequenceBootstrap(config.n_bootstrap, config.random_seed)
    losses = Losses(
        n_predictions=torch.zeros(1 + config.n_bootstrap, dtype=torch.float64),
        clean=ReplicateLosses(),
        changed={
            sae.key: {change.name: ReplicateLosses() for change in changes[sae.key]}
            for sae in group
        },
    )
    for tokens, counts in stream.batches(config.n_tokens, "Ablating"):
        weights = bootstrap.draw(len(tokens)).double()
        run = HookedBatch(hooked, tokens, counts)
        clean = CleanPredictions(run.above(run.full), tokens, counts)
        losses.n_predictions += weights @ clean.n_predictions
        losses.clean.add(weights, clean.losses)
        of_model: dict[tuple[str, int | None], SequenceLosses] = {}
        runs = {False: run}
        if config.include_special_tokens:
            runs[True] = run.changing(torch.ones_like(counts))
        for sae in group:
            batches = {special: SAEBatch(of.x, sae.sae) for special, of in runs.items()}
            for change in changes[sae.key]:
                of, batch = runs[change.special_tokens], batches[change.special_tokens]
                key = (change.name, change.size)
                found = of_model.get(key)
                if found is None:
                    found = SequenceLosses.mean(
                        [
                            clean.compare(of.above(of.full_with(draw(batch))))
                            for draw in change.changes
                        ]
                    )
                    if change.of_model:
                        of_model[key] = found
                losses.changed[sae.key][change.name].add(weights, found)
    return losses


def result_details(
    config: ScaffoldAblationEvalConfig,
    losses: Losses,
    sae: SelectedSAE,
    changes: list[Intervention],
) -> list[ScaffoldAblationResultDetail]:
    """
    Cross-entropy and KL of the clean run and of each intervention, with intervals.

    Args:
        config: The configuration.
        losses: Of all SAEs.
        sae: The SAE.
        changes: Its interventions.
    """
    clean_ce = losses.clean.cross_entropy / losses.n_predictions

    def detail(
        name: str,
        kind: str,
        description: str,
        size: int | None,
        n_draws: int,
        of: ReplicateLosses,
        special_tokens: bool = False,
    ) -> ScaffoldAblationResultDetail:
        ce = of.cross_entropy / losses.n_predictions
        statistics = {
            "ce": ce,
            "ce_ratio": ce / clean_ce,
            "delta_ce": ce - clean_ce,
            "kl": of.kl / losses.n_predictions,
        }
        values: dict[str, float] = {}
        for field, statistic in statistics.items():
            estimate, low, high = interval(statistic, config.confidence)
            values |= {
                field: estimate,
                f"{field}_ci_low": low,
                f"{field}_ci_high": high,
            }
        return ScaffoldAblationResultDetail(
            intervention=name,
            kind=kind,
            description=description,
            special_tokens=special_tokens,
            size=size,
            n_draws=n_draws,
            **values,
        )

    return [
        detail("clean", "reference", "nothing changed", None, 1, losses.clean),
        *(
            detail(
                change.name,
                change.kind,
                change.description,
                change.size,
                len(change.changes),
                losses.changed[sae.key][change.name],
                change.special_tokens,
            )
            for change in changes
        ),
    ]


def cross_entropy_metrics(
    config: ScaffoldAblationEvalConfig,
    details: list[ScaffoldAblationResultDetail],
    alignments: list[DictionaryAlignment],
) -> CrossEntropyMetrics:
    """
    The headline figures.

    Args:
        config: The configuration.
        details: Of one SAE, by `result_details`.
        alignments: Of the dictionaries whose latents were ablated.
    """
    of = {detail.intervention: detail for detail in details}
    ratios, metrics = dict(_RATIOS), dict[str, Any]()
    for alignment in alignments:
        n = _headline_number(config)
        prefix = "baseline_" if alignment.dictionary == "baseline" else ""
        ratios[f"ce_ratio_{prefix}aligned_latents"] = f"{prefix}aligned_{n}_latents"
        metrics["n_aligned_latents"] = n
        if alignment.n_alive < n:
            metrics[f"{prefix}aligned_latents_note"] = (
                f"{alignment.n_alive} alive, fewer than {n}"
            )
    fields = CrossEntropyMetrics.__dataclass_fields__
    for metric, intervention in ratios.items():
        detail = of.get(intervention)
        if detail is None:  # a plain SAE has no scaffold, or too few latents are alive
            continue
        metrics[metric] = detail.ce_ratio
        if f"{metric}_ci_low" in fields:
            metrics[f"{metric}_ci_low"] = detail.ce_ratio_ci_low
            metrics[f"{metric}_ci_high"] = detail.ce_ratio_ci_high
    clean, zero = of["clean"].ce, of["zero_ablation"].ce
    return CrossEntropyMetrics(
        ce_clean=clean,
        ce_loss_score=(zero - of["sae_reconstruction"].ce) / (zero - clean),
        **metrics,
    )


def _headline_number(config: ScaffoldAblationEvalConfig) -> int:
    """Of aligned latents: the paper's if it was asked for, else the largest."""
    numbers = config.n_aligned_latents
    return PAPER_ALIGNED_LATENTS if PAPER_ALIGNED_LATENTS in numbers else max(numbers)
