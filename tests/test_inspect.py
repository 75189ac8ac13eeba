"""What an inspection says, against planted truth and a few lines of plain PyTorch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval_helpers import D_MODEL, HOOK, eval_sae, write_texts
from helpers import MODEL_CLASSES
from saelens_scaffold import ScaffoldJumpReLUSAE
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.evals.eval_configs import TextEvalConfig
from saelens_scaffold.evals.tokens import TokenStream
from saelens_scaffold.inspect import Inspection, inspect_saes, logit_lens, steering
from saelens_scaffold.inspect.axes import AxesFit
from saelens_scaffold.inspect.contexts import StrongestContexts
from saelens_scaffold.inspect.explanations import Explanations, Tokens, label_of
from saelens_scaffold.inspect.logit_lens import promoted_tokens
from saelens_scaffold.inspect.removal import WrittenByLatents
from saelens_scaffold.inspect.sides import SideBySide
from saelens_scaffold.inspect.statistics import LatentStatistics
from saelens_scaffold.models import (
    embedded_model_path,
    load_embedded_model,
    load_stdlib_text,
)
from saelens_scaffold.models.language_models import ModelClass, load_language_model
from saelens_scaffold.saes import ScaffoldJumpReLUSAEConfig
from saelens_scaffold_cli import main

CONTEXT, N_SAMPLE, N_TOKENS = 64, 1_000, 2_500
FIELDS: dict[str, Any] = {
    "dataset": "python-stdlib",
    "n_sample_tokens": N_SAMPLE,
    "n_tokens": N_TOKENS,
    "n_removal_tokens": N_TOKENS,
    "device": "cpu",
}


# ---- planted truth


def planted_scaffold(directions: torch.Tensor) -> ScaffoldJumpReLUSAE:
    """A scaffold whose output is x in the span of orthonormal rows, in a basis of its own."""
    rank, d_in = directions.shape
    cfg = ScaffoldJumpReLUSAEConfig(d_in=d_in, d_sae=2 * d_in, scaffold_rank=rank)
    sae = ScaffoldJumpReLUSAE(cfg)
    mixing = torch.randn(rank, rank) + 2 * torch.eye(rank)
    with torch.no_grad():
        sae.W_enc[:, :rank] = directions.T @ mixing
        sae.W_dec[:rank] = torch.linalg.inv(mixing) @ directions
        sae.b_dec.zero_()
    return sae


def explanations_of(context_size: int, n_targets: int) -> Explanations:
    """Explanations on tokens of the embedded model."""
    tokenizer: Any = AutoTokenizer.from_pretrained(embedded_model_path())
    texts = tokenizer.batch_decode([[i] for i in range(4096)])
    return Explanations(texts, torch.tensor([0]), context_size, n_targets, "cpu")


@pytest.mark.parametrize("seed", range(5))
def test_planted_directions_are_labelled_right(seed: int):
    torch.manual_seed(seed)
    n_sequences, length, n_vocab, n_topics = 160, 64, 4096, 6
    frequencies = 1 / (1.0 + torch.randperm(n_vocab))
    tokens = torch.multinomial(frequencies, n_sequences * length, replacement=True)
    tokens = tokens.view(n_sequences, length)
    topic = torch.randint(1, 1 + n_topics, (n_sequences, 1)).expand_as(tokens)
    planted = torch.stack(
        [
            (torch.arange(length) / 9.0).sin().expand_as(tokens),
            torch.randn(1 + n_topics)[topic],
            frequencies[tokens].log(),
            torch.randn(tokens.shape),
        ],
        dim=2,
    )
    planted = (planted - planted.mean((0, 1))) / planted.std((0, 1))
    planted += 0.3 * torch.randn_like(planted)
    directions = torch.linalg.qr(torch.randn(16, 4)).Q.T
    x = 5 + (planted * torch.tensor([8.0, 6.0, 4.0, 2.0])) @ directions
    x += 0.1 * torch.randn_like(x)

    fit = AxesFit(planted_scaffold(directions))
    fit.update(x[:32].flatten(0, 1))
    axes = fit.result()
    assert torch.allclose((axes.rows @ directions.T).abs(), torch.eye(4), atol=0.1)
    explanations = explanations_of(length, 4)
    everything = torch.ones_like(tokens, dtype=torch.bool)
    entropy = 8 * torch.rand(tokens.shape)
    batch = Tokens(tokens, everything, topic, x, entropy, 0)
    for part in batch.parts(7):
        explanations.update(part, axes.coordinates(part.x).flatten(0, 1))
    labels = [label_of(of) for of in explanations.r_squared()]
    for label, truth in zip(labels, ("position", "topic", "frequency"), strict=False):
        assert label.startswith(f"mostly {truth}"), labels
    assert labels[3] == "unexplained"


def test_labels_follow_their_rules():
    assert label_of({"position": 0.2, "token": 0.24}) == "unexplained"
    assert label_of({"frequency": 0.45, "token": 0.5}) == (
        "partly frequency of the token (R² 0.45)"
    )
    assert label_of({"frequency": 0.35, "token": 0.5}) == (
        "mostly identity of the token (R² 0.50)"
    )
    assert label_of({}) == "unexplained"


def test_r_squared_is_that_of_means_of_the_other_half():
    torch.manual_seed(0)
    tokens = torch.randint(1, 50, (64, 20))
    y = torch.randn(50)[tokens] + torch.randn(tokens.shape) + 3
    explanations = explanations_of(20, 1)
    counts, x = torch.rand(tokens.shape) < 0.8, torch.ones(*tokens.shape, 2)
    batch = Tokens(tokens, counts, torch.zeros_like(tokens), x, y.abs(), 0)
    explanations.update(batch, y[counts][:, None])
    (found,) = explanations.r_squared()

    half = (torch.arange(64) // 16 % 2)[:, None].expand_as(tokens)
    errors = variances = 0.0
    for fit, test in ((0, 1), (1, 0)):
        of_fit, of_test = counts & (half == fit), counts & (half == test)
        overall, means = y[of_fit].mean(), torch.zeros(50)
        for token in range(50):
            own = y[of_fit & (tokens == token)]
            shrunk = (own.sum() + 4 * overall) / (len(own) + 4)
            means[token] = shrunk
        errors += float((y - means[tokens])[of_test].pow(2).sum())
        variances += float((y[of_test] - y[of_test].mean()).pow(2).sum())
    assert found["token"] == pytest.approx(1 - errors / variances, abs=1e-4)
    assert "topic" not in found


def test_distances_to_the_beginnings_of_lines_and_sentences():
    tokenizer: Any = AutoTokenizer.from_pretrained(embedded_model_path())
    ids = tokenizer("One two. Three\nfour x.y").input_ids
    explanations = explanations_of(len(ids), 1)
    tokens = torch.tensor([ids])
    zeros = torch.zeros_like(tokens)
    batch = Tokens(tokens, tokens > 0, zeros, zeros[..., None], zeros, 0)
    groups = explanations._groups(batch)
    texts = [tokenizer.decode([i]) for i in ids]
    line = sentence = 0
    for i, text in enumerate(texts):
        assert groups["line"][0, i] == line, texts
        assert groups["sentence"][0, i] == sentence, texts
        line = 0 if "\n" in text else line + 1
        ends = text.endswith(".") and (i + 1 < len(ids) and texts[i + 1][0].isspace())
        sentence = 0 if ends else sentence + 1


# ---- topics of the text


def test_each_token_has_the_label_of_its_text(tmp_path: Path):
    texts = [f"text number {i} " * (3 + i) for i in range(30)]
    labels = [f"topic {i % 3}" for i in range(30)]
    file = write_texts(tmp_path / "texts.jsonl", texts, labels)
    config = TextEvalConfig(
        model_name="py-neox", dataset=str(file), context_size=16, llm_batch_size=4
    )
    model = load_embedded_model()
    stream = TokenStream(config, model, [], "label")
    batches = [*stream.labelled_batches(400, "a"), *stream.labelled_batches(300, "b")]
    assert stream.labels[1:] == ["topic 0", "topic 1", "topic 2"]
    tokens, counts, numbers = (torch.cat(of) for of in zip(*batches, strict=True))
    plain = TokenStream(config, model, [])
    without = [*plain.batches(400, "a"), *plain.batches(300, "b")]
    assert torch.equal(tokens, torch.cat([of for of, _ in without]))
    assert torch.equal(numbers > 0, counts)
    expected = [
        (token, 1 + i % 3)
        for i, text in enumerate(texts)
        for token in model.to_tokens(text, prepend_bos=False)[0].tolist()
    ]
    pairs = torch.stack([tokens[counts], numbers[counts]], dim=1).tolist()
    assert [tuple(of) for of in pairs] == expected[: len(pairs)]


# ---- a whole inspection


@torch.no_grad()
def activations() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and activations of the embedded text, by transformers alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(embedded_model_path()).float()
    tokenizer = load_embedded_model()
    texts = (row["text"] for row in load_stdlib_text("test"))  # type: ignore[index]
    ids = (tokenizer.to_tokens(t, prepend_bos=False, truncate=False)[0] for t in texts)
    stream = concat_and_batch_sequences(ids, CONTEXT, 0, None, 0)
    tokens = torch.stack([next(stream) for _ in range(60)])
    return tokens, model(tokens, output_hidden_states=True).hidden_states[1]


@pytest.fixture(scope="module")
def found() -> tuple[Inspection, dict[str, Any], torch.Tensor, torch.Tensor]:
    """An inspection of a plain SAE, two of whose latents are opposite, and of a scaffold
    SAE; the SAEs; and tokens and activations of the text."""
    tokens, x = activations()
    saes = {"plain": eval_sae(seed=1), "scaffold": eval_sae(rank=3)}
    flat = x[:, 1:].flatten(0, 1)
    direction = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)[2][0]
    with torch.no_grad():
        for sign, latent in ((1, 4), (-1, 9)):
            saes["plain"].W_dec[latent] = saes["plain"].W_enc[:, latent] = (
                sign * direction
            )
            saes["plain"].b_enc[latent] = -sign * (flat.mean(0) @ direction)
            saes["plain"].b_enc[latent] += sign * saes["plain"].b_dec @ direction
            saes["plain"].threshold[latent] = 0.01
        # what the scaffold writes is, mostly, the same direction
        saes["scaffold"].W_dec[1] = saes["scaffold"].W_enc[:, 1] = direction
    return inspect_saes([*saes.items()], **FIELDS), saes, tokens, x


class _Text:
    """The tokens that were inspected, which follow those of the sample."""

    def __init__(self, found: Inspection, tokens: torch.Tensor, x: torch.Tensor):
        counts = tokens != 0
        n = int((counts.sum(1).cumsum(0) < N_SAMPLE).sum()) + 1
        self.sample = x[:n][counts[:n]]
        rest = slice(n, n + found.n_sequences)
        self.tokens, self.x, self.counts = tokens[rest], x[rest], counts[rest]


def test_what_was_read(found: Any):
    inspection, _, tokens, x = found
    text = _Text(inspection, tokens, x)
    assert inspection.n_sample_tokens == len(text.sample)
    assert inspection.n_tokens == int(text.counts.sum())
    assert 2_500 <= inspection.n_tokens < 2_500 + CONTEXT
    assert inspection.selection.context_size == CONTEXT
    tokenizer: Any = load_embedded_model().tokenizer
    assert len(inspection.tokens) == 4096
    for token in (0, 5, 999):
        assert inspection.tokens[token] == tokenizer.decode([token])
    variances = torch.linalg.eigvalsh(
        torch.cov(text.x[text.counts].double().T, correction=0)
    )
    shares = torch.tensor(inspection.variance_shares, dtype=torch.float64)
    assert torch.allclose(shares, variances.flip(0) / variances.sum(), atol=1e-5)


@pytest.mark.parametrize("index", [0, 1])
@torch.no_grad()
def test_the_dictionary_equals_an_independent_computation(found: Any, index: int):
    inspection, saes, tokens, x = found
    text, sae = _Text(inspection, tokens, x), [*saes.values()][index]
    rank = 3 * index
    pre = (text.x - sae.b_dec) @ sae.W_enc[:, rank:] + sae.b_enc[rank:]
    acts = (pre * (pre > sae.threshold[rank:])).relu()
    counted = acts[text.counts]
    columns = inspection.saes[index].latents
    assert columns.index == [*range(rank, 96)]
    frequency = (counted > 0).float().mean(0)
    assert torch.allclose(torch.tensor(columns.frequency), frequency, atol=2 / 2500)
    l0 = float((counted > 0).float().sum(1).mean())
    assert inspection.saes[index].l0_sparse == pytest.approx(l0, rel=1e-3)
    best = (acts * text.counts[..., None]).max(dim=1)
    for i in range(96 - rank):
        active = counted[:, i][counted[:, i] > 0]
        contexts = columns.contexts[i]
        assert sum(columns.histogram[i]) == pytest.approx(len(active), abs=2)
        if len(active) < 20:
            continue
        assert columns.mean[i] == pytest.approx(float(active.mean()), rel=1e-2)
        assert columns.scale[i] == pytest.approx(float(active.max()), rel=1e-3)
        edges = 2 ** (torch.arange(-20, 21) / 2.0)
        bins = torch.histogram(active, edges.float()).hist.tolist()
        first = columns.first_bin[i] + 20
        shown = bins[first : first + len(columns.histogram[i])]
        assert shown == pytest.approx(columns.histogram[i], abs=2)
        values, order = best.values[:, i].sort(descending=True)
        assert len(contexts) == min(10, int((values > 0).sum()))
        for context, value, sequence in zip(contexts, values, order, strict=False):
            level = int((127 * value / columns.scale[i]).round())
            assert context.values[context.peak] == pytest.approx(level, abs=1)
            if context.sequence != sequence:  # a tie
                continue
            at = int(best.indices[sequence, i])
            assert context.position == at
            window = slice(max(0, at - 15), at + 9)
            assert context.tokens == text.tokens[sequence, window].tolist()
            there = acts[sequence, window, i] * 127 / columns.scale[i]
            levels = torch.tensor(context.values).float()
            assert torch.allclose(levels, there.clamp(max=127), atol=1)


@torch.no_grad()
def test_the_scaffold_equals_an_independent_computation(found: Any):
    inspection, saes, tokens, x = found
    text, sae = _Text(inspection, tokens, x), saes["scaffold"]

    def s_of(x: torch.Tensor) -> torch.Tensor:
        return ((x - sae.b_dec) @ sae.W_enc[:, :3] @ sae.W_dec[:3]).double()

    of_sample, counted = s_of(text.sample), text.x[text.counts]
    axes = torch.linalg.eigh(torch.cov(of_sample.T))[1].flip(1)[:, :3].T
    s, mean = s_of(counted), of_sample.mean(0)
    scaffold = inspection.saes[1].scaffold
    assert inspection.saes[0].scaffold is None
    assert scaffold is not None
    total = counted.double().var(0, correction=0).sum()
    part = s.var(0, correction=0).sum()
    assert scaffold.share_of_variance == pytest.approx(float(part / total), rel=1e-3)
    coordinates = (s - mean) @ axes.T
    everywhere = (s_of(text.x) - mean) @ axes.T
    for i, of in enumerate(scaffold.directions):
        sign = axes[i, of.dimensions[0][0]].sign() * (
            1 if of.dimensions[0][1] > 0 else -1
        )
        assert of.dimensions[0][1] > 0
        expected = sign * axes[i]
        assert torch.allclose(torch.tensor(of.vector).to(axes), expected, atol=1e-3)
        variance = float(coordinates[:, i].var(correction=0))
        assert of.variance == pytest.approx(variance, rel=1e-3)
        for end, contexts in ((1, of.high), (-1, of.low)):
            strength = (sign * end * everywhere[..., i]).where(text.counts, -torch.inf)
            best = strength.max(dim=1)
            values, order = best.values.sort(descending=True)
            assert [c.sequence for c in contexts] == order[:10].tolist()
            assert [c.position for c in contexts] == best.indices[order[:10]].tolist()
            levels = [end * c.values[c.peak] for c in contexts]
            assert levels == pytest.approx(
                (127 * values / of.scale)[:10].tolist(), abs=1
            )
        deviations = (
            sign * coordinates[:, i] / ((of_sample - mean) @ axes[i]).std(correction=0)
        )
        edges = torch.arange(-24, 25).double() / 4
        bins = torch.histogram(deviations.clamp(-5.999, 5.999), edges).hist.tolist()
        assert bins == pytest.approx(of.histogram, abs=3)
    # position 0 is BOS
    fixed = s_of(text.x) + sae.b_dec.double() @ axes.T @ axes
    squares, of_x = fixed.pow(2).sum((0, 2)), text.x.double().pow(2).sum((0, 2))
    shares = torch.tensor(scaffold.positions.share_of_squares).double()
    assert torch.allclose(shares, squares / of_x, rtol=1e-3)
    shares = torch.tensor(scaffold.positions.share_of_total).double()
    assert torch.allclose(shares, squares / squares.sum(), rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("what", ["direction", "dense latent"])
def test_the_loss_without(found: Any, what: str):
    inspection, saes, tokens, x = found
    text = _Text(inspection, tokens, x)
    model: Any = AutoModelForCausalLM.from_pretrained(embedded_model_path()).float()
    if what == "direction":
        (of, *_), sae = inspection.saes[1].scaffold.directions, saes["scaffold"]

        def s_of(x: torch.Tensor) -> torch.Tensor:
            return (x - sae.b_dec) @ sae.W_enc[:, :3] @ sae.W_dec[:3]

        of_sample = s_of(text.sample)
        axis = torch.linalg.eigh(torch.cov(of_sample.double().T))[1][:, -1].float()
    else:
        (of,), sae = (
            (o for o in inspection.saes[0].dense if o.latent == 4),
            saes["plain"],
        )

        def s_of(x: torch.Tensor) -> torch.Tensor:
            pre = (x - sae.b_dec) @ sae.W_enc[:, 4] + sae.b_enc[4]
            return (pre * (pre > sae.threshold[4])).relu()[..., None] * axis

        axis = sae.W_dec[4]
        of_sample = s_of(text.x[text.counts])

    def losses() -> torch.Tensor:
        logits = model(text.tokens).logits[:, :-1]
        targets = text.tokens[:, 1:]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none"
        )
        return loss.view(targets.shape)

    def remove(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # in transformers 4
            return (remove(_, __, output[0]), *output[1:])
        along = (s_of(output) - of_sample.mean(0)) @ axis
        return output - (along * text.counts)[..., None] * axis

    predicts = text.counts[:, :-1] & text.counts[:, 1:]
    clean = losses()
    handle = model.gpt_neox.layers[0].register_forward_hook(remove)
    more = (losses() - clean)[predicts]
    handle.remove()
    assert inspection.n_removal_tokens == int(predicts.sum())
    assert inspection.cross_entropy == pytest.approx(
        float(clean[predicts].mean()), rel=1e-4
    )
    removal = of.removal
    assert removal.increase == pytest.approx(float(more.mean()), rel=1e-2)
    assert removal.kl > 0
    totals = torch.zeros(4096).index_add(0, text.tokens[:, 1:][predicts], more)
    token, n, mean = removal.tokens[0]
    most = int(totals.argmax())
    assert token == most
    assert n == int((text.tokens[:, 1:][predicts] == most).sum())
    assert mean * n == pytest.approx(float(totals.max()), rel=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 1])
def test_dense_latents_are_those_of_all_tokens(found: Any, index: int):
    inspection, saes, tokens, x = found
    text, sae, of = _Text(inspection, tokens, x), [*saes.values()][index], inspection
    rank, of = 3 * index, inspection.saes[index]
    first = (sae.encode(text.sample)[:, rank:] > 0).float().mean(0)
    frequency = (sae.encode(text.x[text.counts])[:, rank:] > 0).float().mean(0)
    is_dense, may_be_dense = (
        frequency > 0.1,
        (first > 0.05) & (first >= first.sort()[0][-32]),
    )
    assert not torch.equal(is_dense, first > 0.1)  # else nothing is tested
    assert of.n_dense == int(is_dense.sum())
    expected = (is_dense & may_be_dense).nonzero()[:, 0].tolist()
    assert sorted(dense.latent for dense in of.dense) == [i + rank for i in expected]


def test_antipodes_and_successors_of_dense_latents(found: Any):
    inspection, *_ = found
    dense = {of.latent: of for of in inspection.saes[0].dense}
    for latent, other in ((4, 9), (9, 4)):
        antipode, successor = dense[latent].antipode, dense[latent].successor
        assert antipode is not None
        assert antipode.latent == other
        assert antipode.cosine_decoder == pytest.approx(-1, abs=1e-3)
        assert antipode.cosine_encoder == pytest.approx(-1, abs=1e-3)
        assert antipode.both_fire == 0
        assert antipode.either_fires > 0.9
        assert successor is not None
        assert successor.sae == 1
        scaffold = inspection.saes[1].scaffold
        assert scaffold is not None
        assert abs(successor.correlation) > 0.6
        assert successor.cosine * successor.correlation > 0
    frequencies = [inspection.saes[0].latents.frequency[l] for l in dense]
    assert frequencies == sorted(frequencies, reverse=True)
    # so little text may have one topic
    assert {*dense[4].r_squared} | {"topic"} == {*inspection.predictors}


@pytest.mark.parametrize("model_class", MODEL_CLASSES[1:])
def test_the_other_routes_find_the_same(found: Any, model_class: ModelClass):
    inspection, saes, *_ = found
    saes = [(name, sae) for name, sae in saes.items() if name == "scaffold"]
    other = inspect_saes(saes, **FIELDS, model_class_name=model_class)
    one, two = inspection.saes[1], other.saes[0]
    assert one.latents.frequency == pytest.approx(two.latents.frequency, abs=2 / 2500)
    assert one.scaffold is not None
    assert two.scaffold is not None
    for a, b in zip(one.scaffold.directions, two.scaffold.directions, strict=True):
        assert a.r_squared == pytest.approx(b.r_squared, abs=1e-3)
        assert a.removal.increase == pytest.approx(b.removal.increase, rel=1e-2)
        assert [c.sequence for c in a.high] == [c.sequence for c in b.high]
        for tops in ([a.promoted, b.promoted], [a.suppressed, b.suppressed]):
            ids = [[token for token, _ in of[:5]] for of in tops]
            assert ids[0] == ids[1]


def test_in_half_precision(found: Any):
    inspection, saes, *_ = found
    saes = [("scaffold", saes["scaffold"])]
    # A CPU without instructions for it takes fifty times as long, most of it for removals.
    changes = {"llm_dtype": "bfloat16", "n_removal_tokens": 100}
    half = inspect_saes(saes, **{**FIELDS, **changes}).saes[0]
    one = inspection.saes[1]
    assert half.l0_sparse == pytest.approx(one.l0_sparse, rel=0.02)
    assert half.latents.mean == pytest.approx(one.latents.mean, rel=0.1, abs=0.05)
    assert half.scaffold is not None
    assert one.scaffold is not None
    for a, b in zip(half.scaffold.directions, one.scaffold.directions, strict=True):
        assert a.variance == pytest.approx(b.variance, rel=0.03)
        assert a.r_squared == pytest.approx(b.r_squared, abs=0.05)


# ---- parts of it


@pytest.mark.parametrize("normalised", ["none", "layer_norm", "constant_norm_rescale"])
@torch.no_grad()
def test_what_latents_write_is_what_decoding_them_changes(normalised: str):
    sae = eval_sae(normalize_activations=normalised)
    x, latents = 3 + 2 * torch.randn(50, D_MODEL), torch.tensor([3, 8])
    means = torch.tensor([0.5, 0.25])
    written = WrittenByLatents(sae, latents, means)
    decoded = sae.decode(sae.encode(x))
    for i, (latent, mean) in enumerate(zip(latents, means, strict=True)):
        change = written.coordinates(x)[:, i, None] * written.rows[i]
        ablated = sae.encode(x)
        ablated[:, latent] = mean
        assert torch.allclose(change, decoded - sae.decode(ablated), atol=1e-4)


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@torch.no_grad()
def test_the_logit_lens_is_transformer_lens_s_own(model_class: ModelClass):
    reference = load_embedded_model()
    directions = torch.randn(5, D_MODEL)
    rows = directions / directions.norm(dim=1, keepdim=True) * D_MODEL**0.5
    rows = torch.cat([torch.zeros(1, D_MODEL), rows])[None]
    own = reference.unembed(reference.ln_final(rows))[0]
    model = load_language_model("py-neox", "cpu", model_class_name=model_class)
    lens = logit_lens(model, directions)
    assert torch.allclose(lens, own[1:] - own[0], atol=1e-4)
    assert torch.allclose(logit_lens(model, -3 * directions), -lens, atol=1e-4)
    promoted, suppressed = promoted_tokens(model, HOOK, directions, 3)
    for of, high, low in zip(lens, promoted, suppressed, strict=True):
        order = of.argsort(descending=True).tolist()
        assert [token for token, _ in high] == order[:3]
        assert [token for token, _ in low] == order[:-4:-1]
        assert high[0][1] == pytest.approx(float(of.max()), abs=1e-4)
    heads = "blocks.0.attn.hook_z"
    assert promoted_tokens(model, heads, directions, 3) == ([[]] * 5, [[]] * 5)
    assert promoted_tokens(model, HOOK, directions[:, :9], 3) == ([[]] * 5, [[]] * 5)


def test_contexts_do_not_depend_on_batches():
    torch.manual_seed(0)
    tokens, acts = torch.randint(0, 9, (20, 30)), torch.randn(20, 30, 4)
    counts = torch.rand(20, 30) < 0.7
    kept: list[StrongestContexts] = []
    for size in (1, 7, 20):
        kept.append(StrongestContexts(4, 5, "cpu"))
        for start in range(0, 20, size):
            rows = slice(start, start + size)
            kept[-1].update(tokens[rows], counts[rows], acts[rows], start)
    for other in kept[1:]:
        for name in ("values", "sequence", "position", "tokens", "activations"):
            assert torch.equal(getattr(kept[0], name), getattr(other, name))


@torch.no_grad()
def test_which_latents_match_are_gone_and_are_new():
    one = eval_sae(seed=0)
    other = eval_sae(seed=0)
    order = torch.randperm(96, generator=torch.manual_seed(0))
    for name in ("W_dec", "b_enc", "threshold"):
        getattr(other, name).copy_(getattr(one, name)[order])
    other.W_enc.copy_(one.W_enc[:, order])
    for latent in (10, 20):
        for rows in (other.W_dec, other.W_enc.T):
            rows[latent] = torch.nn.functional.normalize(torch.randn(D_MODEL), dim=0)
    none = torch.zeros(0, dtype=torch.long)
    statistics = [LatentStatistics(sae, none, 1) for sae in (one, other)]
    side = SideBySide(*statistics)
    x = 4 * torch.randn(30, 10, D_MODEL)
    ones = torch.ones(30, 10, dtype=torch.long)
    batch = Tokens(ones, ones > 0, ones, x, ones, 0)
    side.update(*(of.update(batch) for of in statistics))
    pair = side.result(300, (0, 1))
    assert pair.gone == sorted(order[[10, 20]].tolist())
    assert pair.new == [10, 20]
    for i in range(96):
        if i not in pair.gone:
            assert pair.matched[i]
            assert order[pair.nearest[i]] == i
            assert pair.correlation[i] == pytest.approx(1, abs=1e-4)
    acts = [sae.encode(x.flatten(0, 1)) for sae in (one, other)]
    i = pair.gone[0]
    both = torch.stack([acts[0][:, i], acts[1][:, pair.nearest[i]]])
    assert pair.correlation[i] == pytest.approx(
        float(torch.corrcoef(both)[0, 1]), abs=1e-4
    )


# ---- the command


def test_the_command_writes_what_it_finds_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    paths = [tmp_path / "plain", tmp_path / "scaffold"]
    eval_sae(d_sae=40).save_model(paths[0])
    eval_sae(rank=2, d_sae=40).save_model(paths[1])
    out = tmp_path / "out"
    command = [
        "inspect",
        *map(str, paths),
        "--text",
        "python-stdlib",
        "--out",
        str(out),
    ]
    command += ["--n_tokens", "2500", "--n_removal_tokens", "500"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "direction 1: " in said
    file = out / "inspect.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    found = TypeAdapter(Inspection).validate_python(content)
    assert [of.name for of in found.saes] == ["plain", "scaffold"]
    assert found.n_removal_tokens < 700
    written = file.stat().st_mtime_ns
    assert main(command) == 0
    assert capsys.readouterr().out == said
    assert file.stat().st_mtime_ns == written
    assert main([*command, "--n_tokens", "2600"]) == 0
    assert file.stat().st_mtime_ns > written


def test_mistakes_are_told_before_anything_is_run():
    other = eval_sae(hook_name="blocks.1.hook_resid_post")
    with pytest.raises(UserError, match="different hook points"):
        inspect_saes([("a", eval_sae()), ("b", other)], **FIELDS)
    with pytest.raises(UserError, match="n_tokens is 100; .* 2048 tokens"):
        inspect_saes([("a", eval_sae())], **{**FIELDS, "n_tokens": 100})


# ---- steering


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@torch.no_grad()
def test_steering_changes_what_a_plain_hook_changes(model_class: ModelClass):
    path = embedded_model_path()
    reference: Any = AutoModelForCausalLM.from_pretrained(path).float()
    tokens = torch.randint(1, 4000, (2, 20), generator=torch.manual_seed(0))
    direction = torch.randn(D_MODEL, generator=torch.manual_seed(1))
    unit = direction / direction.norm()

    def expected(change: Any) -> torch.Tensor:
        def hook(_: Any, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):  # in transformers 4
                return (change(output[0]), *output[1:])
            return change(output)

        handle = reference.gpt_neox.layers[1].register_forward_hook(hook)
        logits = reference(tokens).logits
        handle.remove()
        return logits

    model: Any = load_language_model("py-neox", "cpu", model_class_name=model_class)
    name, clean = "blocks.1.hook_resid_post", reference(tokens).logits
    with steering(model, name, direction, add=20):
        added = model(tokens)
    with steering(model, name, direction, remove=True):
        removed = model(tokens)
    with steering(model, name, direction, remove=True, mean=2.0, add=1.0):
        moved = model(tokens)
    assert torch.allclose(added, expected(lambda x: x + 20 * unit), atol=1e-3)
    without = lambda x: x - (x @ unit)[..., None] * unit  # noqa: E731
    assert torch.allclose(removed, expected(without), atol=1e-3)
    assert torch.allclose(moved, expected(lambda x: without(x) + 3 * unit), atol=1e-3)
    assert torch.allclose(model(tokens), clean, atol=1e-3)
    assert not torch.allclose(added, clean, atol=0.1)
    with (
        pytest.raises(UserError, match="one vector that is not 0"),
        steering(model, name, 0 * direction),
    ):
        pass
    with (
        pytest.raises(UserError, match="no hook point"),
        steering(model, "blocks.9.hook_resid_post", direction),
    ):
        pass


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_steering_changes_generated_text(model_class: ModelClass):
    model: Any = load_language_model("py-neox", "cpu", model_class_name=model_class)
    reference = load_embedded_model()
    towards = int(reference.to_tokens(" self", prepend_bos=False)[0, 0])
    direction = reference.W_U[:, towards] - reference.W_U.mean(dim=1)
    tokens = reference.to_tokens("def run(", prepend_bos=True)
    generate = (
        model.model.generate
        if model_class == "AutoModelForCausalLM"
        else model.generate
    )
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    if model_class != "AutoModelForCausalLM":
        settings["verbose"] = False
    plain = generate(tokens, **settings)
    with steering(model, "blocks.3.hook_resid_post", direction, add=300):
        steered = generate(tokens, **settings)
    again = generate(tokens, **settings)
    new = tokens.shape[1]
    assert torch.equal(plain, again)
    assert (steered[0, new:] == towards).all()
    assert not (plain[0, new:] == towards).all()
