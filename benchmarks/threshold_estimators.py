"""How many latents fire at inference, by how the threshold is estimated.

    python benchmarks/threshold_estimators.py
    python benchmarks/threshold_estimators.py --steps 64 500 --seeds 1

Scaffold SAEs of both architectures are trained on the embedded language model, on a
passage of each file, file by file through SAELens's mixing buffer. Each is given the
thresholds of several estimators, and its L0 is counted on files that were held out.
"""

import argparse
from collections import deque
from collections.abc import Iterator
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from sae_lens import LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.training.mixing_buffer import mixing_buffer
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from tqdm.auto import tqdm

from saelens_scaffold import (
    ScaffoldBatchTopKTrainingSAEConfig,
    ScaffoldMatryoshkaTrainingSAEConfig,
)
from saelens_scaffold.models import load_embedded_model, load_stdlib_text
from saelens_scaffold.saes.calibration import ActivationSample, calibrated_threshold
from saelens_scaffold.training.runner import initial_sae

HOOK_NAME = "blocks.2.hook_resid_post"
D_IN, D_SAE, RANK, WIDTHS = 256, 2048, 8, [128, 512, 2048]
CONTEXT, LR = 256, 1e-3
CONTEXTS_PER_FILE = 4
BUFFER_CONTEXTS = 20  # SAELens's default
N_AVERAGED = 16
N_LAST = 8192


@torch.no_grad()
def activations(files: Dataset) -> list[torch.Tensor]:
    """Activations of the middle of each file, of shape (n_contexts, CONTEXT, D_IN)."""
    model: Any = load_embedded_model()
    layer = int(HOOK_NAME.split(".")[1])
    found: list[torch.Tensor] = []
    n_chars = 5 * CONTEXTS_PER_FILE * CONTEXT
    for text in tqdm(files["text"], desc="Activations"):
        start = max(0, (len(text) - n_chars) // 2)
        ids = model.tokenizer(text[start : start + n_chars]).input_ids
        contexts = [
            [model.tokenizer.bos_token_id, *ids[place:][: CONTEXT - 1]]
            for place in range(0, CONTEXTS_PER_FILE * (CONTEXT - 1), CONTEXT - 1)
        ]
        whole = [context for context in contexts if len(context) == CONTEXT]
        if whole:
            _, cache = model.run_with_cache(
                torch.tensor(whole), names_filter=HOOK_NAME, stop_at_layer=layer + 1
            )
            found.append(cache[HOOK_NAME])
    return found


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


class Stream(Iterator[dict[str, torch.Tensor]]):
    """Files in the seed's order, mixed as SAELens mixes them; keeps what was last."""

    def __init__(self, files: list[torch.Tensor], batch_size: int, seed: int):
        order = torch.randperm(
            len(files), generator=torch.Generator().manual_seed(seed)
        )
        torch.manual_seed(seed)
        self.batches = mixing_buffer(
            buffer_size=BUFFER_CONTEXTS * CONTEXT,
            batch_size=batch_size,
            activations_loader=(files[i].flatten(0, 1) for i in order.tolist()),
        )
        self.last = deque[torch.Tensor](maxlen=-(-N_LAST // batch_size))
        self.sample = ActivationSample()

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = next(self.batches).clone()
        self.last.append(batch)
        self.sample.add(batch)
        return {HOOK_NAME: batch}


class Cuts:
    """The smallest active value of each of the last batches, from SAELens's average."""

    def __init__(self, sae: Any):
        self.last = deque[float](maxlen=N_AVERAGED)
        update = sae.update_topk_threshold

        def watched(acts: Any) -> None:
            before, lr = float(sae.topk_threshold), sae.cfg.topk_threshold_lr
            update(acts)
            self.last.append((float(sae.topk_threshold) - (1 - lr) * before) / lr)

        sae.update_topk_threshold = watched


class Trained(NamedTuple):
    sae: Any
    cuts: Cuts
    stream: Stream
    steps: int


def thresholds(trained: Trained) -> dict[str, float]:
    """What each estimator says."""
    sae, cuts, stream, steps = trained
    running, lr = float(sae.topk_threshold), sae.cfg.topk_threshold_lr
    return {
        "running average (SAELens's)": running,
        "running average, bias-corrected": running / (1 - (1 - lr) ** steps),
        "cut of the last batch": cuts.last[-1],
        f"mean cut of {N_AVERAGED} batches": mean(cuts.last),
        "last batch, encoded again": calibrated_threshold(sae, [stream.last[-1]]),
        f"last {N_LAST:,} tokens, encoded again": calibrated_threshold(
            sae, stream.last
        ),
        "**sample of the training, encoded again**": calibrated_threshold(
            sae, stream.sample
        ),
    }


@torch.no_grad()
def l0_sparse(sae: Any, cuts: list[float], held_out: torch.Tensor) -> list[float]:
    """Sparse latents that fire per token in the inference form, by its threshold."""
    inference = sae.to_inference()
    inference.threshold[RANK:] = 0
    fired = torch.zeros(len(cuts))
    for x in held_out.split(4096):
        acts = inference.encode(x)[:, RANK:]
        fired += torch.tensor([int((acts > cut).sum()) for cut in cuts])
    return (fired / len(held_out)).tolist()


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
    options = parser.parse_args()

    split = load_stdlib_text("train", seed=0).train_test_split(test_size=0.25, seed=0)
    files, unseen = activations(split["train"]), activations(split["test"])
    scale = D_IN**0.5 / torch.cat([x.flatten(0, 1) for x in files]).norm(dim=-1).mean()
    files = [x * scale for x in files]
    # a context of each file
    held_out = torch.cat([x[0] * scale for x in unseen])
    n_tokens = sum(len(x) for x in files) * CONTEXT
    print(
        f"{n_tokens:,} tokens of {len(files):,} files to train on, "
        f"{len(held_out):,} of {len(unseen):,} held out.\n"
        f"L0 / k on the files held out, mean ± standard deviation of {options.seeds} seeds."
    )
    for steps in options.steps:
        # at most once through the text, and no more than 1,024 tokens a step
        batch_size = min(1024, n_tokens // steps // 32 * 32)
        ratios: dict[str, dict[str, list[float]]] = {}
        for seed in range(options.seeds):
            saes = {n: initial_sae(c, seed) for n, c in configs(options.k).items()}
            cuts = {name: Cuts(sae) for name, sae in saes.items()}
            stream = Stream(files, batch_size, seed)
            MultiSAETrainer(
                cfg=trainer_config(steps, batch_size),
                saes=saes,
                hook_names=dict.fromkeys(saes, HOOK_NAME),
                data_provider=stream,
            ).fit()
            for name, sae in saes.items():
                k: float = sae.cfg.k  # type: ignore[attr-defined]
                trained = Trained(sae, cuts[name], stream, steps)
                found = thresholds(trained)
                l0s = l0_sparse(sae, [*found.values()], held_out)
                for estimator, l0 in zip(found, l0s, strict=True):
                    of = ratios.setdefault(estimator, {}).setdefault(name, [])
                    of.append(l0 / k)
        print(f"\n{steps:,} steps of {batch_size:,} tokens:\n")
        names = [*configs(options.k)]
        print("| threshold | " + " | ".join(names) + " |")
        print("|---|" + "---:|" * len(names))
        for estimator, of in ratios.items():
            cells = [f"{mean(of[n]):.3f} ± {_spread(of[n]):.3f}" for n in names]
            print(f"| {estimator} | " + " | ".join(cells) + " |", flush=True)


def _spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
