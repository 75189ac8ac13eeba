"""Whether sparse kernels train what dense code trains, over 500 steps on a language model.

SAEs of the embedded model's activations are trained by SAELens's trainer on the same batches:
in sparse kernels; in dense code; in dense code from initial weights that are changed by
rounding (one part in 10^7), which shows how far rounding alone leads apart; and in dense
code from another seed.

    python benchmarks/loss_curves.py
"""

import argparse
import copy
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_train_step import trainer
from sae_lens import TrainingSAE
from sae_lens.saes.sae import TrainingSAEConfig
from tqdm.auto import tqdm

import saelens_scaffold
from saelens_scaffold.compare.config import CompareConfig, read_config
from saelens_scaffold.compare.grid import runs_of
from saelens_scaffold.models import load_embedded_model
from saelens_scaffold.models.stdlib import read_stdlib

# by its path, since the demo itself imports much more
DEMO = Path(saelens_scaffold.__file__).with_name("demo") / "language_model.yaml"

RUNS = {"torch kernels": (0, "torch", 0.0), "triton kernels": (0, "triton", 0.0),
        "dense": (0, "reference", 0.0), "dense, rounded": (0, "reference", 1e-7),
        "dense, other seed": (1, "reference", 0.0)}  # fmt: skip
"""Seed, kernels, and relative change of the initial weights."""


@torch.no_grad()
def batches_of_activations(
    config: CompareConfig, n: int, batch_size: int, device: str = "cpu"
) -> list[torch.Tensor]:
    """Shuffled activations, scaled to a norm of √d_in as SAELens does."""
    model = load_embedded_model(device=device)
    context_size, d_in = config.training["context_size"], config.sae["d_in"]
    texts = [source.text for source in read_stdlib()]
    random.Random(0).shuffle(texts)
    ids = itertools.chain.from_iterable(
        model.to_tokens(text, prepend_bos=False, truncate=False)[0] for text in texts
    )
    bos = torch.full((16, 1), model.tokenizer.bos_token_id, device=device)  # type: ignore[union-attr]
    parts: list[torch.Tensor] = []
    with tqdm(total=n * batch_size, desc="Activations") as progress:
        while sum(map(len, parts)) < n * batch_size:
            tokens = torch.stack([*itertools.islice(ids, 16 * (context_size - 1))])
            _, cache = model.run_with_cache(
                torch.cat([bos, tokens.view(16, -1)], dim=1),
                names_filter=config.hook_name,
                return_type=None,
            )
            parts.append(cache[config.hook_name][:, 1:].flatten(0, 1))
            progress.update(len(parts[-1]))
    activations = torch.cat(parts)[: n * batch_size]
    activations *= d_in**0.5 / activations.norm(dim=-1).mean()
    order = torch.randperm(len(activations), generator=torch.Generator().manual_seed(0))
    return list(activations[order.to(device)].split(batch_size))


def losses(
    cfg: TrainingSAEConfig, run: str, batches: list[torch.Tensor], device: str = "cpu"
) -> Iterator[tuple[float, float]]:
    """The loss, and the mean squared error, of each step."""
    seed, kernels, change = RUNS[run]
    cfg = copy.deepcopy(cfg)
    cfg.kernels, cfg.device = kernels, device  # type: ignore[attr-defined]
    torch.manual_seed(seed)
    sae = TrainingSAE.from_dict(cfg.to_dict())
    sae.W_enc.data *= 1 + change * torch.randn_like(sae.W_enc)
    of_sae = trainer(sae, len(batches[0]), device)
    of_sae.cfg.dead_feature_window = 50  # so that the auxiliary loss takes part
    for batch in tqdm(batches, desc=f"{cfg.architecture()}, {run}"):
        output = of_sae.step(batch)
        yield output.loss.item(), output.losses["mse_loss"].item()


def run(steps: int, batch_size: int, device: str) -> Iterator[dict[str, Any]]:
    """Print a table for each architecture, and give what it says."""
    config = read_config(DEMO)
    configs = {of.arm.architecture: of.config for of in runs_of(config)}
    batches = batches_of_activations(config, steps, batch_size, device)
    names = [n for n in RUNS if device == "cuda" or not n.startswith("triton")]
    for architecture in ("scaffold_batchtopk", "scaffold_matryoshka"):
        curves = {
            name: np.array([*losses(configs[architecture], name, batches, device)])[
                :, 0
            ]
            for name in names
        }
        reference = curves["dense"]
        first, last = reference[0], reference[-100:].mean()
        print(
            f"\n{architecture}, loss of the dense run: first {first:.3f}, last 100 steps {last:.4f}"
        )
        print(
            "| run | largest relative difference, first 20 steps | mean of |relative difference|, last 100 | relative difference of means, last 100 |"
        )
        print("|---|---|---|---|")
        rows: dict[str, Any] = {}
        for name, curve in curves.items():
            relative = (curve - reference) / reference
            rows[name] = {
                "largest_difference_first_20": abs(relative[:20]).max(),
                "mean_difference_last_100": abs(relative[-100:]).mean(),
                "difference_of_means_last_100": curve[-100:].mean() / last - 1,
            }
            of_20, of_100, of_means = rows[name].values()
            print(
                f"| {name} | {of_20:.1e} | {of_100:.1e} | {of_means:+.1e} |", flush=True
            )
        every_tenth = {name: curve[::10].tolist() for name, curve in curves.items()}
        yield {"architecture": architecture, "runs": rows, "losses": every_tenth}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu"
    )
    o = parser.parse_args()
    for _ in run(o.steps, o.batch_size, o.device):
        pass


if __name__ == "__main__":
    main()
