"""BatchTopK SAEs with a scaffold, for training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from sae_lens.config import dict_field
from sae_lens.saes import batchtopk_sae as batchtopk
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from typing_extensions import override

from saelens_scaffold.kernels.choice import Kernels
from saelens_scaffold.kernels.lazy import SparseActivations
from saelens_scaffold.kernels.memory import gradient_memory
from saelens_scaffold.kernels.selection import TopSelection
from saelens_scaffold.plugins import manager as plugins
from saelens_scaffold.saes import calibration, scaffold, sparse_step
from saelens_scaffold.saes import scaffold_jumprelu_sae as scaffold_jumprelu
from saelens_scaffold.saes.scaffold_start import scaffold_start
from saelens_scaffold.saes.sparse_step import SparseStep


@dataclass
class ScaffoldBatchTopKTrainingSAEConfig(batchtopk.BatchTopKTrainingSAEConfig):
    """
    Configuration class for training a ScaffoldBatchTopKTrainingSAE.

    A BatchTopK SAE whose first `scaffold_rank` latents are linear: the computational
    scaffold of [arXiv 2606.14040](https://arxiv.org/abs/2606.14040), a rank-r
    bottleneck that absorbs the dense part of the activations, so that the sparse
    dictionary needs no dense latents. After training it is saved as a
    `scaffold_jumprelu` SAE.

    Args:
        scaffold_rank (int): Rank r of the scaffold. Its r latents are counted in d_sae,
            and are not counted in k. 0 gives a plain BatchTopK SAE.
        sparse_encoder_input (Literal["residual", "activation"]): What the sparse
            encoder reads: what the scaffold left of the activation, or the whole
            activation.
        scaffold_init (Literal["pca", "random", "zeros"]): How the scaffold starts. "pca"
            spans the top-r principal directions of the first training batch, and starts
            b_dec at its mean. "random" is SAELens's initialisation. "zeros" starts with a
            scaffold whose output is zero.
        scaffold_plugins (dict[str, dict[str, Any]]): Names of plugins, each with its
            options, as in {"live_metrics": {"window": 200}}. See docs/plugins.md.
        kernels (Literal["auto", "reference", "torch", "triton"]): Implementation of the
            training step. "auto" uses sparse kernels if there is a scaffold and k is small
            relative to d_sae; "reference" is SAELens's dense code. The environment variable
            SAELENS_SCAFFOLD_KERNELS overrides it. See docs/kernels.md.
        calibrate_threshold (bool): Whether the threshold of the inference form is
            calibrated so that k sparse latents fire per token on a sample of the training
            activations. Otherwise it is SAELens's running average, which is far too low
            after a short training. With scaffold_rank=0 it is always SAELens's.
        k (float): Average number of sparse latents to keep active across the batch,
            scaffold latents not counted. Inherited from BatchTopKTrainingSAEConfig.
        topk_threshold_lr (float): Learning rate for updating the global topk threshold.
            Inherited from BatchTopKTrainingSAEConfig.
        aux_loss_coefficient (float): Coefficient for the auxiliary loss that encourages
            dead sparse latents to learn useful features. 0 switches it off. Inherited
            from TopKTrainingSAEConfig.
        rescale_acts_by_decoder_norm (bool): Treat the decoder as if it was already
            normalized. Inherited from TopKTrainingSAEConfig.
        decoder_init_norm (float | None): Norm to initialize decoder weights to.
            Inherited from TrainingSAEConfig.
        d_in (int): Input dimension (dimensionality of the activations being encoded).
            Inherited from SAEConfig.
        d_sae (int): Number of latents, those of the scaffold included. Inherited from
            SAEConfig.
        dtype (str): Data type for the SAE parameters. Inherited from SAEConfig.
        device (str): Device to place the SAE on. Inherited from SAEConfig.
    """

    scaffold_rank: int = 24
    sparse_encoder_input: Literal["residual", "activation"] = "residual"
    scaffold_init: Literal["pca", "random", "zeros"] = "pca"
    scaffold_plugins: dict[str, dict[str, Any]] = dict_field(default={})
    kernels: Kernels = "auto"
    calibrate_threshold: bool = True

    @override
    @classmethod
    def architecture(cls) -> str:
        return "scaffold_batchtopk"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return scaffold_jumprelu.ScaffoldJumpReLUSAEConfig

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self.validate()

    def validate(self) -> None:
        """
        Raises:
            ValueError: A scaffold SAE cannot be trained with the value of a field.
        """
        scaffold.check_scaffold_config(
            self, "sparse_encoder_input", "scaffold_init", "kernels"
        )
        n_sparse = self.d_sae - self.scaffold_rank
        if not 0 < self.k <= n_sparse:
            raise ValueError(
                f"k must be above 0 and at most d_sae - scaffold_rank = {n_sparse}, "
                f"got {self.k}."
            )
        norm = self.normalize_activations
        at_run_time = norm in ("layer_norm", "constant_norm_rescale")
        if at_run_time and self.aux_loss_coefficient != 0:
            raise ValueError(
                f"aux_loss_coefficient must be 0 with normalize_activations={norm!r}, got "
                f"{self.aux_loss_coefficient}: SAELens's auxiliary loss for dead latents "
                "does not support run-time normalisation, and stops the training when the "
                "first latent dies."
            )
        if self.scaffold_plugins:
            plugins.make_plugins(self.scaffold_plugins)


class ScaffoldBatchTopKTrainingSAE(
    scaffold.ScaffoldMixin, batchtopk.BatchTopKTrainingSAE
):
    """
    BatchTopK Training SAE with a computational scaffold (arXiv 2606.14040).

    With r = scaffold_rank, A = W_enc[:, :r], B = W_dec[:r], and x̄ = x - b_dec:

        z = x̄ A                                 scaffold coordinates, dense, signed
        h = (x̄ - ρ z B) W_enc[:, r:] + b_enc[r:]
        f = BatchTopK(ReLU(h))                   k per token, on average over the batch
        x̂ = z B + f W_dec[r:] + b_dec            = decode(concat[z, f])

    where ρ is 1 for sparse_encoder_input="residual" and 0 for "activation". As the
    first r latents are linear, `decode(encode(x))` is the whole reconstruction, and
    SAELens's losses, metrics, folding and checkpoints apply as they stand. The running
    threshold and the revival of dead latents look at the sparse latents only.

    With scaffold_init="pca" the first training step starts the scaffold on its batch
    (see `initialize_scaffold`). A buffer records that this is done, so neither
    resuming nor fine-tuning does it again.
    """

    cfg: ScaffoldBatchTopKTrainingSAEConfig  # type: ignore[assignment]
    scaffold_is_initialized: torch.Tensor
    calibrated_threshold: torch.Tensor
    """Threshold calibrated for the weights of a checkpoint; -1 during training."""
    calibrates: bool
    """Whether it calibrates its own threshold; a runner may take that over."""
    trains_plain_sae: bool = False
    """Whether its parameters, with rank 0, are a plain SAE's, to be trained in the kernels."""

    def __init__(
        self, cfg: ScaffoldBatchTopKTrainingSAEConfig, use_error_term: bool = False
    ):
        # again, since runners may change a config after it was made
        cfg.validate()
        super().__init__(cfg, use_error_term)
        # a plain attribute costs a step nothing and does not break torch.compile's graph
        self.has_plugins = bool(cfg.scaffold_plugins)
        self.selection = TopSelection()
        self.gradient_memory = gradient_memory(self.W_dec.nbytes)
        self._sparse_step: SparseStep | None = None
        self.sampled_activations = calibration.ActivationSample()
        self.calibrates = cfg.calibrate_threshold and cfg.scaffold_rank > 0
        self._awaits_start = cfg.scaffold_rank > 0 and (
            cfg.scaffold_init == "pca" or self.has_plugins
        )
        is_initialized = torch.tensor(not self._awaits_start, device=self.W_dec.device)
        self.register_buffer("scaffold_is_initialized", is_initialized)
        not_calibrated = torch.full_like(self.topk_threshold, -1.0)
        self.register_buffer("calibrated_threshold", not_calibrated)
        self.register_load_state_dict_post_hook(_read_scaffold_is_initialized)

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        if self.cfg.scaffold_init == "zeros":
            # The encoder, not the decoder: SAELens divides by the decoder's norms.
            self.W_enc.data[:, : self.cfg.scaffold_rank] = 0.0

    @override
    def get_activation_fn(self) -> Callable[[torch.Tensor], torch.Tensor]:
        top_k = batchtopk.BatchTopK(self.cfg.k)
        return scaffold.ScaffoldActivation(self.cfg.scaffold_rank, top_k)

    @override
    def encode_with_hidden_pre(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Scaffold coordinates and sparse activations, and their pre-activations.

        Args:
            x: Activations, shape (..., d_in).

        Returns:
            feature_acts = concat[z, f] and hidden_pre = concat[z, h], both of shape
            (..., d_sae), and both times the decoder's norms with
            rescale_acts_by_decoder_norm.
        """
        x = self.process_sae_in(x)
        if self._sparse_step is not None:
            return self._sparse_step.encode(x)
        hidden_pre = self.pre_activations(x)
        return self.hook_sae_acts_post(self.activation_fn(hidden_pre)), hidden_pre

    def pre_activations(self, x: torch.Tensor) -> torch.Tensor:
        """Pre-activations, shape (..., d_sae), from processed input x̄."""
        W_enc, b_enc = self._encoder()
        hidden_pre = self.hook_sae_acts_pre(x @ W_enc + b_enc)
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * self.W_dec.norm(dim=-1)
        return hidden_pre

    def _encoder(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and bias of the equivalent encoder whose latents all read x̄."""
        rank = self.cfg.scaffold_rank
        b_enc = torch.cat([self.b_enc[:rank].detach(), self.b_enc[rank:]])
        if self.cfg.sparse_encoder_input == "activation":
            return self.W_enc, b_enc
        # Cheaper than subtracting z B from a batch, which is larger than the weights,
        # and joining z and h, which are much larger. Not in autocast's bfloat16, for
        # the folded weights are small differences where A dominates.
        with torch.autocast(self.W_enc.device.type, enabled=False):
            return _fold_residual_input(self.W_enc, b_enc, self.W_dec[:rank])

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if self._awaits_start:
            self.initialize_scaffold(step_input.sae_in)
        if self.has_plugins:
            plugins.before_forward(self, step_input)
        if self.calibrates:
            self._remember(step_input.sae_in)
        # after the plugins, which may have added hooks
        kernels = sparse_step.kernels_for(self, step_input.sae_in)
        if kernels is None:
            return self._training_step(step_input, None)
        return self._sparse_training_step(step_input, kernels)

    @torch.compiler.disable()
    def _remember(self, sae_in: torch.Tensor) -> None:
        self.sampled_activations.add(sae_in)
        self.calibrated_threshold.fill_(-1.0)

    # not compiled: nothing in it could be fused
    @torch.compiler.disable()
    def _sparse_training_step(
        self, step_input: TrainStepInput, kernels: ModuleType
    ) -> TrainStepOutput:
        return self._training_step(step_input, kernels)

    def _training_step(
        self, step_input: TrainStepInput, kernels: ModuleType | None
    ) -> TrainStepOutput:
        for_sparse_latents = self._for_sparse_latents(step_input)
        if kernels is not None:
            sparse_step.fuse_adam_of(self)
            dead = for_sparse_latents.dead_neuron_mask
            self._sparse_step = SparseStep(kernels, self, dead)
        try:
            output = super().training_forward_pass(for_sparse_latents)
        finally:
            self._sparse_step = None
        feature_acts, rank = output.feature_acts.detach(), self.cfg.scaffold_rank
        # evaluated only where the trainer logs
        output.metrics["l0_sparse"] = lambda: self.sum_over_shards(
            _l0_sparse(feature_acts, rank)
        )[0]
        if self.has_plugins:
            plugins.after_forward(self, step_input, output)
        return output

    def level_widths(self) -> Sequence[int]:
        """Widths of the nested reconstructions that are trained, the whole last."""
        return [self.cfg.d_sae]

    def dead_latents(self, dead: torch.Tensor) -> dict[int, torch.Tensor]:
        """
        The dead latents that reconstruct the error of each level.

        Args:
            dead: Mask of the dictionary's latents, shape (d_sae - r,).

        Returns:
            Latents, counted from the dictionary's first, by index of the level.
        """
        return {len(self.level_widths()) - 1: dead.nonzero().view(-1)}

    def sum_over_shards(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        """
        Sums over the processes that each hold a part of the dictionary.

        Here one process holds all of it.

        Args:
            tensors: Sums over this process's latents, of one dtype; without gradients, and
                possibly changed in place.
        """
        return tensors

    @override
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        step = self._sparse_step
        if step is None or feature_acts is not step.feature_acts:
            return super().decode(feature_acts)
        return scaffold.finish_decode(self, step.levels[-1])

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        step = self._sparse_step
        if step is None:
            return super().calculate_aux_loss(step_input, *args, **kwargs)
        loss = self.cfg.aux_loss_coefficient * step.auxiliary_loss(step_input.sae_in)
        return {"auxiliary_reconstruction_loss": loss}

    def _for_sparse_latents(self, step_input: TrainStepInput) -> TrainStepInput:
        """The step's input with a mask that calls only sparse latents dead."""
        mask = step_input.dead_neuron_mask
        if mask is None or self.cfg.aux_loss_coefficient == 0:
            return replace(step_input, dead_neuron_mask=None)
        mask = mask.clone()
        mask[: self.cfg.scaffold_rank] = False
        return replace(step_input, dead_neuron_mask=mask)

    @torch.compiler.disable()
    @torch.no_grad()
    def initialize_scaffold(self, sae_in: torch.Tensor) -> None:
        """
        Start the scaffold on a batch; the first training step calls this.

        A plugin's `initialize_scaffold` decides if one returns a start; else, with
        scaffold_init="pca", B is set to the top-r principal directions of the batch and A
        to their transpose, so that the scaffold is the orthogonal projection onto them,
        and b_dec to the batch's mean (its part outside the subspace, if
        apply_b_dec_to_input is off).

        Tokens with a non-finite component are left out, and so are massive activations
        (BOS, attention sinks), here norms above 10 times the median, which would own the
        first direction and shift the mean. Where the batch does not determine r
        directions (r tokens or fewer, or a rank below r), the missing ones are an
        arbitrary orthonormal completion, which contribute nothing at first and are trained
        like the others; a warning says so.

        Args:
            sae_in: Activations as the SAE takes them in training, shape (..., d_in).

        Raises:
            ValueError: If no token of the batch is finite, or a plugin's start has not
                the scaffold's shape.
        """
        start = scaffold_start(self, sae_in)
        if start is not None:
            rank = self.cfg.scaffold_rank
            self.W_enc[:, :rank] = start.A.to(self.W_enc)
            self.W_dec[:rank] = start.B.to(self.W_dec)
            if start.b_dec is not None:
                self.b_dec.copy_(start.b_dec)
        self.mark_scaffold_initialized()

    def mark_scaffold_initialized(self) -> None:
        """Have the first training step leave the scaffold as it is."""
        self.scaffold_is_initialized.fill_(True)
        self._awaits_start = False

    @override
    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: torch.Tensor) -> None:
        if isinstance(acts_topk, SparseActivations):
            sparse_acts = acts_topk.active
        else:
            sparse_acts = acts_topk[..., self.cfg.scaffold_rank :]
        super().update_topk_threshold(sparse_acts)

    @override
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        self._end_training()
        super().fold_activation_norm_scaling_factor(scaling_factor)

    @override
    def fold_activation_whitening(self, *args: Any, **kwargs: Any) -> None:
        self._end_training()
        super().fold_activation_whitening(*args, **kwargs)

    def _end_training(self) -> None:
        """Calibrate the threshold before normalisation is folded into the weights."""
        plugins.end_training(self)
        threshold = self._calibrated_threshold()
        if threshold >= 0:
            self.topk_threshold.copy_(threshold)
        # both are in units that will no longer be those of the weights
        self.calibrated_threshold.fill_(-1.0)
        self.sampled_activations.clear()

    def _calibrated_threshold(self) -> torch.Tensor:
        """Calibrated threshold of the current weights; -1 if there is none."""
        n_tokens = len(self.sampled_activations)
        if not self.calibrates or n_tokens == 0:
            return self.calibrated_threshold
        calibration.record_calibration(self, n_tokens)
        threshold = calibration.calibrated_threshold(self, self.sampled_activations)
        return torch.full_like(self.calibrated_threshold, threshold)

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        plugins.end_training(self)
        return super().save_inference_model(path)

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        # beside the running average, with which a resumed training continues
        state_dict["calibrated_threshold"] = self._calibrated_threshold()

    @override
    def process_state_dict_for_saving_inference(
        self, state_dict: dict[str, Any]
    ) -> None:
        if self.has_plugins:
            hook = plugins.plugins_of(self).hook
            hook.before_saving_inference(sae=self, state_dict=state_dict)
        super().process_state_dict_for_saving_inference(state_dict)
        threshold = state_dict.pop("calibrated_threshold")
        if threshold >= 0:
            state_dict["threshold"].fill_(float(threshold))
        elif self.cfg.metadata.threshold_calibration is None:
            calibration.record_calibration(self, n_tokens=0)
        del state_dict["scaffold_is_initialized"]
        rank = self.cfg.scaffold_rank
        state_dict["threshold"][:rank] = -torch.inf
        if self.cfg.sparse_encoder_input == "residual":
            names = ("W_enc", "b_enc", "W_dec")
            dtype = torch.promote_types(self.dtype, torch.float32)
            W_enc, b_enc, W_dec = (state_dict[name].to(dtype) for name in names)
            W_enc, b_enc = _fold_residual_input(W_enc, b_enc, W_dec[:rank])
            # new tensors, since those of a state dict share memory with the parameters
            state_dict["W_enc"] = W_enc.to(self.dtype)
            state_dict["b_enc"] = b_enc.to(self.dtype)

    @override
    @torch.no_grad()
    def to_inference(self) -> scaffold_jumprelu.ScaffoldJumpReLUSAE:
        """
        The inference form that `save_inference_model` saves.

        The weights are copies, and training may continue.
        """
        state_dict = self.state_dict()
        self.process_state_dict_for_saving_inference(state_dict)
        cfg_dict = self.cfg.get_inference_sae_cfg_dict()
        cfg = scaffold_jumprelu.ScaffoldJumpReLUSAEConfig.from_dict(cfg_dict)
        return scaffold.build_sae(
            scaffold_jumprelu.ScaffoldJumpReLUSAE, cfg, state_dict
        )


def _l0_sparse(feature_acts: torch.Tensor, rank: int) -> torch.Tensor:
    """Mean number of active sparse latents per token."""
    if isinstance(feature_acts, SparseActivations):
        return feature_acts.active.bool().float().sum() / len(feature_acts)
    return feature_acts[..., rank:].bool().float().sum(-1).mean()


def _read_scaffold_is_initialized(sae: ScaffoldBatchTopKTrainingSAE, _: Any) -> None:
    # A Python bool, because reading the buffer in each step would wait for the GPU.
    sae._awaits_start = not bool(sae.scaffold_is_initialized)


def _fold_residual_input(
    W_enc: torch.Tensor, b_enc: torch.Tensor, B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The encoder that reads x̄ and equals one that reads the residual x̄ - z B.

    W_enc[:, r:] <- (I - A B) W_enc[:, r:], with the same pre-activations. An encoder
    bias of the scaffold goes the same way: b_enc[r:] <- b_enc[r:] - b_A B W_enc[:, r:].

    Args:
        W_enc: Encoder weights, shape (d_in, d_sae).
        b_enc: Encoder bias, shape (d_sae,).
        B: The scaffold's decoder rows, shape (r, d_in).

    Returns:
        The weights and the bias, of the same shapes.
    """
    widths = [len(B), len(b_enc) - len(B)]
    A, W_sparse = W_enc.split(widths, dim=1)
    b_scaffold, b_sparse = b_enc.split(widths)
    read_by_sparse = B @ W_sparse
    return (
        torch.cat([A, W_sparse - A @ read_by_sparse], dim=1),
        torch.cat([b_scaffold, b_sparse - b_scaffold @ read_by_sparse]),
    )
