"""The language-model half: a packaged comparison of SAEs on the embedded model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from saelens_scaffold.compare import CompareConfig, compare, read_config
from saelens_scaffold.compare.table import comparison_text
from saelens_scaffold.demo.report import COLUMNS, Half, Row, by_sae

CONFIG_PATH = Path(__file__).with_name("language_model.yaml")
# a fraction of the tokens, with as large a share of them for warm-up and decay
QUICK = {"training_tokens": 61_440, "lr_warm_up_steps": 3, "lr_decay_steps": 12}
QUICK_EVALUATIONS = {
    "dense_latents": {"n_tokens": 8192, "n_bootstrap": 20},
    "scaffold_ablation": {"n_tokens": 1024, "n_fit_tokens": 2048, "n_bootstrap": 20},
}


def language_model_half(
    seeds: list[int],
    quick: bool,
    output_path: Path,
    ray: str | None = None,
    cpus_per_task: int | None = None,
) -> Half:
    """
    Run the comparison, as far as an earlier run has not finished it.

    Args:
        seeds: Training seeds.
        quick: Whether to train and evaluate on a fraction of the tokens.
        output_path: Folder of the comparison.
        ray: As for `compare`.
        cpus_per_task: As for `compare`.

    Raises:
        UserError: The folder holds SAEs that were trained with another configuration, or
            an evaluation failed.
    """
    config = language_model_config(seeds, quick)
    results = compare(
        config, output_path, device="cpu", ray=ray, cpus_per_task=cpus_per_task
    )
    comparisons = [comparison_text(results)] if len(seeds) > 1 else []
    return Half(
        f"A language model: {config.hook_name} of {config.model_name}",
        by_sae([_row(sae) for sae in results["saes"]]),
        [*comparisons, *results["warnings"]],
    )


def language_model_config(seeds: list[int], quick: bool = False) -> CompareConfig:
    """The packaged comparison with these training seeds."""
    config = read_config(CONFIG_PATH)
    config = replace(config, grid={**config.grid, "seed": seeds})
    if not quick:
        return config
    evaluations = {
        name: {**options, **QUICK_EVALUATIONS[name]}
        for name, options in config.evaluations.items()
    }
    training = {**config.training, **QUICK}
    return replace(config, training=training, evaluations=evaluations)


def _row(sae: dict[str, Any]) -> Row:
    """An SAE of results.json."""
    numbers: dict[str, float | None] = {}
    for name, column in COLUMNS.items():
        if "metric" in column:
            evaluation, category, metric = column["metric"].split(".")
            numbers[name] = sae["evaluations"][evaluation][category][metric]
    histogram = sae["firing_histogram"]
    edges = np.array(histogram["log10_edges"])
    centres = 10 ** ((edges[:-1] + edges[1:]) / 2)
    frequencies = np.repeat(centres, histogram["counts"]).tolist()
    return Row(sae["arm"], sae["architecture"], sae["seed"], numbers, frequencies)
