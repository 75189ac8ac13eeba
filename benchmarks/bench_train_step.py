"""What a training step costs, against the SAELens parent of the same d_sae and k.

Both SAEs are trained by SAELens's own trainer in one process, alternating step by step on
the same batches, after a warm-up; the ratio is that of the medians, with an interval by
bootstrap over the paired steps.

    python benchmarks/bench_train_step.py
"""

import argparse
import platform
import time
from typing import Any

import numpy as np
import torch
from sae_lens import TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

import saelens_scaffold  # noqa: F401  (registers the architectures)
from saelens_scaffold.demo.architectures import TWINS, twin_configs


def trainer(
    sae: TrainingSAE[Any], batch_size: int, device: str
) -> SAETrainer[Any, Any]:
    return SAETrainer(
        SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=10**9,
            device=device,
            autocast=False,
            lr=3e-4,
            lr_end=3e-4,
            lr_scheduler_name="constant",
            lr_warm_up_steps=0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            lr_decay_steps=0,
            n_restart_cycles=1,
            train_batch_size_samples=batch_size,
            dead_feature_window=1000,
            feature_sampling_window=2000,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        iter(()),
    )


def seconds(step: Any, batch: torch.Tensor, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(batch)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d_in", type=int, default=256)
    parser.add_argument("--d_sae", type=int, default=4096)
    parser.add_argument("--k", type=float, default=32)
    parser.add_argument("--rank", type=int, default=24)
    parser.add_argument("--batch_size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu"
    )
    o = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {o.device}, float32, d_in {o.d_in}, d_sae {o.d_sae}, "
        f"k {o.k:g}, rank {o.rank}, batch {o.batch_size}, {o.steps} paired steps"
    )
    configs = twin_configs(
        d_in=o.d_in,
        d_sae=o.d_sae,
        k=o.k,
        scaffold_rank=o.rank,
        matryoshka_widths=(o.d_sae // 16, o.d_sae // 4, o.d_sae),
        device=o.device,
    )
    torch.manual_seed(0)
    basis = torch.randn(o.d_in, o.d_in, device=o.device) / o.d_in**0.5
    warm_up = 5
    for scaffold, plain in TWINS.items():
        steps = {
            name: trainer(
                TrainingSAE.from_dict(configs[name].to_dict()), o.batch_size, o.device
            ).step
            for name in (plain, scaffold)
        }
        times: dict[str, list[float]] = {plain: [], scaffold: []}
        for i in range(warm_up + o.steps):
            batch = torch.randn(o.batch_size, o.d_in, device=o.device) @ basis
            order = (plain, scaffold) if i % 2 else (scaffold, plain)
            for name in order:
                times[name].append(seconds(steps[name], batch, o.device))
        pairs = np.array([times[plain], times[scaffold]])[:, warm_up:]
        resampled = np.random.default_rng(0).integers(o.steps, size=(2000, o.steps))
        medians = np.median(pairs[:, resampled], axis=-1)
        low, high = np.quantile(medians[1] / medians[0], [0.025, 0.975])
        plain_ms, scaffold_ms = 1000 * np.median(pairs, axis=1)
        print(
            f"{plain} {plain_ms:.0f} ms, {scaffold} {scaffold_ms:.0f} ms: "
            f"ratio {scaffold_ms / plain_ms:.3f} (95 % interval {low:.3f} to {high:.3f})"
        )


if __name__ == "__main__":
    main()
