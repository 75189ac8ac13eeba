"""Gradient pursuit against the loop of the paper's code (arXiv 2410.14670), on one CPU core.

The loop is written anew from its formulas: dense weights, batches of 256 tokens (its
default), and as many steps for all of a batch as its largest budget has. Its steps cost
alike, so a few are timed. Times are CPU times of one thread, taken in turns.

A BatchTopK SAE is trained on py-neox first, and pursued with each token's own L0. Then
come random dictionaries, with budgets of the same spread about their mean.

    python benchmarks/bench_pursuit.py
    python benchmarks/bench_pursuit.py --random 768 16384 24 --random 2304 65536 24
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
)
from sae_lens.training.sae_trainer import SAETrainer
from threshold_estimators import activations

from saelens_scaffold.models import load_stdlib_text
from saelens_scaffold.pursuit import GradientPursuit

BATCH = 256
MAX_ACTIVATIONS = 2**24


def loop_step(
    x: torch.Tensor,
    weights: torch.Tensor,
    finished: torch.Tensor,
    decoder: torch.Tensor,
    budgets: torch.Tensor,
    step: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of the paper's loop: the weights, and those of tokens that are finished."""
    residual = x - weights @ decoder
    support = weights != 0
    products = residual @ decoder.T
    support[torch.arange(len(x)), products.argmax(dim=-1)] = True
    gradient = products * support.float()
    direction = gradient @ decoder
    length = (direction * residual).sum(-1) / (direction * direction).sum(-1)
    weights = (weights + gradient * length.unsqueeze(1)).clamp(min=0)
    return weights, torch.where(budgets.unsqueeze(1) > step, weights, finished)


def seconds_per_step(
    x: torch.Tensor, decoder: torch.Tensor, budgets: torch.Tensor, steps: int
) -> float:
    weights = finished = torch.zeros(BATCH, len(decoder))
    start = time.process_time()
    for step in range(steps):
        weights, finished = loop_step(
            x[:BATCH], weights, finished, decoder, budgets[:BATCH], step
        )
    return (time.process_time() - start) / steps


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def trained(o: argparse.Namespace) -> tuple[Any, torch.Tensor]:
    """A BatchTopK SAE of py-neox, in training form, and activations of other text."""

    def scaled(split: Any, files: int) -> torch.Tensor:
        rows: Any = load_stdlib_text(split)
        x = torch.cat(
            [f[:, 1:].flatten(0, 1) for f in activations(rows.select(range(files)))]
        )
        return x / x.square().mean().sqrt()

    x = scaled("train", 100)

    def data() -> Iterator[torch.Tensor]:
        while True:
            yield x[torch.randint(len(x), (1024,))]

    torch.manual_seed(0)
    cfg = BatchTopKTrainingSAEConfig(d_in=x.shape[1], d_sae=2048, k=24)
    sae = BatchTopKTrainingSAE(cfg)
    sae.b_dec.data = x.mean(dim=0)
    fixed: dict[str, Any] = {
        "n_checkpoints": 0,
        "checkpoint_path": None,
        "save_final_checkpoint": False,
        "total_training_samples": o.train_steps * 1024,
        "device": "cpu",
        "autocast": False,
        "lr": 1e-3,
        "lr_end": 1e-3,
        "lr_scheduler_name": "constant",
        "lr_warm_up_steps": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "lr_decay_steps": 0,
        "n_restart_cycles": 1,
        "train_batch_size_samples": 1024,
        "dead_feature_window": 1000,
        "feature_sampling_window": 1000,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    SAETrainer(cfg=SAETrainerConfig(**fixed), sae=sae, data_provider=data()).fit()
    return sae, scaled("test", 40)


def random_dictionary(
    d_in: int, d_sae: int, l0: int, budgets: torch.Tensor
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A dictionary of unit rows, sparse sums of them with noise, and scaled budgets."""
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae))
    sae.W_dec.data = torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=1)
    budgets = budgets[: MAX_ACTIVATIONS // d_sae]
    latents = torch.randint(d_sae, (len(budgets), max(1, l0 // 2)))
    strength = torch.rand(latents.shape)
    x = torch.nn.functional.embedding_bag(
        latents, sae.W_dec.data, per_sample_weights=strength, mode="sum"
    )
    x += 0.02 * torch.randn_like(x)
    return sae, x, (budgets * l0 / budgets.float().mean()).round().long()


def compare(
    sae: Any, x: torch.Tensor, budgets: torch.Tensor, o: argparse.Namespace
) -> None:
    decoder = torch.nn.functional.normalize(sae.W_dec.data, dim=1)
    targets = x - sae.b_dec
    of_batches = torch.stack([part.max() for part in budgets.split(BATCH)])
    mean, largest = float(budgets.float().mean()), float(of_batches.float().mean())
    equal = round(mean)
    pursuit = GradientPursuit(sae)
    first = seconds(lambda: pursuit.encode(x, budgets)) / len(x)
    times: dict[str, list[float]] = {"step": [], "own": [], "equal": []}
    for _ in range(o.repeats):
        step = seconds_per_step(targets, decoder, budgets, o.steps)
        times["step"].append(step / BATCH)
        times["own"].append(seconds(lambda: pursuit.encode(x, budgets)) / len(x))
        at_equal = seconds(lambda: pursuit.encode(x[:BATCH], equal)) / BATCH
        times["equal"].append(at_equal)
    step, own, at_equal = (sorted(of)[len(of) // 2] for of in times.values())
    print(
        f"\nd_in {x.shape[1]}, d_sae {len(decoder)}, {len(x):,} tokens; budgets: mean "
        f"{mean:.1f}, mean of the largest of {BATCH} tokens {largest:.1f}\n\n"
        "| budgets | loop, µs a token | pursuit, µs a token | ratio |\n"
        "|---|---:|---:|---:|"
    )
    for name, n_steps, ours in (
        ("own L0", largest, own),
        ("own L0, first call", largest, first),
        (f"{equal} for all", equal, at_equal),
    ):
        loop = step * n_steps
        print(f"| {name} | {1e6 * loop:.0f} | {1e6 * ours:.0f} | {loop / ours:.1f} |")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--random",
        type=int,
        nargs=3,
        action="append",
        default=[],
        metavar=("D_IN", "D_SAE", "L0"),
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8, help="of the loop, to time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--train_steps", type=int, default=100)
    o = parser.parse_args()
    torch.set_num_threads(1)
    with torch.enable_grad():
        sae, x = trained(o)
    x = x[: o.tokens]
    acts = sae.encode(x).to_dense()
    centred = (x - x.mean(dim=0)).square().sum()
    for name, of in (("encode", acts), ("pursuit", GradientPursuit(sae).encode(x))):
        fvu = (x - sae.decode(of)).square().sum() / centred
        print(f"{name}: FVU {fvu:.3f}, L0 {of.count_nonzero() / len(x):.1f}")
    budgets = acts.count_nonzero(dim=1)
    compare(sae, x, budgets, o)
    for d_in, d_sae, l0 in o.random:
        compare(*random_dictionary(d_in, d_sae, l0, budgets), o)


if __name__ == "__main__":
    main()
