"""Binary tasks from labelled text, made known to sae-probes."""

import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pandas as pd
from sae_probes import generate_model_activations, utils_data
from transformer_lens import HookedTransformer

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.labelled_data import LabelledText

Tasks = Mapping[str, pd.DataFrame]
"""By name, as sae-probes has them: the columns "prompt" and "target", 1 or 0."""


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
    pool = {
        label: texts + (text.test or {}).get(label, [])
        for label, texts in text.train.items()
    }
    n = task_size // 2
    short = {label: len(texts) for label, texts in pool.items() if len(texts) < n}
    if short:
        raise UserError(
            f"task_size {task_size} takes {n} rows of each class, but dataset "
            f"{text.name!r} has fewer of these: {short}; allowed are a smaller task_size, "
            "or fewer classes (max_classes)"
        )
    tasks: dict[str, pd.DataFrame] = {}
    for number, label in enumerate(pool):
        rng = random.Random(label)
        others = [other for other in pool if other != label]
        rows = [(prompt, 1) for prompt in rng.sample(pool[label], n)]
        for i, other in enumerate(others):
            share = n // len(others) + (i < n % len(others))
            rows += [(prompt, 0) for prompt in rng.sample(pool[other], share)]
        rng.shuffle(rows)
        name = re.sub(r"[^A-Za-z0-9-]+", "-", f"{Path(text.name).stem}-{label}")
        tasks[f"{number}_{name}"] = pd.DataFrame(
            {"prompt": [row[0] for row in rows], "target": [row[1] for row in rows]}
        )
    return tasks


@contextmanager
def known_to_sae_probes(tasks: Tasks, model: HookedTransformer) -> Iterator[None]:
    """
    Let sae-probes run other tasks, for as long as this lasts. Its own work as before.

    Args:
        tasks: The tasks.
        model: The language model. sae-probes cuts texts to 1024 tokens, which are too
            many for models with a shorter context.
    """
    own_table = utils_data.read_numbered_dataset_df
    own_generate = generate_model_activations.generate_single_dataset_activations

    def read_csv(path: Any, **kwargs: Any) -> pd.DataFrame:
        task = tasks.get(Path(path).name.partition(".")[0])
        return pd.read_csv(path, **kwargs) if task is None else task

    def read_numbered_dataset_df(tag: str) -> pd.DataFrame:
        return tasks[tag] if tag in tasks else own_table(tag)

    def generate(*args: Any, max_seq_len: int, **kwargs: Any) -> None:
        max_seq_len = min(max_seq_len, model.cfg.n_ctx)
        own_generate(*args, max_seq_len=max_seq_len, **kwargs)

    with (
        patch.object(
            generate_model_activations, "pd", SimpleNamespace(read_csv=read_csv)
        ),
        patch.object(
            generate_model_activations, "generate_single_dataset_activations", generate
        ),
        patch.object(utils_data, "read_numbered_dataset_df", read_numbered_dataset_df),
        # cached: one dictionary for all of sae-probes' modules
        patch.dict(
            utils_data.get_dataset_sizes(), {name: len(t) for name, t in tasks.items()}
        ),
    ):
        yield
