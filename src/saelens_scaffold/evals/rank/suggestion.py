"""Suggesting a rank: from options to a table, numbers and a picture."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.box import MARKDOWN
from rich.markup import escape
from rich.table import Column, Table

from saelens_scaffold._util.configs import make_config
from saelens_scaffold._util.errors import UserError
from saelens_scaffold._util.files import make_writable, new_file
from saelens_scaffold._util.tables import markdown
from saelens_scaffold.evals import data as text_data
from saelens_scaffold.evals import model as lm
from saelens_scaffold.evals import saes as selected_saes
from saelens_scaffold.evals.eval_configs import TextEvalConfig
from saelens_scaffold.evals.rank import analysis as ranks
from saelens_scaffold.evals.tokens import TokenStream, check_context_size, common_tokens
from saelens_scaffold.models.hook_points import check_activations
from saelens_scaffold.models.language_models import (
    check_model_name,
    load_language_model,
)
from saelens_scaffold.saes.facts import DENSE_THRESHOLD, FiringStatistics
from saelens_scaffold.saes.subspaces import ActivationMoments


def suggest_rank(
    *,
    output_path: str | Path,
    hook_name: str | None = None,
    sae_path: str | None = None,
    device: str | None = None,
    **text_fields: object,
) -> str:
    """
    Suggest a rank for a scaffold: everything that `saelens-scaffold rank` does.

    Args:
        output_path: Gets rank.json and rank.png.
        hook_name: Hook point; by default the SAE's.
        sae_path: Directory of a plain SAE, whose dense latents count.
        device: Where to compute; by default a GPU if there is one.
        text_fields: Fields of `TextEvalConfig`; None stands for a default. That of
            model_name is the SAE's, that of dataset_split "test" of the embedded text and
            else "train", that of n_tokens 100,000.

    Returns:
        The table of candidates, and the suggestion.

    Raises:
        UserError: Something is missing, or cannot be used.
    """
    given = {name: value for name, value in text_fields.items() if value is not None}
    fields = {"n_tokens": 100_000, **given}
    loaded = selected_saes.load_saes([sae_path] if sae_path else [])
    if len(loaded) > 1:
        raise UserError(f"{sae_path} holds {len(loaded)} SAEs; name one of them")
    if loaded and "model_name" not in fields:
        fields["model_name"] = selected_saes.common_model_name(loaded)
    if loaded and "model_class_name" not in fields:
        of_saes = [sae for _, sae in loaded]
        fields["model_class_name"] = selected_saes.common_model_class(of_saes)
    if fields.get("dataset") == text_data.EMBEDDED_DATASET_NAME:
        fields.setdefault("dataset_split", "test")
    config = make_config(TextEvalConfig, fields)
    device, dtype = lm.choose_device(device), config.llm_dtype
    sae = selected_saes.resolve_saes(loaded, device, dtype)[0] if loaded else None
    hook_name = hook_name or (sae.hook_name if sae else None)
    if hook_name is None:
        raise UserError("name the hook point: --hook_name, or --sae_path")
    check_model_name(config.model_name, config.model_class_name)
    tokens = common_tokens([sae] if sae else [], config)
    check_activations(
        config.model_name,
        hook_name,
        model_class_name=config.model_class_name,
        by_either_name=True,
    )
    check_context_size(config, [sae] if sae else [], config.model_class_name)
    text = (config.dataset, config.dataset_split, config.text_column)
    text_data.check_text(*text, tokens.context_size)
    folder = Path(output_path)
    make_writable(folder)
    analysis = analyse_rank(config, hook_name, device, sae)
    suggestion = analysis.suggestion and asdict(analysis.suggestion)
    with new_file(folder / "rank.json") as file:
        numbers = {"suggestion": suggestion, **asdict(analysis)}
        file.write_text(json.dumps(numbers, indent=2), encoding="utf-8")
    with new_file(folder / "rank.png") as file:
        picture(analysis).savefig(file, dpi=150, format="png")
    where = f"The spectrum is in {folder / 'rank.png'}, all numbers in rank.json."
    return f"{analysis_text(analysis)}\n{where}"


def analyse_rank(
    config: TextEvalConfig,
    hook_name: str,
    device: str,
    sae: selected_saes.SelectedSAE | None = None,
) -> ranks.RankAnalysis:
    """
    Look at a language model's activations, and at a plain SAE's dense latents.

    Args:
        config: Which language model reads which text.
        hook_name: The hook point, as in "blocks.12.hook_resid_post".
        device: Where to compute.
        sae: A plain SAE that was trained there.

    Raises:
        UserError: The model, the hook point or the text cannot be used, and why.
    """
    saes = [] if sae is None else [sae]
    for plain in saes:
        if plain.rank:
            raise UserError(
                f"SAE {plain.label!r} has a scaffold (of rank {plain.rank}), which has taken "
                "over dense latents already; name a plain SAE of this hook point, or none"
            )
        if plain.hook_name != hook_name:
            at = f"was trained at {plain.hook_name}, not at {hook_name}"
            raise UserError(f"SAE {plain.label!r} {at}")
    model = load_language_model(
        config.model_name, device, config.llm_dtype, config.model_class_name
    )
    hooked = lm.HookedModel(model, hook_name)
    lm.by_hook_point(model, saes)  # sees that it fits
    any_tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
    d_in = hooked.below(any_tokens)[0].shape[-1]
    _check_enough(config.n_tokens, d_in, hook_name)
    text = (config.dataset, config.dataset_split, config.text_column)
    seen = text_data.text_seen_in_training(saes, *text)
    firing = [FiringStatistics(plain.sae, n_replicates=0) for plain in saes]
    moments = ActivationMoments(d_in, device)
    stream = TokenStream(config, model, saes)
    for tokens, counts in stream.batches(config.n_tokens, "Reading activations"):
        x = lm.activations_at(model, tokens, [hook_name])[hook_name][counts]
        lm.check_finite(x, hook_name)
        moments.update(x)
        for of in firing:
            of.update_unsampled(x)
    _check_enough(moments.n, d_in, hook_name)
    seed = config.random_seed
    analysis = ranks.analyse_covariance(moments.covariance, moments.n, seed)
    analysis.tokens = stream.selection
    for plain, of in zip(saes, firing, strict=True):
        dense = (of.fired / moments.n > DENSE_THRESHOLD).cpu()
        directions = moments.principal_directions()[1].cpu()
        decoder = plain.sae.W_dec.detach().cpu()[dense]
        analysis.candidates += ranks.dense_latent_candidates(decoder, directions)
        analysis.n_dense_latents = int(dense.sum())
        analysis.text_seen_in_training = seen[plain.key]
    return analysis


def _check_enough(n_tokens: int, d_in: int, hook_name: str) -> None:
    if n_tokens <= d_in:
        raise UserError(
            f"n_tokens is {n_tokens}; a spectrum of the {d_in} dimensions at {hook_name} "
            f"needs more than {d_in} tokens, and says little with fewer than {10 * d_in}"
        )


def analysis_text(analysis: ranks.RankAnalysis) -> str:
    """The candidates as a table, and the one that is suggested."""
    table = Table("by", Column("rank", justify="right"), "reason", box=MARKDOWN)
    for candidate in analysis.candidates:
        table.add_row(candidate.name, str(candidate.rank), escape(candidate.reason))
    found = analysis.suggestion
    advice = (
        "Nothing stands out from chance: there is no dense part to give a scaffold."
        if found is None
        else f"Try scaffold_rank={found.rank} (by {found.name}), and half and twice as "
        "much: a rank is chosen by comparing SAEs, not by a spectrum."
    )
    return f"{markdown(table)}\n{advice}"


def picture(analysis: ranks.RankAnalysis) -> Figure:
    """The spectrum, with the candidates."""
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    shares = analysis.variance_shares
    axes.loglog(range(1, len(shares) + 1), shares, ".-")
    for i, candidate in enumerate(analysis.candidates, start=1):
        if candidate.rank == 0:  # has no place on a logarithmic axis
            continue
        style = "-" if candidate == analysis.suggestion else "--"
        label = f"{candidate.name}: {candidate.rank}"
        axes.axvline(candidate.rank, color=f"C{i}", linestyle=style, label=label)
    axes.set(xlabel="principal direction", ylabel="share of the variance")
    axes.legend()
    return figure
