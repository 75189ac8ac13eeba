"""What a whole training costs: a language model's forward pass, SAELens's store, the SAE.

Each SAE is trained by its own runner (SAELens's, and that of `saelens-scaffold train`) on the
same random-weight language model and random tokens, which cost what trained ones do. The
language model alone is read through the store as SAELens runs it; our runner fuses its
attention and GELU.

    python benchmarks/bench_training.py
    python benchmarks/bench_training.py --model gemma-2-2b --d_sae 65536 --k 80 --batch_size 4096
"""

import argparse
import gc
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from bench_train_step import sae_configs
from measure import add_sizes
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.config import LoggingConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig

from saelens_scaffold import ResumableTrainingRunner


class Model(NamedTuple):
    """
    Attributes:
        layer: After which the SAE reads, and above which nothing is built.
        context_size: Tokens of a prompt.
        prompts: In a batch.
        cfg: Fields of `HookedTransformerConfig`.
    """

    layer: int
    context_size: int
    prompts: int
    cfg: dict[str, Any]


_GEMMA = {
    "gated_mlp": True,
    "act_fn": "gelu_pytorch_tanh",
    "normalization_type": "RMS",
    "positional_embedding_type": "rotary",
    "final_rms": True,
}

MODELS = {
    "gemma-2-2b": Model(12, 1024, 8, {
        "d_model": 2304, "n_heads": 8, "n_key_value_heads": 4, "d_head": 256,
        "d_mlp": 9216, "d_vocab": 256_000, **_GEMMA,
    }),
    "gpt2-small": Model(6, 256, 16, {
        "d_model": 768, "n_heads": 12, "d_head": 64, "d_mlp": 3072,
        "d_vocab": 50_257, "act_fn": "gelu_new", "normalization_type": "LN",
    }),
    "tiny": Model(0, 32, 4, {
        "d_model": 32, "n_heads": 2, "n_key_value_heads": 1, "d_head": 16,
        "d_mlp": 64, "d_vocab": 100, **_GEMMA,
    }),
}  # fmt: skip


WARM_UP = 2
"""Steps before those that are timed."""


class RandomTokens:
    """A dataset of prompts, as SAELens's store reads it: without end."""

    def __init__(self, d_vocab: int, context_size: int):
        self.d_vocab, self.context_size = d_vocab, context_size

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        while True:
            tokens = torch.randint(self.d_vocab, (self.context_size,))
            yield {"tokens": tokens.tolist()}


def language_model(shape: Model, o: argparse.Namespace) -> HookedTransformer:
    cfg = HookedTransformerConfig(
        n_layers=shape.layer + 1,
        n_ctx=shape.context_size,
        device=o.device,
        dtype=torch.bfloat16 if o.precision == "bf16" else torch.float32,
        seed=0,
        **shape.cfg,
    )
    return HookedTransformer(cfg)


def runner_config(sae: Any, shape: Model, steps: int, o: argparse.Namespace) -> Any:
    return LanguageModelSAERunnerConfig(
        sae=sae,
        model_name="random weights",
        dataset_path="random tokens",
        hook_name=f"blocks.{shape.layer}.hook_resid_post",
        context_size=shape.context_size,
        store_batch_size_prompts=shape.prompts,
        n_batches_in_buffer=o.buffer,
        training_tokens=steps * o.batch_size,
        train_batch_size_tokens=o.batch_size,
        device=o.device,
        autocast=o.precision == "bf16",
        autocast_lm=o.precision == "bf16",
        dtype="float32",
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
        save_final_checkpoint=False,
    )


def run(o: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Print and give the tokens per second of the language model, then of each SAE."""
    shape = MODELS[o.model]
    o.d_in = shape.cfg["d_model"]
    configs: Any = sae_configs(o)
    model = language_model(shape, o)
    data = RandomTokens(shape.cfg["d_vocab"], shape.context_size)
    runners: dict[str, Any] = {
        "BatchTopK": LanguageModelSAETrainingRunner,
        "ScaffoldBatchTopK": ResumableTrainingRunner,
    }
    print(f"{o.model}, random weights, layer {shape.layer}, {o.precision}, {o.device}")
    print("| | tokens / s | s | peak memory, MiB |\n|---|---|---|---|")

    def timed(name: str, work: Any) -> dict[str, Any]:
        gc.collect()
        if o.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        peak = float("nan")
        if o.device == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 2**20
        seconds = time.perf_counter() - start
        rate = o.steps * o.batch_size / seconds
        print(f"| {name} | {rate:.0f} | {seconds:.1f} | {peak:.0f} |", flush=True)
        return {"of": name, "tokens_per_s": rate, "s": seconds, "peak_mib": peak}

    for name, runner_class in runners.items():

        def runner(steps: int, name: str = name, cls: Any = runner_class) -> Any:
            cfg = runner_config(configs[name], shape, steps, o)
            return cls(cfg, override_dataset=data, override_model=model)

        runner(WARM_UP).run()  # compiles, and chooses algorithms
        timed_runner = runner(o.steps)
        if name == "BatchTopK":
            store = iter(timed_runner.activations_store)
            yield timed("language model alone", partial(read, store, o.steps))
        yield timed(name, timed_runner.run)


def read(store: Iterator[torch.Tensor], n_batches: int) -> None:
    for _ in range(n_batches):
        next(store)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sizes(parser)
    parser.set_defaults(d_sae=24_576, batch_size=1024)
    parser.add_argument("--model", choices=MODELS, default="gpt2-small")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--buffer", type=int, default=16, help="batches mixed at a time"
    )
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu"
    )
    for _ in run(parser.parse_args()):
        pass


if __name__ == "__main__":
    main()
