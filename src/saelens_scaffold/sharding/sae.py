"""SAEs of which each process trains a part."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from typing_extensions import override

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.kernels.choice import sparse_kernels
from saelens_scaffold.kernels.lazy import SparseActivations
from saelens_scaffold.plugins import manager as plugins
from saelens_scaffold.saes import (
    ScaffoldBatchTopKTrainingSAE,
    ScaffoldBatchTopKTrainingSAEConfig,
    ScaffoldJumpReLUSAE,
    ScaffoldMatryoshkaTrainingSAE,
    ScaffoldMatryoshkaTrainingSAEConfig,
)
from saelens_scaffold.saes.scaffold import build_sae
from saelens_scaffold.sharding import state
from saelens_scaffold.sharding.selection import ShardedTopSelection
from saelens_scaffold.sharding.shard import Shard

WholeConfig = ScaffoldBatchTopKTrainingSAEConfig


class ShardedBatchTopKTrainingSAE(ScaffoldBatchTopKTrainingSAE):
    """
    A process's part of a ScaffoldBatchTopKTrainingSAE: the scaffold and some latents.

    `cfg` is of this part, and so is what is of single latents: weights, activations, masks
    of dead latents, firing counts. Losses, reconstructions, thresholds and l0_sparse are of
    the whole SAE, and equal on all processes. It encodes in training steps only; see
    `whole_sae` for anything else.

    All processes call its methods together.

    Args:
        cfg: Configuration of the part, see `part_config`.
        shard: The part.
        whole_cfg: Configuration of the whole SAE.
    """

    whole_cfg: WholeConfig

    def __init__(self, cfg: WholeConfig, shard: Shard, whole_cfg: WholeConfig):
        super().__init__(cfg)
        self.shard, self.whole_cfg = shard, whole_cfg
        self.selection = ShardedTopSelection(shard)

    @property
    def latents(self) -> torch.Tensor:
        """This part's latents in the whole SAE, shape (d_sae of the part,)."""
        return self.shard.latents(self.whole_cfg.d_sae, self.whole_cfg.scaffold_rank)

    @override
    def sum_over_shards(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        if len(tensors) == 1:
            return [self.shard.sum_(tensors[0].detach())]
        # in one message
        sizes = [tensor.numel() for tensor in tensors]
        joined = torch.cat([tensor.detach().flatten() for tensor in tensors])
        sums = self.shard.sum_(joined).split(sizes)
        return [
            total.view_as(tensor) for total, tensor in zip(sums, tensors, strict=True)
        ]

    def of_all_latents(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the latents of all parts, shape (d_sae of the whole,), from this part's."""
        whole = values.new_zeros(self.whole_cfg.d_sae)
        whole[self.latents] = values
        if not self.shard.is_first:  # what all have counts once
            whole[: self.cfg.scaffold_rank] = 0.0
        return self.shard.sum_(whole)

    @override
    @torch.no_grad()
    def log_histograms(self) -> dict[str, Any]:
        norms = self.of_all_latents(self.W_dec.float().norm(dim=1))
        return {"weights/W_dec_norms": norms.cpu().numpy()}

    @override
    def _training_step(
        self, step_input: TrainStepInput, kernels: ModuleType | None
    ) -> TrainStepOutput:
        if kernels is None:
            raise UserError(
                "an SAE of several processes trains in sparse kernels only: without hooks "
                "at its hook points, and without kernels='reference', which the "
                "environment's SAELENS_SCAFFOLD_KERNELS may also say"
            )
        return super()._training_step(step_input, kernels)

    @override
    @torch.no_grad()
    def initialize_scaffold(self, sae_in: torch.Tensor) -> None:
        super().initialize_scaffold(sae_in)
        rank = self.cfg.scaffold_rank
        # all have computed it, and rounding must not part them
        for weight in (self.W_enc[:, :rank], self.W_dec[:rank], self.b_dec):
            weight.copy_(self.shard.broadcast_(weight.clone()))

    @override
    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: torch.Tensor) -> None:
        assert isinstance(acts_topk, SparseActivations)
        active = acts_topk.active.double()
        infinity = active.new_tensor([torch.inf])
        least = self.shard.min_(torch.cat([active[active > 0], infinity]).min()[None])
        # of the dictionary alone, so not by way of the parent, which looks for that
        BatchTopKTrainingSAE.update_topk_threshold(self, least[least < infinity])

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save the whole SAE in its training form, from the first process."""
        if (whole := whole_sae(self)) is not None:
            whole.save_model(path)
        return Path(path) / SAE_WEIGHTS_FILENAME, Path(path) / SAE_CFG_FILENAME

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save the whole SAE in its inference form, from the first process."""
        plugins.end_training(self)
        if (whole := whole_sae(self)) is not None:
            whole.save_inference_model(path)
        return Path(path) / SAE_WEIGHTS_FILENAME, Path(path) / SAE_CFG_FILENAME

    @override
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        raise UserError(
            "one process's part of an SAE encodes in training steps only; whole_sae makes "
            "the whole one"
        )

    @override
    def to_inference(self) -> ScaffoldJumpReLUSAE:
        raise UserError(
            "one process's part of an SAE has no inference form; whole_sae makes the whole "
            "one"
        )


class ShardedMatryoshkaTrainingSAE(
    ShardedBatchTopKTrainingSAE, ScaffoldMatryoshkaTrainingSAE
):
    """A process's part of a ScaffoldMatryoshkaTrainingSAE, with a part of each level."""

    cfg: ScaffoldMatryoshkaTrainingSAEConfig  # type: ignore[assignment]
    whole_cfg: ScaffoldMatryoshkaTrainingSAEConfig  # type: ignore[assignment]

    @override
    def _iterable_decode(
        self, feature_acts: torch.Tensor, include_outer_loss: bool = False
    ) -> Generator[tuple[int, torch.Tensor], None, None]:
        levels = super()._iterable_decode(feature_acts, include_outer_loss)
        # SAELens names losses after the widths
        widths = _level_widths(self.whole_cfg)
        for width, (_, level) in zip(widths, levels, strict=False):
            yield width, level


def check_shardable(cfg: Any, world_size: int) -> None:
    """
    See that an SAE can be trained by several processes.

    Args:
        cfg: Configuration of the whole SAE.
        world_size: Number of processes.

    Raises:
        UserError: It cannot, and why.
    """
    if not isinstance(cfg, WholeConfig):
        raise UserError(
            f"architecture is {cfg.architecture()!r}; several processes train one SAE of "
            "'scaffold_batchtopk' or 'scaffold_matryoshka'"
        )
    if cfg.kernels == "reference":
        raise UserError(
            "kernels is 'reference'; several processes need 'auto', 'torch' or 'triton'"
        )
    starts = [cfg.scaffold_rank, *_level_widths(cfg)]
    narrowest = min(
        stop - start for start, stop in zip(starts[:-1], starts[1:], strict=True)
    )
    if narrowest < world_size:
        raise UserError(
            f"d_sae or a level of matryoshka_widths has {narrowest} latents without the "
            f"scaffold; there must be one for each of {world_size} processes"
        )
    if cfg.k > (cfg.d_sae - cfg.scaffold_rank) // world_size:
        raise UserError(
            f"k is {cfg.k}; it must be at most the latents of each of {world_size} "
            f"processes, {(cfg.d_sae - cfg.scaffold_rank) // world_size}"
        )
    plugins.check_fit_for_shards(cfg.scaffold_plugins)


def shard_sae(
    sae: ScaffoldBatchTopKTrainingSAE | None, cfg: WholeConfig, shard: Shard
) -> ShardedBatchTopKTrainingSAE:
    """
    This process's part of an SAE, from the first process, which has made it.

    Args:
        sae: The whole SAE, on any device; None on other processes than the first.
        cfg: Configuration of the whole SAE, with this process's device.
        shard: The part.

    Raises:
        UserError: The SAE cannot be trained by several processes.
    """
    check_shardable(cfg, shard.world_size)
    parts = None
    if sae is not None:
        whole = sae.state_dict()
        parts = (state.take(whole, of_part) for of_part in _all_latents(cfg, shard))
    is_matryoshka = isinstance(cfg, ScaffoldMatryoshkaTrainingSAEConfig)
    sae_class = (
        ShardedMatryoshkaTrainingSAE if is_matryoshka else ShardedBatchTopKTrainingSAE
    )
    make = partial(sae_class, shard=shard, whole_cfg=cfg)
    return build_sae(make, part_config(cfg, shard), shard.scatter(parts))


def whole_sae(sae: ShardedBatchTopKTrainingSAE) -> ScaffoldBatchTopKTrainingSAE | None:
    """
    The whole SAE in its training form, on the CPU of the first process; None on others.

    Its threshold is calibrated if that of the parts would be, and its plugins are theirs.
    """
    weights = sae.state_dict()
    sae.process_state_dict_for_saving(weights)
    parts = sae.shard.gather(weights)
    if parts is None:
        return None
    whole, is_matryoshka = sae.whole_cfg, isinstance(sae, ShardedMatryoshkaTrainingSAE)
    # of the part's, which training may have changed
    changes: dict[str, Any] = {"d_sae": whole.d_sae, "kernels": whole.kernels}
    if is_matryoshka:
        changes["matryoshka_widths"] = [*_level_widths(whole)]
    cfg = replace(sae.cfg, device="cpu", **changes)
    sae_class = (
        ScaffoldMatryoshkaTrainingSAE if is_matryoshka else ScaffoldBatchTopKTrainingSAE
    )
    latents = [*_all_latents(cfg, sae.shard)]
    built = build_sae(sae_class, cfg, state.put(parts, latents), copies=False)
    plugins.share(sae, built)
    return built


def part_config(cfg: WholeConfig, shard: Shard) -> WholeConfig:
    """The configuration of this process's part of an SAE."""
    latents = shard.latents(cfg.d_sae, cfg.scaffold_rank)
    changes: dict[str, Any] = {"d_sae": len(latents)}
    if cfg.kernels == "auto":
        changes["kernels"] = sparse_kernels(torch.device(cfg.device))
    if isinstance(cfg, ScaffoldMatryoshkaTrainingSAEConfig):
        widths = torch.tensor(_level_widths(cfg))
        changes["matryoshka_widths"] = torch.searchsorted(latents, widths).tolist()
    return replace(cfg, **changes)


def _level_widths(cfg: WholeConfig) -> Sequence[int]:
    widths = getattr(cfg, "matryoshka_widths", [])
    return [*(width for width in widths if width < cfg.d_sae), cfg.d_sae]


def _all_latents(cfg: WholeConfig, shard: Shard) -> Iterator[torch.Tensor]:
    for part in range(shard.world_size):
        yield shard.latents(cfg.d_sae, cfg.scaffold_rank, part)
