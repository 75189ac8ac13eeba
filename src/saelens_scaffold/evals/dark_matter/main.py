"""Linear and nonlinear errors of SAEs, and what they cost the language model."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.base import Call, Implementation, Result
from saelens_scaffold.evals.baselines import named_for, plain_twins
from saelens_scaffold.evals.dark_matter import eval_output as output
from saelens_scaffold.evals.dark_matter.errors import Batch, LinearErrors
from saelens_scaffold.evals.dark_matter.eval_config import DarkMatterEvalConfig
from saelens_scaffold.evals.dark_matter.metrics import Metrics
from saelens_scaffold.evals.dark_matter.norms import NormPredictions
from saelens_scaffold.evals.data import text_seen_in_training
from saelens_scaffold.evals.eval_configs import check_baseline
from saelens_scaffold.evals.intervals import ReplicateSums, SequenceBootstrap
from saelens_scaffold.evals.losses import CleanPredictions, predicting_text
from saelens_scaffold.evals.model import (
    HookedBatch,
    HookedModel,
    activations_at,
    by_hook_point,
)
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.evals.tokens import TokenStream
from saelens_scaffold.models.language_models import LanguageModel, load_language_model
from saelens_scaffold.pursuit import GradientPursuit
from saelens_scaffold.saes.facts import reconstruct, scaffold_rank

PURSUIT = " by pursuit"
"""After an SAE's key: its errors with activations by gradient pursuit."""


def measure(
    config: DarkMatterEvalConfig, saes: list[SelectedSAE], call: Call
) -> Iterator[tuple[SelectedSAE, Result]]:
    """
    Measure the errors of all SAEs of a hook point together: two passes over the tokens to
    fit on, one over those to test on.
    """
    known = [*saes, *call.companions]
    twins = plain_twins(config.baseline, saes, known)
    earlier = _earlier(config, saes, known)
    model = load_language_model(
        config.model_name, call.device, config.llm_dtype, config.model_class_name
    )
    text = (config.dataset, config.dataset_split, config.text_column)
    seen = text_seen_in_training(saes, *text)
    for hooked, at_hook in by_hook_point(model, known, call.kept):
        group = [sae for sae in at_hook if sae.key in seen]
        if not group:
            continue
        if not config.scaling:
            needed = {*seen, *(twin.key for twin in twins.values())}
            at_hook = [sae for sae in at_hook if sae.key in needed]
        at = _HookPoint(config, hooked, at_hook, earlier)
        metrics, losses, stream = at.measure(model, call.device)
        for sae in group:
            peers = [peer for peer in at_hook if peer.key != sae.key]
            norms, details, scaling = metrics.norm_metrics(
                sae, peers if config.scaling else []
            )
            scaffold, overlaps = metrics.scaffold(sae, twins.get(sae.key))
            categories = output.DarkMatterMetricCategories(
                reconstruction=metrics.reconstruction(sae),
                linear_error=metrics.linear_error(sae.key),
                norms=norms,
                cross_entropy=metrics.cross_entropy(sae.key, losses),
                scaffold=scaffold,
                earlier=metrics.earlier(sae.key),
                pursuit=metrics.pursuit(sae.key + PURSUIT),
                token_stats=output.TokenMetrics(
                    n_tokens=int(metrics.errors.sums["n"][0, 0]),
                    n_sequences=at.n_sequences,
                    n_fit_tokens=metrics.errors.fitted.n,
                ),
            )
            result = {
                "eval_result_metrics": categories,
                "eval_result_details": details,
                "error_scaling": scaling,
                "scaffold_overlaps": overlaps,
                "tokens": stream.selection,
                "text_seen_in_training": seen[sae.key],
            }
            yield sae, result


@dataclass
class _HookPoint:
    """
    The SAEs of a hook point, measured together.

    Attributes:
        config: The configuration.
        hooked: The language model at the hook point.
        saes: The SAEs there.
        earlier: The SAE at an earlier hook point, by the keys of those that have one.
        n_sequences: Number of sequences tested on, once measured.
    """

    config: DarkMatterEvalConfig
    hooked: HookedModel
    saes: Sequence[SelectedSAE]
    earlier: Mapping[str, SelectedSAE]
    n_sequences: int = 0

    @cached_property
    def pursuits(self) -> dict[str, GradientPursuit]:
        """Gradient pursuit with each SAE, by its key, if it is asked for."""
        saes = self.saes if self.config.pursuit else ()
        return {sae.key: GradientPursuit(sae.sae) for sae in saes}

    def measure(
        self, model: LanguageModel, device: str
    ) -> tuple[Metrics, dict[str, torch.Tensor], TokenStream]:
        """Metrics, cross-entropies as of `Metrics.cross_entropy`, and the text."""
        config, keys = self.config, [sae.key for sae in self.saes]
        with_pursuit = keys + [key + PURSUIT for key in self.pursuits]
        widths = {
            key: self.earlier[key].sae.cfg.d_in for key in keys if key in self.earlier
        }
        d_in = self.saes[0].sae.cfg.d_in
        errors = LinearErrors(d_in, with_pursuit, widths, device)
        stream = TokenStream(config, model, self.saes)
        n_fit = config.n_fit_tokens
        for tokens, counts in stream.batches(n_fit, "Fitting linear errors"):
            errors.fit(_Run(self, stream, tokens, counts).batch())
        n_inputs = d_in + 2 * max(widths.values(), default=0)
        if errors.fitted.n <= n_inputs:
            raise UserError(
                f"dataset {config.dataset!r} has {errors.fitted.n:,} tokens to fit on; a "
                f"map of {n_inputs:,} inputs needs more"
            )
        norms = NormPredictions(errors, keys, config.scaling, model.cfg.d_vocab, device)
        stream = TokenStream(config, model, self.saes)  # from the beginning
        for tokens, counts in stream.batches(n_fit, "Fitting norms"):
            norms.fit(_Run(self, stream, tokens, counts).batch(with_losses=True))
        norms.solve()
        bootstrap = SequenceBootstrap(config.n_bootstrap, config.random_seed)
        losses, n_predictions = ReplicateSums(), 0
        for tokens, counts in stream.batches(config.n_tokens, "Testing"):
            run = _Run(self, stream, tokens, counts)
            batch = run.batch(with_losses=True)
            weights = bootstrap.draw(len(tokens))
            errors.test(batch, weights)
            norms.test(batch, weights)
            sequence = torch.arange(len(tokens))
            losses.add(sequence, weights, **run.losses(errors))
            n_predictions += weights.double() @ run.clean.n_predictions
            self.n_sequences += len(tokens)
        means = {name: of[:, 0] / n_predictions for name, of in losses.items()}
        return Metrics(errors, norms, config.confidence), means, stream


class _Run:
    """One batch of sequences through the language model and the SAEs."""

    def __init__(
        self,
        at: _HookPoint,
        stream: TokenStream,
        tokens: torch.Tensor,
        counts: torch.Tensor,
    ):
        self._at, self._tokens, self._counts = at, tokens, counts
        self._run = HookedBatch(at.hooked, tokens, counts)
        self._follows = predicting_text(tokens, counts, stream.tokenizer)
        x = self._run.x
        self._of_all = {sae.key: reconstruct(sae.sae, x) for sae in at.saes}

    @cached_property
    def clean(self) -> CleanPredictions:
        """Predictions with nothing changed."""
        logits = self._run.above(self._run.full)
        return CleanPredictions(logits, self._tokens, self._follows)

    @torch.no_grad()
    def batch(self, with_losses: bool = False) -> Batch:
        """The tokens that count and that text follows."""
        follows = self._follows
        x, kept = self._run.x, follows[self._counts]
        found = {key: (of[kept], l0[kept]) for key, (of, l0) in self._of_all.items()}
        for key, pursuit in self._at.pursuits.items():
            acts = pursuit.encode(x[kept], found[key][1])
            l0 = acts[:, scaffold_rank(pursuit.sae) :].count_nonzero(dim=1)
            found[key + PURSUIT] = pursuit.sae.decode(acts), l0
        return Batch(
            x=_at_least_float32(x[kept]),
            reconstructions={
                key: _at_least_float32(of) for key, (of, _) in found.items()
            },
            l0={key: l0 for key, (_, l0) in found.items()},
            token=self._tokens[follows],
            loss=(self.clean.surprise if with_losses else follows.float())[follows],
            sequence=follows.nonzero()[:, 0],
            earlier=self._earlier(self._tokens, follows),
        )

    def _earlier(
        self, tokens: torch.Tensor, follows: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """See `Batch.earlier`."""
        own = {sae.key for sae in self._at.saes}
        asked = {key: sae for key, sae in self._at.earlier.items() if key in own}
        if not asked:
            return {}
        hook_names = {sae.hook_name for sae in asked.values()}
        found = activations_at(self._at.hooked.model, tokens, sorted(hook_names))
        inputs: dict[str, torch.Tensor] = {}
        for key, sae in asked.items():
            x = found[sae.hook_name][follows]
            reconstruction, _ = reconstruct(sae.sae, x)
            both = torch.cat([reconstruction, x - reconstruction], dim=1)
            inputs[key] = _at_least_float32(both)
        return inputs

    @torch.no_grad()
    def losses(self, errors: LinearErrors) -> dict[str, torch.Tensor]:
        """Sums of the cross-entropy over each sequence, shape (n_sequences,), named as in
        `Metrics.cross_entropy`."""
        run, found = self._run, {"clean": self.clean.losses[0]}
        for key, (reconstruction, _) in self._of_all.items():
            linear = errors.map_of(key)(_at_least_float32(run.x))
            instead = {
                "reconstruction": reconstruction,
                "linear": reconstruction + linear,
                "nonlinear": run.x - linear,
            }
            for name, x in instead.items():
                logits = run.above(run.full_with(x))
                found[f"{key} {name}"] = self.clean.compare(logits)[0]
        return found


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check(config: DarkMatterEvalConfig, saes: Sequence[SelectedSAE]) -> None:
    """
    Raises:
        UserError: A baseline or an earlier SAE cannot be one, there are fewer tokens to fit
            on than inputs of a map, or pursuit is on and a decoder is not linear.
    """
    plain_twins(config.baseline, saes, saes)
    earlier = _earlier(config, saes, saes)
    for sae in saes:
        # what stands in for an SAE that is not trained yet has other weights
        if config.pursuit and len(sae.sae.W_dec) == sae.sae.cfg.d_sae:
            pursuit = GradientPursuit(sae.sae)
            if sae.sae.cfg.reshape_activations == "none":
                pursuit.check_decoder([sae.sae.cfg.d_in])
        n_inputs = sae.sae.cfg.d_in
        if sae.key in earlier:
            n_inputs += 2 * earlier[sae.key].sae.cfg.d_in
        if config.n_fit_tokens <= n_inputs:
            raise UserError(
                f"n_fit_tokens is {config.n_fit_tokens:,}; the linear map to the error of "
                f"SAE {sae.label!r} has {n_inputs:,} inputs and needs more tokens"
            )


def _earlier(
    config: DarkMatterEvalConfig,
    saes: Sequence[SelectedSAE],
    candidates: Sequence[SelectedSAE],
) -> dict[str, SelectedSAE]:
    """
    The SAEs at earlier hook points, by the keys of those that have one.

    Raises:
        UserError: One is not among the candidates, or its hook point is not earlier.
    """
    by_name = {candidate.label: candidate for candidate in candidates}
    given = config.earlier or {}
    for name in [given] if isinstance(given, str) else [*given, *given.values()]:
        check_baseline(name, [*by_name], field="earlier")
    found: dict[str, SelectedSAE] = {}
    for sae in candidates:
        name = named_for(config.earlier, sae.label)
        if name is None:
            continue
        if _is_before(by_name[name].hook_name, sae.hook_name):
            found[sae.key] = by_name[name]
        elif isinstance(given, dict):
            raise UserError(
                f"earlier is {name!r} at {by_name[name].hook_name}; it must be an SAE at a "
                f"hook point before {sae.hook_name}, where {sae.label!r} is"
            )
    if isinstance(given, str) and not found:
        raise UserError(
            f"earlier is {given!r} at {by_name[given].hook_name}; no SAE in the call is at a "
            "later hook point"
        )
    asked = {sae.key for sae in saes}
    return {key: earlier for key, earlier in found.items() if key in asked}


def _is_before(hook_name: str, other: str) -> bool:
    """Whether a hook point is another one, in the same layer or an earlier one."""
    layers = [re.search(r"\.(\d+)(?:\.|$)", name) for name in (hook_name, other)]
    first, second = (int(layer[1]) if layer else -1 for layer in layers)
    return hook_name != other and 0 <= first <= second


IMPLEMENTATION = Implementation(
    DarkMatterEvalConfig, measure, output.DarkMatterEvalOutput, check
)
