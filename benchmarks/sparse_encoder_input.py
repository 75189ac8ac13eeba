"""Which input should the sparse encoder read, the residual or the activation?

Trains a plain BatchTopK SAE and scaffold SAEs with both inputs at the same k on planted
data whose truth is known: 600 independent sparse features and 8 dense directions in 128
dimensions. The same question on a language model: `regimes.py`.

    python benchmarks/sparse_encoder_input.py --seeds 3
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from saelens_scaffold import ScaffoldBatchTopKTrainingSAEConfig
from saelens_scaffold.demo.main import TABLE_WIDTH, quiet
from saelens_scaffold.demo.measures import Measured
from saelens_scaffold.demo.planted import (
    PlantedActivations,
    PlantedSettings,
    planted_configs,
    train_on_planted,
)
from saelens_scaffold.demo.report import Part, print_part

SETTINGS = PlantedSettings(structured=False, k=12, steps=800, batch_size=2048)


def run(seed: int) -> list[Measured]:
    twins = planted_configs(SETTINGS)
    scaffold = twins["ScaffoldBatchTopK"]
    assert isinstance(scaffold, ScaffoldBatchTopKTrainingSAEConfig)
    saes = {
        "BatchTopK": twins["BatchTopK"],
        "scaffold, residual": scaffold,
        "scaffold, activation": replace(scaffold, sparse_encoder_input="activation"),
    }
    with tempfile.TemporaryDirectory() as directory:
        planted = PlantedActivations(SETTINGS, seed)
        return train_on_planted(planted, saes, seed, Path(directory))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    options = parser.parse_args()
    quiet()
    results = [result for seed in range(options.seeds) for result in run(seed)]
    print_part(Part(str(SETTINGS), results), Console(width=TABLE_WIDTH))


if __name__ == "__main__":
    main()
