"""Train a language model like the one embedded in `saelens_scaffold.models`.

The text is the standard library of the Python that runs this script, less the files that
`saelens_scaffold.models.stdlib` holds out. The full run takes about 40 minutes on 2 CPU
cores and ends near 2.4 nats per held-out token. Started again after an interruption, with
the same arguments, it goes on from the last checkpoint, in DIR.partial.

    python benchmarks/train_embedded_model.py --out py-neox
"""

import argparse
import math
import os
import platform
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from saelens_scaffold._util.files import new_directory
from saelens_scaffold.models.local import register_local_model
from saelens_scaffold.models.stdlib import load_stdlib_text

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
CONTEXT = 256
BATCH_SIZE = 16
STEPS = 4500
WARMUP_STEPS = 200
LEARNING_RATE = 2e-3
FINAL_LEARNING_RATE = 0.1  # as a share of the highest
WEIGHT_DECAY = 0.1  # on matrices
BETAS = (0.9, 0.95)
CLIP_NORM = 1.0
EVAL_BLOCKS = 192

README = """# {name}
A GPT-NeoX language model of Python source code: hidden size {config.hidden_size}, \
{config.num_hidden_layers} layers, {config.num_attention_heads} heads, {parameters:.1f} M parameters, \
byte-level BPE of {config.vocab_size:,} tokens (`{end}` is BOS, EOS and padding), context \
{config.max_position_embeddings} (trained at {context}).

Made by `benchmarks/train_embedded_model.py` of saelens-scaffold with `--steps {steps} --seed \
{seed}` from the standard library of CPython {python}: {files:,} files, {tokens:,} tokens. \
Held-out cross-entropy {loss:.3f} nats per token. Stored in bfloat16.
"""


def main() -> None:
    """Train, or go on training, and write the model."""
    args = parse_args()
    if args.out.exists():
        raise SystemExit(
            f"--out {args.out} exists already; remove it or choose another"
        )
    partial = args.out.with_name(f"{args.out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)

    train_texts: list[str] = load_stdlib_text("train")["text"]
    tokenizer = load_or_train_tokenizer(partial / "tokenizer.json", train_texts)
    train_blocks = tokenize(tokenizer, train_texts)
    # The held-out files come shuffled, so the first blocks are a fair sample of them.
    test_blocks = tokenize(tokenizer, load_stdlib_text("test")["text"])[:EVAL_BLOCKS]
    print(
        f"{len(train_texts):,} files, {train_blocks.numel():,} tokens in blocks of {CONTEXT}"
    )

    torch.manual_seed(args.seed)
    model = GPTNeoXForCausalLM(model_config()).to(args.device)
    optimizer = make_optimizer(model)
    checkpoint = partial / "checkpoint.pt"
    settings = {
        "steps": args.steps,
        "seed": args.seed,
        "tokens": sha256(train_blocks.numpy().tobytes()).hexdigest(),
    }
    first_step = load_checkpoint(checkpoint, settings, model, optimizer, args.device)

    progress = tqdm(range(first_step, args.steps), initial=first_step, total=args.steps)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate_factor(step, args.steps)
        batch = batch_at(step, train_blocks, args.seed).to(args.device)
        loss = cross_entropy(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % args.checkpoint_every == 0:
            save_checkpoint(checkpoint, step + 1, settings, model, optimizer)
            progress.write(
                f"step {step + 1}: held-out {evaluate(model, test_blocks):.3f}"
            )

    model.bfloat16()
    held_out = evaluate(model, test_blocks)
    print(f"held-out cross-entropy: {held_out:.3f} nats per token")
    with new_directory(args.out) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        file = directory / "tokenizer_config.json"
        # transformers 4 does not know the class by transformers 5's name
        text = file.read_text(encoding="utf-8")
        text = text.replace("TokenizersBackend", "PreTrainedTokenizerFast")
        file.write_text(text, encoding="utf-8")
        readme = README.format(
            name=args.out.name,
            config=model.config,
            parameters=sum(p.numel() for p in model.parameters()) / 1e6,
            end=END_OF_TEXT,
            context=CONTEXT,
            steps=args.steps,
            seed=args.seed,
            python=platform.python_version(),
            files=len(train_texts),
            tokens=train_blocks.numel(),
            loss=held_out,
        )
        (directory / "README.md").write_text(readme, encoding="utf-8")
        register_local_model(directory)  # TransformerLens must be able to read it
    shutil.rmtree(partial)
    print(f"written to {args.out}")


def parse_args() -> argparse.Namespace:
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="new directory for the model"
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="training steps (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights and the order (%(default)s)"
    )
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        default=250,
        metavar="STEPS",
        help="save and evaluate this often (%(default)s)",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="cpu or cuda; bfloat16 autocast on both (%(default)s)",
    )
    args = parser.parse_args()
    for flag in ("steps", "checkpoint_every"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} must be at least 1")
    return args


def model_config() -> GPTNeoXConfig:
    """The model's shape: 5.2 M parameters, rotary 25 %, parallel residual, untied."""
    return GPTNeoXConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=512,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
        use_parallel_residual=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def load_or_train_tokenizer(file: Path, texts: list[str]) -> PreTrainedTokenizerFast:
    """Read the tokenizer from `file`, or train it on `texts` and write it there.

    Args:
        file: A tokenizer.json.
        texts: The training text.

    Returns:
        Byte-level BPE of 4,096 tokens whose id 0 is BOS, EOS and padding.
    """
    if file.exists():
        tokenizer = Tokenizer.from_file(str(file))
    else:
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
        tokenizer.decoder = ByteLevelDecoder()  # pyright: ignore[reportAttributeAccessIssue]
        trainer = BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(texts, trainer, length=len(texts))
        temporary = file.with_suffix(".tmp")
        tokenizer.save(str(temporary))
        os.replace(temporary, file)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        # no token_type_ids, which transformers 4 would add and GPT-NeoX does not take
        model_input_names=["input_ids", "attention_mask"],
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Cut texts, each after an end-of-text token, into blocks of equal length.

    Args:
        tokenizer: The tokenizer.
        texts: One text for each file.

    Returns:
        Token ids (blocks, 256).
    """
    ids: list[torch.Tensor] = []
    for start in tqdm(range(0, len(texts), 64), desc="tokenizing", leave=False):
        for encoded in tokenizer(texts[start : start + 64])["input_ids"]:
            ids.append(torch.tensor([0, *encoded], dtype=torch.int16))
    tokens = torch.cat(ids)
    return tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def batch_at(step: int, blocks: torch.Tensor, seed: int) -> torch.Tensor:
    """The batch of a step. It depends on nothing else, so resuming is exact.

    Args:
        step: Number of the step, from 0.
        blocks: All blocks (blocks, 256).
        seed: Of the order, which is new in every pass over the blocks.

    Returns:
        Token ids (16, 256).
    """
    epoch, index = divmod(step, len(blocks) // BATCH_SIZE)
    order = torch.randperm(
        len(blocks), generator=torch.Generator().manual_seed(1_000_003 * seed + epoch)
    )
    return blocks[order[index * BATCH_SIZE : (index + 1) * BATCH_SIZE]]


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to 10 %, as a share of the highest rate."""
    warmup = min(WARMUP_STEPS, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return (
        FINAL_LEARNING_RATE
        + (1 - FINAL_LEARNING_RATE) * (1 + math.cos(math.pi * done)) / 2
    )


def make_optimizer(model: GPTNeoXForCausalLM) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=BETAS,
    )


def cross_entropy(model: GPTNeoXForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean loss of predicting each next token of a batch (blocks, 256), in nats."""
    batch = batch.long()
    with torch.autocast(batch.device.type, dtype=torch.bfloat16):
        loss = model(batch, labels=batch).loss
    assert loss is not None
    return loss


@torch.no_grad()
def evaluate(model: GPTNeoXForCausalLM, blocks: torch.Tensor) -> float:
    """Mean loss over blocks (blocks, 256), in nats per token."""
    losses = [
        cross_entropy(model, batch.to(model.device)).item() * len(batch)
        for batch in blocks.split(BATCH_SIZE)
    ]
    return sum(losses) / len(blocks)


def save_checkpoint(
    file: Path,
    step: int,
    settings: dict[str, Any],
    model: GPTNeoXForCausalLM,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Save all a run's state; batches and learning rates follow from the step alone."""
    state = {
        "step": step,
        "settings": settings,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    temporary = file.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, file)


def load_checkpoint(
    file: Path,
    settings: dict[str, Any],
    model: GPTNeoXForCausalLM,
    optimizer: torch.optim.Optimizer,
    device: str,
) -> int:
    """Restore a run's state, if there is any.

    Args:
        file: The checkpoint, which need not exist.
        settings: What must be the same as in the run that saved it.
        model: To be restored.
        optimizer: To be restored.
        device: Of the model.

    Returns:
        The next step, 0 without a checkpoint.

    Raises:
        SystemExit: The checkpoint is of a run with other settings.
    """
    if not file.exists():
        return 0
    state = torch.load(file, map_location=device, weights_only=True)
    if state["settings"] != settings:
        differing = [
            name for name in settings if settings[name] != state["settings"].get(name)
        ]
        raise SystemExit(
            f"{file} is of a run with other {', '.join(differing)}; use the same arguments and "
            f"the same Python, or remove {file.parent}"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"].cpu())
    print(f"going on from step {state['step']}")
    return state["step"]


if __name__ == "__main__":
    main()
