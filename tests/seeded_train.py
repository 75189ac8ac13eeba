"""`saelens-scaffold train` with a seed, in a process that a signal ends at a step.

python seeded_train.py ARGS... with the environment's END=RANK:STEP:SIGNAL: the process of
this rank sends itself the signal in this step of its first attempt.
"""

import os
import sys
from typing import Any

import torch

from saelens_scaffold import ScaffoldBatchTopKTrainingSAE
from saelens_scaffold_cli import main


def end_at(rank: str, step: str, signal: str) -> None:
    first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if not first_attempt or rank != os.environ["RANK"]:
        return
    forward = ScaffoldBatchTopKTrainingSAE.training_forward_pass

    def ending(self: Any, step_input: Any) -> Any:
        if step_input.n_training_steps == int(step):
            os.kill(os.getpid(), int(signal))
        return forward(self, step_input)

    ScaffoldBatchTopKTrainingSAE.training_forward_pass = ending  # type: ignore[method-assign]


def train(*args: str) -> None:
    if "END" in os.environ:
        end_at(*os.environ["END"].split(":"))
    torch.manual_seed(0)
    sys.exit(main(["train", *args]))


if __name__ == "__main__":
    train(*sys.argv[1:])
