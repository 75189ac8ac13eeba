"""Headline figures, most of which repeat a figure of one intervention."""

from collections.abc import Mapping, Sequence
from typing import Any

from saelens_scaffold.evals.output_fields import headlines, repeated
from saelens_scaffold.evals.scaffold_ablation import ScaffoldAblationEvalConfig
from saelens_scaffold.evals.scaffold_ablation.eval_output import (
    CrossEntropyMetrics,
    DictionaryAlignment,
    ScaffoldAblationResultDetail,
    SpecialTokenMetrics,
    TopicAccuracy,
    TopicMetrics,
)
from saelens_scaffold.evals.scaffold_ablation.fit import Fit, SAEFit
from saelens_scaffold.evals.scaffold_ablation.geometry import geometry
from saelens_scaffold.evals.scaffold_ablation.interventions import WITH_SPECIAL_TOKENS
from saelens_scaffold.evals.scaffold_ablation.topic_texts import TopicTexts

PAPER_ALIGNED_LATENTS = 787
"""How many aligned latents the paper (arXiv 2606.14040) ablates for its headline."""


def cross_entropy_metrics(
    config: ScaffoldAblationEvalConfig,
    details: Sequence[ScaffoldAblationResultDetail],
    alignments: Sequence[DictionaryAlignment],
) -> CrossEntropyMetrics:
    """
    Args:
        config: Numbers of aligned latents.
        details: One for each intervention on one SAE.
        alignments: Of the dictionaries whose latents were ablated.
    """
    of = {detail.intervention: detail for detail in details}
    clean, zero, reconstruction = (
        of[name] for name in ("clean", "zero_ablation", "sae_reconstruction")
    )
    metrics = headlines(CrossEntropyMetrics, details, "ce_ratio")
    numbers = config.n_aligned_latents
    n = PAPER_ALIGNED_LATENTS if PAPER_ALIGNED_LATENTS in numbers else max(numbers)
    for alignment in alignments:
        prefix = "baseline_" if alignment.dictionary == "baseline" else ""
        metrics["n_aligned_latents"] = n
        if alignment.n_alive < n:
            note = f"{alignment.n_alive} alive, fewer than {n}"
            metrics[f"{prefix}aligned_latents_note"] = note
        else:
            name, detail = "aligned_latents", of[f"{prefix}aligned_{n}_latents"]
            metrics |= repeated(
                CrossEntropyMetrics, f"ce_ratio_{prefix}{name}", detail, "ce_ratio"
            )
    return CrossEntropyMetrics(
        ce_clean=clean.ce,
        ce_loss_score=(zero.ce - reconstruction.ce) / (zero.ce - clean.ce),
        ce_ratio_reconstruction=reconstruction.ce_ratio,
        **metrics,
    )


def topic_metrics(
    texts: TopicTexts | None, accuracies: Sequence[TopicAccuracy], fit: SAEFit
) -> TopicMetrics:
    """
    Args:
        texts: The texts; None if topics were not classified.
        accuracies: Of one SAE.
        fit: Statistics of that SAE, special tokens excluded.
    """
    if texts is None:
        return TopicMetrics()
    read = _after_the_last_layer(accuracies)
    ablated = next(a for a in read if a.intervention == "topic_latents_ablated")
    return TopicMetrics(
        chance=texts.chance,
        n_topics=len(texts.topics),
        n_topic_latents=ablated.size,
        n_topic_latents_alive=int((fit.fired > 0).sum()),
        **headlines(TopicMetrics, read, "accuracy"),
        **headlines(TopicMetrics, read, "accuracy", "_retrained"),
    )


def special_token_metrics(
    fits: Mapping[bool, Fit],
    sae_key: str,
    details: Sequence[ScaffoldAblationResultDetail],
    accuracies: Sequence[TopicAccuracy],
) -> SpecialTokenMetrics:
    """
    Args:
        fits: Statistics without special tokens under False, and with them under True if
            they are included.
        sae_key: Key of one SAE.
        details: One for each intervention on that SAE.
        accuracies: Of that SAE; none if topics were not classified.
    """
    if True not in fits:
        return SpecialTokenMetrics()
    metrics: dict[str, Any] = {}
    for special, fit in fits.items():
        name = f"top_direction_variance{WITH_SPECIAL_TOKENS if special else ''}"
        metrics[name] = fit.moments.explained_variance(fit.directions[:1])
    with_them, _ = geometry(fits[True], fits[True].saes[sae_key])
    read = _after_the_last_layer(accuracies)
    return SpecialTokenMetrics(
        overlap_with_pca_with_special_tokens=with_them.overlap_with_pca,
        **metrics,
        **headlines(SpecialTokenMetrics, details, "ce_ratio"),
        **headlines(SpecialTokenMetrics, read, "accuracy"),
    )


def _after_the_last_layer(accuracies: Sequence[TopicAccuracy]) -> list[TopicAccuracy]:
    return [accuracy for accuracy in accuracies if accuracy.read_at == "last_layer"]
