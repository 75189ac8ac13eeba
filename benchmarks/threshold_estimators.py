"""How many latents fire at inference, by how the threshold is estimated.

    python benchmarks/threshold_estimators.py
    python benchmarks/threshold_estimators.py --steps 64 500 --seeds 1

Scaffold SAEs of both architectures are trained on the embedded language model, and each
is saved with the thresholds of several estimators. L0 is counted on files held out.
"""

import argparse
import random
from collections import deque
from collections.abc import Iterator
from statistics import mean, stdev
from typing import Any

import torch
from datasets import Dataset
from sae_lens import LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from tqdm.auto import tqdm

from saelens_scaffold import (
    ScaffoldBatchTopKTrainingSAEConfig,
    ScaffoldMatryoshkaTrainingSAEConfig,
)
from saelens_scaffold.embedded import load_embedded_model, load_stdlib_text
from saelens_scaffold.saes.calibration import RecentActivations, calibrated_threshold
from saelens_scaffold.training_runner import initial_sae

HOOK_NAME = "blocks.2.hook_resid_post"
D_IN, D_SAE, RANK, WIDTHS = 256, 2048, 8, [128, 512, 2048]
CONTEXT, LR = 256, 1e-3
CUTS_AVERAGED = 16
RECENT = {
    "the last batch": 0,
    "2,048 tokens": 2048,
    "8,192 tokens": 8192,
    "32,768 tokens": 32_768,
}
"""Tokens of recent activations that are encoded anew, by name."""


@torch.no_grad()
def activations(files: Dataset, n_tokens: int) -> torch.Tensor:
    """
    Activations of one passage of each file, in random order, shape (n_tokens, D_IN).

    One passage of each, since files differ much in how many latents fire.
    """
    model: Any = load_embedded_model()
    draw = random.Random(0)
    contexts: list[list[int]] = []
    per_file = -(-n_tokens // (len(files) * CONTEXT))
    n_chars = 6 * per_file * CONTEXT
    for text in tqdm(files["text"], desc="Reading"):
        start = draw.randrange(max(1, len(text) - n_chars))
        ids = model.tokenizer(text[start : start + n_chars]).input_ids
        for place in range(0, per_file * (CONTEXT - 1), CONTEXT - 1):
            context = [model.tokenizer.bos_token_id, *ids[place:][: CONTEXT - 1]]
            if len(context) == CONTEXT:
                contexts.append(context)
    layer = int(HOOK_NAME.split(".")[1])
    batches: list[torch.Tensor] = []
    for tokens in tqdm(torch.tensor(contexts).split(32), desc="Activations"):
        _, cache = model.run_with_cache(
            tokens, names_filter=HOOK_NAME, stop_at_layer=layer + 1
        )
        batches.append(cache[HOOK_NAME].flatten(0, 1))
    x = torch.cat(batches)
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]


def configs(ks: list[float]) -> dict[str, TrainingSAEConfig]:
    """The SAEs that are trained together."""
    common: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "scaffold_rank": RANK}
    found: dict[str, TrainingSAEConfig] = {}
    for k in ks:
        found[f"BatchTopK, k {k:g}"] = ScaffoldBatchTopKTrainingSAEConfig(**common, k=k)
        found[f"Matryoshka, k {k:g}"] = ScaffoldMatryoshkaTrainingSAEConfig(
            **common, k=k, matryoshka_widths=WIDTHS
        )
    return found


class Watched(Iterator[dict[str, torch.Tensor]]):
    """Batches of stored activations; sees the SAEs' thresholds go by."""

    def __init__(self, x: torch.Tensor, batch_size: int, seed: int):
        self.x, self.batch_size = x, batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.recent = {n: RecentActivations(n or batch_size) for n in RECENT.values()}
        self.order = torch.empty(0, dtype=torch.long)

    def __next__(self) -> dict[str, torch.Tensor]:
        if len(self.order) < self.batch_size:
            self.order = torch.randperm(len(self.x), generator=self.generator)
        chosen, self.order = self.order.split(
            [self.batch_size, len(self.order) - self.batch_size]
        )
        batch = self.x[chosen]
        for recent in self.recent.values():
            recent.add(batch)
        return {HOOK_NAME: batch}


class Cuts:
    """The smallest active value of each of the last batches, from SAELens's average."""

    def __init__(self, sae: Any):
        self.sae, self.last = sae, deque[float](maxlen=CUTS_AVERAGED)
        update = sae.update_topk_threshold

        def watched(acts: Any) -> None:
            before, lr = float(sae.topk_threshold), sae.cfg.topk_threshold_lr
            update(acts)
            self.last.append((float(sae.topk_threshold) - (1 - lr) * before) / lr)

        sae.update_topk_threshold = watched


def thresholds(sae: Any, cuts: Cuts, data: Watched, steps: int) -> dict[str, float]:
    """What each estimator says."""
    running, lr = float(sae.topk_threshold), sae.cfg.topk_threshold_lr
    return {
        "running average (SAELens)": running,
        "the same, bias-corrected": running / (1 - (1 - lr) ** steps),
        "last batch's cut": cuts.last[-1],
        f"mean of {CUTS_AVERAGED} cuts": mean(cuts.last),
    } | {
        f"encoded anew, {name}": (calibrated_threshold(sae, data.recent[n]))
        for name, n in RECENT.items()
    }


@torch.no_grad()
def l0_sparse(sae: Any, threshold: float, held_out: torch.Tensor) -> float:
    """Sparse latents that fire per token in the inference form."""
    inference = sae.to_inference()
    inference.threshold[RANK:] = threshold
    fired = sum(
        int((inference.encode(x)[:, RANK:] > 0).sum()) for x in held_out.split(4096)
    )
    return fired / len(held_out)


def trainer_config(steps: int, batch_size: int) -> SAETrainerConfig:
    return SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=steps * batch_size,
        device="cpu",
        autocast=False,
        lr=LR,
        lr_end=LR / 10,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=batch_size,
        dead_feature_window=200,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[64, 500, 5000])
    parser.add_argument("--k", type=float, nargs="+", default=[4, 32])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train_tokens", type=int, default=1_000_000)
    parser.add_argument("--held_out_tokens", type=int, default=200_000)
    options = parser.parse_args()

    files = load_stdlib_text("train", seed=0).train_test_split(test_size=0.25, seed=0)
    train = activations(files["train"], options.train_tokens)
    held_out = activations(files["test"], options.held_out_tokens)
    scale = D_IN**0.5 / train.norm(dim=-1).mean()
    train, held_out = train * scale, held_out * scale
    print(f"{len(train):,} tokens to train on, {len(held_out):,} held out")
    print("L0 / k on the held-out files, mean ± standard deviation over seeds\n")

    for steps in options.steps:
        # as many tokens as there are, and no more than 1,024 a step
        batch_size = min(1024, max(128, len(train) // steps // 128 * 128))
        ratios: dict[str, dict[str, list[float]]] = {}
        for seed in range(options.seeds):
            saes = {n: initial_sae(c, seed) for n, c in configs(options.k).items()}
            cuts = {name: Cuts(sae) for name, sae in saes.items()}
            data = Watched(train, batch_size, seed)
            MultiSAETrainer(
                cfg=trainer_config(steps, batch_size),
                saes=saes,
                hook_names=dict.fromkeys(saes, HOOK_NAME),
                data_provider=data,
            ).fit()
            for name, sae in saes.items():
                k: float = sae.cfg.k  # type: ignore[attr-defined]
                for estimator, cut in thresholds(sae, cuts[name], data, steps).items():
                    ratio = l0_sparse(sae, cut, held_out) / k
                    ratios.setdefault(estimator, {}).setdefault(name, []).append(ratio)
        print(f"{steps:,} steps of {batch_size:,} tokens:\n")
        names = [*configs(options.k)]
        print("| threshold | " + " | ".join(names) + " |")
        print("|---|" + "---:|" * len(names))
        for estimator, of in ratios.items():
            cells = [f"{mean(of[n]):.3f} ± {_spread(of[n]):.3f}" for n in names]
            print(f"| {estimator} | " + " | ".join(cells) + " |")
        print(flush=True)


def _spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
