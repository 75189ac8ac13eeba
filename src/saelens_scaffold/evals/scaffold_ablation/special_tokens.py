"""Headline figures with BOS, EOS and padding ablated and fitted on, too."""

from collections.abc import Mapping, Sequence
from typing import Any

from saelens_scaffold.evals.scaffold_ablation.eval_output import (
    ScaffoldAblationResultDetail,
)
from saelens_scaffold.evals.scaffold_ablation.fit import Fit
from saelens_scaffold.evals.scaffold_ablation.geometry import geometry
from saelens_scaffold.evals.scaffold_ablation.interventions import WITH_SPECIAL_TOKENS
from saelens_scaffold.evals.scaffold_ablation.special_token_output import (
    SpecialTokenMetrics,
)
from saelens_scaffold.evals.scaffold_ablation.topic_output import TopicAccuracy

_ENDS = ("", "_ci_low", "_ci_high")


def special_token_metrics(
    fits: Mapping[bool, Fit],
    key: str,
    rank: int,
    details: Sequence[ScaffoldAblationResultDetail],
    accuracies: Sequence[TopicAccuracy],
) -> SpecialTokenMetrics:
    """
    Args:
        fits: Without special tokens under False, and with them under True if they are
            included.
        key: Of one SAE.
        rank: Number of principal directions it is compared with.
        details: Of that SAE, one for each intervention.
        accuracies: Of that SAE; none if topics were not classified.
    """
    if True not in fits:
        return SpecialTokenMetrics()
    metrics: dict[str, Any] = {}
    fields = SpecialTokenMetrics.__dataclass_fields__
    for detail in details:
        if f"ce_ratio_{detail.intervention}" in fields:
            for end in _ENDS:
                value = getattr(detail, f"ce_ratio{end}")
                metrics[f"ce_ratio_{detail.intervention}{end}"] = value
    for accuracy in accuracies:
        name = f"accuracy_{accuracy.intervention}"
        if name in fields and accuracy.read_at == "last_layer":
            for end in _ENDS:
                metrics[f"{name}{end}"] = getattr(accuracy, f"accuracy{end}")
    of_all, _ = geometry(fits[True].model, fits[True].saes[key], rank)
    return SpecialTokenMetrics(
        overlap_with_pca_with_special_tokens=of_all.overlap_with_pca,
        **{
            f"top_direction_variance{WITH_SPECIAL_TOKENS if special else ''}": (
                fit.model.moments.explained_variance(fit.model.directions[:1])
            )
            for special, fit in fits.items()
        },
        **metrics,
    )
