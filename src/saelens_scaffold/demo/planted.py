"""Known truth: sparse features and a dense low-rank component, planted together."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, LoggingConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.synthetic import (
    HierarchyConfig,
    LowRankCorrelationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    SyntheticSAERunnerConfig,
    ZipfianFiringProbabilityConfig,
)
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from tqdm.auto import tqdm

from saelens_scaffold._util.files import new_directory
from saelens_scaffold._util.provenance import versions
from saelens_scaffold.demo.rows import DENSE, TWINS, Half, Row, by_sae
from saelens_scaffold.saes.calibration import SampledBatches, calibrate_threshold
from saelens_scaffold.saes.scaffold import scaffold_rank
from saelens_scaffold.saes.subspaces import orthonormal_basis, subspace_overlap
from saelens_scaffold.training.measurement import l0_warning
from saelens_scaffold.training.runner import initial_sae

# MultiSAETrainer routes activations by hook point; planted data has a single one.
HOOK_NAME = "planted"


@dataclass(frozen=True)
class PlantedSettings:
    """
    What is planted, and how the SAEs are trained on it.

    Attributes:
        d_in: Dimension of the activations.
        n_features: Number of planted sparse features. They form a hierarchy, are
            correlated, and fire with Zipfian probabilities of at most 8 %.
        dense_rank: Dimension of the planted dense Gaussian component, and rank of the
            scaffolds. Its standard deviations fall evenly from 6 to 2.
        d_sae: Number of latents, those of a scaffold included.
        k: Sparse latents active per sample.
        matryoshka_widths: Widths of the Matryoshka levels.
        steps: Training steps.
        batch_size: Samples per step.
        lr: Adam's learning rate.
        eval_samples: Number of held-out samples.
    """

    d_in: int = 128
    n_features: int = 600
    dense_rank: int = 8
    d_sae: int = 1024
    k: float = 8
    matryoshka_widths: tuple[int, ...] = (256, 512, 1024)
    steps: int = 500
    batch_size: int = 1024
    lr: float = 1e-3
    eval_samples: int = 16_384


def planted_configs(settings: PlantedSettings) -> dict[str, TrainingSAEConfig]:
    """Scaffold SAEs and their twins, by architecture: of the same width and k."""
    values = {**vars(settings), "scaffold_rank": settings.dense_rank}
    values["matryoshka_widths"] = list(settings.matryoshka_widths)
    names = ("d_in", "d_sae", "k", "scaffold_rank", "matryoshka_widths")
    configs: dict[str, TrainingSAEConfig] = {}
    for architecture in (name for twins in TWINS.items() for name in twins):
        config_class = get_sae_training_class(architecture)[1]
        known = [name for name in names if name in config_class.__dataclass_fields__]
        configs[architecture] = config_class(**{name: values[name] for name in known})
    return configs


class PlantedActivations(Iterator[dict[str, torch.Tensor]]):
    """
    SAELens's synthetic activations plus a dense Gaussian component of low rank.

    Iterating gives training batches for `MultiSAETrainer`.

    Args:
        settings: What is planted.
        seed: Seed of what is planted. Samples come from torch's global generator.
    """

    def __init__(self, settings: PlantedSettings, seed: int):
        self.settings = settings
        self.config = SyntheticModelConfig(
            num_features=settings.n_features,
            hidden_dim=settings.d_in,
            # No planted feature is dense, so every dense latent is an artefact.
            firing_probability=ZipfianFiringProbabilityConfig(
                exponent=0.5, max_prob=0.08, min_prob=0.008
            ),
            hierarchy=HierarchyConfig(
                total_root_nodes=40,
                branching_factor=3,
                max_depth=2,
                compensate_probabilities=True,
            ),
            correlation=LowRankCorrelationConfig(
                rank=16, correlation_scale=0.1, seed=seed
            ),
            mean_firing_magnitudes=1.5,
            std_firing_magnitudes=0.5,
            bias=3.0,
            seed=seed,
        )
        self.model = SyntheticModel(self.config)
        generator = torch.Generator().manual_seed(seed)
        gaussian = torch.randn(settings.d_in, settings.dense_rank, generator=generator)
        self.dense_directions = torch.linalg.qr(gaussian).Q.T
        """Orthonormal rows that span the dense component, shape (dense_rank, d_in)."""
        self.dense_stds = torch.linspace(6, 2, settings.dense_rank)

    @property
    def features(self) -> torch.Tensor:
        """Unit directions of the planted sparse features, shape (n_features, d_in)."""
        vectors = self.model.feature_dict.feature_vectors.detach()
        return torch.nn.functional.normalize(vectors, dim=1)

    @torch.no_grad()
    def sample(self, n: int) -> torch.Tensor:
        """Draw n activations, shape (n, d_in)."""
        dense = torch.randn(n, self.settings.dense_rank) * self.dense_stds
        return self.model.sample(n) + dense @ self.dense_directions

    def __next__(self) -> dict[str, torch.Tensor]:
        return {HOOK_NAME: self.sample(self.settings.batch_size)}


def planted_half(
    settings: PlantedSettings, seeds: list[int], output_path: Path
) -> Half:
    """Train and measure SAEs with each seed, unless an earlier run has done so."""
    rows: list[Row] = []
    for seed in seeds:
        directory = output_path / f"seed-{seed}"
        # as JSON has it, where tuples are lists
        made_from = json.dumps([asdict(settings), versions()])
        finished = _read_finished(directory / "results.json", made_from)
        if finished is None:
            print(f"planted data, seed {seed}: training", file=sys.stderr)
            with new_directory(directory, replace=True) as temporary:
                finished = train_on_planted(settings, seed, temporary)
                content = {"made_from": json.loads(made_from)}
                content["results"] = [asdict(row) for row in finished]
                (temporary / "results.json").write_text(json.dumps(content, indent=1))
        else:
            print(f"planted data, seed {seed}: finished before", file=sys.stderr)
        rows += finished
    return Half(
        "Known truth: sparse features and a dense component, planted",
        by_sae(rows),
        [row.l0_warning for row in rows if row.l0_warning],
    )


def train_on_planted(
    settings: PlantedSettings, seed: int, output_path: Path
) -> list[Row]:
    """
    Train SAEs in lockstep on the same samples, save them and measure what was saved.

    Args:
        settings: What is planted, and how the SAEs are trained.
        seed: Seed of what is planted, of the SAEs' weights and of the samples.
        output_path: Directory that gets a directory for each SAE.
    """
    planted = PlantedActivations(settings, seed)
    configs = planted_configs(settings)
    saes = {name: initial_sae(config, seed) for name, config in configs.items()}
    runner_config = SyntheticSAERunnerConfig(
        synthetic_model=planted.config,
        sae=configs["batchtopk"],
        training_samples=settings.steps * settings.batch_size,
        batch_size=settings.batch_size,
        lr=settings.lr,
        checkpoint_path=None,
        dead_feature_window=200,
        logger=LoggingConfig(log_to_wandb=False),
    )
    batches = SampledBatches(planted)
    torch.manual_seed(seed)
    MultiSAETrainer(
        cfg=runner_config.to_sae_trainer_config(),
        saes=saes,
        hook_names=dict.fromkeys(saes, HOOK_NAME),
        data_provider=batches,
    ).fit()

    # held out, and the same whatever was trained
    torch.manual_seed(seed + 1_000_000)
    samples = planted.sample(settings.eval_samples)
    rows: list[Row] = []
    for name, sae in tqdm(saes.items(), desc="Measuring on planted data"):
        calibrate_threshold(sae, batches.samples[HOOK_NAME])  # type: ignore[arg-type]
        sae.save_inference_model(output_path / name)
        saved = SAE.load_from_disk(output_path / name)
        numbers, frequencies = _measure(saved, planted, samples)
        warning = l0_warning(
            f"{name}, seed {seed}",
            numbers["l0_sparse"],
            len(samples),
            saved.cfg.metadata,
        )
        rows.append(Row(name, name, seed, numbers, frequencies, warning))
    return rows


@torch.no_grad()
def _measure(
    sae: SAE[Any], planted: PlantedActivations, samples: torch.Tensor
) -> tuple[dict[str, Any], list[float]]:
    """Numbers of an SAE's row, and the firing frequencies of its sparse latents."""
    acts = sae.encode(samples)
    residual = samples - sae.decode(acts)
    variance = (samples - samples.mean(dim=0)).pow(2).sum()
    rank = scaffold_rank(sae)
    frequencies = (acts != 0).float().mean(dim=0)[rank:]
    alive = sae.W_dec[rank:][frequencies > 0]
    cosines = torch.nn.functional.normalize(alive, dim=1) @ planted.features.T
    l0_sparse = float(frequencies.sum())
    numbers: dict[str, Any] = {
        **{name: int((frequencies > t).sum()) for name, t in DENSE.items()},
        "alive": len(alive),
        "l0_sparse": l0_sparse,
        "l0_total": l0_sparse + rank,
        "explained_variance": float(1 - residual.pow(2).sum() / variance),
        "feature_cosine": float(cosines.max(dim=1).values.mean()),
    }
    if rank:
        truth = orthonormal_basis(planted.dense_directions)
        scaffold = orthonormal_basis(sae.W_dec[:rank])
        numbers["overlap"] = subspace_overlap(scaffold, truth)
    return numbers, [round(frequency, 6) for frequency in frequencies.tolist()]


def _read_finished(file: Path, made_from: str) -> list[Row] | None:
    """Rows of an earlier run, if its settings and versions are the same."""
    try:
        content = json.loads(file.read_text())
        if content["made_from"] == json.loads(made_from):
            return [Row(**row) for row in content["results"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
