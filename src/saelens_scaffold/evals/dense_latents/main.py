"""Firing frequencies of the sparse latents, and how many of them are dense."""

import json
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from saelens_scaffold.evals.bootstrap import Interval, SequenceBootstrap, interval
from saelens_scaffold.evals.dense_latents.eval_config import DenseLatentsEvalConfig
from saelens_scaffold.evals.dense_latents.eval_output import (
    EVAL_TYPE_ID_DENSE_LATENTS,
    DenseLatent,
    DenseLatentMetrics,
    DenseLatentsEvalOutput,
    DenseLatentsMetricCategories,
    DenseLatentsResultDetail,
    FiringHistogram,
    ReconstructionQualityMetrics,
    SparsityMetrics,
    TokenMetrics,
)
from saelens_scaffold.evals.language_model import (
    activations_at,
    by_hook_point,
    check_finite,
    load_language_model,
)
from saelens_scaffold.evals.overlap import text_seen_in_training
from saelens_scaffold.evals.run import Result, run_evaluation
from saelens_scaffold.evals.selected_saes import (
    CUSTOM_SAE_ID,
    SelectedSAE,
    SelectedSAEs,
    label_of,
    result_path,
    selected_baseline,
)
from saelens_scaffold.evals.text_data import TokenStream
from saelens_scaffold.saes.firing import (
    FiringStatistics,
    TextStatistics,
)
from saelens_scaffold.saes.subspaces import (
    orthonormal_basis,
    share_in_subspace,
)
from saelens_scaffold.training.measurement import l0_warning

logger = logging.getLogger(__name__)

HISTOGRAM_LOG10_EDGES = [-7 + i / 4 for i in range(29)]


def run_eval(
    config: DenseLatentsEvalConfig,
    selected_saes: SelectedSAEs,
    device: str,
    output_path: str,
    force_rerun: bool = False,
    clean_up_activations: bool = False,  # noqa: ARG001
    save_activations: bool = True,  # noqa: ARG001
    artifacts_path: str = "artifacts",  # noqa: ARG001
) -> dict[str, dict[str, Any]]:
    """
    Count dense latents, of all SAEs in one pass of the language model.

    Args:
        config: The configuration.
        selected_saes: (release, sae_id) or (name, SAE object) pairs.
        device: Where to compute.
        output_path: Folder for the results, one JSON file for each SAE.
        force_rerun: Whether to evaluate SAEs again that have a result there.
        clean_up_activations: For SAEBench's signature; no activations are stored.
        save_activations: For SAEBench's signature; no activations are stored.
        artifacts_path: For SAEBench's signature; there are no artifacts.

    Returns:
        The results (`DenseLatentsEvalOutput` as dictionaries) under the SAEs' names.

    Raises:
        ValueError: The configuration, an SAE, the model or the text cannot be used, and
            why.
    """
    baseline_file = None
    if config.baseline is not None:
        release, sae = selected_baseline(config.baseline, selected_saes)
        sae_id = sae if isinstance(sae, str) else CUSTOM_SAE_ID
        baseline_file = result_path(output_path, release, sae_id)
    results = run_evaluation(
        partial(_measure, baseline_file=baseline_file),
        DenseLatentsEvalOutput,
        config,
        selected_saes,
        device,
        output_path,
        force_rerun,
        rank_in=lambda result: result.get("pca_rank"),
    )
    for result in results.values():
        warning = l0_warning_of(result)
        if warning is not None:
            logger.warning(warning)
    return results


def l0_warning_of(result: dict[str, Any]) -> str | None:
    """What to say of the SAE of a result if its L0 is not the k it was trained with."""
    metrics = result["eval_result_metrics"]
    return l0_warning(
        label_of(result["sae_lens_release_id"], result["sae_lens_id"]),
        metrics["sparsity"]["l0_sparse"],
        metrics["token_stats"]["n_tokens"],
        result["sae_cfg_dict"].get("metadata") or {},
    )


def _measure(
    config: DenseLatentsEvalConfig,
    saes: list[SelectedSAE],
    device: str,
    baseline_file: Path | None,
) -> Iterator[tuple[SelectedSAE, Result]]:
    model = load_language_model(config.model_name, device, config.llm_dtype)
    groups = {at.hook_name: group for at, group in by_hook_point(model, saes)}
    firing = {sae.key: FiringStatistics(sae.sae, config.n_bootstrap) for sae in saes}
    text = {
        hook_name: TextStatistics(group[0].sae.cfg.d_in, config.n_bootstrap, device)
        for hook_name, group in groups.items()
    }
    bootstrap = SequenceBootstrap(config.n_bootstrap, config.random_seed)
    seen = text_seen_in_training(
        saes, config.dataset, config.dataset_split, config.text_column
    )
    stream = TokenStream(config, model, saes)
    for tokens, counts in stream.batches(config.n_tokens, "Counting dense latents"):
        weights = bootstrap.draw(len(tokens))
        sequence = counts.nonzero()[:, 0]
        activations = activations_at(model, tokens, list(groups))
        for hook_name, group in groups.items():
            x = activations[hook_name][counts]
            check_finite(x, hook_name)
            text[hook_name].update(x, sequence, weights)
            for sae in group:
                firing[sae.key].update(x, sequence, weights)

    counts_of = {
        sae.label: _dense_counts(
            config.thresholds, firing[sae.key], text[sae.hook_name]
        )
        for sae in saes
    }
    baseline = None
    if config.baseline is not None and baseline_file is not None:
        baseline = counts_of.get(config.baseline)
        if baseline is None:  # its result is there from an earlier call
            baseline = _stored_dense_counts(baseline_file)
    for sae in saes:
        yield (
            sae,
            _result(
                config,
                sae,
                firing[sae.key],
                text[sae.hook_name],
                counts_of[sae.label],
                None if sae.label == config.baseline else baseline,
                config.pca_rank or sae.subspace_rank,
            )
            | {"text_seen_in_training": seen[sae.key]},
        )


def _dense_counts(
    thresholds: Sequence[float], firing: FiringStatistics, text: TextStatistics
) -> torch.Tensor:
    """Latents above each threshold in every replicate, (n_thresholds, 1 + n_replicates).

    Those of the sample itself, which come first, are counted in whole numbers.
    """
    fired = firing.replicate_fired.cpu().double()
    fired[0] = firing.fired.cpu()
    frequencies = fired / text.replicate_tokens[:, None]
    return torch.stack([(frequencies > t).sum(dim=1) for t in thresholds]).double()


def _result(
    config: DenseLatentsEvalConfig,
    sae: SelectedSAE,
    firing: FiringStatistics,
    text: TextStatistics,
    counts: torch.Tensor,
    baseline: torch.Tensor | None,
    pca_rank: int,
) -> Result:
    n_tokens = text.moments.n
    details: list[DenseLatentsResultDetail] = []
    for i, threshold in enumerate(config.thresholds):
        count = interval(counts[i], config.confidence)
        reduction = None
        if baseline is not None and baseline[i, 0] > 0:
            # a replicate in which the baseline has no dense latent has no ratio
            ratio = counts[i] / baseline[i].where(baseline[i] > 0, torch.nan)
            reduction = interval(1 - ratio, config.confidence)
        details.append(
            DenseLatentsResultDetail(
                threshold=threshold,
                count=int(count.estimate),
                count_ci_low=count.low,
                count_ci_high=count.high,
                **_optional("reduction", reduction),
            )
        )
    headline = details[0]
    alive = interval(
        (firing.replicate_fired > 0).sum(dim=1).cpu().double(), config.confidence
    )
    n_sparse = len(firing.fired)
    explained = interval(
        1 - firing.squared_errors.cpu().double() / text.replicate_variances,
        config.confidence,
    )
    l0_sparse = float(firing.fired.sum()) / n_tokens
    return {
        "eval_result_metrics": DenseLatentsMetricCategories(
            dense_latents=DenseLatentMetrics(
                dense_latents=headline.count,
                dense_latents_ci_low=headline.count_ci_low,
                dense_latents_ci_high=headline.count_ci_high,
                reduction=headline.reduction,
                reduction_ci_low=headline.reduction_ci_low,
                reduction_ci_high=headline.reduction_ci_high,
            ),
            sparsity=SparsityMetrics(
                l0_sparse=l0_sparse,
                l0_total=l0_sparse + sae.rank,
                scaffold_rank=sae.rank,
                alive_latents=int(alive.estimate),
                alive_latents_ci_low=alive.low,
                alive_latents_ci_high=alive.high,
                dead_latents=n_sparse - int(alive.estimate),
                dead_latents_ci_low=n_sparse - alive.high,
                dead_latents_ci_high=n_sparse - alive.low,
            ),
            reconstruction_quality=ReconstructionQualityMetrics(
                explained_variance=explained.estimate,
                explained_variance_ci_low=explained.low,
                explained_variance_ci_high=explained.high,
            ),
            token_stats=TokenMetrics(n_tokens=n_tokens, n_sequences=text.n_sequences),
        ),
        "eval_result_details": details,
        "dense_latents": _dense_latents(
            min(config.thresholds), sae, firing, text, pca_rank
        ),
        "firing_histogram": _histogram(firing.fired.cpu() / n_tokens),
        "pca_rank": pca_rank,
        # exact, for whoever wants to draw or to bootstrap them differently
        "eval_result_unstructured": {
            "fired": firing.fired.tolist(),
            "dense_counts_of_replicates": counts.long().tolist(),
        },
    }


def _optional(name: str, value: Interval | None) -> dict[str, Any]:
    if value is None:
        return {}
    return {
        name: value.estimate,
        f"{name}_ci_low": value.low,
        f"{name}_ci_high": value.high,
    }


def _stored_dense_counts(file: Path) -> torch.Tensor:
    """What `_dense_counts` was in an earlier call of the same configuration."""
    stored = json.loads(file.read_text(encoding="utf-8"))
    return torch.tensor(
        stored["eval_result_unstructured"]["dense_counts_of_replicates"]
    ).double()


@torch.no_grad()
def _dense_latents(
    threshold: float,
    sae: SelectedSAE,
    firing: FiringStatistics,
    text: TextStatistics,
    pca_rank: int,
) -> list[DenseLatent]:
    frequencies = firing.fired / text.moments.n
    dense = (frequencies > threshold).nonzero()[:, 0]
    dense = dense[frequencies[dense].argsort(descending=True, stable=True)]
    if len(dense) == 0:
        return []
    rank, weights = sae.rank, sae.sae
    decoder = weights.W_dec[rank:].detach()
    antipodality, antipode = _antipodality(weights.W_enc[:, rank:].T, decoder, dense)
    pca = text.principal_directions[:pca_rank]
    in_pca = share_in_subspace(decoder[dense].cpu(), pca)
    in_scaffold = (
        share_in_subspace(
            decoder[dense].cpu(), orthonormal_basis(weights.W_dec[:rank].cpu())
        )
        if rank
        else None
    )
    means = firing.activation_sums[dense] / firing.fired[dense]
    return [
        DenseLatent(
            index=rank + int(latent),
            frequency=float(frequencies[latent]),
            mean_activation=float(means[i]),
            antipodality=float(antipodality[i]),
            antipode=rank + int(antipode[i]) if antipodality[i] > 0 else None,
            share_in_scaffold=None if in_scaffold is None else float(in_scaffold[i]),
            share_in_pca=float(in_pca[i]),
        )
        for i, latent in enumerate(dense)
    ]


def _antipodality(
    encoder: torch.Tensor, decoder: torch.Tensor, latents: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How nearly each latent is one half of an antipodal pair (arXiv 2506.15679).

    The largest product of the cosines of encoder and decoder with another latent. Only
    latents that are opposite in both count, as a copy has a product of 1 too.

    Args:
        encoder: Of all latents, shape (n, d_in).
        decoder: Of all latents, shape (n, d_in).
        latents: Indices, shape (m,).

    Returns:
        The products and the other latents, both of shape (m,). A latent without an
        opposite has the product 0.
    """
    encoder, decoder = (F.normalize(rows.float(), dim=1) for rows in (encoder, decoder))
    of_encoder = encoder[latents] @ encoder.T
    of_decoder = decoder[latents] @ decoder.T
    products = of_encoder * of_decoder * ((of_encoder < 0) & (of_decoder < 0))
    best = products.max(dim=1)
    return best.values, best.indices


def _histogram(frequencies: torch.Tensor) -> FiringHistogram:
    alive = frequencies[frequencies > 0].double().log10()
    edges = torch.tensor(HISTOGRAM_LOG10_EDGES, dtype=torch.float64)
    counts, _ = torch.histogram(alive.clamp(edges[0], edges[-1]), edges)
    return FiringHistogram(
        log10_edges=HISTOGRAM_LOG10_EDGES, counts=counts.long().tolist()
    )


if __name__ == "__main__":
    from saelens_scaffold.evals import command_line

    command_line.main(run_eval, DenseLatentsEvalConfig, EVAL_TYPE_ID_DENSE_LATENTS)
