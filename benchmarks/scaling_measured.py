"""What `scaling.py` predicts, measured with processes on this machine."""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_train_step import state_of, trainer
from measure import Machine, added_memory, bytes_of, measure_machine, seconds
from scaling import (
    Cluster,
    Training,
    communicating,
    computing,
    memory,
    sums,
    table,
    training_of,
)

from saelens_scaffold import (
    ScaffoldBatchTopKTrainingSAEConfig,
    ScaffoldMatryoshkaTrainingSAEConfig,
)
from saelens_scaffold._util.files import temporary_folder
from saelens_scaffold.saes import (
    ScaffoldBatchTopKTrainingSAE,
    ScaffoldMatryoshkaTrainingSAE,
)
from saelens_scaffold.sharding.sae import shard_sae
from saelens_scaffold.sharding.shard import Shard
from saelens_scaffold.sharding.trainer import ShardedSAETrainer

WARM_UP = 3


def print_measured(o: argparse.Namespace) -> None:
    print(
        f"gloo, processes of one thread, d_in {o.d_in}, d_sae {o.d_sae:,}, k {o.k:g}, rank "
        f"{o.rank}, batch {o.batch_size:,}, levels {o.levels}, {o.steps} steps\n"
    )
    rows: list[tuple[str, ...]] = []
    reached = None
    for n in o.processes:
        found, training = measure(o, n), training_of(o, n)
        machine = Machine(*found["machine"])
        cluster = Cluster(machine, 0, found["link"], found["latency"])
        computes = computing(training, cluster)
        communicates = communicating(training, cluster)
        reached = reached or computes / (found["step"] - communicates)
        seconds_of = computes + communicates, computes / reached + communicates
        rows.append(
            (
                str(n),
                *(f"{1e3 * of:.1f}" for of in (*seconds_of, found["step"])),
                f"{sum(sums(training).values()):,}",
                f"{found['bytes']:,}",
                *(f"{of / 2**20:.0f}" for of in (memory(training), found["memory"])),
            )
        )
    print(
        f"The first computes at {reached:.0%} of the roofline, which is taken to be so for "
        "all.\n"
    )
    heads = ("processes", "ms at least", "ms predicted", "measured")
    heads = (*heads, "bytes summed, predicted", "measured")
    table((*heads, "MiB of each, predicted", "measured"), iter(rows))


def measure(o: argparse.Namespace, n_processes: int) -> dict[str, Any]:
    """
    Train with some processes, and measure the first.

    Returns:
        Seconds of a `step`, the median; `bytes` that it hands to sums; bytes of `memory` of
        weights, state and what a step adds; and `machine`, `link` and `latency` as in
        `Cluster`, measured while all processes do the same.
    """
    with temporary_folder() as folder:
        mp.spawn(_process, (o, n_processes, str(folder)), n_processes)  # type: ignore[attr-defined]
        return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def _process(rank: int, o: argparse.Namespace, n_processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=n_processes
    )
    shard, training = Shard(), training_of(o, n_processes)
    dist.barrier()
    machine = measure_machine("cpu", "float32")
    link, latency = _measure_link(shard, training)
    part = trainer(
        _part(o, shard), o.batch_size, "cpu", trainer_class=ShardedSAETrainer
    )
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(o.d_in, o.d_in, generator=generator) / o.d_in**0.5
    times: list[float] = []
    for _ in range(WARM_UP + o.steps):
        batch = torch.randn(o.batch_size, o.d_in, generator=generator) @ basis
        dist.barrier()
        before = shard.bytes_sent
        times.append(seconds(part.step, batch, "cpu"))
        sent = shard.bytes_sent - before
    added = added_memory(part.step, batch, "cpu")
    state = bytes_of(state_of(part.sae.parameters(), part.optimizer))
    found = {
        "step": float(np.median(times[WARM_UP:])),
        "bytes": sent,
        "memory": state + (added or 0),
        "machine": machine,
        "link": link,
        "latency": latency,
    }
    if shard.is_first:
        Path(folder, "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def _part(o: argparse.Namespace, shard: Shard) -> Any:
    """This process's part of the SAE."""
    sizes: dict[str, Any] = {"d_in": o.d_in, "d_sae": o.d_sae, "k": o.k}
    sizes |= {"scaffold_rank": o.rank, "kernels": "torch"}
    if o.levels > 1:
        levels = [o.d_sae >> i for i in reversed(range(o.levels))]
        cfg: Any = ScaffoldMatryoshkaTrainingSAEConfig(
            **sizes, matryoshka_widths=levels
        )
        make: Any = ScaffoldMatryoshkaTrainingSAE
    else:
        cfg = ScaffoldBatchTopKTrainingSAEConfig(**sizes)
        make = ScaffoldBatchTopKTrainingSAE
    return shard_sae(make(cfg) if shard.is_first else None, cfg, shard)


def _measure_link(shard: Shard, training: Training) -> tuple[float, float]:
    """Bytes a second that each process sends in a sum, and seconds of a short one."""
    if training.n_processes == 1:
        return float("inf"), 0.0
    long = torch.ones(training.batch_size, training.d_in)
    sum_up = partial(_times, shard)
    latency = sum_up(torch.ones(1))
    of_long = max(sum_up(long) - latency, 1e-9)
    n_others = training.n_processes - 1
    return 2 * n_others / training.n_processes * long.nbytes / of_long, latency


def _times(shard: Shard, tensor: torch.Tensor) -> float:
    times = [seconds(lambda _: shard.sum_(tensor), tensor, "cpu") for _ in range(20)]
    return float(np.median(times))
