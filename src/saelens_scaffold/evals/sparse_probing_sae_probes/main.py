"""SAEBench's sparse probing by sae-probes, over several seeds."""

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_bench.evals.sparse_probing_sae_probes import main as sae_bench_main
from sae_bench.evals.sparse_probing_sae_probes.eval_config import (
    SparseProbingSaeProbesEvalConfig as SaeBenchConfig,
)
from sae_probes import DATASETS, generate_model_activations

from saelens_scaffold.evals.labelled_data import LabelledText
from saelens_scaffold.evals.over_seeds import (
    SaeBenchEvaluator,
    SeedRun,
    lent_model,
    run_over_seeds,
)
from saelens_scaffold.evals.selected_saes import SelectedSAEs
from saelens_scaffold.evals.sparse_probing_sae_probes.eval_config import (
    SparseProbingSaeProbesEvalConfig,
)
from saelens_scaffold.evals.sparse_probing_sae_probes.eval_output import (
    EVAL_TYPE_ID_SPARSE_PROBING_SAE_PROBES,
    SparseProbingSaeProbesEvalOutput,
)
from saelens_scaffold.evals.sparse_probing_sae_probes.tasks import (
    known_to_sae_probes,
    one_vs_rest_tasks,
)


def _check(config: SparseProbingSaeProbesEvalConfig, text: LabelledText) -> None:
    one_vs_rest_tasks(text, config.task_size)


def _run(seed_run: SeedRun) -> None:
    tasks = {
        text.name: one_vs_rest_tasks(text, seed_run.config.task_size)
        for text in seed_run.texts
    }
    of_sae_probes = seed_run.results.parent / "sae-probes"
    if seed_run.force_rerun:
        shutil.rmtree(of_sae_probes, ignore_errors=True)
    _remove_unfinished(of_sae_probes)
    _remove_unfinished(seed_run.activations)
    keep = seed_run.save_activations
    config = replace(
        seed_run.seed_config,
        dataset_names=[
            name
            for dataset in seed_run.seed_config.dataset_names
            for name in tasks.get(dataset, [dataset])
        ],
        results_path=str(of_sae_probes),
        model_cache_path=str(seed_run.activations) if keep else None,
    )
    every_task = {name: task for of in tasks.values() for name, task in of.items()}
    with (
        known_to_sae_probes(every_task, seed_run.model),
        lent_model(seed_run.model, generate_model_activations),
    ):
        sae_bench_main.run_eval(
            config, seed_run.selected_saes, seed_run.device, str(seed_run.results)
        )


def _remove_unfinished(folder: Path) -> None:
    """Remove the files that an interrupted call did not write to their end."""
    for file in folder.rglob("*.pt"):
        if not zipfile.is_zipfile(file):  # torch writes the directory of the zip last
            file.unlink()
    for file in folder.rglob("*.json"):
        try:
            json.loads(file.read_text("utf-8"))
        except ValueError:
            file.unlink()


EVALUATOR = SaeBenchEvaluator(
    EVAL_TYPE_ID_SPARSE_PROBING_SAE_PROBES,
    SaeBenchConfig,
    SparseProbingSaeProbesEvalOutput,
    check=_check,
    run=_run,
    extra_fields=("sae_metrics_by_k",),
    knows=frozenset(DATASETS).__contains__,
    activations_depend_on_seed=False,
)


def run_eval(
    config: SparseProbingSaeProbesEvalConfig,
    selected_saes: SelectedSAEs,
    device: str,
    output_path: str,
    force_rerun: bool = False,
    clean_up_activations: bool = False,
    save_activations: bool = True,
    artifacts_path: str = "artifacts",
) -> dict[str, dict[str, Any]]:
    """
    Run SAEBench's variant of sparse probing by sae-probes once with each seed.

    Of a scaffold SAE the sparse dictionary alone is judged. With one seed, the metrics of
    a plain SAE are those of SAEBench. A class of a dataset that sae-probes does not know
    is a task of its own: to tell its texts from those of the other classes.

    Args:
        config: The configuration.
        selected_saes: (release, sae_id) or (name, SAE object) pairs.
        device: Where to compute.
        output_path: Folder for the results, one JSON file for each SAE.
        force_rerun: Whether to evaluate again what has a result.
        clean_up_activations: Whether to delete stored activations afterwards.
        save_activations: Whether to store the language model's activations, for the
            SAEs that follow in this call and in later ones.
        artifacts_path: Folder for them, and for SAEBench's results of each seed.

    Returns:
        The results (`SparseProbingSaeProbesEvalOutput` as dictionaries) under the SAEs' names.

    Raises:
        ValueError: The configuration, an SAE, the model or the text cannot be used, and
            why.
    """
    return run_over_seeds(
        EVALUATOR,
        config,
        selected_saes,
        device,
        output_path,
        force_rerun,
        clean_up_activations,
        save_activations,
        artifacts_path,
    )


if __name__ == "__main__":
    from saelens_scaffold.evals import command_line

    command_line.main(
        run_eval,
        SparseProbingSaeProbesEvalConfig,
        EVAL_TYPE_ID_SPARSE_PROBING_SAE_PROBES,
    )
