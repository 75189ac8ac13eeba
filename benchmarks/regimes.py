"""Where do scaffolds help? Dense latents at two sparsities, on the embedded model.

Trains a plain BatchTopK SAE whose b_dec starts at the activations' mean, the same with
the scaffold's rank added to its k (so that l0_total is matched, not l0_sparse), and
scaffold SAEs with both inputs of the sparse encoder, with several seeds and several k.

    python benchmarks/regimes.py --k 4 24 --seeds 3
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from saelens_scaffold import ScaffoldBatchTopKTrainingSAEConfig
from saelens_scaffold.demo.language_model import (
    CENTRED,
    EmbeddedActivations,
    LanguageModelSettings,
    language_model_configs,
    train_on_language_model,
)
from saelens_scaffold.demo.main import TABLE_WIDTH, quiet
from saelens_scaffold.demo.measures import Measured
from saelens_scaffold.demo.report import Part, print_part


def run(settings: LanguageModelSettings, seed: int) -> list[Measured]:
    twins = language_model_configs(settings)
    plain, scaffold = twins["BatchTopK"], twins["ScaffoldBatchTopK"]
    assert isinstance(scaffold, ScaffoldBatchTopKTrainingSAEConfig)
    k_total = settings.k + settings.scaffold_rank
    saes = {
        f"BatchTopK{CENTRED}": plain,
        f"BatchTopK, k = {k_total:g}{CENTRED}": replace(plain, k=k_total),  # type: ignore[call-arg]
        "scaffold, residual": scaffold,
        "scaffold, activation": replace(scaffold, sparse_encoder_input="activation"),
    }
    with tempfile.TemporaryDirectory() as directory:
        activations = EmbeddedActivations(settings, seed)
        return train_on_language_model(activations, saes, seed, Path(directory))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--k", type=float, nargs="+", default=[4, 24], help="default: 4 24"
    )
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    options = parser.parse_args()
    quiet()
    for k in options.k:
        settings = LanguageModelSettings(k=k)
        results = [r for seed in range(options.seeds) for r in run(settings, seed)]
        title = f"k {k:g} of {settings.d_sae} latents ({k / settings.d_sae:.2%})"
        print_part(Part(title, results), Console(width=TABLE_WIDTH))


if __name__ == "__main__":
    main()
