"""Sparse probing by sae-probes: many binary tasks, read from the last token."""

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import Field
from sae_bench.evals.sparse_probing_sae_probes import eval_config as sae_bench_config
from sae_bench.evals.sparse_probing_sae_probes import eval_output as sae_bench_output
from sae_bench.evals.sparse_probing_sae_probes import main
from sae_probes import DATASETS

from saelens_scaffold._util.configs import documented
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.labelled_data import LabelledText
from saelens_scaffold.evals.saebench import over_seeds
from saelens_scaffold.evals.saebench.replacements import sae_probes_tasks


@documented
class SparseProbingSaeProbesEvalConfig(
    over_seeds.OverSeedsEvalConfig, sae_bench_config.SparseProbingSaeProbesEvalConfig
):
    """SAEBench's configuration of sparse probing by sae-probes, with seeds and other text."""

    task_size: Annotated[int, Field(ge=200, multiple_of=2)] = 2000
    """Texts of the task that is made of each class of a dataset that sae-probes does not
    know: half of that class, half of the others."""
    ks: over_seeds.LatentCounts = Field(default_factory=lambda: [1, 2, 5])
    """Numbers of latents that a probe reads."""
    reg_type: Literal["l1", "l2"] = "l1"
    """Regularisation of the probes."""
    setting: Literal["normal"] = "normal"
    """Balance of the classes: SAEBench collects sae-probes' normal setting only."""
    binarize: Literal[False] = False
    """Always false: SAEBench 0.6 does not find sae-probes' binarised results."""
    results_path: str = ""
    """Not used: what sae-probes writes is removed after the call."""
    model_cache_path: str | None = None
    """Not used: what sae-probes writes is removed after the call."""


@documented(title="Sparse Probing (sae-probes)")
class SparseProbingSaeProbesEvalOutput(
    over_seeds.OverSeedsEvalOutput, sae_bench_output.SparseProbingSaeProbesEvalOutput
):
    """
    SAEBench's sparse probing by sae-probes over several seeds: up to 113 binary tasks, whose probes read the last token, with cross-validated regularisation. Metrics are means over the seeds.
    """

    eval_config: SparseProbingSaeProbesEvalConfig  # pyright: ignore[reportGeneralTypeIssues]
    """Configuration of the evaluation."""


def one_vs_rest_tasks(text: LabelledText, task_size: int) -> dict[str, pd.DataFrame]:
    """
    For each class of a dataset the task to tell it from the others.

    Rows of a train and of a test split are taken together, because sae-probes splits a
    task itself, with each seed in another way. The rows of a task do not depend on the
    seed, as they don't in sae-probes' own.

    Args:
        text: The dataset.
        task_size: Texts of a task, half of the class, half of the others.

    Returns:
        The tasks, under names that sae-probes can make file names of.

    Raises:
        UserError: A class has too few texts.
    """
    test = text.test or {}
    pool = {label: text.train[label] + test.get(label, []) for label in text.labels}
    n = task_size // 2
    short = {label: len(texts) for label, texts in pool.items() if len(texts) < n}
    if short:
        raise UserError(
            f"dataset {text.name!r} has fewer of these than the {n} rows that task_size "
            f"{task_size} takes: {short}; lower task_size or max_classes"
        )
    tasks: dict[str, pd.DataFrame] = {}
    columns = ["prompt", "target"]
    for number, label in enumerate(pool):
        rng = random.Random(label)
        others = [other for other in pool if other != label]
        rows = [(prompt, 1) for prompt in rng.sample(pool[label], n)]
        for i, other in enumerate(others):
            share = n // len(others) + (i < n % len(others))
            rows += [(prompt, 0) for prompt in rng.sample(pool[other], share)]
        rng.shuffle(rows)
        name = re.sub(r"[^A-Za-z0-9-]+", "-", f"{Path(text.name).stem}-{label}")
        tasks[f"{number}_{name}"] = pd.DataFrame.from_records(rows, columns=columns)
    return tasks


def _check(config: SparseProbingSaeProbesEvalConfig, text: LabelledText) -> None:
    one_vs_rest_tasks(text, config.task_size)


def _run(run: over_seeds.SeedRun, saes: over_seeds.NamedSAEs) -> None:
    tasks: dict[str, pd.DataFrame] = {}
    names = [name for name in run.config.dataset_names if name in DATASETS]
    for text in run.texts:
        tasks |= one_vs_rest_tasks(text, run.config.task_size)
    config = replace(
        run.config,
        dataset_names=[*names, *tasks],
        results_path=str(run.folder / "sae-probes"),
        model_cache_path=str(run.call.artifacts / "activations"),
    )
    with sae_probes_tasks(tasks, run.model):
        main.run_eval(config, saes, run.call.device, str(run.folder / "results"))


SPARSE_PROBING_SAE_PROBES = over_seeds.ProbingEvaluation(
    "sparse_probing_sae_probes",
    DATASETS.__contains__,
    _check,
    _run,
    averaged=("eval_result_metrics", "eval_result_details", "sae_metrics_by_k"),
    # sae-probes draws with a generator of its own, seeded for each task
    probes_follow_activations=False,
).implementation(SparseProbingSaeProbesEvalConfig, SparseProbingSaeProbesEvalOutput)
