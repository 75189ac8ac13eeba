"""Metrics of a training as a CSV file."""

import csv
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from sae_lens.training.multi_sae_trainer import MultiSAETrainer

from saelens_scaffold._util.files import new_file

_COLUMNS = ("step", "sae", "metric", "value")


class MetricsLog:
    """
    SAELens's metrics of every SAE, as it logs them to Weights & Biases.

    Several processes may log to the same file.

    Args:
        file: CSV file with the columns step, sae, metric and value, which gets more rows.
    """

    def __init__(self, file: Path):
        self.file = file
        self._lock = FileLock(file.with_name(f"{file.name}.lock"))

    @torch.no_grad()
    def add(self, trainer: MultiSAETrainer, outputs: Mapping[str, Any]) -> None:
        """Add what a step gave, if it is one of those that are logged."""
        step = trainer.n_training_steps
        if step % trainer.cfg.logger.wandb_log_frequency:
            return
        rows = [
            (step, name, metric, value)
            for name, of_sae in trainer.trainers.items()
            for metric, value in of_sae.build_train_step_log_dict(
                output=outputs[name], n_training_samples=trainer.n_training_samples
            ).items()
        ]
        with self._lock, self.file.open("a", newline="", encoding="utf-8") as file:
            is_new = not self.file.stat().st_size
            csv.writer(file).writerows([_COLUMNS, *rows] if is_new else rows)

    def forget_after(self, step: int, saes: Collection[str]) -> None:
        """Remove rows of steps that a training of these SAEs, begun or resumed, repeats."""
        with self._lock:
            if not self.file.exists():
                return
            with self.file.open(newline="", encoding="utf-8") as file:
                header, *rows = csv.reader(file)
            kept = [row for row in rows if row[1] not in saes or int(row[0]) <= step]
            with (
                new_file(self.file) as temporary,
                temporary.open("w", newline="", encoding="utf-8") as file,
            ):
                csv.writer(file).writerows([header, *kept])
