"""Whether sparse kernels train what dense code trains, over 500 steps on a language model.

SAEs of the embedded model's activations are trained by SAELens's trainer on the same batches:
in sparse kernels; in dense code; in dense code from initial weights that are changed by
rounding (one part in 10^7), which shows how far rounding alone leads apart; and in dense
code from another seed.

    python benchmarks/loss_curves.py
"""

import argparse
import copy
from collections.abc import Iterator

import numpy as np
import torch
from bench_train_step import trainer
from sae_lens import ActivationsStore, TrainingSAE
from sae_lens.saes.sae import TrainingSAEConfig
from tqdm.auto import tqdm

from saelens_scaffold.compare.config import CompareConfig
from saelens_scaffold.compare.grid import runs_of
from saelens_scaffold.demo.language_model import language_model_config
from saelens_scaffold.models import load_embedded_model, load_stdlib_text

RUNS = {"kernels": (0, "auto", 0.0), "dense": (0, "reference", 0.0),
        "dense, rounded": (0, "reference", 1e-7), "dense, other seed": (1, "reference", 0.0)}  # fmt: skip
"""Seed, kernels, and relative change of the initial weights."""


@torch.no_grad()
def batches_of_activations(
    config: CompareConfig, n: int, batch_size: int
) -> list[torch.Tensor]:
    """Shuffled activations, scaled to a norm of √d_in as SAELens does."""
    model = load_embedded_model()
    d_in = config.sae["d_in"]
    store = ActivationsStore(
        model=model,
        dataset=load_stdlib_text("train", seed=0),
        streaming=False,
        hook_name=config.hook_name,
        hook_head_index=None,
        context_size=config.training["context_size"],
        d_in=d_in,
        n_batches_in_buffer=8,
        total_training_tokens=10**9,
        store_batch_size_prompts=16,
        train_batch_size_tokens=batch_size,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
    )
    parts: list[torch.Tensor] = []
    with tqdm(total=n * batch_size, desc="Activations") as progress:
        while sum(map(len, parts)) < n * batch_size:
            _, cache = model.run_with_cache(
                store.get_batch_tokens(),
                names_filter=config.hook_name,
                return_type=None,
            )
            parts.append(cache[config.hook_name][:, 1:].flatten(0, 1))
            progress.update(len(parts[-1]))
    activations = torch.cat(parts)[: n * batch_size]
    activations *= d_in**0.5 / activations.norm(dim=-1).mean()
    order = torch.randperm(len(activations), generator=torch.Generator().manual_seed(0))
    return list(activations[order].split(batch_size))


def losses(
    cfg: TrainingSAEConfig, run: str, batches: list[torch.Tensor]
) -> Iterator[tuple[float, float]]:
    """The loss, and the mean squared error, of each step."""
    seed, kernels, change = RUNS[run]
    cfg = copy.deepcopy(cfg)
    cfg.kernels = kernels  # type: ignore[attr-defined]
    torch.manual_seed(seed)
    sae = TrainingSAE.from_dict(cfg.to_dict())
    sae.W_enc.data *= 1 + change * torch.randn_like(sae.W_enc)
    of_sae = trainer(sae, len(batches[0]), "cpu")
    of_sae.cfg.dead_feature_window = 50  # so that the auxiliary loss takes part
    for batch in tqdm(batches, desc=f"{cfg.architecture()}, {run}"):
        output = of_sae.step(batch)
        yield output.loss.item(), output.losses["mse_loss"].item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=512)
    o = parser.parse_args()
    config = language_model_config([0])
    configs = {run.arm.architecture: run.config for run in runs_of(config)}
    batches = batches_of_activations(config, o.steps, o.batch_size)
    for name in ("scaffold_batchtopk", "scaffold_matryoshka"):
        curves = {
            run: np.array(list(losses(configs[name], run, batches))) for run in RUNS
        }
        reference = curves.pop("dense")
        print(
            f"\n{name}, loss of the dense run: first {reference[0, 0]:.3f}, last 100 steps {reference[-100:, 0].mean():.4f}"
        )
        print(
            "| run | largest relative difference, first 20 steps | mean of |relative difference|, last 100 | relative difference of means, last 100 |"
        )
        print("|---|---|---|---|")
        for run, curve in curves.items():
            relative = (curve[:, 0] - reference[:, 0]) / reference[:, 0]
            of_means = curve[-100:, 0].mean() / reference[-100:, 0].mean() - 1
            print(
                f"| {run} | {abs(relative[:20]).max():.1e} | {abs(relative[-100:]).mean():.1e} | {of_means:+.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
