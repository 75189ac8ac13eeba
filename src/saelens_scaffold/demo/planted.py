"""Known truth: sparse features and a dense low-rank component, planted together."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.synthetic import (
    ConstantFiringProbabilityConfig,
    HierarchyConfig,
    LowRankCorrelationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from tqdm.auto import tqdm

from saelens_scaffold.demo.architectures import twin_configs
from saelens_scaffold.demo.measures import Measured, measured
from saelens_scaffold.saes.calibration import SampledBatches, calibrate_threshold
from saelens_scaffold.saes.scaffold import scaffold_rank
from saelens_scaffold.training.runner import initial_sae

# MultiSAETrainer routes activations by hook point; planted ones have but this
HOOK_NAME = "planted"


@dataclass(frozen=True)
class PlantedSettings:
    """
    What is planted, and how the SAEs are trained on it.

    Attributes:
        d_in: Dimension of the activations.
        n_features: Number of planted sparse features.
        structured: Whether the features form a hierarchy, are correlated and fire with
            Zipfian probabilities, at most 8 % of the time; otherwise they are
            independent and each fires 1.25 % of the time.
        dense_rank: Dimension of the planted dense Gaussian component, and rank of the
            scaffolds. Its standard deviations fall evenly from 6 to 2.
        d_sae: Number of latents.
        k: Sparse latents active per sample.
        matryoshka_widths: Widths of the Matryoshka levels.
        steps: Training steps.
        batch_size: Samples a step.
        lr: Adam's learning rate.
        eval_samples: Held-out samples measured.
    """

    d_in: int = 128
    n_features: int = 600
    structured: bool = True
    dense_rank: int = 8
    d_sae: int = 1024
    k: float = 8
    matryoshka_widths: tuple[int, ...] = (256, 512, 1024)
    steps: int = 500
    batch_size: int = 1024
    lr: float = 1e-3
    eval_samples: int = 16_384


def planted_configs(settings: PlantedSettings) -> dict[str, TrainingSAEConfig]:
    """The SAEs that are compared on planted data."""
    return twin_configs(
        d_in=settings.d_in,
        d_sae=settings.d_sae,
        k=settings.k,
        scaffold_rank=settings.dense_rank,
        matryoshka_widths=settings.matryoshka_widths,
    )


class PlantedActivations:
    """
    SAELens's synthetic activations plus a dense Gaussian component of low rank.

    Iterating gives training batches for `MultiSAETrainer`.

    Args:
        settings: What is planted.
        seed: Seed of what is planted. Samples come from torch's global generator.
    """

    def __init__(self, settings: PlantedSettings, seed: int):
        self.settings = settings
        self.model = SyntheticModel(_synthetic_model_config(settings, seed))
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

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        return {HOOK_NAME: self.sample(self.settings.batch_size)}


def _synthetic_model_config(
    settings: PlantedSettings, seed: int
) -> SyntheticModelConfig:
    magnitudes: dict[str, Any] = {
        "mean_firing_magnitudes": 1.5,
        "std_firing_magnitudes": 0.5,
    }
    if not settings.structured:
        return SyntheticModelConfig(
            num_features=settings.n_features,
            hidden_dim=settings.d_in,
            firing_probability=ConstantFiringProbabilityConfig(0.0125),
            bias=False,
            seed=seed,
            **magnitudes,
        )
    return SyntheticModelConfig(
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
        correlation=LowRankCorrelationConfig(rank=16, correlation_scale=0.1, seed=seed),
        bias=3.0,
        seed=seed,
        **magnitudes,
    )


def train_on_planted(
    planted: PlantedActivations,
    saes: dict[str, TrainingSAEConfig],
    seed: int,
    output_path: Path,
) -> list[Measured]:
    """
    Train SAEs in lockstep on the same samples, save them and measure what was saved.

    Args:
        planted: The activations.
        saes: Configurations of the SAEs, by name.
        seed: Seed of the SAEs' weights and of the samples.
        output_path: Directory that gets a directory for each SAE.

    Returns:
        What was measured of each SAE, in the same order.
    """
    settings = planted.settings
    training_saes = {name: initial_sae(cfg, seed) for name, cfg in saes.items()}
    batches = SampledBatches(iter(planted))
    torch.manual_seed(seed)
    MultiSAETrainer(
        cfg=_trainer_config(settings),
        saes=training_saes,
        hook_names=dict.fromkeys(saes, HOOK_NAME),
        data_provider=batches,
    ).fit()
    for sae in training_saes.values():
        calibrate_threshold(sae, batches.samples[HOOK_NAME])  # type: ignore[arg-type]

    torch.manual_seed(
        seed + 1_000_000
    )  # held out, and the same for whatever was trained
    samples = planted.sample(settings.eval_samples)
    results: list[Measured] = []
    for name, training_sae in tqdm(training_saes.items(), desc="Measuring on planted"):
        training_sae.save_inference_model(output_path / name)
        sae = SAE.load_from_disk(output_path / name)
        results.append(_measure(sae, name, seed, planted, samples))
    return results


@torch.no_grad()
def _measure(
    sae: SAE[Any],
    name: str,
    seed: int,
    planted: PlantedActivations,
    samples: torch.Tensor,
) -> Measured:
    acts = sae.encode(samples)
    residual = samples - sae.decode(acts)
    variance = (samples - samples.mean(dim=0)).pow(2).sum()
    frequencies = (acts != 0).float().mean(dim=0)
    rank = scaffold_rank(sae)
    alive = sae.W_dec[rank:][frequencies[rank:] > 0]
    cosines = torch.nn.functional.normalize(alive, dim=1) @ planted.features.T
    return measured(
        sae,
        name,
        seed,
        n_tokens=len(samples),
        firing_frequencies=frequencies,
        explained_variance=float(1 - residual.pow(2).sum() / variance),
        dense_subspace=planted.dense_directions,
        feature_cosine=float(cosines.max(dim=1).values.mean()),
    )


def _trainer_config(settings: PlantedSettings) -> SAETrainerConfig:
    return SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=settings.steps * settings.batch_size,
        device="cpu",
        autocast=False,
        lr=settings.lr,
        lr_end=settings.lr,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=settings.batch_size,
        dead_feature_window=200,
        feature_sampling_window=1000,
        logger=LoggingConfig(log_to_wandb=False),
    )
