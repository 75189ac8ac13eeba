"""Matryoshka BatchTopK SAEs with a scaffold, for training."""

import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from sae_lens.saes import matryoshka_batchtopk_sae as matryoshka
from typing_extensions import override

from saelens_scaffold.saes import scaffold_batchtopk_sae as scaffold_batchtopk


@dataclass
class ScaffoldMatryoshkaTrainingSAEConfig(
    scaffold_batchtopk.ScaffoldBatchTopKTrainingSAEConfig,
    matryoshka.MatryoshkaBatchTopKTrainingSAEConfig,
):
    """
    Configuration class for training a ScaffoldMatryoshkaTrainingSAE.

    A Matryoshka BatchTopK SAE whose first `scaffold_rank` latents are the linear
    scaffold of [arXiv 2606.14040](https://arxiv.org/abs/2606.14040). After training it
    is saved as a `scaffold_jumprelu` SAE.

    Args:
        matryoshka_widths (list[int]): The widths of the matryoshka levels, scaffold
            latents counted, so the first must be larger than scaffold_rank. Inherited
            from MatryoshkaBatchTopKTrainingSAEConfig.
        use_matryoshka_aux_loss (bool): Whether to encourage dead latents to reconstruct
            the error of just their own level rather than the error of the entire SAE.
            Inherited from MatryoshkaBatchTopKTrainingSAEConfig.
        scaffold_rank (int): Rank r of the scaffold. Inherited from
            ScaffoldBatchTopKTrainingSAEConfig.
        sparse_encoder_input (Literal["residual", "activation"]): What the sparse
            encoder reads. Inherited from ScaffoldBatchTopKTrainingSAEConfig.
        scaffold_init (Literal["pca", "random", "zeros"]): How the scaffold starts.
            Inherited from ScaffoldBatchTopKTrainingSAEConfig.
        kernels (Literal["auto", "reference", "torch", "triton"]): What computes a training
            step. Inherited from ScaffoldBatchTopKTrainingSAEConfig.
        k (float): Average number of sparse latents to keep active across the batch,
            scaffold latents not counted. Inherited from BatchTopKTrainingSAEConfig.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return "scaffold_matryoshka"

    @override
    def validate(self) -> None:
        super().validate()
        if self.matryoshka_widths and self.scaffold_rank >= self.matryoshka_widths[0]:
            raise ValueError(
                "scaffold_rank must be less than the first of matryoshka_widths="
                f"{self.matryoshka_widths}, got {self.scaffold_rank}."
            )
        if self.normalize_activations in ("layer_norm", "constant_norm_rescale"):
            raise ValueError(
                "normalize_activations must be 'none', 'expected_average_only_in' or "
                "'covariance_whitening' for Matryoshka SAEs, got "
                f"{self.normalize_activations!r}: SAELens undoes run-time normalisation "
                "once per step, and Matryoshka's inner losses need it once per level."
            )


class ScaffoldMatryoshkaTrainingSAE(
    scaffold_batchtopk.ScaffoldBatchTopKTrainingSAE,
    matryoshka.MatryoshkaBatchTopKTrainingSAE,
):
    """
    Matryoshka BatchTopK Training SAE with a computational scaffold (arXiv 2606.14040).

    Matryoshka levels are prefixes of the latents, and the scaffold is the first
    latents, so every level contains it.
    """

    cfg: ScaffoldMatryoshkaTrainingSAEConfig  # type: ignore[assignment]

    @override
    def level_widths(self) -> Sequence[int]:
        return self.cfg.matryoshka_widths

    @override
    def dead_latents(self, dead: torch.Tensor) -> dict[int, torch.Tensor]:
        if not self.cfg.use_matryoshka_aux_loss:
            return super().dead_latents(dead)
        starts = [0, *(width - self.cfg.scaffold_rank for width in self.level_widths())]
        latents = dead.nonzero().view(-1)
        of_levels = itertools.pairwise(starts)
        return {
            level: latents[(latents >= start) & (latents < stop)]
            for level, (start, stop) in enumerate(of_levels)
        }

    @override
    def _iterable_decode(
        self, feature_acts: torch.Tensor, include_outer_loss: bool = False
    ) -> Generator[tuple[int, torch.Tensor], None, None]:
        step = self._sparse_step
        if step is None or feature_acts is not step.feature_acts:
            yield from super()._iterable_decode(feature_acts, include_outer_loss)
            return
        widths = self.cfg.matryoshka_widths
        for width, level in zip(widths, step.levels, strict=True):
            if include_outer_loss or width != widths[-1]:
                yield width, self.run_time_activation_norm_fn_out(level + self.b_dec)
