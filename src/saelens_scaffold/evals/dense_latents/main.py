"""Firing frequencies of the sparse latents, and how many of them are dense."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from saelens_scaffold.evals import intervals
from saelens_scaffold.evals import model as lm
from saelens_scaffold.evals.base import Call, Implementation, Result
from saelens_scaffold.evals.data import text_seen_in_training
from saelens_scaffold.evals.dense_latents import eval_output as output
from saelens_scaffold.evals.dense_latents.eval_config import DenseLatentsEvalConfig
from saelens_scaffold.evals.eval_configs import check_baseline
from saelens_scaffold.evals.saes import SelectedSAE, label_of
from saelens_scaffold.evals.tokens import TokenStream, tokens_of
from saelens_scaffold.models.language_models import load_language_model
from saelens_scaffold.saes.facts import (
    FiringStatistics,
    TextStatistics,
    antipodality,
    l0_warning,
)
from saelens_scaffold.saes.subspaces import orthonormal_basis, share_in_subspace

HISTOGRAM_LOG10_EDGES = [-7 + i / 4 for i in range(29)]


class _Sums(NamedTuple):
    """Sums over all tokens, of one SAE and of the activations at its hook point."""

    sae: SelectedSAE
    firing: FiringStatistics
    text: TextStatistics


def measure(
    config: DenseLatentsEvalConfig, saes: list[SelectedSAE], call: Call
) -> Iterator[tuple[SelectedSAE, Result]]:
    """Count dense latents, of all SAEs in one pass of the language model."""
    check(config, [*saes, *call.companions])
    # A baseline that has a result is counted again, since replicates are paired.
    baselines = [sae for sae in call.companions if sae.label == config.baseline]
    seen = text_seen_in_training(
        saes, config.dataset, config.dataset_split, config.text_column
    )
    sums = _sums_over_tokens(config, [*saes, *baselines], call)
    counts: dict[str | None, torch.Tensor] = {
        of.sae.label: _dense_counts(config.thresholds, of) for of in sums
    }
    for sae, of in zip(saes, sums, strict=False):
        baseline = None if sae.label == config.baseline else counts.get(config.baseline)
        result = _result(config, of, counts[sae.label], baseline)
        about = {
            "tokens": tokens_of(sae, config),
            "text_seen_in_training": seen[sae.key],
        }
        yield sae, {**result, **about}


def check(config: DenseLatentsEvalConfig, saes: Sequence[SelectedSAE]) -> None:
    """
    Raises:
        UserError: The baseline is none of the SAEs.
    """
    if config.baseline is not None:
        check_baseline(config.baseline, [sae.label for sae in saes])


def l0_warning_of(result: Mapping[str, Any]) -> str | None:
    """A warning if the L0 of an SAE is not the k it was trained with, from its result."""
    metrics = result["eval_result_metrics"]
    return l0_warning(
        label_of(result["sae_lens_release_id"], result["sae_lens_id"]),
        metrics["sparsity"]["l0_sparse"],
        metrics["token_stats"]["n_tokens"],
        result["sae_cfg_dict"].get("metadata") or {},
    )


def _sums_over_tokens(
    config: DenseLatentsEvalConfig, saes: list[SelectedSAE], call: Call
) -> list[_Sums]:
    device, kept = call.device, call.kept
    model = load_language_model(
        config.model_name, device, config.llm_dtype, config.model_class_name
    )
    groups = {at.hook_name: group for at, group in lm.by_hook_point(model, saes)}
    text = {
        hook_name: TextStatistics(group[0].sae.cfg.d_in, config.n_bootstrap, device)
        for hook_name, group in groups.items()
    }
    firing = {sae.key: FiringStatistics(sae.sae, config.n_bootstrap) for sae in saes}
    bootstrap = intervals.SequenceBootstrap(config.n_bootstrap, config.random_seed)
    stream = TokenStream(config, model, saes)
    for tokens, counts in stream.batches(config.n_tokens, "Counting dense latents"):
        weights = bootstrap.draw(len(tokens))
        sequence = counts.nonzero()[:, 0]
        activations = lm.kept_activations_at(model, tokens, list(groups), kept)
        for hook_name, group in groups.items():
            x = activations[hook_name][counts]
            lm.check_finite(x, hook_name)
            text[hook_name].update(x, sequence, weights)
            for sae in group:
                firing[sae.key].update(x, sequence, weights)
    return [_Sums(sae, firing[sae.key], text[sae.hook_name]) for sae in saes]


def _dense_counts(thresholds: Sequence[float], of: _Sums) -> torch.Tensor:
    """Latents above each threshold in every replicate, (n_thresholds, 1 + n_replicates)."""
    fired = of.firing.replicate_fired.cpu().double()
    fired[0] = of.firing.fired.cpu()  # the sample itself, counted in whole numbers
    frequencies = fired / of.text.replicate_tokens[:, None]
    return torch.stack([(frequencies > t).sum(dim=1) for t in thresholds]).double()


def _result(
    config: DenseLatentsEvalConfig,
    of: _Sums,
    counts: torch.Tensor,
    baseline: torch.Tensor | None,
) -> Result:
    details: list[output.DenseLatentsResultDetail] = []
    for i, threshold in enumerate(config.thresholds):
        statistics = {"count": counts[i]}
        if baseline is not None and baseline[i, 0] > 0:
            # a replicate in which the baseline has no dense latent has no ratio
            ratio = counts[i] / baseline[i].where(baseline[i] > 0, torch.nan)
            statistics["reduction"] = 1 - ratio
        figures = intervals.estimates(config.confidence, **statistics)
        details.append(output.DenseLatentsResultDetail(threshold, **figures))
    headline, n_tokens = output.DenseLatentMetrics, of.text.moments.n
    errors = of.firing.squared_errors.cpu().double()
    explained = 1 - errors / of.text.replicate_variances
    pca_rank = config.pca_rank or of.sae.subspace_rank
    return {
        "eval_result_metrics": output.DenseLatentsMetricCategories(
            dense_latents=headline(
                **intervals.repeated(headline, "dense_latents", details[0], "count"),
                **intervals.repeated(headline, "reduction", details[0], "reduction"),
            ),
            sparsity=_sparsity(of, config.confidence),
            reconstruction_quality=output.ReconstructionQualityMetrics(
                **intervals.estimates(config.confidence, explained_variance=explained)
            ),
            token_stats=output.TokenMetrics(n_tokens, of.text.n_sequences),
        ),
        "eval_result_details": details,
        "dense_latents": _dense_latents(of, min(config.thresholds), pca_rank),
        "firing_histogram": _histogram(of.firing.fired.cpu() / n_tokens),
        "pca_rank": pca_rank,
        # exact, for whoever wants to draw or to bootstrap them differently
        "eval_result_unstructured": {
            "fired": of.firing.fired.tolist(),
            "dense_counts_of_replicates": counts.long().tolist(),
        },
    }


def _sparsity(of: _Sums, confidence: float) -> output.SparsityMetrics:
    rank, n_sparse = of.sae.rank, len(of.firing.fired)
    l0_sparse = float(of.firing.fired.sum()) / of.text.moments.n
    n_alive = (of.firing.replicate_fired > 0).sum(dim=1).cpu().double()
    estimate, low, high = intervals.interval(n_alive, confidence)
    dead = intervals.Interval(n_sparse - estimate, n_sparse - high, n_sparse - low)
    return output.SparsityMetrics(
        l0_sparse=l0_sparse,
        l0_total=l0_sparse + rank,
        scaffold_rank=rank,
        **intervals.estimates(confidence, alive_latents=n_alive),
        **intervals.interval_fields("dead_latents", dead),
    )


@torch.no_grad()
def _dense_latents(
    of: _Sums, threshold: float, pca_rank: int
) -> list[output.DenseLatent]:
    """Every sparse latent above a threshold, and where its decoder direction lies."""
    firing, rank, weights = of.firing, of.sae.rank, of.sae.sae
    frequencies = firing.fired / of.text.moments.n
    dense = (frequencies > threshold).nonzero()[:, 0]
    dense = dense[frequencies[dense].argsort(descending=True, stable=True)]
    if len(dense) == 0:
        return []
    decoder = weights.W_dec[rank:].detach()
    opposite, antipode = antipodality(weights.W_enc[:, rank:].T, decoder, dense)
    directions = decoder[dense].cpu()
    in_pca = share_in_subspace(directions, of.text.principal_directions[:pca_rank])
    scaffold = orthonormal_basis(weights.W_dec[:rank].cpu())
    in_scaffold = share_in_subspace(directions, scaffold)
    means = firing.activation_sums[dense] / firing.fired[dense]
    return [
        output.DenseLatent(
            index=rank + int(latent),
            frequency=float(frequencies[latent]),
            mean_activation=float(means[i]),
            antipodality=float(opposite[i]),
            antipode=rank + int(antipode[i]) if opposite[i] > 0 else None,
            share_in_scaffold=float(in_scaffold[i]) if rank else None,
            share_in_pca=float(in_pca[i]),
        )
        for i, latent in enumerate(dense)
    ]


def _histogram(frequencies: torch.Tensor) -> output.FiringHistogram:
    alive = frequencies[frequencies > 0].double().log10()
    edges = torch.tensor(HISTOGRAM_LOG10_EDGES, dtype=torch.float64)
    counts, _ = torch.histogram(alive.clamp(edges[0], edges[-1]), edges)
    return output.FiringHistogram(HISTOGRAM_LOG10_EDGES, counts.long().tolist())


IMPLEMENTATION = Implementation(
    DenseLatentsEvalConfig, measure, output.DenseLatentsEvalOutput, check, l0_warning_of
)
