"""Cross-entropy, KL and topic accuracy with the scaffold removed, and with its rivals."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from saelens_scaffold.evals.bootstrap import SequenceBootstrap, interval
from saelens_scaffold.evals.language_model import (
    HookedBatch,
    HookedModel,
    by_hook_point,
    check_finite,
    load_language_model,
)
from saelens_scaffold.evals.run import Result, run_evaluation
from saelens_scaffold.evals.scaffold_ablation.eval_config import (
    ScaffoldAblationEvalConfig,
)
from saelens_scaffold.evals.scaffold_ablation.eval_output import (
    EVAL_TYPE_ID_SCAFFOLD_ABLATION,
    CrossEntropyMetrics,
    ScaffoldAblationEvalOutput,
    ScaffoldAblationMetricCategories,
    ScaffoldAblationResultDetail,
)
from saelens_scaffold.evals.scaffold_ablation.fit import ModelFit, SAEFit
from saelens_scaffold.evals.scaffold_ablation.geometry import geometry
from saelens_scaffold.evals.scaffold_ablation.interventions import (
    Intervention,
    SAEBatch,
    interventions,
)
from saelens_scaffold.evals.scaffold_ablation.predictions import (
    CleanPredictions,
    ReplicateLosses,
    SequenceLosses,
)
from saelens_scaffold.evals.scaffold_ablation.special_tokens import (
    special_token_metrics,
)
from saelens_scaffold.evals.scaffold_ablation.topic_texts import load_topic_texts
from saelens_scaffold.evals.scaffold_ablation.topics import TopicProbes, topic_metrics
from saelens_scaffold.evals.selected_saes import SelectedSAE, SelectedSAEs
from saelens_scaffold.evals.text_data import TokenStream
from saelens_scaffold.subspaces import ActivationMoments

PAPER_ALIGNED_LATENTS = 787
"""How many aligned latents the paper (arXiv 2606.14040) ablates for its headline."""


def run_eval(
    config: ScaffoldAblationEvalConfig,
    selected_saes: SelectedSAEs,
    device: str,
    output_path: str,
    force_rerun: bool = False,
    clean_up_activations: bool = False,  # noqa: ARG001
    save_activations: bool = True,  # noqa: ARG001
    artifacts_path: str = "artifacts",  # noqa: ARG001
) -> dict[str, dict[str, Any]]:
    """
    Ablate the scaffolds of all SAEs. The layers below the hook point run once for a
    batch, and those above it once for each intervention.

    Args:
        config: The configuration.
        selected_saes: (release, sae_id) or (name, SAE object) pairs. A plain SAE has no
            scaffold to remove, but the rest of its results lines up with the others'.
        device: Where to compute.
        output_path: Folder for the results, one JSON file for each SAE.
        force_rerun: Whether to evaluate SAEs again that have a result there.
        clean_up_activations: For SAEBench's signature; no activations are stored.
        save_activations: For SAEBench's signature; no activations are stored.
        artifacts_path: For SAEBench's signature; there are no artifacts.

    Returns:
        The results (`ScaffoldAblationEvalOutput` as dictionaries) under the SAEs' names.

    Raises:
        ValueError: The configuration, an SAE, the model or the text cannot be used, and
            why.
    """
    return run_evaluation(
        _measure,
        ScaffoldAblationEvalOutput,
        config,
        selected_saes,
        device,
        output_path,
        force_rerun,
        rank_in=lambda result: result["eval_result_metrics"]["geometry"]["pca_rank"],
    )


def _measure(
    config: ScaffoldAblationEvalConfig, saes: list[SelectedSAE], device: str
) -> Iterator[tuple[SelectedSAE, Result]]:
    model = load_language_model(config.model_name, device, config.llm_dtype)
    for hooked, group in by_hook_point(model, saes):
        stream = TokenStream(config, model, group)
        # read before the long work, so that what is wrong with it is said now
        texts = (
            load_topic_texts(config, model, stream.context_size, stream.prepend_bos)
            if config.topics
            else None
        )
        ranks = {sae.key: config.pca_rank or sae.subspace_rank for sae in group}
        fits = _fit(config, hooked, group, stream)
        changes = {
            sae.key: [
                change.including_special_tokens() if special else change
                for special, fit in fits.items()
                for change in interventions(
                    config, fit.model, fit.saes[sae.key], ranks[sae.key]
                )
            ]
            for sae in group
        }
        losses = _losses(config, hooked, group, stream, changes)
        topics = (
            TopicProbes(config, hooked, texts).accuracies(
                {special: fit.saes for special, fit in fits.items()}, changes
            )
            if texts
            else {}
        )
        for sae in group:
            accuracies = topics.get(sae.key, [])
            of_rank = {
                special: geometry(fit.model, sae, ranks[sae.key])
                for special, fit in fits.items()
            }
            geometry_metrics, angles = of_rank[False]
            details = _details(config, losses, sae, changes[sae.key])
            yield (
                sae,
                {
                    "eval_result_metrics": ScaffoldAblationMetricCategories(
                        cross_entropy=_cross_entropy_metrics(config, details),
                        geometry=geometry_metrics,
                        topics=topic_metrics(
                            texts, accuracies, fits[False].saes[sae.key]
                        ),
                        special_tokens=special_token_metrics(
                            {special: fit.model for special, fit in fits.items()},
                            {special: found for special, (found, _) in of_rank.items()},
                            details,
                            accuracies,
                        ),
                    ),
                    "eval_result_details": details,
                    "topic_accuracies": accuracies,
                    "principal_angles": angles,
                    "n_predictions": int(losses.n_predictions[0]),
                },
            )


class _Fit(NamedTuple):
    """What is learnt of some tokens: of the activations, and of each SAE by its key."""

    model: ModelFit
    saes: dict[str, SAEFit]


def _fit(
    config: ScaffoldAblationEvalConfig,
    hooked: HookedModel,
    group: list[SelectedSAE],
    stream: TokenStream,
) -> dict[bool, _Fit]:
    """Without special tokens under False, and with them under True if they are wanted."""
    d_in, device = group[0].sae.cfg.d_in, hooked.model.cfg.device or "cpu"
    kinds = (False, True) if config.include_special_tokens else (False,)
    moments = {special: ActivationMoments(d_in, device) for special in kinds}
    saes = {special: {sae.key: SAEFit(sae) for sae in group} for special in kinds}
    for tokens, counts in stream.batches(config.n_fit_tokens, "Fitting ablations"):
        full = hooked.below(tokens)[0]
        for special in kinds:
            x = full.flatten(0, 1) if special else full[counts]
            check_finite(x, hooked.hook_name)
            moments[special].update(x)
            for fit in saes[special].values():
                fit.update(x)
    return {
        special: _Fit(ModelFit.of(moments[special]), saes[special]) for special in kinds
    }


@dataclass
class _Losses:
    """Of the clean run, and of each SAE's interventions by name."""

    n_predictions: torch.Tensor
    clean: ReplicateLosses
    changed: dict[str, dict[str, ReplicateLosses]]


@torch.no_grad()
def _losses(
    config: ScaffoldAblationEvalConfig,
    hooked: HookedModel,
    group: list[SelectedSAE],
    stream: TokenStream,
    changes: dict[str, list[Intervention]],
) -> _Losses:
    bootstrap = SequenceBootstrap(config.n_bootstrap, config.random_seed)
    losses = _Losses(
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


def _details(
    config: ScaffoldAblationEvalConfig,
    losses: _Losses,
    sae: SelectedSAE,
    changes: list[Intervention],
) -> list[ScaffoldAblationResultDetail]:
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


def _cross_entropy_metrics(
    config: ScaffoldAblationEvalConfig, details: list[ScaffoldAblationResultDetail]
) -> CrossEntropyMetrics:
    of = {detail.intervention: detail for detail in details}
    metrics: dict[str, Any] = {}

    def add(metric: str, intervention: str, with_interval: bool = True) -> None:
        detail = of.get(intervention)
        if detail is None:  # a plain SAE has no scaffold
            return
        metrics[metric] = detail.ce_ratio
        if with_interval:
            metrics[f"{metric}_ci_low"] = detail.ce_ratio_ci_low
            metrics[f"{metric}_ci_high"] = detail.ce_ratio_ci_high

    add("ce_ratio_reconstruction", "sae_reconstruction", with_interval=False)
    add("ce_ratio_scaffold_subtracted", "scaffold_subtracted")
    add("ce_ratio_scaffold_mean_ablated", "scaffold_mean_ablated", with_interval=False)
    add("ce_ratio_scaffold_projected_out", "scaffold_projected_out")
    add("ce_ratio_pca_projected_out", "pca_projected_out")
    add("ce_ratio_random_projected_out", "random_projected_out", with_interval=False)

    measured = [n for n in config.n_aligned_latents if f"aligned_{n}_latents" in of]
    if measured:
        paper = PAPER_ALIGNED_LATENTS
        name = f"aligned_{paper if paper in measured else measured[-1]}_latents"
        add("ce_ratio_aligned_latents", name)
        metrics["n_aligned_latents"] = of[name].size

    clean, zero = of["clean"].ce, of["zero_ablation"].ce
    return CrossEntropyMetrics(
        ce_clean=clean,
        ce_loss_score=(zero - of["sae_reconstruction"].ce) / (zero - clean),
        **metrics,
    )


if __name__ == "__main__":
    from saelens_scaffold.evals import command_line

    command_line.main(
        run_eval, ScaffoldAblationEvalConfig, EVAL_TYPE_ID_SCAFFOLD_ABLATION
    )
