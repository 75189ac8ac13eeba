"""Cross-entropy, KL and topic accuracy with the scaffold removed, and with its rivals."""

from collections.abc import Iterator, Sequence

from saelens_scaffold.evals.base import Call, Implementation, Result
from saelens_scaffold.evals.baselines import plain_twins
from saelens_scaffold.evals.data import text_seen_in_training
from saelens_scaffold.evals.model import by_hook_point
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.evals.scaffold_ablation import ScaffoldAblationEvalConfig, metrics
from saelens_scaffold.evals.scaffold_ablation import eval_output as output
from saelens_scaffold.evals.scaffold_ablation.fit import fit
from saelens_scaffold.evals.scaffold_ablation.interventions import (
    interventions,
    measure_losses,
    result_details,
)
from saelens_scaffold.evals.scaffold_ablation.topics import TopicProbes, read_topics
from saelens_scaffold.evals.tokens import TokenStream
from saelens_scaffold.models.language_models import load_language_model


def measure(
    config: ScaffoldAblationEvalConfig, saes: list[SelectedSAE], call: Call
) -> Iterator[tuple[SelectedSAE, Result]]:
    """
    Ablate the scaffolds of all SAEs. The layers below the hook point run once for a batch,
    and those above it once for each intervention.

    A plain SAE has no scaffold to remove, but the rest of its results lines up with the
    others'. As a baseline it lends scaffold SAEs its latents.
    """
    baselines = plain_twins(config.baseline, saes, [*saes, *call.companions])
    needed = {sae.key: sae for sae in [*saes, *baselines.values()]}
    model = load_language_model(
        config.model_name, call.device, config.llm_dtype, config.model_class_name
    )
    text = (config.dataset, config.dataset_split, config.text_column)
    seen = text_seen_in_training(saes, *text)
    for hooked, at_hook in by_hook_point(model, list(needed.values()), call.kept):
        stream = TokenStream(config, model, at_hook)
        # texts are read before the long work, so that errors in them are reported now
        probes = TopicProbes(config, hooked, stream) if config.topics else None
        fits = fit(config, hooked, at_hook, baselines, stream)
        group = [sae for sae in at_hook if sae.key in seen]
        changes = {sae.key: interventions(config, fits, sae.key) for sae in group}
        losses, n_predictions = measure_losses(config, hooked, stream, group, changes)
        topics = probes.accuracies(fits, changes) if probes else {}
        for sae in group:
            of = fits[False].saes[sae.key]
            details = [
                *result_details(losses, sae, changes[sae.key], config.confidence)
            ]
            accuracies = topics.get(sae.key, [])
            last = [a for a in accuracies if a.read_at == "last_layer"]
            alignments = [*metrics.dictionary_alignments(config, of)]
            geometry, angles = metrics.geometry_metrics(fits[False], of)
            categories = output.ScaffoldAblationMetricCategories(
                metrics.cross_entropy_metrics(config, details, alignments),
                geometry,
                metrics.topic_metrics(probes, last, of),
                metrics.special_token_metrics(fits, sae.key, details, last),
            )
            result = {
                "eval_result_metrics": categories,
                "eval_result_details": details,
                "topic_accuracies": accuracies,
                "principal_angles": angles,
                "dictionary_alignments": alignments,
                "n_predictions": n_predictions,
                "tokens": stream.selection,
                "text_seen_in_training": seen[sae.key],
            }
            yield sae, result


def check(config: ScaffoldAblationEvalConfig, saes: Sequence[SelectedSAE]) -> None:
    """
    Raises:
        UserError: A baseline cannot be one, or the texts with topics cannot be used.
    """
    plain_twins(config.baseline, saes, saes)
    if config.topics:
        read_topics(config)


IMPLEMENTATION = Implementation(
    ScaffoldAblationEvalConfig, measure, output.ScaffoldAblationEvalOutput, check
)
