"""A scaffold for an SAE that exists, in one pass: the command `saelens-scaffold absorb`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, PositiveInt
from rich.box import MARKDOWN
from rich.table import Column, Table
from sae_lens import SAE
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from saelens_scaffold._util.configs import documented, make_config
from saelens_scaffold._util.errors import UserError, one_line
from saelens_scaffold._util.files import make_writable, new_directory
from saelens_scaffold._util.tables import markdown
from saelens_scaffold.evals import data as text_data
from saelens_scaffold.evals import model as lm
from saelens_scaffold.evals.eval_configs import OpenShare, TextEvalConfig
from saelens_scaffold.evals.saes import (
    CUSTOM_SAE_ID,
    SelectedSAE,
    common_model_class,
    load_saes,
)
from saelens_scaffold.evals.tokens import TokenStream, check_context_size, common_tokens
from saelens_scaffold.models.hook_points import check_activations
from saelens_scaffold.models.language_models import (
    check_model_name,
    load_language_model,
)
from saelens_scaffold.saes import ScaffoldJumpReLUSAE, absorption, validation
from saelens_scaffold.saes.calibration import ActivationSample
from saelens_scaffold.saes.facts import FiringStatistics
from saelens_scaffold.saes.least_squares import LeastSquares
from saelens_scaffold.saes.loading import HTTP_ERROR
from saelens_scaffold.saes.subspaces import ActivationMoments

_SAMPLED_FROM = 100_000
"""Tokens that thresholds are calibrated and firing frequencies are counted on a sample of."""


@documented
class AbsorbConfig(TextEvalConfig):
    """Which scaffold, from which text."""

    n_tokens: PositiveInt = 300_000
    """Tokens to fit the scaffold on."""
    held_out_tokens: PositiveInt = 100_000
    """Tokens to choose its rank on."""
    held_out_split: str | None = None
    """Split with these; if None, they follow the others."""
    rank: Annotated[int, Field(ge=0)] | None = None
    """Rank; if None, chosen."""
    drop_dense: OpenShare | None = None
    """Frequency above which latents are taken out first."""


def run(
    sae: str, *, output_path: str, device: str | None = None, **fields: object
) -> str:
    """
    The command `saelens-scaffold absorb`.

    Args:
        sae: Directory of an SAE, or RELEASE/SAE_ID of SAELens.
        output_path: Directory to make for the SAE with the scaffold.
        device: Where to compute; by default a GPU if there is one.
        fields: Fields of `AbsorbConfig`; None stands for a default. Of the embedded text,
            the held-out tokens are by default those of its split "test".

    Returns:
        The curve as a table, and what was saved.

    Raises:
        UserError: Something cannot be used; or no rank explains as much of the variance of
            held-out text as the SAE does.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if Path(output_path).exists():
        raise UserError(f"{output_path} exists already; remove it or name another")
    source = _load(sae, given.get("model_name"))
    given.setdefault("model_name", source.sae.cfg.metadata.model_name)
    given.setdefault("model_class_name", common_model_class([source.sae]))
    if given.get("dataset") == text_data.EMBEDDED_DATASET_NAME:
        given.setdefault("held_out_split", "test")
    config = make_config(AbsorbConfig, given)
    if config.held_out_split == config.dataset_split or Path(config.dataset).is_file():
        config.held_out_split = None  # which would be the text that is fitted
    device = lm.choose_device(device)
    _check(config, source)
    make_writable(Path(output_path).parent)
    absorbed, numbers = absorb(config, source, device)
    with new_directory(output_path) as folder:
        absorbed.save_model(folder)
        text = json.dumps(numbers, indent=2)
        (folder / "absorb.json").write_text(text, encoding="utf-8")
    return _said(output_path, config, absorbed, numbers)


def _load(name: str, model_name: object) -> SelectedSAE:
    """An SAE, which may not name its language model if that is given."""
    release, _, sae_id = name.partition("/")
    if not Path(name).exists() and release in get_pretrained_saes_directory():
        if sae_id not in get_pretrained_saes_directory()[release].saes_map:
            raise UserError(f"SAELens's release {release} has no SAE {sae_id!r}")
        try:
            sae = SAE.from_pretrained(release, sae_id)
        except (HTTP_ERROR, OSError, ValueError) as error:
            raise UserError(f"SAE {name!r}: {one_line(error)}") from error
    else:
        loaded = load_saes([name])
        if len(loaded) > 1:
            raise UserError(f"{name} holds {len(loaded)} SAEs; name one of them")
        ((_, sae),) = loaded
    sae.cfg.metadata.model_name = sae.cfg.metadata.model_name or model_name
    with validation.named(f"SAE {name!r}"):
        validation.check_can_be_used(sae)
    # SAEs of half precision, too, are fitted and saved in single precision
    sae.to(dtype=torch.promote_types(sae.dtype, torch.float32))
    return SelectedSAE(name, CUSTOM_SAE_ID, sae)


def _check(config: AbsorbConfig, source: SelectedSAE) -> None:
    """Find everything that is named, before anything is run."""
    absorption.check_has_jumprelu_form(source.sae)
    d_in = source.sae.cfg.d_in
    model_class = config.model_class_name
    check_model_name(config.model_name, model_class)
    check_activations(
        config.model_name,
        source.hook_name,
        d_in,
        model_class_name=model_class,
        by_either_name=True,
    )
    largest = d_in - 1 - source.rank
    if config.rank is not None and config.rank > largest:
        raise UserError(f"rank is {config.rank}; it must be at most {largest}")
    if config.n_tokens <= d_in:
        raise UserError(
            f"n_tokens is {config.n_tokens}; a scaffold at {d_in} dimensions needs more "
            f"than {d_in} tokens, and says little with fewer than {10 * d_in}"
        )
    check_context_size(config, [source], model_class)
    tokens = common_tokens([source], config)
    for split in {config.dataset_split, config.held_out_split} - {None}:
        name, column = config.dataset, config.text_column
        text_data.check_text(name, str(split), column, tokens.context_size)


def absorb(
    config: AbsorbConfig, source: SelectedSAE, device: str
) -> tuple[ScaffoldJumpReLUSAE, dict[str, Any]]:
    """
    Fit a scaffold to an SAE's error, and choose its rank.

    Args:
        config: Which scaffold, from which text.
        source: The SAE.
        device: Where to compute.

    Returns:
        The SAE with the scaffold, and what its rank was chosen by.

    Raises:
        UserError: See `run`.
    """
    sae = source.sae.to(device=device)
    model = load_language_model(
        config.model_name, device, config.llm_dtype, config.model_class_name
    )
    ((hooked, _),) = lm.by_hook_point(model, [source])
    # The model's activations have their heads flattened.
    reshape, sae.cfg.reshape_activations = sae.cfg.reshape_activations, "none"
    base = _prepared(config, hooked, source)
    stream = TokenStream(config, model, [source])
    sums = LeastSquares(base.cfg.d_in, base.cfg.d_in, device)
    for x in _activations(hooked, stream, config.n_tokens, "Fitting"):
        scaled = absorption.scaled_error(base, x)
        sums.update(scaled.x, scaled.error)
    scaffold = absorption.fitted_scaffold(sums)
    d_in = base.cfg.d_in
    largest = max(config.rank or 0, min(d_in // 4, d_in - 1 - source.rank))
    held_out = _HeldOut(sae, base, scaffold.of_rank(largest))
    if config.held_out_split is not None:
        other = replace(config, dataset_split=config.held_out_split)
        stream = TokenStream(other, model, [source])
    for x in _activations(hooked, stream, config.held_out_tokens, "Choosing the rank"):
        held_out.update(x)
    curve = held_out.explained_variance()
    rank = _chosen_rank(curve, config.rank)
    absorbed = absorption.add_scaffold(base, scaffold.of_rank(rank))
    absorbed.cfg.reshape_activations = reshape
    metadata: Any = absorbed.cfg.metadata
    metadata.absorbed |= {
        "rank": rank,
        "dataset": config.dataset,
        "dataset_split": config.dataset_split,
        "n_tokens": sums.n,
        "held_out_split": config.held_out_split or config.dataset_split,
        "held_out_tokens": held_out.n_tokens,
        "explained_variance_before": curve.of_input,
        "explained_variance": curve.of_ranks[rank],
    }
    numbers = {
        **metadata.absorbed,
        "n_dropped_latents": metadata.n_dropped_latents or 0,
        "explained_variance_by_rank": curve.of_ranks,
    }
    return absorbed, numbers


def _activations(
    hooked: lm.HookedModel, stream: TokenStream, n_tokens: int, desc: str
) -> Iterator[torch.Tensor]:
    """The activations of the next tokens that count, each of shape (n_tokens, d_in)."""
    for tokens, counts in stream.batches(n_tokens, desc):
        x = hooked.below(tokens)[0][counts].float()
        lm.check_finite(x, hooked.hook_name)
        yield x


def _prepared(
    config: AbsorbConfig, hooked: lm.HookedModel, source: SelectedSAE
) -> ScaffoldJumpReLUSAE:
    """The SAE in JumpReLU form, without its dense latents if they are to go."""
    is_topk = source.sae.cfg.architecture() == "topk"
    if not is_topk and config.drop_dense is None:
        return absorption.jumprelu_form(source.sae)
    sampled, stream = ActivationSample(), TokenStream(config, hooked.model, [source])
    n_tokens = min(config.n_tokens, _SAMPLED_FROM)
    for x in _activations(hooked, stream, n_tokens, "Sampling"):
        sampled.add(x)
    x = torch.cat([*sampled])
    base = absorption.jumprelu_form(source.sae, x)
    if config.drop_dense is None:
        return base
    firing = FiringStatistics(base, n_replicates=0)
    firing.update_unsampled(x)
    dense = (firing.fired > config.drop_dense * len(x)).nonzero()[:, 0]
    return absorption.without_latents(base, firing.rank + dense)


class Curve(NamedTuple):
    """
    Explained variance of held-out text.

    Attributes:
        of_input: Of the SAE as it was.
        of_ranks: With a scaffold of rank 0 (a bias), 1, 2, ...
    """

    of_input: float
    of_ranks: list[float]


class _HeldOut:
    """
    Explained variance with a scaffold of every rank, in one pass.

    Args:
        sae: The SAE as it was.
        base: The SAE that the scaffold is for.
        scaffold: Of the largest rank. The rows of its decoder are orthonormal, so that each
            coordinate takes its share of the squared error, whatever the others do.
    """

    def __init__(
        self,
        sae: SAE[Any],
        base: ScaffoldJumpReLUSAE,
        scaffold: absorption.Scaffold,
    ):
        self._base, self._scaffold = base, scaffold
        self._input = FiringStatistics(sae, n_replicates=0)
        self._moments = ActivationMoments(len(scaffold.A), scaffold.A.device)
        self._errors = scaffold.A.new_zeros(1 + len(scaffold.B))

    @property
    def n_tokens(self) -> int:
        return self._moments.n

    def update(self, x: torch.Tensor) -> None:
        """
        Args:
            x: Activations, shape (n_tokens, d_in).
        """
        self._moments.update(x)
        self._input.update_unsampled(x)
        scaled = absorption.scaled_error(self._base, x)
        inputs, errors, scale = (of.to(self._errors) for of in scaled)
        A, B, mean_x, mean_error = self._scaffold
        errors, z = errors - mean_error, (inputs - mean_x) @ A
        # |e - z B|² = |e|² + Σ z_i² - 2 z_i (e B_i)
        changes = z.pow(2) - 2 * z * (errors @ B.T)
        terms = torch.cat([errors.pow(2).sum(1, keepdim=True), changes], dim=1)
        self._errors += (terms * scale.pow(2)).sum(dim=0)

    def explained_variance(self) -> Curve:
        """The curve of the tokens seen."""
        total = float(self._moments.covariance.trace()) * self.n_tokens
        of_ranks = 1 - self._errors.cumsum(0) / total
        return Curve(
            1 - float(self._input.squared_errors[0]) / total, of_ranks.tolist()
        )


def knee_of(explained: Sequence[float]) -> int:
    """
    The rank at the knee of a curve: where it lies farthest above the line through its ends.

    Args:
        explained: Explained variance with rank 0, 1, 2, ...
    """
    curve = torch.tensor(explained, dtype=torch.float64)
    line = torch.linspace(explained[0], explained[-1], len(curve), dtype=curve.dtype)
    return int((curve - line).argmax())


def _chosen_rank(curve: Curve, rank: int | None) -> int:
    """
    The rank asked for, or else the knee. Where the SAE would explain less of held-out text
    than it did, the next smaller rank; if none is asked for, the next larger.
    """
    wanted = knee_of(curve.of_ranks) if rank is None else rank
    enough = [r for r, of in enumerate(curve.of_ranks) if of >= curve.of_input]
    smaller = [r for r in enough if r <= wanted]
    if smaller:
        return smaller[-1]
    if rank is None and enough:
        return enough[0]
    advice = (
        f"the smallest rank that does is {enough[0]}"
        if enough
        else "no rank of the curve does; fit it on more text (n_tokens), or let the dense "
        "latents stay (drop_dense)"
    )
    raise UserError(
        f"with a scaffold of rank {wanted} the SAE explains {curve.of_ranks[wanted]:.4f} of "
        f"the variance of held-out text, and must explain {curve.of_input:.4f} as it did "
        f"without; {advice}"
    )


def _table(numbers: dict[str, Any]) -> str:
    """The curve at ranks that double, and at the one chosen."""
    explained = numbers["explained_variance_by_rank"]
    doubling = [0] + [1 << i for i in range(len(explained).bit_length())]
    ranks = {r for r in doubling if r < len(explained)}
    ranks |= {numbers["rank"], len(explained) - 1}
    right = [Column(n, justify="right") for n in ("explained variance", "FVU")]
    table = Table("rank", *right, "", box=MARKDOWN)
    before = numbers["explained_variance_before"]
    table.add_row("as it was", f"{before:.4f}", f"{1 - before:.4f}", "")
    for rank in sorted(ranks):
        chosen = "chosen" if rank == numbers["rank"] else ""
        of = explained[rank]
        table.add_row(str(rank), f"{of:.4f}", f"{1 - of:.4f}", chosen)
    return markdown(table)


def _said(
    output_path: str,
    config: AbsorbConfig,
    sae: ScaffoldJumpReLUSAE,
    numbers: dict[str, Any],
) -> str:
    """What the command prints."""
    rank = numbers["rank"]
    why = "as asked for"
    if config.rank is None:
        why = "the knee of the curve"
    elif rank < config.rank:
        why = f"as rank {config.rank} explains less of held-out text than the SAE did"
    facts = [
        f"scaffold_jumprelu SAE, d_in {sae.cfg.d_in}, d_sae {sae.cfg.d_sae}",
        f"scaffold_rank {sae.cfg.scaffold_rank}",
    ]
    if numbers["n_dropped_latents"]:
        facts.append(f"{numbers['n_dropped_latents']} dense latents taken out")
    return (
        f"{_table(numbers)}\n{output_path}: {', '.join(facts)}. Rank {rank} was chosen, {why}. "
        f"Explained variance of {numbers['held_out_tokens']:,} held-out tokens: "
        f"{numbers['explained_variance']:.4f}, before {numbers['explained_variance_before']:.4f}."
    )
