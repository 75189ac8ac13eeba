"""Cross-entropy, KL and topic accuracy with the scaffold removed, and with its rivals."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.language_model import (
    HookedModel,
    by_hook_point,
    check_finite,
    load_language_model,
)
from saelens_scaffold.evals.overlap import text_seen_in_training
from saelens_scaffold.evals.run import Result, run_evaluation
from saelens_scaffold.evals.scaffold_ablation.cross_entropy import (
    cross_entropy_metrics,
    measure_losses,
    result_details,
)
from saelens_scaffold.evals.scaffold_ablation.eval_config import (
    ScaffoldAblationEvalConfig,
)
from saelens_scaffold.evals.scaffold_ablation.eval_output import (
    EVAL_TYPE_ID_SCAFFOLD_ABLATION,
    DictionaryAlignment,
    ScaffoldAblationEvalOutput,
    ScaffoldAblationMetricCategories,
)
from saelens_scaffold.evals.scaffold_ablation.fit import Fit, ModelFit, SAEFit
from saelens_scaffold.evals.scaffold_ablation.geometry import geometry
from saelens_scaffold.evals.scaffold_ablation.interventions import (
    Intervention,
    interventions,
)
from saelens_scaffold.evals.scaffold_ablation.latents import dictionary_alignment
from saelens_scaffold.evals.scaffold_ablation.special_tokens import (
    special_token_metrics,
)
from saelens_scaffold.evals.scaffold_ablation.topic_texts import load_topic_texts
from saelens_scaffold.evals.scaffold_ablation.topics import TopicProbes, topic_metrics
from saelens_scaffold.evals.selected_saes import (
    SelectedSAE,
    SelectedSAEs,
    resolve_saes,
    selected_baseline,
)
from saelens_scaffold.evals.text_data import TokenStream
from saelens_scaffold.saes.subspaces import ActivationMoments


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
            scaffold to remove, but the rest of its results lines up with the others'. As
            `config.baseline` it lends scaffold SAEs its latents.
        device: Where to compute.
        output_path: Folder for the results, one JSON file for each SAE.
        force_rerun: Whether to evaluate SAEs again that have a result there.
        clean_up_activations: For SAEBench's signature; no activations are stored.
        save_activations: For SAEBench's signature; no activations are stored.
        artifacts_path: For SAEBench's signature; there are no artifacts.

    Returns:
        The results (`ScaffoldAblationEvalOutput` as dictionaries) under the SAEs' names.

    Raises:
        UserError: The configuration, an SAE, the model or the text cannot be used, and
            why.
    """
    _check_baselines(config.baseline, selected_saes)
    return run_evaluation(
        partial(_measure, selected_saes=selected_saes),
        ScaffoldAblationEvalOutput,
        config,
        selected_saes,
        device,
        output_path,
        force_rerun,
        rank_in=lambda result: result["eval_result_metrics"]["geometry"]["pca_rank"],
    )


def _check_baselines(
    baseline: str | dict[str, str] | None, selected_saes: SelectedSAEs
) -> None:
    if isinstance(baseline, dict):
        names = [*baseline, *baseline.values()]
    else:
        names = [] if baseline is None else [baseline]
    for name in names:
        selected_baseline(name, selected_saes)


def _baselines(
    config: ScaffoldAblationEvalConfig,
    saes: list[SelectedSAE],
    device: str,
    selected_saes: SelectedSAEs,
) -> dict[str, SelectedSAE]:
    """
    The baselines of the scaffold SAEs that have one, by the scaffold SAEs' keys.

    Raises:
        UserError: A baseline has a scaffold itself, or another hook point.
    """
    resolved = {sae.label: sae for sae in saes}
    found: dict[str, SelectedSAE] = {}
    for sae in saes:
        name = config.baseline_of(sae.label)
        if name is None or not sae.rank:
            continue
        if name not in resolved:  # its result is there from an earlier call
            pair = selected_baseline(name, selected_saes)
            (resolved[name],) = resolve_saes([pair], device, config.llm_dtype)
        baseline = found[sae.key] = resolved[name]
        if baseline.rank:
            raise UserError(
                f"baseline is {name!r}, whose scaffold has rank {baseline.rank}; it must "
                "be a plain SAE"
            )
        if baseline.hook_name != sae.hook_name:
            raise UserError(
                f"baseline is {name!r} at {baseline.hook_name}; it must be an SAE at "
                f"{sae.hook_name}, where {sae.label!r} is"
            )
    return found


def _measure(
    config: ScaffoldAblationEvalConfig,
    saes: list[SelectedSAE],
    device: str,
    selected_saes: SelectedSAEs,
) -> Iterator[tuple[SelectedSAE, Result]]:
    baselines = _baselines(config, saes, device, selected_saes)
    measured = {sae.key for sae in saes}
    needed = {sae.key: sae for sae in [*saes, *baselines.values()]}
    model = load_language_model(config.model_name, device, config.llm_dtype)
    seen = text_seen_in_training(
        saes, config.dataset, config.dataset_split, config.text_column
    )
    for hooked, at_hook in by_hook_point(model, list(needed.values())):
        stream = TokenStream(config, model, at_hook)
        # read before the long work, so that what is wrong with it is said now
        texts = (
            load_topic_texts(config, model, stream.context_size, stream.prepend_bos)
            if config.topics
            else None
        )
        fits = _fit(config, hooked, at_hook, stream)
        group = [sae for sae in at_hook if sae.key in measured]
        ranks = {sae.key: config.pca_rank or sae.subspace_rank for sae in group}
        baseline_keys = {
            key: baseline.key for key, baseline in baselines.items() if key in ranks
        }
        changes = {
            sae.key: _interventions(config, fits, sae, ranks, baseline_keys)
            for sae in group
        }
        losses = measure_losses(config, hooked, group, stream, changes)
        topics = (
            TopicProbes(config, hooked, texts).accuracies(
                {special: fit.saes for special, fit in fits.items()}, changes
            )
            if texts
            else {}
        )
        for sae in group:
            accuracies = topics.get(sae.key, [])
            of = fits[False].saes[sae.key]
            geometry_metrics, angles = geometry(fits[False].model, of, ranks[sae.key])
            details = result_details(config, losses, sae, changes[sae.key])
            alignments = _alignments(
                config, of, fits[False].baseline(sae, baseline_keys)
            )
            yield (
                sae,
                {
                    "eval_result_metrics": ScaffoldAblationMetricCategories(
                        cross_entropy=cross_entropy_metrics(
                            config, details, alignments
                        ),
                        geometry=geometry_metrics,
                        topics=topic_metrics(texts, accuracies, of),
                        special_tokens=special_token_metrics(
                            fits, sae.key, ranks[sae.key], details, accuracies
                        ),
                    ),
                    "eval_result_details": details,
                    "topic_accuracies": accuracies,
                    "principal_angles": angles,
                    "dictionary_alignments": alignments,
                    "n_predictions": int(losses.n_predictions[0]),
                    "text_seen_in_training": seen[sae.key],
                },
            )


def _interventions(
    config: ScaffoldAblationEvalConfig,
    fits: dict[bool, Fit],
    sae: SelectedSAE,
    ranks: dict[str, int],
    baseline_keys: dict[str, str],
) -> list[Intervention]:
    """Those without special tokens, and those with them, fitted on the same tokens."""
    return [
        change.including_special_tokens() if special else change
        for special, fit in fits.items()
        for change in interventions(
            config,
            fit.model,
            fit.saes[sae.key],
            ranks[sae.key],
            fit.baseline(sae, baseline_keys),
        )
    ]


def _alignments(
    config: ScaffoldAblationEvalConfig, of: SAEFit, baseline: SAEFit | None
) -> list[DictionaryAlignment]:
    basis = of.scaffold_basis
    if basis is None:
        return []
    dictionaries = {"own": of} | ({"baseline": baseline} if baseline else {})
    return [
        dictionary_alignment(config, name, fit, basis)
        for name, fit in dictionaries.items()
    ]


def _fit(
    config: ScaffoldAblationEvalConfig,
    hooked: HookedModel,
    group: list[SelectedSAE],
    stream: TokenStream,
) -> dict[bool, Fit]:
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
        special: Fit(ModelFit.of(moments[special]), saes[special]) for special in kinds
    }


if __name__ == "__main__":
    from saelens_scaffold.evals import command_line

    command_line.main(
        run_eval, ScaffoldAblationEvalConfig, EVAL_TYPE_ID_SCAFFOLD_ABLATION
    )
