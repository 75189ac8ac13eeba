"""A plain SAE, with a scaffold absorbed, then fine-tuned; and one trained from scratch.

    python benchmarks/fine_tuning.py

All SAEs are of the embedded language model and have the same dictionary size and k. In
inference form, on files that were held out: explained variance, the share of the
cross-entropy that zero ablation costs which is recovered, and dense latents. BOS is left
out, and left as it is.
"""

import argparse
import copy
import sys
from collections.abc import Iterator
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from sae_lens import SAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from threshold_estimators import trainer_config
from tqdm.auto import tqdm

from saelens_scaffold import ScaffoldBatchTopKTrainingSAEConfig
from saelens_scaffold.models import load_embedded_model, load_stdlib_text
from saelens_scaffold.saes.calibration import ActivationSample, calibrate_threshold
from saelens_scaffold.training.fine_tuning import start
from saelens_scaffold.training.measurement import measure
from saelens_scaffold.training.runner import initial_sae

HOOK_NAME, LAYER = "blocks.2.hook_resid_post", 2
D_IN, D_DICTIONARY, RANK, K = 256, 2048, 8, 4
CONTEXT, BATCH = 256, 1024
N_HELD_OUT = 64
COLUMNS = ("l0_sparse", "l0_total", "expl. var.", "CE score", "> 10 %")


def contexts(files: Dataset, n: int, model: Any) -> torch.Tensor:
    """Token ids with BOS, shape (n, CONTEXT), of files in their order."""
    found: list[torch.Tensor] = []
    for text in files["text"]:
        ids = torch.tensor(model.tokenizer(text).input_ids)
        # no more of a file than of others
        whole = ids[: len(ids) // (CONTEXT - 1) * (CONTEXT - 1)]
        found += whole.view(-1, CONTEXT - 1)[:4]
        if len(found) >= n:
            break
    bos = torch.full((n, 1), model.tokenizer.bos_token_id)
    return torch.cat([bos, torch.stack(found[:n])], dim=1)


@torch.no_grad()
def activations(tokens: torch.Tensor, model: Any) -> torch.Tensor:
    """Shape (n_tokens, D_IN), without BOS."""
    parts: list[torch.Tensor] = []
    for batch in tqdm(tokens.split(32), desc="Activations"):
        _, cache = model.run_with_cache(
            batch, names_filter=HOOK_NAME, stop_at_layer=LAYER + 1
        )
        parts.append(cache[HOOK_NAME][:, 1:].flatten(0, 1))
    return torch.cat(parts)


class Held:
    """Tokens held out, and the cross-entropy without the SAE, and with zeros for x."""

    def __init__(self, tokens: torch.Tensor, model: Any):
        self._tokens, self._model = tokens, model
        self.x = activations(tokens, model)
        self.clean = self.loss(lambda x: x)
        self.ablated = self.loss(torch.zeros_like)

    @torch.no_grad()
    def loss(self, change: Any) -> float:
        def replace(x: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.cat([x[:, :1], change(x[:, 1:])], dim=1)

        hooks = [(HOOK_NAME, replace)]
        losses = [
            self._model.run_with_hooks(batch, return_type="loss", fwd_hooks=hooks)
            for batch in self._tokens.split(16)
        ]
        return float(torch.stack(losses).mean())

    def row(self, sae: Any, scale: float) -> list[float]:
        """The columns of an SAE in inference form, which takes scaled activations."""
        sae.fold_activation_norm_scaling_factor(scale)
        found = measure(sae, [self.x], len(self.x), "held out")
        loss = self.loss(sae)
        score = (self.ablated - loss) / (self.ablated - self.clean)
        facts = (found.l0_sparse, found.l0_total, found.explained_variance)
        return [*facts, score, found.dense_latents]


def trainer(sae: Any, data: Iterator[torch.Tensor], steps: int) -> Any:
    cfg = trainer_config(steps, BATCH)
    cfg.lr_warm_up_steps, cfg.lr_decay_steps = steps // 20, steps // 5
    return SAETrainer(cfg=cfg, sae=sae, data_provider=data)


def plain(stream: list[torch.Tensor], steps: int, seed: int) -> SAE[Any]:
    """A BatchTopK SAE that starts at the mean of the activations, and fires K latents."""
    cfg = BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_DICTIONARY, k=K)
    sae: Any = initial_sae(cfg, seed)
    sae.b_dec.data.copy_(stream[0].mean(0))
    trainer(sae, iter(stream), steps).fit()
    sample = ActivationSample()
    for x in stream[:steps]:
        sample.add(x)
    calibrate_threshold(sae, sample)
    with TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return SAE.load_from_disk(folder)


def scaffold_sae(seed: int, rank: int = RANK, **fields: Any) -> Any:
    cfg = ScaffoldBatchTopKTrainingSAEConfig(
        d_in=D_IN, d_sae=D_DICTIONARY + rank, k=K, scaffold_rank=rank, **fields
    )
    return initial_sae(cfg, seed)


def fine_tuned(
    saved: SAE[Any], later: list[torch.Tensor], steps: int, seed: int, rank: int = RANK
) -> SAE[Any]:
    """The SAE with an absorbed scaffold, after so many steps."""
    sae = scaffold_sae(seed, rank, sparse_encoder_input="activation")
    made = trainer(sae, iter(later), max(steps, 1))
    start(made, saved)
    if steps > 0:
        made.fit()
    if rank == 0:  # which keeps the running threshold
        sample = ActivationSample()
        for x in later[:steps]:
            sample.add(x)
        calibrate_threshold(sae, sample)
    return sae.to_inference()


def saes_of(
    seed: int, batches: list[torch.Tensor], steps: int
) -> Iterator[tuple[str, SAE[Any]]]:
    """The SAEs in inference form, by name; those that are fine-tuned see later batches."""
    later, share = batches[steps:], steps // 20
    saved = plain(batches, steps, seed)
    yield "plain", saved
    yield "plain, 20 % more", fine_tuned(saved, later, 4 * share, seed, rank=0)
    yield "absorbed", fine_tuned(saved, later, 0, seed)
    yield "absorbed, fine-tuned for 5 %", fine_tuned(saved, later, share, seed)
    yield "absorbed, fine-tuned for 20 %", fine_tuned(saved, later, 4 * share, seed)
    sae = trainer(scaffold_sae(seed), iter(batches), steps).fit()
    yield "from scratch", sae.to_inference()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    steps: int = options.steps

    model: Any = load_embedded_model()
    held = Held(contexts(load_stdlib_text("test"), N_HELD_OUT, model), model)
    # of the steps, a fifth more, and what a scaffold is absorbed from
    n_tokens = (steps + steps // 5 + 10) * BATCH
    n_contexts = -(-n_tokens // (CONTEXT - 1))
    x = activations(contexts(load_stdlib_text("train"), n_contexts, model), model)
    scale = float(D_IN**0.5 / x.norm(dim=1).mean())
    print(
        f"{steps} steps of {BATCH:,} tokens, {len(held.x):,} tokens held out, mean ± "
        f"standard deviation of {options.seeds} seeds:\n"
    )
    rows: dict[str, list[list[float]]] = {}
    for seed in range(options.seeds):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        batches = [x[i] * scale for i in order[:n_tokens].split(BATCH)]
        for name, sae in saes_of(seed, batches, steps):
            row = held.row(copy.deepcopy(sae), scale)
            rows.setdefault(name, []).append(row)
            print(seed, name, *(f"{v:.4g}" for v in row), file=sys.stderr, flush=True)
    print("| SAE | " + " | ".join(COLUMNS) + " |")
    print("|---|" + "---:|" * len(COLUMNS))
    for name, of in rows.items():
        cells = [
            f"{mean(v):.{digits}f} ± {stdev(v) if len(v) > 1 else 0:.{digits}f}"
            for v, digits in zip(zip(*of, strict=True), (1, 1, 3, 3, 1), strict=True)
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
