"""What interventions cost the language model in next-token prediction."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch

from saelens_scaffold.evals.data import TokenStream
from saelens_scaffold.evals.intervals import SequenceBootstrap, estimates
from saelens_scaffold.evals.model import HookedBatch, HookedModel
from saelens_scaffold.evals.saes import SelectedSAE
from saelens_scaffold.evals.scaffold_ablation import ScaffoldAblationEvalConfig
from saelens_scaffold.evals.scaffold_ablation.eval_output import (
    ScaffoldAblationResultDetail,
)
from saelens_scaffold.evals.scaffold_ablation.interventions import (
    CLEAN,
    Identity,
    Intervention,
    distinct,
)


@torch.no_grad()
def measure_losses(
    config: ScaffoldAblationEvalConfig,
    hooked: HookedModel,
    stream: TokenStream,
    group: Sequence[SelectedSAE],
    changes: Mapping[str, list[Intervention]],
) -> tuple[dict[Identity, torch.Tensor], int]:
    """
    Run the language model with every intervention.

    Args:
        config: Number of tokens and replicates.
        hooked: The language model at the SAEs' hook point.
        stream: The text, from where it is to be evaluated on.
        group: The SAEs.
        changes: The interventions on each SAE, by its key.

    Returns:
        Cross-entropy and KL of the clean run and of each intervention, by its identity, in
        the sample and every bootstrap replicate, shape (2, 1 + n_replicates), float64; and
        the number of predictions.
    """
    bootstrap = SequenceBootstrap(config.n_bootstrap, config.random_seed)
    n_predictions = torch.zeros(1 + config.n_bootstrap, dtype=torch.float64)
    sums: defaultdict[Identity, torch.Tensor] = defaultdict(
        lambda: torch.zeros(2, 1 + config.n_bootstrap, dtype=torch.float64)
    )
    for tokens, counts in stream.batches(config.n_tokens, "Ablating"):
        weights = bootstrap.draw(len(tokens)).double()
        run = HookedBatch(hooked, tokens, counts)
        clean = CleanPredictions(run.above(run.full), tokens, counts)
        n_predictions += weights @ clean.n_predictions
        batch = {CLEAN.identity(): clean.losses}
        runs = {False: run}
        if config.include_special_tokens:
            runs[True] = run.changing(torch.ones_like(counts))
        for identity, change, of in distinct(group, changes, runs):
            changed = runs[change.special_tokens]
            draws = [
                clean.compare(changed.above(changed.full_with(draw(of))))
                for draw in change.changes
            ]
            batch[identity] = torch.stack(draws).mean(dim=0)
        for identity, losses in batch.items():
            sums[identity] += torch.stack([weights @ loss for loss in losses])
    means = {identity: of / n_predictions for identity, of in sums.items()}
    return means, int(n_predictions[0])


def result_details(
    losses: Mapping[Identity, torch.Tensor],
    sae: SelectedSAE,
    changes: Sequence[Intervention],
    confidence: float,
) -> list[ScaffoldAblationResultDetail]:
    """Cross-entropy and KL of the clean run and of each intervention on an SAE."""
    clean_ce, _ = losses[CLEAN.identity()]
    found: list[ScaffoldAblationResultDetail] = []
    for change in [CLEAN, *changes]:
        ce, kl = losses[change.identity(sae.key)]
        figures = {"ce": ce, "ce_ratio": ce / clean_ce, "delta_ce": ce - clean_ce}
        detail = ScaffoldAblationResultDetail(
            kind=change.kind,
            n_draws=len(change.changes),
            **change.fields(),
            **estimates(confidence, **figures, kl=kl),
        )
        found.append(detail)
    return found


class CleanPredictions:
    """
    Predictions of the language model when nothing is changed, for one batch.

    Args:
        logits: Shape (batch, seq, d_vocab).
        tokens: Shape (batch, seq).
        counts: Mask of the tokens that count, shape (batch, seq). A prediction counts if
            both the token it is made at and the token it is about do: elsewhere the
            activations are not changed, and the predictions hardly.

    Attributes:
        n_predictions: Number of predictions that count in each sequence, shape (batch,),
            float64.
        losses: Losses as of `compare`; the KL divergence is 0.
    """

    def __init__(
        self, logits: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor
    ):
        # what follows the last token of a sequence is not known, and never counts
        self._targets = tokens.roll(-1, dims=1).flatten()
        follows = counts.roll(-1, dims=1)
        follows[:, -1] = False
        self._counts = (counts & follows).cpu().double()
        self.n_predictions = self._counts.sum(dim=1)
        flat = logits.flatten(0, 1)
        self._probabilities = torch.empty_like(flat, dtype=torch.float32)
        for rows, log_p in _log_softmax_in_parts(logits):
            torch.exp(log_p, out=self._probabilities[rows])
        _, self._clean_expectation = self._surprise_and_expectation(logits)
        self.losses = self.compare(logits)

    def compare(self, logits: torch.Tensor) -> torch.Tensor:
        """
        Losses of other predictions for the same batch.

        Args:
            logits: Shape (batch, seq, d_vocab).

        Returns:
            Sums over the predictions of each sequence, in nats, shape (2, batch), float64:
            cross-entropy of the next token, and KL divergence from the clean prediction.
        """
        surprise, expectation = self._surprise_and_expectation(logits)
        # KL(p || q) = E_p[log p] - E_p[log q], of which the first is the same for all q
        both = torch.stack([surprise, self._clean_expectation - expectation])
        by_token = both.cpu().double().view(2, *self._counts.shape)
        return (by_token * self._counts).sum(dim=2)

    def _surprise_and_expectation(
        self, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-log q(next token) and E_p[log q], both of shape (batch * seq,)."""
        surprises: list[torch.Tensor] = []
        expectations: list[torch.Tensor] = []
        for rows, log_q in _log_softmax_in_parts(logits):
            targets = self._targets[rows, None]
            surprises.append(-log_q.gather(1, targets).squeeze(1))
            p = self._probabilities[rows]
            expectations.append(torch.bmm(p[:, None], log_q[:, :, None]).flatten())
        return torch.cat(surprises), torch.cat(expectations)


def _log_softmax_in_parts(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Log probabilities in float32, in parts small enough for a CPU's cache."""
    flat = logits.flatten(0, 1)
    step = max(1, (2**20 if flat.device.type == "cpu" else 2**26) // flat.shape[1])
    for start in range(0, len(flat), step):
        rows = slice(start, start + step)
        yield rows, flat[rows].float().log_softmax(dim=-1)
