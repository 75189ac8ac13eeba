"""SAEs of which each process trains a part, against the same in one process."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sae_lens.saes.sae import TrainStepInput

import sharding_helpers
from forked import PATIENCE
from helpers import D_IN, RANK, scaffold_config
from saelens_scaffold._util.errors import UserError
from saelens_scaffold.kernels import torch_ops
from saelens_scaffold.kernels.selection import Encoder
from saelens_scaffold.plugins import manager as plugins
from saelens_scaffold.plugins.hookspecs import hookimpl
from saelens_scaffold.sharding.largest import n_counts, share_of_largest
from saelens_scaffold.sharding.sae import check_shardable
from saelens_scaffold.sharding.selection import (
    BATCH_DIGIT,
    TOKEN_DIGIT,
    ShardedTopSelection,
)
from saelens_scaffold.sharding.shard import Shard
from saelens_scaffold.sharding.state import put, take
from sharding_helpers import (
    N_TOKENS,
    Pool,
    Trained,
    part_of_sae,
    train_sharded,
    train_whole,
)

# not divisible by the number of processes
D_SAE = 133
BATCHTOPK = {"d_sae": D_SAE, "kernels": "torch"}
MATRYOSHKA = {
    **BATCHTOPK,
    "architecture": "scaffold_matryoshka",
    "matryoshka_widths": [12, 50, D_SAE],
}
REVIVED_BY_LEVEL = {**MATRYOSHKA, "use_matryoshka_aux_loss": True}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with sharding_helpers.pool() as started:
        yield started


def assert_same(parts: list[Trained], whole: Trained, tolerance: float) -> None:
    first = parts[0]
    for part in parts:
        # to the last bit, or they would part
        assert part.steps == first.steps
        assert part.logged == first.logged
    np.testing.assert_allclose(first.steps, whole.steps, rtol=tolerance)
    for step, expected in enumerate(whole.selected):
        selected = [each for part in parts for each in part.selected[step]]
        assert sorted(selected) == sorted(expected), step
    assert first.weights.keys() == whole.weights.keys()
    for name, expected in whole.weights.items():
        ours, theirs = (w[np.isfinite(w)] for w in (first.weights[name], expected))
        error = np.linalg.norm(ours - theirs)
        assert error <= tolerance * np.linalg.norm(theirs), name
    for ours, theirs in zip(first.logged, whole.logged, strict=True):
        assert ours == pytest.approx(theirs, rel=max(tolerance, 1e-6))


# In float32, rounding could decide which of two latents at a cut is selected, and then the
# trainings part. It does not here; if it ever does on another machine, float64 tells.
@pytest.mark.parametrize(
    ("world_size", "overrides", "dtype", "n_steps"),
    [
        (2, BATCHTOPK, "float32", 60),
        (2, BATCHTOPK, "float64", 60),
        (2, MATRYOSHKA, "float64", 60),
        (2, REVIVED_BY_LEVEL, "float32", 60),
        (4, BATCHTOPK, "float32", 60),
        (4, REVIVED_BY_LEVEL, "float64", 50),
    ],
)
def test_training_is_that_of_one_process(
    pool: Pool, world_size: int, overrides: dict[str, Any], dtype: str, n_steps: int
):
    overrides = {**overrides, "dtype": dtype}
    whole = train_whole(n_steps, **overrides)
    n_dead = [log["sparsity/dead_features"] for log in whole.logged[:-1]]
    # some steps revive all dead latents, others have to choose
    assert max(n_dead) > D_IN // 2
    parts = pool(world_size, train_sharded, n_steps, **overrides)
    assert_same(parts, whole, 1e-5 if dtype == "float32" else 1e-10)


@pytest.mark.parametrize("overrides", [BATCHTOPK, MATRYOSHKA, REVIVED_BY_LEVEL])
def test_one_shard_is_the_ordinary_sae_to_the_last_bit(overrides: dict[str, Any]):
    ours, theirs = train_sharded(None, 30, **overrides), train_whole(30, **overrides)
    assert ours.steps == theirs.steps
    assert ours.selected == theirs.selected
    for logged, expected in zip(ours.logged, theirs.logged, strict=True):
        assert logged == pytest.approx(expected, rel=1e-6)
    for name, weight in theirs.weights.items():
        assert np.array_equal(ours.weights[name], weight)
    assert sum(ours.bytes_sent) == 0


OTHERS: list[dict[str, Any]] = [
    {"scaffold_rank": 0},
    {"sparse_encoder_input": "activation"},
    {"rescale_acts_by_decoder_norm": False},
    {"apply_b_dec_to_input": False},
    {"scaffold_init": "zeros"},
    {"aux_loss_coefficient": 0.0, "normalize_activations": "layer_norm"},
    {
        "scaffold_plugins": {
            "schedule": {"alone_until": 5, "lr_factor": 0.5},
            "orthonormal_decoder": {},
            "decorrelation": {"coefficient": 0.5},
            "live_metrics": {"window": 5},
        }
    },
]


def test_other_configurations_are_those_of_one_process(pool: Pool):
    for others in OTHERS:
        overrides = {**MATRYOSHKA, "dtype": "float64", **others}
        if "normalize_activations" in others:
            overrides |= BATCHTOPK | {"architecture": "scaffold_batchtopk"}
            del overrides["matryoshka_widths"]
        parts = pool(2, train_sharded, 20, **overrides)
        assert_same(parts, train_whole(20, **overrides), 1e-10)


@pytest.mark.parametrize("overrides", [{"autocast": True}, {"dtype": "bfloat16"}])
def test_half_precision(pool: Pool, overrides: dict[str, Any]):
    overrides = {**REVIVED_BY_LEVEL, **overrides}
    parts, whole = pool(2, train_sharded, 10, **overrides), train_whole(10, **overrides)
    assert parts[0].steps == parts[1].steps
    # bfloat16's rounding, after which other latents are selected
    np.testing.assert_allclose(parts[0].steps, whole.steps, rtol=0.05, atol=0.01)


def bytes_of_a_step(
    world_size: int, n_revived: int, has_chosen: bool, dtype: torch.dtype
) -> int:
    """What each process hands to sums, for one level and the residual input."""
    reconstructions = N_TOKENS * D_IN * (1 + n_revived)
    gradients = N_TOKENS * RANK + RANK * D_IN + D_IN
    counts = n_counts(dtype, BATCH_DIGIT, world_size)
    # a bound, the threshold, the norm of the gradients, and the number of dead latents
    counts += 1 + 1 + 1 + 1
    counts += n_revived  # once more
    if has_chosen:
        counts += N_TOKENS * n_counts(dtype, TOKEN_DIGIT, world_size)
    return dtype.itemsize * (reconstructions + gradients) + 8 * counts


@pytest.mark.parametrize(
    ("world_size", "dtype"), [(2, torch.float32), (4, torch.float64)]
)
def test_bytes_sent_do_not_depend_on_the_width(
    pool: Pool, world_size: int, dtype: torch.dtype
):
    without_dead, with_few, with_many = (
        bytes_of_a_step(world_size, n_revived, has_chosen, dtype)
        for n_revived, has_chosen in ((0, False), (1, False), (1, True))
    )
    for d_sae in (D_SAE, 8 * D_SAE):
        overrides = {**BATCHTOPK, "d_sae": d_sae, "dtype": str(dtype).split(".")[1]}
        for part in pool(world_size, train_sharded, 30, **overrides):
            # the first step starts the scaffold and guesses from a sample, too
            sent = {*part.bytes_sent[1:]}
            assert {without_dead, with_many} <= sent
            assert sent <= {without_dead, with_few, with_many}


@pytest.mark.parametrize("d_in", [5, 6])  # as many as latents of a part
def test_parts_of_a_state_make_the_whole(d_in: int):
    names = ["b_dec", "W_enc"]
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.rand(d_in, 13)}
    whole = {
        "W_enc": torch.rand(d_in, 13),
        "W_dec": torch.rand(13, d_in),
        "optimizer": {"state": {0: {"exp_avg": torch.rand(d_in)}, 1: moments}},
        "n_training_steps": 7,
    }
    shards = [ThreadShard(i, threading.Barrier(3), []) for i in range(3)]
    latents = [shard.latents(13, 2) for shard in shards]
    assert [each.tolist() for each in latents] == [
        [0, 1, 2, 5, 8, 11],
        [0, 1, 3, 6, 9, 12],
        [0, 1, 4, 7, 10],
    ]
    parts = [take(whole, of_part, names) for of_part in latents]
    assert torch.equal(parts[1]["W_dec"], whole["W_dec"][latents[1]])
    taken = parts[1]["optimizer"]["state"][1]["exp_avg"]
    assert torch.equal(taken, moments["exp_avg"][:, latents[1]])
    torch.testing.assert_close(put(parts, latents, names), whole, rtol=0, atol=0)


# ---- the selection, among threads in place of processes


class ThreadShard(Shard):
    """A part of a dictionary whose other parts are in other threads."""

    def __init__(self, rank: int, barrier: threading.Barrier, tensors: list[Any]):
        super().__init__()
        self.rank, self.world_size = rank, barrier.parties
        self._barrier, self._tensors = barrier, tensors

    def _reduce_(self, tensor: torch.Tensor, operation: Any) -> torch.Tensor:
        self._tensors[self.rank] = tensor.clone()
        self._barrier.wait(PATIENCE)
        every = torch.stack(self._tensors)
        self._barrier.wait(PATIENCE)
        is_sum = operation == dist.ReduceOp.SUM
        return tensor.copy_(every.sum(0) if is_sum else every.amax(0))


def in_threads(world_size: int, function: Callable[[ThreadShard], Any]) -> list[Any]:
    barrier, tensors = threading.Barrier(world_size), [None] * world_size
    results: list[Any] = [None] * world_size

    def call(rank: int) -> None:
        try:
            results[rank] = function(ThreadShard(rank, barrier, tensors))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=call, args=(i,)) for i in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# few values, so that there are ties, and the special ones
VALUES = st.sampled_from(
    [-torch.inf, -1.0, -0.0, 0.0, 1e-40, 0.25, 0.5, 1.0, 3.0, torch.inf]
)
MATRICES = st.integers(4, 13).flatmap(
    lambda width: st.lists(
        st.lists(VALUES, min_size=width, max_size=width), min_size=1, max_size=6
    )
)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


class GivenEncoder(Encoder):
    """An encoder whose W is the pre-activations, for infinities times 0 are none."""

    def products(
        self, tokens: slice = slice(None), latents: slice = slice(None)
    ) -> torch.Tensor:
        return self.W[tokens, latents].contiguous()

    def among(self, latents: torch.Tensor) -> Encoder:
        return encoder_of(self.W[:, latents])


def encoder_of(h: torch.Tensor) -> Encoder:
    return GivenEncoder(h, h, torch.zeros(h.shape[1]).to(h), None)


def assert_largest(found: list[torch.Tensor], h: torch.Tensor, n: int) -> None:
    """That what was found are n of the largest places of h, each once."""
    places = torch.cat(found)
    assert len(places.unique()) == len(places)
    expected = h.flatten().topk(min(n, h.numel())).values
    assert torch.equal(h.flatten()[places].sort(descending=True).values, expected)


@settings(max_examples=150, deadline=None)
@given(
    MATRICES, st.floats(0, 1), DTYPES, st.integers(1, 4), st.none() | st.floats(0.1, 2)
)
@example([[-1.0] * 5] * 2, 1.0, torch.float32, 3, None)  # nothing positive
@example([[0.5] * 5] * 3, 0.5, torch.float32, 3, 0.5)  # nothing but ties, at the guess
def test_the_selection_is_that_of_topk_over_all(
    values: list[list[float]],
    share: float,
    dtype: torch.dtype,
    world_size: int,
    last_guess: float | None,
):
    h = torch.tensor(values).to(dtype)
    n = int(share * h.numel())

    def select(shard: Shard) -> torch.Tensor:
        selection = ShardedTopSelection(shard)
        selection._last_guess = last_guess
        latents = shard.latents(h.shape[1], 0)
        encoder = encoder_of(h[:, latents])
        for _ in range(2):  # with a guess of its own the second time
            places, _ = selection(encoder, n, torch_ops)
        return places // len(latents) * h.shape[1] + latents[places % len(latents)]

    found = in_threads(world_size, select)
    assert_largest(found, h, min(n, int((h > 0).sum())))


@settings(max_examples=100, deadline=None)
@given(MATRICES, st.integers(1, 14), DTYPES, st.integers(1, 4))
def test_the_largest_of_each_token_over_all(
    values: list[list[float]], k: int, dtype: torch.dtype, world_size: int
):
    h = torch.tensor(values).to(dtype)
    width = h.shape[1]

    def select(shard: Shard) -> torch.Tensor:
        latents = shard.latents(width, 0)
        # parts may have no dead latents at all
        is_dead = (latents < width - 2).nonzero()[:, 0]
        selection = ShardedTopSelection(shard)
        encoder = encoder_of(h[:, latents])
        places, _ = selection.of_each_token(encoder, is_dead, k, torch_ops)
        return places // len(latents) * width + latents[places % len(latents)]

    found = torch.cat(in_threads(world_size, select))
    for token, of_token in enumerate(h[:, :-2]):
        here = found[found // width == token] % width
        assert_largest([here], of_token[None], k)


def test_not_a_number_is_the_largest():
    values = torch.tensor([[torch.nan, 1.0, torch.inf], [2.0, -torch.nan, -torch.inf]])

    def share(shard: Shard) -> list[int]:
        mine = values[shard.rank, None]
        found = (share_of_largest(mine, n, 4, shard) for n in range(1, 8))
        return [int(each.n_here) for each in found]

    assert in_threads(2, share) == [[1, 1, 2, 2, 3, 3, 3], [0, 1, 1, 2, 2, 3, 3]]


# ---- what cannot be


class Foreign:
    @hookimpl
    def after_optimizer_step(self, sae: Any) -> None:
        sae.W_dec.data /= sae.W_dec.norm()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"kernels": "reference"}, "kernels is 'reference'"),
        ({"k": 40.0}, "k is 40.0; it must be at most .* 4 processes, 32"),
        (
            {"architecture": "scaffold_matryoshka", "matryoshka_widths": [6, D_SAE]},
            "a level of matryoshka_widths has 3 latents .* each of 4 processes",
        ),
        ({"scaffold_plugins": {"foreign": {}}}, "scaffold_plugins has 'foreign'"),
    ],
)
def test_what_several_processes_cannot_train_is_named(
    monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any], message: str
):
    load = plugins.load_plugin
    monkeypatch.setattr(
        plugins,
        "load_plugin",
        lambda name: Foreign if name == "foreign" else load(name),
    )
    with pytest.raises(UserError, match=message):
        check_shardable(scaffold_config(**{"d_sae": D_SAE, **overrides}), 4)


def test_a_part_refuses_what_only_the_whole_sae_can_do():
    part = part_of_sae(Shard(), **BATCHTOPK)
    for refused in (lambda: part(torch.zeros(1, D_IN)), part.sparse_sae):
        with pytest.raises(UserError, match="whole_sae"):
            refused()
    part.add_hook("hook_sae_acts_post", lambda tensor, hook: tensor)
    step_input = TrainStepInput(torch.ones(9, D_IN), {}, None, 0, False)
    with pytest.raises(UserError, match="without hooks at its hook points"):
        part.training_forward_pass(step_input)
