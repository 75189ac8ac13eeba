from pydantic import Field
from pydantic.dataclasses import dataclass
from sae_bench.evals.base_eval_output import DEFAULT_DISPLAY, BaseMetrics


@dataclass
class TopicMetrics(BaseMetrics):
    """
    Headline accuracies, of probes after the last layer. Removing the scaffold means mean
    ablation: s(x) by itself depends on how an SAE's weights are written down, s(x) - E[s]
    does not.
    """

    chance: float | None = Field(
        default=None,
        title="Chance",
        description="Accuracy of always naming the most frequent topic",
    )
    n_topics: int | None = Field(
        default=None,
        title="Topics",
        description="Number of topics",
    )
    accuracy_clean: float | None = Field(
        default=None,
        title="Topic Accuracy, Clean",
        description="Accuracy of a linear probe after the last layer, nothing changed (the paper: 0.987)",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    accuracy_scaffold_mean_ablated: float | None = Field(
        default=None,
        title="Topic Accuracy, Scaffold Mean-Ablated",
        description="Of the same probe, with the scaffold's part replaced by its mean at the hook point (the paper removes the scaffold: chance)",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    accuracy_scaffold_mean_ablated_ci_low: float | None = Field(
        default=None,
        title="Topic Accuracy, Scaffold Mean-Ablated (low)",
        description="Lower end of its bootstrap interval over texts",
    )
    accuracy_scaffold_mean_ablated_ci_high: float | None = Field(
        default=None,
        title="Topic Accuracy, Scaffold Mean-Ablated (high)",
        description="Upper end of its bootstrap interval over texts",
    )
    accuracy_scaffold_mean_ablated_retrained: float | None = Field(
        default=None,
        title="Topic Accuracy, Scaffold Mean-Ablated, Retrained",
        description="Of a probe trained on the changed activations: high if the topic has moved, chance if it is gone",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    accuracy_scaffold_mean_ablated_retrained_ci_low: float | None = Field(
        default=None,
        title="Topic Accuracy, Scaffold Mean-Ablated, Retrained (low)",
        description="Lower end of its bootstrap interval over texts",
    )
    accuracy_scaffold_mean_ablated_retrained_ci_high: float | None = Field(
        default=None,
        title="Topic Accuracy, Scaffold Mean-Ablated, Retrained (high)",
        description="Upper end of its bootstrap interval over texts",
    )
    accuracy_topic_latents_ablated: float | None = Field(
        default=None,
        title="Topic Accuracy, Latents Ablated",
        description="Of the clean-trained probe, with the sparse latents most aligned with the topics set to zero (the paper: virtually unchanged, for 2048)",
        json_schema_extra=DEFAULT_DISPLAY,
    )
    accuracy_topic_latents_ablated_ci_low: float | None = Field(
        default=None,
        title="Topic Accuracy, Latents Ablated (low)",
        description="Lower end of its bootstrap interval over texts",
    )
    accuracy_topic_latents_ablated_ci_high: float | None = Field(
        default=None,
        title="Topic Accuracy, Latents Ablated (high)",
        description="Upper end of its bootstrap interval over texts",
    )
    accuracy_topic_latents_ablated_retrained: float | None = Field(
        default=None,
        title="Topic Accuracy, Latents Ablated, Retrained",
        description="Of a probe trained on the changed activations",
    )
    accuracy_topic_latents_ablated_retrained_ci_low: float | None = Field(
        default=None,
        title="Topic Accuracy, Latents Ablated, Retrained (low)",
        description="Lower end of its bootstrap interval over texts",
    )
    accuracy_topic_latents_ablated_retrained_ci_high: float | None = Field(
        default=None,
        title="Topic Accuracy, Latents Ablated, Retrained (high)",
        description="Upper end of its bootstrap interval over texts",
    )
    n_topic_latents: int | None = Field(
        default=None,
        title="Topic-Aligned Latents",
        description="How many latents that were: as many as asked for, or all that are alive",
    )
    n_topic_latents_alive: int | None = Field(
        default=None,
        title="Alive Latents",
        description="How many sparse latents fire on the text fitted on",
    )


@dataclass
class TopicAccuracy:
    intervention: str = Field(
        title="Intervention", description="What was taken away at the hook point"
    )
    description: str = Field(title="Description", description="What it does")
    read_at: str = Field(
        title="Read At",
        description="Where the topic is read: hook_point or last_layer",
    )
    special_tokens: bool = Field(
        title="Special Tokens",
        description="Whether BOS, EOS and padding are ablated and fitted on, too",
    )
    size: int | None = Field(
        title="Size", description="Number of dimensions or latents it removes"
    )
    accuracy: float = Field(
        title="Accuracy", description="Of a probe trained on clean activations"
    )
    accuracy_ci_low: float = Field(
        title="Accuracy (low)", description="Lower end of its interval over texts"
    )
    accuracy_ci_high: float = Field(
        title="Accuracy (high)", description="Upper end of its interval over texts"
    )
    accuracy_retrained: float = Field(
        title="Accuracy, Retrained",
        description="Of a probe trained on the changed activations: high if the topic has moved, chance if it is gone",
    )
    accuracy_retrained_ci_low: float = Field(
        title="Accuracy, Retrained (low)",
        description="Lower end of its interval over texts",
    )
    accuracy_retrained_ci_high: float = Field(
        title="Accuracy, Retrained (high)",
        description="Upper end of its interval over texts",
    )
