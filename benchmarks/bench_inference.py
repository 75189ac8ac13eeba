"""What encoding and decoding cost at inference: scaffold SAEs, dense and in sparse kernels.

SAELens's JumpReLU SAE, the scaffold's with `kernels="reference"` (SAELens's dense code) and with
the sparse kernels take turns on the same batches, without gradients. Printed are medians
with their quartiles, the ratio of SAELens's to each (with an interval by bootstrap over the
pairs), the memory that a call adds at its peak, and how much of a roofline is reached.

    python benchmarks/bench_inference.py
    python benchmarks/bench_inference.py --d_in 768 --d_sae 24576 --batch_size 1024
"""

import argparse
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from measure import (
    Machine,
    Phase,
    Step,
    add_sizes,
    added_memory,
    measure_machine,
    paired_seconds,
    ratio_of_medians,
)
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

from saelens_scaffold import ScaffoldJumpReLUSAE, ScaffoldJumpReLUSAEConfig

SAELENS = "SAELens JumpReLU"


def saes(o: argparse.Namespace) -> dict[str, JumpReLUSAE]:
    """The same weights in each, and a threshold above which k latents are, on average."""
    sizes = {"d_in": o.d_in, "d_sae": o.d_sae, "device": o.device}
    torch.manual_seed(0)
    made: dict[str, JumpReLUSAE] = {SAELENS: JumpReLUSAE(JumpReLUSAEConfig(**sizes))}
    for name, kernels in (("dense code", "reference"), ("sparse kernels", "auto")):
        made[f"scaffold, {name}"] = ScaffoldJumpReLUSAE(
            ScaffoldJumpReLUSAEConfig(**sizes, scaffold_rank=o.rank, kernels=kernels)  # type: ignore[arg-type]
        )
    of_saelens = made[SAELENS]
    W_dec = torch.nn.functional.normalize(of_saelens.W_dec.data, dim=1)
    sample = torch.randn(256, o.d_in, device=o.device) @ W_dec.T
    threshold = sample.flatten().topk(int(256 * o.k)).values[-1]
    for sae in made.values():
        sae.W_dec.data, sae.W_enc.data = W_dec, W_dec.T.contiguous()
        rank = o.rank if isinstance(sae, ScaffoldJumpReLUSAE) else 0
        sae.threshold.data[rank:] = threshold
    return made


def rooflines(o: argparse.Namespace) -> dict[str, list[Phase]]:
    n, d, f = o.batch_size, o.d_in, o.d_sae
    weights, acts, entries = 4 * d * f, 4 * n * f, n * (o.k + o.rank)
    rows = 4 * d * min(f, entries)
    return {
        "encode": [Phase("product", 2 * n * d * f, weights + acts)],
        "decode": [
            Phase("read activations", n * f, acts),
            Phase("sums of rows", 2 * entries * d, rows + 4 * n * d),
        ],
    }


def compare(
    what: str,
    calls: Mapping[str, Step],
    batches: Callable[[], Iterator[torch.Tensor]],
    machine: Machine,
    o: argparse.Namespace,
) -> dict[str, Any]:
    """Print a table of the calls, and return what it says."""
    times = paired_seconds(calls, batches(), o.device, warm_up=3)
    print(f"| {what} | ms (quartiles) | {SAELENS} / it (95 %) | memory added, MiB |")
    print("|---|---|---|---|")
    argument = next(batches())
    rows: dict[str, Any] = {}
    for name, call in calls.items():
        added = added_memory(call, argument, o.device)
        low, median, high = 1000 * np.quantile(times[name], [0.25, 0.5, 0.75])
        ratio, ratio_low, ratio_high = ratio_of_medians(times[SAELENS], times[name])
        mib = "-" if added is None else f"{added / 2**20:.0f}"
        print(
            f"| {name} | {median:.1f} ({low:.1f} to {high:.1f}) | {ratio:.2f} "
            f"({ratio_low:.2f} to {ratio_high:.2f}) | {mib} |"
        )
        rows[name] = {"ms": median, "as_fast_as_saelens": ratio, "added_mib": mib}
    least = sum(phase.seconds(machine) for phase in rooflines(o)[what])
    reached = least / np.median(times["scaffold, sparse kernels"])
    print(
        f"\nroofline: {1000 * least:.1f} ms, {reached:.0%} of it reached\n", flush=True
    )
    return {
        "call": what,
        "calls": rows,
        "roofline_ms": 1000 * least,
        "roofline_reached": reached,
    }


@torch.no_grad()
def run(o: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare encoding, and decoding."""
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {o.device}, float32, d_in {o.d_in}, d_sae {o.d_sae}, "
        f"k {o.k:g}, rank {o.rank}, batch {o.batch_size}, {o.calls} paired calls\n"
    )
    machine = measure_machine(o.device, "float32")
    by_name = saes(o)
    sparse = by_name["scaffold, sparse kernels"]

    def inputs() -> Iterator[torch.Tensor]:
        for _ in range(3 + o.calls):
            yield torch.randn(o.batch_size, o.d_in, device=o.device)

    def activations() -> Iterator[torch.Tensor]:
        for x in inputs():
            yield sparse.encode(x)

    encoders: dict[str, Step] = {name: sae.encode for name, sae in by_name.items()}
    decoders: dict[str, Step] = {name: sae.decode for name, sae in by_name.items()}
    return [
        compare("encode", encoders, inputs, machine, o),
        compare("decode", decoders, activations, machine, o),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sizes(parser)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu"
    )
    run(parser.parse_args())


if __name__ == "__main__":
    main()
