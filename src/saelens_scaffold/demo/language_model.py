"""A real model: SAEs on the embedded language model, trained and judged by SAELens."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    ActivationsStore,
    LoggingConfig,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer

from saelens_scaffold.demo.architectures import twin_configs
from saelens_scaffold.demo.measures import Measured, measured
from saelens_scaffold.models import (
    EMBEDDED_MODEL_NAME,
    load_embedded_model,
    load_stdlib_text,
)
from saelens_scaffold.saes.pca import principal_subspace
from saelens_scaffold.training.runner import (
    RepeatableMultiSAETrainingRunner,
    initial_sae,
)

CENTRED = " (centred)"
"""Ending of the names of SAEs whose b_dec starts at the activations' mean."""


@dataclass(frozen=True)
class LanguageModelSettings:
    """
    How the SAEs are trained on the embedded language model.

    Attributes:
        hook_name: The hook point.
        d_in: Dimension of the activations there.
        d_sae: Number of latents.
        k: Sparse latents active per token.
        scaffold_rank: Rank of the scaffolds.
        matryoshka_widths: Widths of the Matryoshka levels.
        training_tokens: Tokens trained on.
        batch_size: Tokens a step.
        lr: Adam's learning rate, which falls to a tenth over the last fifth.
        context_size: Tokens a context, BOS included.
        eval_contexts: Held-out contexts measured.
        eval_contexts_ce: How many of them for the cross-entropy.
        pca_contexts: Training contexts for the mean at which centred SAEs start, and for
            the PCA subspace with which scaffolds are compared.
    """

    hook_name: str = "blocks.2.hook_resid_post"
    d_in: int = 256
    d_sae: int = 2048
    k: float = 4
    scaffold_rank: int = 8
    matryoshka_widths: tuple[int, ...] = (128, 512, 2048)
    training_tokens: int = 400_000
    batch_size: int = 1024
    lr: float = 1e-3
    context_size: int = 256
    eval_contexts: int = 256
    eval_contexts_ce: int = 96
    pca_contexts: int = 256


def language_model_configs(
    settings: LanguageModelSettings,
) -> dict[str, TrainingSAEConfig]:
    """The SAEs that are compared on the embedded model."""
    return twin_configs(
        d_in=settings.d_in,
        d_sae=settings.d_sae,
        k=settings.k,
        scaffold_rank=settings.scaffold_rank,
        matryoshka_widths=settings.matryoshka_widths,
        normalize_activations="expected_average_only_in",
    )


class EmbeddedActivations:
    """
    The embedded model, its text, and what is known of its activations beforehand.

    Args:
        settings: The hook point and the sizes.
        seed: Seed of the order of the training text.
    """

    def __init__(self, settings: LanguageModelSettings, seed: int):
        self.settings = settings
        self.model: HookedTransformer = load_embedded_model()
        self.train_text: Dataset = load_stdlib_text("train", seed=seed)
        self.test_text: Dataset = load_stdlib_text("test", seed=0)
        activations = self._first_activations()
        # in the units in which SAELens trains, see expected_average_only_in
        activations *= settings.d_in**0.5 / activations.norm(dim=-1).mean()
        self.mean, self.principal_directions, _, _ = principal_subspace(
            activations, settings.scaffold_rank
        )

    @torch.no_grad()
    def _first_activations(self) -> torch.Tensor:
        """Activations of the first training contexts, shape (n_tokens, d_in)."""
        settings = self.settings
        store = _activations_store(self.model, self.train_text, settings)
        batches: list[torch.Tensor] = []
        for _ in range(settings.pca_contexts // store.store_batch_size_prompts):
            _, cache = self.model.run_with_cache(
                store.get_batch_tokens(),
                names_filter=settings.hook_name,
                return_type=None,
            )
            batches.append(cache[settings.hook_name].flatten(0, 1))
        return torch.cat(batches)


def train_on_language_model(
    activations: EmbeddedActivations,
    saes: dict[str, TrainingSAEConfig],
    seed: int,
    output_path: Path,
) -> list[Measured]:
    """
    Train SAEs in lockstep on the same activations, save them and measure what was saved.

    Args:
        activations: Where the activations come from.
        saes: Configurations of the SAEs, by name. One whose name ends in `CENTRED`
            starts with b_dec at the activations' mean.
        seed: Seed of the SAEs' weights and of the order of the activations.
        output_path: Directory that gets a directory for each SAE.

    Returns:
        What was measured of each SAE, in the same order.
    """
    training_saes = {name: initial_sae(cfg, seed) for name, cfg in saes.items()}
    for name, sae in training_saes.items():
        if name.endswith(CENTRED):
            sae.b_dec.data.copy_(activations.mean)
    runner = RepeatableMultiSAETrainingRunner(
        _runner_config(activations.settings, saes, seed, output_path),
        override_dataset=activations.train_text,
        override_model=activations.model,
        override_saes=training_saes,
    )
    runner.calibrated = [*saes]
    torch.manual_seed(seed)
    runner.run()

    results: list[Measured] = []
    for name in tqdm(saes, desc="Measuring on held-out text"):
        sae = SAE.load_from_disk(output_path / name)
        results.append(_measure(sae, name, seed, activations))
    return results


def with_centred(saes: dict[str, TrainingSAEConfig]) -> dict[str, TrainingSAEConfig]:
    """Each plain SAE once more, to start with b_dec at the mean as a scaffold does."""
    result: dict[str, TrainingSAEConfig] = {}
    for name, cfg in saes.items():
        result[name] = cfg
        if not hasattr(cfg, "scaffold_rank"):
            result[name + CENTRED] = copy.deepcopy(cfg)
    return result


def _runner_config(
    settings: LanguageModelSettings,
    saes: dict[str, TrainingSAEConfig],
    seed: int,
    output_path: Path,
) -> MultiSAETrainingRunnerConfig:
    steps = settings.training_tokens // settings.batch_size
    return MultiSAETrainingRunnerConfig(
        saes=saes,
        hook_names=settings.hook_name,
        model_name=EMBEDDED_MODEL_NAME,
        dataset_path="the Python standard library",
        streaming=False,
        context_size=settings.context_size,
        n_batches_in_buffer=16,
        store_batch_size_prompts=16,
        training_tokens=settings.training_tokens,
        train_batch_size_tokens=settings.batch_size,
        lr=settings.lr,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 5,
        dead_feature_window=200,
        n_batches_for_norm_estimate=20,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(output_path),
        seed=seed,
    )


def _activations_store(
    model: HookedTransformer, text: Dataset, settings: LanguageModelSettings
) -> ActivationsStore:
    return ActivationsStore(
        model=model,
        dataset=text,
        streaming=False,
        hook_name=settings.hook_name,
        hook_head_index=None,
        context_size=settings.context_size,
        d_in=settings.d_in,
        n_batches_in_buffer=8,
        total_training_tokens=10**9,
        store_batch_size_prompts=16,
        train_batch_size_tokens=settings.batch_size,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
    )


def _measure(
    sae: SAE[Any], name: str, seed: int, activations: EmbeddedActivations
) -> Measured:
    settings = activations.settings
    store = _activations_store(activations.model, activations.test_text, settings)
    contexts = store.store_batch_size_prompts
    metrics, latent_metrics = run_evals(
        sae,
        store,
        activations.model,
        ActivationScaler(),
        EvalConfig(
            n_eval_reconstruction_batches=settings.eval_contexts_ce // contexts,
            n_eval_sparsity_variance_batches=settings.eval_contexts // contexts,
            compute_ce_loss=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
            compute_featurewise_density_statistics=True,
        ),
        exclude_special_tokens=True,
    )
    return measured(
        sae,
        name,
        seed,
        n_tokens=int(metrics["token_stats"]["total_tokens_eval_sparsity_variance"]),
        firing_frequencies=torch.tensor(latent_metrics["feature_density"]),
        explained_variance=metrics["reconstruction_quality"]["explained_variance"],
        dense_subspace=activations.principal_directions,
        ce_loss_score=metrics["model_performance_preservation"]["ce_loss_score"],
    )
