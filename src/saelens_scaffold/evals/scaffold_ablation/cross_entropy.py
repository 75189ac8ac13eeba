"""What interventions cost the language model in next-token prediction."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from saelens_scaffold.evals.bootstrap import SequenceBootstrap
from saelens_scaffold.evals.language_model import HookedBatch, HookedModel
from saelens_scaffold.evals.output_fields import estimates
from saelens_scaffold.evals.scaffold_ablation.eval_config import (
    ScaffoldAblationEvalConfig,
)
from saelens_scaffold.evals.scaffold_ablation.eval_output import (
    ScaffoldAblationResultDetail,
)
from saelens_scaffold.evals.scaffold_ablation.interventions import (
    CLEAN,
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


class Losses:
    """
    Losses in every bootstrap replicate, of the clean run and of interventions.

    Attributes:
        n_predictions: Shape (1 + n_replicates,), float64.
        of: Losses by key of the SAE and name of the intervention, the clean run's too.
    """

    def __init__(self, n_replicates: int):
        self.n_predictions = torch.zeros(1 + n_replicates, dtype=torch.float64)
        self.of: defaultdict[tuple[str, str], ReplicateLosses]
        self.of = defaultdict(ReplicateLosses)


@torch.no_grad()
def measure_losses(
    config: ScaffoldAblationEvalConfig,
    hooked: HookedModel,
    stream: TokenStream,
    group: Sequence[SelectedSAE],
    changes: Mapping[str, list[Intervention]],
) -> Losses:
    """
    Run the language model with every intervention.

    Args:
        config: Number of tokens and replicates.
        hooked: The language model at the SAEs' hook point.
        stream: The text, from where it is to be evaluated on.
        group: The SAEs.
        changes: The interventions on each SAE, by its key.
    """
    bootstrap = SequenceBootstrap(config.n_bootstrap, config.random_seed)
    losses = Losses(config.n_bootstrap)
    for tokens, counts in stream.batches(config.n_tokens, "Ablating"):
        weights = bootstrap.draw(len(tokens)).double()
        run = HookedBatch(hooked, tokens, counts)
        clean = CleanPredictions(run.above(run.full), tokens, counts)
        losses.n_predictions += weights @ clean.n_predictions
        runs = {False: run}
        if config.include_special_tokens:
            runs[True] = run.changing(torch.ones_like(counts))
        # interventions that do not depend on the SAE are run once
        of_batch: dict[tuple[Any, ...], SequenceLosses] = {}
        for sae in group:
            losses.of[sae.key, CLEAN.name].add(weights, clean.losses)
            batches = {special: SAEBatch(of.x, sae.sae) for special, of in runs.items()}
            for change in changes[sae.key]:
                of, batch = runs[change.special_tokens], batches[change.special_tokens]
                identity = change.identity(sae.key)
                if identity not in of_batch:
                    of_batch[identity] = SequenceLosses.mean(
                        [
                            clean.compare(of.above(of.full_with(draw(batch))))
                            for draw in change.changes
                        ]
                    )
                losses.of[sae.key, change.name].add(weights, of_batch[identity])
    return losses


def result_details(
    config: ScaffoldAblationEvalConfig,
    losses: Losses,
    sae: SelectedSAE,
    changes: Sequence[Intervention],
) -> list[ScaffoldAblationResultDetail]:
    """
    Cross-entropy and KL of the clean run and of each intervention, with intervals.

    Args:
        config: Confidence of the intervals.
        losses: Losses of all SAEs.
        sae: The SAE.
        changes: Its interventions.
    """
    n_predictions = losses.n_predictions
    clean_ce = losses.of[sae.key, CLEAN.name].cross_entropy / n_predictions
    found: list[ScaffoldAblationResultDetail] = []
    for change in [CLEAN, *changes]:
        of = losses.of[sae.key, change.name]
        ce = of.cross_entropy / n_predictions
        detail = ScaffoldAblationResultDetail(
            intervention=change.name,
            kind=change.kind,
            description=change.description,
            special_tokens=change.special_tokens,
            size=change.size,
            n_draws=len(change.changes),
            **estimates(
                config.confidence,
                ce=ce,
                ce_ratio=ce / clean_ce,
                delta_ce=ce - clean_ce,
                kl=of.kl / n_predictions,
            ),
        )
        found.append(detail)
    return found
