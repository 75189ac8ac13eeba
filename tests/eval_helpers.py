"""Small SAEs of the embedded model, for tests of evaluations."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata

from saelens_scaffold import ScaffoldJumpReLUSAE
from saelens_scaffold.saes import ScaffoldJumpReLUSAEConfig

D_MODEL = 256
HOOK = "blocks.0.hook_resid_post"
"""After the first of the model's four layers, because it is the cheapest."""


def evaluation_names(*names: str) -> list[Any]:
    """Names of evaluations as parameters; those of SAEBench need it."""
    own = ("dark_matter", "dense_latents", "scaffold_ablation")
    needs = pytest.mark.sae_bench
    return [n if n in own else pytest.param(n, marks=needs) for n in names]


def eval_sae(
    rank: int = 0, seed: int = 0, d_sae: int = 96, hook_name: str = HOOK, **kwargs: Any
) -> Any:
    """A plain (rank 0) or scaffold SAE, whose latents fire at very different rates."""
    cfg_kwargs: dict[str, Any] = {
        "d_in": D_MODEL,
        "d_sae": d_sae,
        "metadata": SAEMetadata(
            model_name="py-neox", hook_name=hook_name, context_size=64, prepend_bos=True
        ),
        **kwargs,
    }
    sae = (
        ScaffoldJumpReLUSAE(ScaffoldJumpReLUSAEConfig(**cfg_kwargs, scaffold_rank=rank))
        if rank
        else JumpReLUSAE(JumpReLUSAEConfig(**cfg_kwargs))
    )
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(d_sae, D_MODEL, generator=g)
    directions /= directions.norm(dim=1, keepdim=True)
    with torch.no_grad():
        sae.W_dec.copy_(directions)
        sae.W_enc.copy_(directions.T)
        sae.b_enc.zero_()
        sae.b_dec.copy_(0.01 * torch.randn(D_MODEL, generator=g))
        sae.threshold.copy_(torch.linspace(0.05, 1.5, d_sae))
        sae.threshold[:rank] = -torch.inf
    return sae


@torch.no_grad()
def assert_fired(fired: Sequence[int], sae: Any, x: torch.Tensor) -> None:
    """The latents' counts of firing on `x`, which come of another forward pass.

    The two passes differ by rounding, so that a token whose pre-activation is that
    close to the threshold may or may not count.
    """
    bounds = []
    for rounding in (-1e-5, 1e-5):
        moved = copy.deepcopy(sae)
        moved.threshold += rounding
        bounds.append((moved.encode(x) != 0).sum(dim=0)[-len(fired) :])
    assert len(fired) == sae.cfg.d_sae - getattr(sae.cfg, "scaffold_rank", 0)
    found, (most, fewest) = torch.tensor(fired), bounds
    assert (found <= most).all(), (found - most).max()
    assert (found >= fewest).all(), (fewest - found).max()
    assert (most - fewest).sum() < 1e-3 * most.sum()  # else it proves little


def write_texts(
    path: Path, texts: Sequence[str], labels: Sequence[str] | None = None
) -> Path:
    """A .jsonl, .csv or .parquet file, or a directory of the datasets library."""
    from datasets import Dataset

    columns: dict[str, list[str]] = {"text": list(texts)}
    if labels is not None:
        columns["label"] = list(labels)
    dataset = Dataset.from_dict(columns)
    write = {
        ".jsonl": dataset.to_json,
        ".csv": dataset.to_csv,
        ".parquet": dataset.to_parquet,
        "": dataset.save_to_disk,
    }
    write[path.suffix](str(path))
    return path
