"""Small SAEs, planted activations and plain-torch references for the tests."""

from typing import Any, get_args

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer

from saelens_scaffold import (
    ScaffoldBatchTopKTrainingSAE,
    ScaffoldBatchTopKTrainingSAEConfig,
    ScaffoldMatryoshkaTrainingSAE,
    ScaffoldMatryoshkaTrainingSAEConfig,
)
from saelens_scaffold._util.compat import release
from saelens_scaffold.models.language_models import ModelClass

D_IN, D_SAE, RANK, K = 16, 64, 3, 4.0

# TransformerLens's, which its versions before 3 have not
HAS_BRIDGE = release("transformer-lens") >= (3, 0)
MODEL_CLASSES: tuple[Any, ...] = tuple(
    of for of in get_args(ModelClass) if HAS_BRIDGE or of != "TransformerBridge"
)

# for what runs on a GPU too, where there is one
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def scaffold_config(
    architecture: str = "scaffold_batchtopk", **overrides: Any
) -> ScaffoldBatchTopKTrainingSAEConfig:
    kwargs: dict[str, Any] = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "k": K,
        "scaffold_rank": RANK,
        **overrides,
    }
    if architecture == "scaffold_batchtopk":
        return ScaffoldBatchTopKTrainingSAEConfig(**kwargs)
    kwargs.setdefault("matryoshka_widths", [8, 32, kwargs["d_sae"]])
    return ScaffoldMatryoshkaTrainingSAEConfig(**kwargs)


def scaffold_sae(
    architecture: str = "scaffold_batchtopk", seed: int = 0, **overrides: Any
) -> ScaffoldBatchTopKTrainingSAE:
    cfg = scaffold_config(architecture, **overrides)
    torch.manual_seed(seed)
    if isinstance(cfg, ScaffoldMatryoshkaTrainingSAEConfig):
        return ScaffoldMatryoshkaTrainingSAE(cfg)
    return ScaffoldBatchTopKTrainingSAE(cfg)


def activations(n: int, d_in: int = D_IN, seed: int = 0) -> torch.Tensor:
    """Sparse features plus three dense directions plus a mean, shape (n, d_in)."""
    structure = torch.Generator().manual_seed(1234)
    features = torch.randn(4 * d_in, d_in, generator=structure)
    dense = torch.randn(3, d_in, generator=structure)
    mean = torch.randn(d_in, generator=structure)
    g = torch.Generator().manual_seed(seed)
    firing = torch.rand(n, 4 * d_in, generator=g) < 0.05
    return firing * 1.0 @ features + 3 * torch.randn(n, 3, generator=g) @ dense + mean


def trainer_for(
    sae: TrainingSAE[Any],
    steps: int,
    data: Any,
    batch_size: int = 128,
    cls: type[SAETrainer[Any, Any]] = SAETrainer,
    **overrides: Any,
) -> SAETrainer[Any, Any]:
    kwargs: dict[str, Any] = {
        "n_checkpoints": 0,
        "checkpoint_path": None,
        "save_final_checkpoint": False,
        "total_training_samples": steps * batch_size,
        "device": sae.cfg.device,
        "autocast": False,
        "lr": 3e-3,
        "lr_end": 3e-3,
        "lr_scheduler_name": "constant",
        "lr_warm_up_steps": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "lr_decay_steps": 0,
        "n_restart_cycles": 1,
        "train_batch_size_samples": batch_size,
        "dead_feature_window": 5,
        "feature_sampling_window": 1000,
        "logger": LoggingConfig(log_to_wandb=False),
        "n_batches_for_norm_estimate": 5,
        **overrides,
    }
    return cls(cfg=SAETrainerConfig(**kwargs), sae=sae, data_provider=data)


def batches(
    batch_size: int = 128, d_in: int = D_IN, dtype: torch.dtype = torch.float32
) -> Any:
    """An endless stream of batches, the same one each time."""
    seed = 0
    while True:
        yield activations(batch_size, d_in, seed).to(dtype)
        seed += 1


def train(sae: Any, steps: int = 50, **overrides: Any) -> Any:
    """Train in place with SAELens's trainer on the stream of `batches`."""
    data = batches(d_in=sae.cfg.d_in, dtype=sae.dtype)
    return trainer_for(sae, steps, data, **overrides).fit()


def overlap(rows_a: torch.Tensor, rows_b: torch.Tensor) -> float:
    """Mean squared cosine of the principal angles between two row spaces."""
    a = torch.linalg.qr(rows_a.double().T).Q
    b = torch.linalg.qr(rows_b.double().T).Q
    return float((a.T @ b).pow(2).sum() / min(a.shape[1], b.shape[1]))
