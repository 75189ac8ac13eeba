"""The kernels by themselves, against a few lines of plain torch."""

import copy
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers import DEVICES
from saelens_scaffold.kernels import torch_ops
from saelens_scaffold.kernels.entries import Entries, sorted_entries
from saelens_scaffold.kernels.lazy import LazyTensor, SparseActivations
from saelens_scaffold.kernels.memory import GradientMemory, gradient_memory
from saelens_scaffold.kernels.selection import (
    Encoder,
    TopSelection,
    largest_of_each_token,
)
from saelens_scaffold.kernels.sparse_forward import SparseForward

# few values, so that there are ties, and the special ones
VALUES = st.sampled_from([-1.0, -0.0, 0.0, 0.25, 0.5, 0.5, 1.0, 2.0, 3.0, torch.inf])


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HALF_TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
TOLERANCES = [(torch.float64, 1e-12), (torch.float32, 1e-5), *HALF_TOLERANCES.items()]


def encoder_of(
    pre_activations: torch.Tensor, scale: torch.Tensor | None = None
) -> Encoder:
    """An encoder with these pre-activations, exactly."""
    n_latents = pre_activations.shape[1]
    identity = torch.eye(len(pre_activations), dtype=pre_activations.dtype)
    bias = torch.zeros(n_latents, dtype=pre_activations.dtype)
    return Encoder(identity, pre_activations, bias, scale)


@settings(max_examples=200, deadline=None)
@given(
    values=st.integers(1, 12).flatmap(
        lambda width: st.lists(
            st.lists(VALUES, min_size=width, max_size=width), min_size=1, max_size=9
        )
    ),
    share=st.floats(0, 1),
    last_guess=st.none() | st.floats(1e-3, 5),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    block=st.integers(1, 200),
    once=st.booleans(),
)
@example([[-1.0] * 3] * 2, 1.0, None, torch.float32, 8, False)  # nothing positive
@example([[0.5] * 4] * 3, 0.5, None, torch.float32, 8, False)  # nothing but ties
@example([[0.5] * 4] * 3, 0.5, 0.5, torch.float32, 8, True)  # and all at the guess
def test_the_selection_is_that_of_topk(
    values: list[list[float]],
    share: float,
    last_guess: float | None,
    dtype: torch.dtype,
    block: int,
    once: bool,
):
    # an identity times infinity is not a number
    h = torch.tensor(values).clamp(max=1e6).to(dtype)
    n = int(share * h.numel())
    select = TopSelection()
    select._last_guess = last_guess
    ops = ModuleType("blocks of any size")
    ops.above, ops.block_elements = torch_ops.above, lambda _: block  # type: ignore[attr-defined]
    for _ in range(2):  # the second time with the guess of the first
        encoder = encoder_of(h).multiply() if once else encoder_of(h)
        places, selected = select(encoder, n, ops)
        assert len(places.unique()) == len(places)
        assert torch.equal(h.flatten()[places], selected)
        expected = h.relu().flatten().topk(n).values
        positive = expected[expected > 0]
        assert torch.equal(selected.sort(descending=True).values, positive)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 500, 20_000])
def test_the_selection_with_biases_and_scales(dtype: torch.dtype, n: int):
    torch.manual_seed(0)
    encoder = Encoder(
        torch.randn(200, 8).to(dtype),
        torch.randn(8, 300).to(dtype),
        5 * torch.randn(300).to(dtype),
        torch.rand(300).to(dtype) + 0.1,
    )
    assert encoder.scale is not None
    select = TopSelection()
    for shift in (1.0, 1.3, 0.7, 1.0):  # the guess of one batch is wrong for the next
        scale = encoder.scale * shift
        moved = encoder._replace(scale=scale)
        places, selected = select(moved, n, torch_ops)
        h = (encoder.x @ encoder.W + encoder.b) * scale
        expected = h.relu().flatten().topk(n).values
        assert torch.equal(
            selected.sort(descending=True).values, expected[expected > 0]
        )
        assert len(places.unique()) == len(places)


def counting(passes: list[torch.Tensor]) -> ModuleType:
    """Operations on all latents at a time, which note their passes."""
    ops = ModuleType("counting")

    def above(values: torch.Tensor, cuts: torch.Tensor):
        passes.append(cuts)
        return torch_ops.above(values, cuts)

    ops.above, ops.block_elements = above, lambda _: 10**9  # type: ignore[attr-defined]
    return ops


def test_a_good_guess_needs_one_pass_and_a_bad_one_another():
    torch.manual_seed(0)
    encoder = encoder_of(torch.randn(256, 512))
    passes: list[torch.Tensor] = []
    ops = counting(passes)
    select = TopSelection()
    select(encoder, 2000, ops)
    assert len(passes) == 1, "from a sample"
    select(encoder_of(torch.randn(256, 512)), 2000, ops)
    assert len(passes) == 2, "from the last batch"
    select(encoder_of(torch.randn(256, 512) / 10), 2000, ops)
    assert len(passes) == 4, "the last batch's is too high, a sample's is not"


def in_bfloat16(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("products", "bias", "scale", "guess"),
    [
        # 1 + b is rounded up, and so is its multiple, to 1.9921875
        (
            in_bfloat16(1.0, 1.984375),
            in_bfloat16(0.003936767578125, 0.0),
            in_bfloat16(1.9765625, 1.0),
            1.98436,
        ),
        # guess - b is rounded up, from 2^20 + 1.2 to 2^20 + 1.25
        (
            torch.tensor([2.0**20 + 1.25, 1.22]),
            torch.tensor([-(2.0**20), 0.0]),
            None,
            1.2,
        ),
    ],
)
def test_what_rounding_lifts_above_the_guess_is_not_missed(
    products: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor | None, guess: float
):
    encoder = Encoder(torch.ones_like(bias[:1, None]), products[None], bias, scale)
    h = encoder.pre_activations(products)
    assert float(h[0]) > float(h[1]) > guess, "the case that is meant"
    select = TopSelection()
    select._last_guess = guess
    assert select(encoder, 1, torch_ops).values == h[0]


def test_a_large_bias_costs_no_further_pass():
    torch.manual_seed(0)
    encoder = encoder_of(torch.randn(256, 512).to(torch.bfloat16))
    encoder.b[0] = -100
    passes: list[torch.Tensor] = []
    ops = counting(passes)
    select = TopSelection()
    select(encoder, 2000, ops)
    passes.clear()
    select(encoder, 2000, ops)
    assert len(passes) == 1


def test_not_a_number_is_the_largest_as_for_topk():
    h = torch.randn(20, 30)
    h[3, 4] = torch.nan
    # not by a product, in which the NaN would spread
    select = TopSelection()
    encoder = Encoder(torch.ones(20, 1), torch.zeros(1, 30), torch.zeros(30), None)
    passes: list[torch.Tensor] = []
    ops = counting(passes)
    above = ops.above
    ops.above = lambda _, cuts: above(h, cuts)  # type: ignore[attr-defined]
    places, values = select(encoder, 10, ops)
    assert places[values.isnan()].tolist() == [3 * 30 + 4]
    finite = h.flatten().nan_to_num(-1).topk(9).values
    assert torch.equal(values[~values.isnan()].sort(descending=True).values, finite)
    # and the next batch is selected as if nothing had been
    h = torch.rand(20, 30)
    passes.clear()
    assert torch.equal(
        select(encoder, 10, ops).values.sort(descending=True).values,
        h.flatten().topk(10).values,
    )
    assert len(passes) == 1


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("max_elements", [1, 100, 10**6])
def test_the_largest_of_each_token_among_some_latents(max_elements: int, once: bool):
    h = torch.randn(17, 40, dtype=torch.float64)
    latents = torch.tensor([3, 5, 8, 13, 21, 34])
    encoder = encoder_of(h).multiply() if once else encoder_of(h)
    selected = largest_of_each_token(encoder, latents, 4, max_elements)
    dense = torch.zeros_like(h).flatten()
    dense[selected.places] = selected.values
    expected = torch.full_like(h, -torch.inf)
    expected[:, latents] = h[:, latents]
    top = expected.topk(4)
    expected = torch.zeros_like(h).scatter(1, top.indices, top.values)
    assert torch.equal(dense.view_as(h), expected)


def test_entries_are_sorted_both_ways():
    rows, latents = torch.tensor([4, 1, 1, 5]), torch.tensor([0, 3, 2, 0])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    entries, values = sorted_entries(rows, latents, values, 3, 6, 5)
    assert entries.rows.tolist() == [1, 1, 4, 5]
    assert entries.latents.tolist() == [2, 3, 0, 0]
    assert values.tolist() == [3, 2, 1, 4]
    assert entries.tokens.tolist() == [1, 1, 1, 2]
    assert entries.row_offsets.tolist() == [0, 0, 2, 2, 2, 3, 4]
    assert entries.by_latent.tolist() == [2, 3, 0, 1]
    assert entries.latent_offsets.tolist() == [0, 2, 2, 3, 4, 4]


def random_entries(
    n_tokens: int, n_parts: int, n_latents: int, n: int
) -> tuple[Entries, torch.Tensor]:
    n_rows = n_tokens * n_parts
    places = torch.randperm(n_rows * n_latents)[:n].sort().values
    rows, latents = places // n_latents, places % n_latents
    return Entries(rows, latents, n_tokens, n_rows, n_latents), places


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [0, 1, 300])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_sums_and_entry_dots_are_products(
    device: str, n: int, transposed: bool, dtype: torch.dtype
):
    with torch.device(device):
        check_operations(torch_ops, n, transposed, dtype)


def check_operations(
    ops: ModuleType, n: int, transposed: bool, dtype: torch.dtype, d: int = 600
) -> None:
    torch.manual_seed(0)
    entries, places = random_entries(20, 2, 30, n)
    weights, table = torch.randn(n).to(dtype), torch.randn(30, d).to(dtype)
    left = torch.randn(40, d).to(dtype)
    dense = torch.zeros(40 * 30).double()
    dense[places] = weights.double()
    # a table that is a slice, and an output that is transposed
    padded = torch.cat([table, table], dim=1)[:, :d]
    out = torch.empty(d, 40, dtype=dtype).T if transposed else left.new_empty(40, d)
    ops.row_sums(entries.row_offsets, entries.latents, weights, padded, out)
    half = HALF_TOLERANCES.get(dtype)
    tolerances: dict[str, Any] = {}
    if half is not None:
        tolerances = {"rtol": half, "atol": half}
    expected = dense.view(40, 30) @ table.double()
    torch.testing.assert_close(out, expected.to(dtype), **tolerances)
    dots = ops.entry_dots(
        entries.row_offsets, entries.rows, entries.latents, left, table
    )
    expected = (left.double() @ table.double().T).flatten()[places]
    if half is not None:
        tolerances = {"rtol": half, "atol": half * d**0.5}
    torch.testing.assert_close(dots, expected.to(dtype), **tolerances)


def forward_case(
    dtype: torch.dtype, rank: int, n_parts: int
) -> tuple[list[torch.Tensor], Entries]:
    torch.manual_seed(rank)
    d_in, d_sae, n_tokens = 5, 14, 6
    entries, _ = random_entries(n_tokens, n_parts, d_sae - rank, 20)
    shapes = [(d_in, d_sae), (d_sae,), (d_sae, d_in), (d_in,)]
    parameters = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    return [torch.randn(n_tokens, d_in).to(dtype), *parameters], entries


def _alone(*sums: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return sums


def sparse_forward(
    inputs: list[torch.Tensor],
    entries: Entries,
    rank: int,
    residual: bool,
    ops: ModuleType,
) -> tuple[torch.Tensor, ...]:
    x, W_enc, b_enc, W_dec, b_dec = inputs

    def select(encoder: Encoder) -> tuple[Entries, torch.Tensor]:
        h = encoder.pre_activations(encoder.products())
        return entries, h[entries.tokens, entries.latents]

    x_bar = (x - b_dec).detach()
    return SparseForward.apply(  # type: ignore[return-value]
        x_bar, W_enc, b_enc, W_dec, b_dec, rank, residual, select, ops, [],
        GradientMemory(), _alone,
    )  # fmt: skip


def dense_forward(
    inputs: list[torch.Tensor], entries: Entries, rank: int, residual: bool
) -> tuple[torch.Tensor, ...]:
    """The formula of the README, in plain torch."""
    x, W_enc, b_enc, W_dec, b_dec = inputs
    x_bar = x - b_dec
    z = x_bar @ W_enc[:, :rank] + b_enc[:rank].detach()
    read = x_bar - z @ W_dec[:rank] if residual else x_bar
    h = read @ W_enc[:, rank:] + b_enc[rank:]
    values = h[entries.tokens, entries.latents]
    f = values.new_zeros(entries.n_rows, entries.n_latents)
    f = f.index_put((entries.rows, entries.latents), values)
    scaffold = torch.zeros(entries.n_rows, len(b_dec), dtype=x.dtype)
    scaffold = scaffold.index_add(0, torch.arange(len(x)), z @ W_dec[:rank])
    return z, values, scaffold + f @ W_dec[rank:]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("rank", "n_parts"), [(0, 1), (3, 1), (2, 3)])
def test_gradcheck(rank: int, n_parts: int, residual: bool):
    check_gradients_numerically(torch_ops, rank, n_parts, residual)


def check_gradients_numerically(
    ops: ModuleType, rank: int, n_parts: int, residual: bool
) -> None:
    inputs, entries = forward_case(torch.float64, rank, n_parts)
    b_enc = inputs[2].detach()

    def outputs(W_enc: torch.Tensor, b_sparse: torch.Tensor, *decoder: torch.Tensor):
        # finite differences would see the scaffold's bias, which is not trained
        bias = torch.cat([b_enc[:rank], b_sparse])
        # and b_dec in x, of which the function is told
        x = inputs[0]
        return sparse_forward([x, W_enc, bias, *decoder], entries, rank, residual, ops)

    arguments = (inputs[1], b_enc[rank:].clone().requires_grad_(), *inputs[3:])
    assert torch.autograd.gradcheck(outputs, arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("rank", "n_parts"), [(0, 1), (3, 1), (2, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_gradients_are_those_of_dense_code(
    device: str,
    rank: int,
    n_parts: int,
    residual: bool,
    dtype: torch.dtype,
    tolerance: float,
):
    with torch.device(device):
        check_gradients(torch_ops, rank, n_parts, residual, dtype, tolerance)


def check_gradients(
    ops: ModuleType,
    rank: int,
    n_parts: int,
    residual: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    inputs, entries = forward_case(dtype, rank, n_parts)
    precise = [t.detach().double().requires_grad_() for t in inputs]
    ours = sparse_forward(inputs, entries, rank, residual, ops)
    theirs = dense_forward(precise, entries, rank, residual)
    weights = [torch.randn_like(output) for output in theirs]
    for outputs in (ours, theirs):
        sum(
            ((output * weight.to(output)).sum())
            for output, weight in zip(outputs, weights, strict=True)
        ).backward()  # type: ignore[union-attr]
    for mine, reference in zip(inputs[1:], precise[1:], strict=True):
        assert mine.grad is not None and reference.grad is not None
        error = (mine.grad.double() - reference.grad).norm()
        assert error <= tolerance * reference.grad.norm()


# ---- memory of gradients


@pytest.mark.parametrize(
    "hold", [torch.Tensor.detach, torch.Tensor.numpy, lambda t: t[0], lambda t: t]
)
def test_memory_of_a_gradient_that_somebody_holds_is_left_alone(
    hold: Callable[[torch.Tensor], Any],
):
    memory = GradientMemory()
    weights = torch.zeros(3, 5).T
    first = memory.empty_like(weights).fill_(1.0)
    assert first.stride() == weights.stride()
    place, held = first.data_ptr(), hold(first)
    del first
    memory.empty_like(weights).fill_(2.0)
    assert (held == 1).all()
    del held
    again = memory.empty_like(weights)
    assert again.data_ptr() == place and again.stride() == weights.stride()
    del again
    sliced = memory.empty_like(torch.zeros(5, 9)[:, :3])
    assert sliced.data_ptr() == place and sliced.is_contiguous()


def test_saes_of_one_size_share_the_memory_of_gradients():
    assert gradient_memory(-1) is not gradient_memory(-2)  # sizes of no SAE
    memory = gradient_memory(-1)
    assert gradient_memory(-1) is copy.deepcopy(memory) is memory
    gone = weakref.ref(memory)
    del memory
    assert gone() is None


# ---- lazy tensors


def test_a_lazy_tensor_is_made_once_and_when_it_is_needed():
    made: list[torch.Tensor] = []
    weight = torch.tensor(2.0, requires_grad=True)

    def make() -> torch.Tensor:
        made.append(weight * torch.ones(3, 4))
        return made[0]

    lazy = LazyTensor(make, (3, 4), torch.empty(0, dtype=torch.float32))
    assert lazy.shape == (3, 4) and lazy.dtype == torch.float32 and len(lazy) == 3
    assert lazy.device.type == "cpu" and isinstance(lazy, torch.Tensor)
    assert not made
    assert lazy[1].sum() == 8
    assert lazy.flatten(0, -1).shape == (12,)
    assert torch.equal(torch.stack([lazy, lazy])[0], made[0])
    assert lazy.detach().numpy().sum() == 24
    assert lazy.requires_grad
    (torch.ones(2, 3) @ lazy).sum().backward()
    assert weight.grad == 24
    assert len(made) == 1


@pytest.mark.parametrize("first_look", [torch.no_grad, torch.inference_mode])
def test_a_lazy_tensor_has_its_gradient_whoever_looks_first(first_look: Any):
    weight = torch.tensor(2.0, requires_grad=True)
    z, active, place = weight * torch.ones(2, 1), weight * torch.ones(1), torch.zeros(1)
    acts = SparseActivations(z, active, place.long(), place.long(), 3)
    with first_look():
        assert not acts[:, 1:].max().requires_grad
        detached = acts.detach()
    (weight * acts[:, 1:]).sum().backward()
    assert weight.grad == 4
    assert not (detached + 0).requires_grad
    with torch.no_grad():
        without = LazyTensor(lambda: 2 * weight, (), weight)
    assert not (without + 0).requires_grad


@given(n_tokens=st.integers(1, 5), rank=st.integers(0, 3), n=st.integers(0, 20))
@settings(max_examples=50, deadline=None)
def test_sparse_activations_are_as_the_dense_ones(n_tokens: int, rank: int, n: int):
    n_latents = 7
    entries, _ = random_entries(n_tokens, 1, n_latents, min(n, n_tokens * n_latents))
    z = torch.randint(-1, 2, (n_tokens, rank)).float()
    active = torch.randint(0, 3, (len(entries.rows),)).float()
    acts = SparseActivations(z, active, entries.tokens, entries.latents, n_latents)
    dense = torch.zeros(n_tokens, rank + n_latents)
    dense[:, :rank] = z
    dense[entries.tokens, rank + entries.latents] = active
    # what SAELens's trainer does with them
    for of in (acts, dense):
        firing = of.bool().float()
        assert torch.equal(firing.sum(-2), (dense != 0).float().sum(0))
        assert torch.equal(firing.sum(0), (dense != 0).float().sum(0))
        assert torch.equal(of.bool().float().sum(-1), (dense != 0).float().sum(-1))
    assert acts._made is None
    assert torch.equal(acts.sum(-1, keepdim=True), dense.sum(-1, keepdim=True))
    assert torch.equal(acts.bool().sum(0), dense.bool().sum(0))
    assert torch.equal(acts[:, 1:] * 2, dense[:, 1:] * 2)
    assert torch.equal(acts != 0, dense != 0)
