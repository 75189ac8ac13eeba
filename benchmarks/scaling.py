"""
What it takes to train one SAE with several processes, each with a part of its dictionary.

Of each step are predicted: its time at least, by the roofline of a process's part and by what
goes over the links; the memory of each process; and the bytes that it sends. None of the sums
over processes depends on d_sae. Below, how far that is from the limits of the devices, and what
an experiment of several SAEs costs. Rates are those that devices and links reach; the defaults
are assumptions, of H100s with TF32, NVLink within a node of 8, and 400 Gbit/s for each between
nodes. bench_train_step.py measures a device's.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --d_sae 16777216 --processes 64 --n_saes 1
    python benchmarks/scaling.py --measure --processes 1 2 4 --d_in 256 --d_sae 16384 --k 32 --batch_size 1024

--measure trains with gloo processes of one thread each on this machine, and prints what is
predicted from its rates, measured while all of them compute, beside what is measured.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from measure import Machine, Phase, add_sizes, roofline

from saelens_scaffold.sharding.largest import n_counts
from saelens_scaffold.sharding.selection import BATCH_DIGIT

FLOAT, COUNT = 4, 8
"""Bytes of a number, and of a count."""


class Training(NamedTuple):
    """
    One SAE and its batches, and how many processes train it.

    Attributes:
        d_in: Width of the activations.
        d_sae: Latents of the whole SAE.
        k: Active latents per token.
        rank: Rank of the scaffold, with residual input.
        batch_size: Tokens per step.
        n_levels: Matryoshka levels; 1 for BatchTopK.
        n_processes: Number of processes.
    """

    d_in: int
    d_sae: int
    k: float
    rank: int
    batch_size: int
    n_levels: int
    n_processes: int

    def part(self) -> "Training":
        """What one process computes, as if it were alone."""
        latents = self.rank + math.ceil((self.d_sae - self.rank) / self.n_processes)
        return self._replace(d_sae=latents, k=self.k / self.n_processes)


class Cluster(NamedTuple):
    """
    Devices and what joins them.

    Attributes:
        machine: What a device can do.
        memory: Bytes of memory of a device.
        link: Bytes a second that a process sends, and receives at the same time.
        latency: Seconds that a message takes, however short.
    """

    machine: Machine
    memory: float
    link: float
    latency: float


def sums(training: Training) -> dict[str, int]:
    """Bytes of each tensor that is summed over the processes in a step, if no latent is dead."""
    n, d, r = training.batch_size, training.d_in, training.rank
    if training.n_processes == 1:
        return {}
    of_cut = n_counts(torch.float32, BATCH_DIGIT, training.n_processes)
    return {
        "reconstructions": FLOAT * n * d * training.n_levels,
        "gradients of the scaffold and b_dec": FLOAT * (n * r + r * d + d),
        "counts for the cut": COUNT * of_cut,
        "bound and least of the cut, norm of the gradients": 3 * COUNT,
        "number of dead latents": COUNT,
    }


N_MESSAGES = 10
"""Messages of a step: the cut takes one for each of three digits and one for ties; its bound
and least and the norm take one each, and so does the rest."""


def sent(training: Training) -> float:
    """
    Bytes that a process sends in a step: sums go around a ring, in two rounds; activations,
    of which each process computes its share of the batch, in one.
    """
    n_others = training.n_processes - 1
    activations = FLOAT * training.batch_size * training.d_in
    of_all = 2 * sum(sums(training).values()) + activations
    return of_all * n_others / training.n_processes


def phases(training: Training) -> list[Phase]:
    """The roofline of one process's part, and what each process does for the whole batch."""
    n, d, r = training.batch_size, training.d_in, training.rank
    per_token = 4 + 6 * training.n_levels  # vectors that are read or written
    whole = Phase("per token", 8 * n * d * r, FLOAT * n * d * per_token)
    return [*roofline(training.part(), training.n_levels), whole]


def computing(training: Training, cluster: Cluster) -> float:
    """Seconds of a step at least, without communication."""
    return sum(phase.seconds(cluster.machine) for phase in phases(training))


def communicating(training: Training, cluster: Cluster) -> float:
    """Seconds of a step in communication, none of which overlaps with computation."""
    if training.n_processes == 1:
        return 0.0
    return sent(training) / cluster.link + N_MESSAGES * cluster.latency


def step_seconds(training: Training, cluster: Cluster) -> float:
    """Seconds of a step at least."""
    return computing(training, cluster) + communicating(training, cluster)


def memory(training: Training) -> int:
    """
    Bytes of a process at the peak of a step: weights, gradients, Adam's two moments and the
    square roots of one; and what is kept per token and per active latent. Without the
    language model and the store of activations.
    """
    part, n, d = training.part(), training.batch_size, training.d_in
    weights = 2 * d * part.d_sae + part.d_sae + d
    per_token = n * d * (2 + 4 * training.n_levels)
    # twice as many candidates as active latents, with places, values and what sorts them
    per_entry = 8 * 2 * math.ceil(n * part.k)
    return FLOAT * (5 * weights + per_token + per_entry)


def largest_d_sae(training: Training, cluster: Cluster) -> int:
    """Latents of the widest SAE whose parts fit into the devices' memory."""
    per_latent = (
        memory(training._replace(d_sae=2 * training.d_sae)) - memory(training)
    ) / (training.d_sae)
    return int(training.d_sae + (cluster.memory - memory(training)) / per_latent)


def most_processes(training: Training, cluster: Cluster) -> int:
    """Processes, a power of 2, up to which less than half of a step is communication."""
    n = 1
    while True:
        twice = training._replace(n_processes=2 * n)
        computes, communicates = (
            of(twice, cluster) for of in (computing, communicating)
        )
        if communicates > computes or 2 * n > training.d_sae:
            return n
        n *= 2


# ---- what is printed


def training_of(o: argparse.Namespace, n_processes: int) -> Training:
    sizes = (o.d_in, o.d_sae, o.k, o.rank, o.batch_size, o.levels)
    return Training(*sizes, n_processes)


def cluster_of(o: argparse.Namespace, n_processes: int) -> Cluster:
    machine = Machine(1e9 * o.memory_bandwidth * o.reached, 1e12 * o.rate * o.reached)
    link = o.link if n_processes <= o.per_node else o.node_link
    return Cluster(machine, 2**30 * o.memory, 1e9 * link, 1e-6 * o.latency)


def table(heads: Sequence[str], rows: Iterator[Sequence[str]]) -> None:
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def print_steps(o: argparse.Namespace) -> None:
    print(
        f"d_in {o.d_in}, d_sae {o.d_sae:,}, k {o.k:g}, rank {o.rank}, batch "
        f"{o.batch_size:,}, levels {o.levels}; a step:\n"
    )
    heads = ("processes", "ms at least", "of it communication", "sent by each, MB")
    table((*heads, "memory of each, GiB", "tokens/s"), _steps(o))


def _steps(o: argparse.Namespace) -> Iterator[Sequence[str]]:
    for n in o.processes:
        training, cluster = training_of(o, n), cluster_of(o, n)
        seconds, needed = step_seconds(training, cluster), memory(training)
        yield (
            str(n),
            f"{1e3 * seconds:.2f}",
            f"{communicating(training, cluster) / seconds:.0%}",
            f"{sent(training) / 1e6:.1f}",
            f"{needed / 2**30:.1f}"
            + (" (too much)" if needed > cluster.memory else ""),
            f"{training.batch_size / seconds:,.0f}",
        )


def print_limits(o: argparse.Namespace) -> None:
    print("Limits:\n")
    heads = ("processes", "d_sae", "of the memory", "widest that fits")
    table((*heads, "of a step is communication", "more than half from"), _limits(o))


def _limits(o: argparse.Namespace) -> Iterator[Sequence[str]]:
    for n in o.processes:
        training, cluster = training_of(o, n), cluster_of(o, n)
        share = communicating(training, cluster) / step_seconds(training, cluster)
        # more processes than these are on several nodes
        further = cluster_of(o, max(n, o.per_node + 1))
        yield (
            str(n),
            f"{training.d_sae:,}",
            f"{memory(training) / cluster.memory:.0%}",
            f"{largest_d_sae(training, cluster):,}",
            f"{share:.0%}",
            f"{2 * most_processes(training, further):,} processes",
        )


def print_experiment(o: argparse.Namespace) -> None:
    print(
        f"{o.n_saes} SAEs, {o.tokens:,.0f} tokens each, {o.lm_gflop:g} GFLOP of the language "
        "model per token, run once for the SAEs that a group of GPUs trains:\n"
    )
    heads = (
        "GPUs",
        "processes per SAE",
        "SAEs at a time",
        "hours at least",
        "GPU hours",
    )
    table((*heads, "memory of each, GiB"), _experiments(o))


def _experiments(o: argparse.Namespace) -> Iterator[Sequence[str]]:
    for n_gpus in o.processes:
        for n in sorted({1, *(p for p in o.processes if p <= n_gpus)}):
            training, cluster = training_of(o, n), cluster_of(o, n)
            n_groups = min(n_gpus // n, o.n_saes)
            in_turn = math.ceil(o.n_saes / n_groups)
            of_model = 1e9 * o.lm_gflop * o.batch_size / n / cluster.machine.rate
            seconds = in_turn * step_seconds(training, cluster) + of_model
            hours = seconds * o.tokens / o.batch_size / 3600
            yield (
                str(n_gpus),
                str(n),
                str(n_groups),
                f"{hours:.2f}",
                f"{hours * n_groups * n:.1f}",
                f"{memory(training) / 2**30:.1f}",
            )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sizes(parser)
    parser.set_defaults(d_in=2304, d_sae=65_536, k=80, rank=24, batch_size=4096)
    parser.add_argument("--levels", type=int, default=1, help="Matryoshka levels")
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        default=[1, 8, 64],
        help="numbers of processes, each with a device",
    )
    of_device = parser.add_argument_group("devices and links")
    for name, default, text in (
        ("rate", 400, "TFLOP/s that a product reaches"),
        ("memory_bandwidth", 3000, "GB/s that a copy reads and writes"),
        ("memory", 80, "GiB of a device"),
        ("per_node", 8, "devices of a node"),
        ("link", 300, "GB/s that a device sends within a node"),
        ("node_link", 45, "GB/s that a device sends between nodes"),
        ("latency", 30, "microseconds of a message"),
        ("reached", 1, "share of these rates that a step reaches"),
    ):
        of_device.add_argument(f"--{name}", type=float, default=default, help=text)
    of_experiment = parser.add_argument_group("the experiment")
    of_experiment.add_argument("--n_saes", type=int, default=24)
    of_experiment.add_argument("--tokens", type=float, default=500e6)
    of_experiment.add_argument(
        "--lm_gflop", type=float, default=2, help="of the language model, per token"
    )
    of_measure = parser.add_argument_group("measuring")
    of_measure.add_argument("--measure", action="store_true", help="on this machine")
    of_measure.add_argument("--steps", type=int, default=10)
    o = parser.parse_args(arguments)
    if o.measure:
        from scaling_measured import print_measured

        print_measured(o)
        return
    print_steps(o)
    print_limits(o)
    if o.n_saes > 1:
        print_experiment(o)


if __name__ == "__main__":
    main()
