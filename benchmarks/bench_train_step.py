"""What a training step costs: scaffold SAEs, their SAELens parents, and other trainers.

All are trained in one process, by their own trainers, taking turns on the same batches,
after a warm-up. Printed are medians with their quartiles, the ratio of the parent's to each
(with an interval by bootstrap over the pairs), and memory: what the weights, the optimizer's
state and the step at its peak take. The roofline says what the device, as measured
here, would need at least for the scaffold SAE's step; beside it stands what PyTorch takes for
the encoder's product alone, the one that stays dense.

    python benchmarks/bench_train_step.py
    python benchmarks/bench_train_step.py --d_in 768 --d_sae 24576 --batch_size 1024
    python benchmarks/bench_train_step.py --grid          # every size that fits, on this device

EleutherAI's sparsify and dictionary_learning take part if they can be imported.
"""

import argparse
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import (
    Machine,
    Step,
    add_sizes,
    added_memory,
    bytes_of,
    measure_machine,
    paired_seconds,
    ratio_of_medians,
    roofline,
    seconds,
    tf32,
)
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

from saelens_scaffold import (
    ScaffoldBatchTopKTrainingSAEConfig,
    ScaffoldMatryoshkaTrainingSAEConfig,
)

__all__ = ["seconds", "trainer"]

FAMILIES = {
    "BatchTopK": (
        "ScaffoldBatchTopK",
        "dictionary_learning BatchTopK",
        "sparsify TopK",
    ),
    "Matryoshka": ("ScaffoldMatryoshka", "dictionary_learning Matryoshka"),
}
"""SAELens's architecture -> what is compared with it."""

GRID = [
    (256, 4096, 2048),
    (768, 24576, 1024),
    (2304, 16384, 4096),
    (2304, 65536, 4096),
]
"""d_in, d_sae, batch size."""


class Contender(NamedTuple):
    """
    Attributes:
        step: Trains on a batch.
        state: Gives the weights, and the optimizer's state.
    """

    step: Step
    state: Callable[[], Iterator[object]]


def trainer(
    sae: TrainingSAE[Any],
    batch_size: int,
    device: str,
    autocast: bool = False,
    trainer_class: type[SAETrainer[Any, Any]] = SAETrainer,
) -> SAETrainer[Any, Any]:
    return trainer_class(
        SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=10**9,
            device=device,
            autocast=autocast,
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


def state_of(
    parameters: Iterator[torch.Tensor], optimizer: torch.optim.Optimizer
) -> Iterator[object]:
    yield from parameters
    for of_parameter in optimizer.state.values():
        yield from of_parameter.values()


def saelens_contender(cfg: Any, o: argparse.Namespace) -> Contender:
    sae = TrainingSAE.from_dict(cfg.to_dict())
    of_sae = trainer(sae, o.batch_size, o.device, o.precision == "bf16")
    return Contender(of_sae.step, lambda: state_of(sae.parameters(), of_sae.optimizer))


def dictionary_learning_contender(matryoshka: bool, o: argparse.Namespace) -> Contender:
    from dictionary_learning.trainers.batch_top_k import (  # type: ignore[import-not-found]
        BatchTopKTrainer,
    )
    from dictionary_learning.trainers.matryoshka_batch_top_k import (  # type: ignore[import-not-found]
        MatryoshkaBatchTopKTrainer,
    )

    options: dict[str, Any] = {
        "steps": 10**6,
        "activation_dim": o.d_in,
        "dict_size": o.d_sae,
        "k": int(o.k),
        "layer": 0,
        "lm_name": "none",
        "lr": 3e-4,
        "device": o.device,
    }
    if matryoshka:
        ends = widths(o)
        added = np.diff([0, *ends]) / o.d_sae
        of_ae = MatryoshkaBatchTopKTrainer(**options, group_fractions=added.tolist())
    else:
        of_ae = BatchTopKTrainer(**options)
    n_steps = iter(range(10**9))
    return Contender(
        lambda batch: of_ae.update(next(n_steps), batch),
        lambda: state_of(of_ae.ae.parameters(), of_ae.optimizer),
    )


def sparsify_contender(o: argparse.Namespace) -> Contender:
    if o.device == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig  # type: ignore[import-not-found]

    cfg = SparseCoderConfig(num_latents=o.d_sae, k=int(o.k))
    coder = SparseCoder(o.d_in, cfg, device=o.device, dtype=torch.float32)
    optimizer = torch.optim.Adam(coder.parameters(), lr=3e-4)

    def step(batch: torch.Tensor) -> None:
        # as its trainer, which reads a language model, does it for a batch
        coder.set_decoder_norm_to_unit_norm()
        coder(batch).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Contender(step, lambda: state_of(coder.parameters(), optimizer))


def widths(o: argparse.Namespace) -> tuple[int, ...]:
    """Four of Matryoshka's levels."""
    return (o.d_sae // 16, o.d_sae // 8, o.d_sae // 4, o.d_sae)


def make(name: str, configs: dict[str, Any], o: argparse.Namespace) -> Contender | None:
    """None if it is not installed."""
    package = name.split()[0]
    if name in configs:
        return saelens_contender(configs[name], o)
    if importlib.util.find_spec(package) is None:
        return None
    if package == "sparsify":
        return sparsify_contender(o)
    return dictionary_learning_contender("Matryoshka" in name, o)


def encoders_product(o: argparse.Namespace) -> Step:
    """Pre-activations of a batch without their biases, and nothing else."""
    dtype = torch.bfloat16 if o.precision == "bf16" else torch.float32
    W = torch.randn(o.d_in, o.d_sae, device=o.device, dtype=dtype)
    out = W.new_empty(o.batch_size, o.d_sae)
    return lambda batch: torch.mm(batch.to(dtype), W, out=out)


def run(o: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare the families that are asked for."""
    device = torch.cuda.get_device_name() if o.device == "cuda" else "CPU"
    print(
        f"{device}, {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {o.precision}, "
        f"d_in {o.d_in}, d_sae {o.d_sae}, k {o.k:g}, rank {o.rank}, batch "
        f"{o.batch_size}, {o.steps} paired steps, Matryoshka widths {widths(o)}"
    )
    machine = measure_machine(o.device, o.precision)
    print(
        f"copies {machine.bandwidth / 1e9:.0f} GB/s, multiplies "
        f"{machine.rate / 1e9:.0f} GFLOP/s\n"
    )
    configs = sae_configs(o)
    with tf32(o.precision == "tf32"):
        return [
            run_family(parent, others, configs, machine, o)
            for parent, others in FAMILIES.items()
            if parent in o.families
        ]


def sae_configs(o: argparse.Namespace) -> dict[str, TrainingSAEConfig]:
    """Each plain architecture and its scaffold twin, of the same width and k."""
    plain: dict[str, Any] = {
        "d_in": o.d_in,
        "d_sae": o.d_sae,
        "k": o.k,
        "device": o.device,
    }
    scaffold: dict[str, Any] = {**plain, "scaffold_rank": o.rank}
    levels: dict[str, Any] = {"matryoshka_widths": list(widths(o))}
    return {
        "BatchTopK": BatchTopKTrainingSAEConfig(**plain),
        "ScaffoldBatchTopK": ScaffoldBatchTopKTrainingSAEConfig(**scaffold),
        "Matryoshka": MatryoshkaBatchTopKTrainingSAEConfig(**plain, **levels),
        "ScaffoldMatryoshka": ScaffoldMatryoshkaTrainingSAEConfig(**scaffold, **levels),
    }


def run_family(
    parent: str,
    others: tuple[str, ...],
    configs: dict[str, Any],
    machine: Machine,
    o: argparse.Namespace,
) -> dict[str, Any]:
    """Print a table of the contenders, and return what it says."""
    contenders: dict[str, Contender] = {}
    for name in (parent, *others):
        contender = make(name, configs, o)
        if contender is None:
            print(f"({name} is not installed)")
        else:
            contenders[name] = contender
    torch.manual_seed(0)
    basis = torch.randn(o.d_in, o.d_in, device=o.device) / o.d_in**0.5
    warm_up = 3

    def batches() -> Iterator[torch.Tensor]:
        for _ in range(warm_up + o.steps):
            yield torch.randn(o.batch_size, o.d_in, device=o.device) @ basis

    steps = {name: contender.step for name, contender in contenders.items()}
    steps["product"] = encoders_product(o)
    times = paired_seconds(steps, batches(), o.device, warm_up)
    del steps  # and the product's memory
    batch = next(batches())
    print(
        f"| SAE | step, ms (quartiles) | {parent} / it (95 %) | peak memory, MiB | of {parent}'s |"
    )
    print("|---|---|---|---|---|")
    peaks: dict[str, float] = {}
    rows: dict[str, dict[str, float]] = {}
    for name, contender in contenders.items():
        added = added_memory(contender.step, batch, o.device)
        peaks[name] = float("nan")
        if added is not None:
            peaks[name] = (added + bytes_of(contender.state())) / 2**20
        low, median, high = 1000 * np.quantile(times[name], [0.25, 0.5, 0.75])
        ratio, ratio_low, ratio_high = ratio_of_medians(times[parent], times[name])
        print(
            f"| {name} | {median:.1f} ({low:.1f} to {high:.1f}) | {ratio:.2f} "
            f"({ratio_low:.2f} to {ratio_high:.2f}) | {peaks[name]:.0f} | "
            f"{peaks[name] / peaks[parent]:.2f} |"
        )
        rows[name] = {
            "ms": median,
            "as_fast_as_parent": ratio,
            "as_fast_as_parent_low": ratio_low,
            "as_fast_as_parent_high": ratio_high,
            "peak_mib": peaks[name],
        }
    phases = roofline(o, 1 if parent == "BatchTopK" else 4)
    least = sum(phase.seconds(machine) for phase in phases)
    share = least / np.median(times[others[0]])
    product = 1000 * np.median(times["product"])
    print(
        f"\nroofline of {others[0]}: {1000 * least:.1f} ms, {share:.0%} of it reached; "
        f"the encoder's product alone takes PyTorch {product:.1f} ms"
    )
    for phase in phases:
        print(f"  {phase.name}: {1000 * phase.seconds(machine):.2f} ms")
    print(flush=True)
    return {
        **machine._asdict(),
        "steps": rows,
        "roofline_ms": 1000 * least,
        "roofline_reached": share,
        "product_ms": product,
    }


def grid(device: str) -> Iterator[dict[str, Any]]:
    """Options of every size and precision, the largest first."""
    precisions = ["bf16", "tf32", "float32"] if device == "cuda" else ["float32"]
    for d_in, d_sae, batch_size in reversed(GRID):
        sizes = {"d_in": d_in, "d_sae": d_sae, "batch_size": batch_size}
        for k in (80, 32):
            for precision in precisions:
                for family in FAMILIES:
                    yield {**sizes, "k": k, "precision": precision, "families": family}


def run_grid(o: argparse.Namespace) -> None:
    """Each size in a process of its own; one that does not fit is passed over."""
    for options in grid(o.device):
        arguments = [f"--{n}={v}" for n, v in {**options, "steps": o.steps}.items()]
        finished = subprocess.run([sys.executable, __file__, *arguments])
        if finished.returncode != 0:
            print(f"(failed: {' '.join(arguments)})\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sizes(parser)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--precision", choices=["float32", "tf32", "bf16"], default="float32"
    )
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--grid", action="store_true", help="run every size")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu"
    )
    o = parser.parse_args()
    if o.grid:
        run_grid(o)
    else:
        run(o)


if __name__ == "__main__":
    main()
