"""Rows to experts and back: copies bit for bit, sums that are each other's transposes, nothing read where nothing is ours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from policy.kernels import permute_triton
from policy.kernels.permute import (
    combine,
    combine_backward,
    permute,
    permute_backward,
    permute_weights,
    permute_weights_backward,
)
from policy.kernels.plan import Plan, plan
from policy.kernels.quantize import quantize_rows
from tests.policy.kernels.interpreter import DEVICE

BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
NUM_TOKENS, TOP_K, NUM_EXPERTS = 45, 3, 4


def ragged_plan() -> Plan:
    """Experts 0 to 5 are chosen, 1 to 4 are ours, expert 3 by nobody."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(NUM_TOKENS, 6, generator=generator)
    scores[:, 3] = -1
    return plan(scores.argsort(-1, descending=True)[:, :TOP_K].to(DEVICE), NUM_EXPERTS, 1)


def normal(*size: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def whole_numbers(*size: int, seed: int = 1) -> Tensor:
    """Small enough for sums in any order, in bf16 too, to be exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, size, generator=generator).bfloat16().to(DEVICE)


def raw(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@BACKENDS
@pytest.mark.parametrize(
    ("width", "dtype"),
    # Words of four bytes, more of them than a program takes; bytes alone; a row of three bytes.
    [(1040, torch.bfloat16), (513, torch.float8_e4m3fn), (3, torch.float8_e4m3fn), (20, torch.float32)],
)
def test_expanded_rows_are_their_tokens_bit_for_bit(backend, width: int, dtype: torch.dtype) -> None:
    made = ragged_plan()
    x = torch.randint(0, 256, (NUM_TOKENS, width * dtype.itemsize), dtype=torch.uint8, device=DEVICE).view(dtype)
    got = permute(x, None, made, backend=backend)
    assert got.dtype == dtype
    assert len(got) == len(made.source_row)
    for row, source in enumerate(made.source_row.tolist()):
        want = raw(x[source]) if source >= 0 else torch.zeros_like(raw(x[0]))
        assert torch.equal(raw(got[row]), want), row


@BACKENDS
def test_quantised_rows_move_with_their_scales(backend) -> None:
    made = ragged_plan()
    x = normal(NUM_TOKENS, 1152)
    q, s = permute(*quantize_rows(x), made, backend=backend)
    want_q, want_s = quantize_rows(x.float()[made.source_row.clamp(min=0).long()])
    live = made.source_row >= 0
    assert torch.equal(raw(q)[live], raw(want_q)[live])
    assert torch.equal(s[:, live], want_s[:, live])
    assert not s[:, ~live].any()
    assert not raw(q)[~live].any()


@BACKENDS
def test_each_gradient_is_the_transpose(backend) -> None:
    """<P x, y> = <x, P' y>, exactly, for the copies and for the sums."""
    made = ragged_plan()
    x, y = whole_numbers(NUM_TOKENS, 24), whole_numbers(len(made.source_row), 24, seed=2)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() * b.double()).sum()

    live = dot(permute(x, None, made, backend=backend), y)
    assert live != 0
    assert live == dot(x, permute_backward(y, made, backend=backend))
    assert live == dot(combine_backward(x, made, backend=backend), y)
    assert live == dot(x, combine(y, made, backend=backend))


@BACKENDS
def test_there_and_back_counts_the_choices_that_are_ours(backend) -> None:
    made = ragged_plan()
    x = whole_numbers(NUM_TOKENS, 40)
    ours = (made.position >= 0).sum(-1, keepdim=True)
    assert 0 < ours.min() < ours.max()
    assert torch.equal(combine(permute(x, None, made, backend=backend), made, backend=backend), x * ours)


def test_the_kernels_sums_are_the_definitions_bit_for_bit() -> None:
    made = ragged_plan()
    for dtype in (torch.bfloat16, torch.float32):
        y = normal(len(made.source_row), 600, dtype=dtype)
        assert torch.equal(combine(y, made, backend="triton"), combine(y, made, backend="torch"))


@BACKENDS
def test_weighted_sums_are_rounded_once(backend) -> None:
    made = ragged_plan()
    y, weights = normal(len(made.source_row), 40), normal(NUM_TOKENS, TOP_K, dtype=torch.float32, seed=2)
    got = combine(y, made, weights, backend=backend)
    rows = y.double()[made.position.clamp(min=0).long()] * weights.double()[..., None]
    want = rows.where(made.position[..., None] >= 0, 0.0).sum(1)
    assert ((got.double() - want).abs() <= want.abs() * 2**-8 + 1e-6).all()


@BACKENDS
def test_what_is_not_a_tokens_own_row_is_not_read(backend) -> None:
    """NaN in padding and in other tokens' rows; a token whose experts are all elsewhere gets zeros."""
    made = plan(torch.tensor([[0, 1], [5, 6], [2, 0]], device=DEVICE), 3)
    y = torch.full((len(made.source_row), 16), torch.nan, device=DEVICE)
    y[made.position[0].long()] = torch.tensor([[1.0], [2.0]], device=DEVICE)
    got = combine(y, made, backend=backend)
    assert (got[0] == 3).all()
    assert (got[1] == 0).all()
    assert got[2].isnan().all()


@BACKENDS
def test_a_sum_does_not_depend_on_the_other_tokens(backend) -> None:
    indices = torch.tensor([[0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 2, 1], [1, 0, 2]], device=DEVICE)
    rows = normal(5, 3, 48)

    def summed(tokens: slice) -> Tensor:
        made = plan(indices[tokens], 3)
        y = torch.zeros(len(made.source_row), 48, dtype=torch.bfloat16, device=DEVICE)
        y[made.position.long()] = rows[tokens]
        return combine(y, made, backend=backend)

    together = summed(slice(None))
    for token in range(5):
        assert torch.equal(summed(slice(token, token + 1))[0], together[token])
    assert torch.equal(summed(slice(None)), together)


def test_the_weights_of_rows_and_their_gradient() -> None:
    made = ragged_plan()
    weights = normal(NUM_TOKENS, TOP_K, dtype=torch.float32)
    got = permute_weights(weights, made)
    for row, (token, slot) in enumerate(zip(made.source_row.tolist(), made.source_slot.tolist(), strict=True)):
        assert got[row] == (weights[token, slot] if token >= 0 else 0)
    grad = torch.arange(len(got), dtype=torch.float32, device=DEVICE) + 1
    back = permute_weights_backward(grad, made)
    assert torch.equal(back, torch.where(made.position >= 0, made.position + 1.0, 0.0))


@BACKENDS
def test_no_tokens(backend) -> None:
    made = plan(torch.zeros(0, 2, dtype=torch.long, device=DEVICE), 2)
    q, s = permute(*quantize_rows(normal(0, 128)), made, backend=backend)
    assert not raw(q).any()
    assert torch.equal(s, torch.zeros(1, 256, device=DEVICE))
    assert combine(normal(256, 16), made, backend=backend).shape == (0, 16)
    assert torch.equal(permute_weights(normal(0, 2, dtype=torch.float32), made), torch.zeros(256, device=DEVICE))


def test_rows_beyond_2_31_elements() -> None:
    """The first columns of 200 tokens' rows, which lie so far apart that the last ones are beyond; pages untouched are free."""
    num_tokens, width, few = 200, 10_900_000, permute_triton.PERMUTE_BLOCK_D
    made = plan(torch.zeros(num_tokens, 1, dtype=torch.long, device=DEVICE), 1)
    x = torch.empty(num_tokens, width, dtype=torch.uint8, device=DEVICE)
    out = torch.empty(256, width, dtype=torch.uint8, device=DEVICE)
    x[-1, :few], x[0, :few], out[-1, :few] = 7, 5, 9
    programs = num_tokens // permute_triton.PERMUTE_BLOCK_T
    permute_triton.permute_kernel[(programs + 2, 1)](
        x, made.position, made.source_row, out, num_tokens, programs, width,
        TOP_K=1, BLOCK_T=permute_triton.PERMUTE_BLOCK_T, BLOCK_D=few,
    )  # fmt: skip
    assert [out[row, 3].item() for row in (0, 199, 200, 255)] == [5, 7, 0, 0]

    y = out.view(torch.float8_e4m3fn)
    y[199, :few], y[0, :few] = 2.0, 3.0
    back = x.view(torch.float8_e4m3fn)
    permute_triton.combine_kernel[(num_tokens // permute_triton.COMBINE_BLOCK_T, 1)](
        y, made.position, made.position, back, num_tokens, width,
        WEIGHTED=False, TOP_K=1, BLOCK_T=permute_triton.COMBINE_BLOCK_T, BLOCK_D=few,
    )  # fmt: skip
    assert [back[row, 3].item() for row in (0, 199)] == [3.0, 2.0]


def test_unfit_input_is_refused() -> None:
    made = ragged_plan()
    x, y = normal(NUM_TOKENS, 16), normal(len(made.source_row), 16)
    with pytest.raises(ValueError, match="one for each of the plan's 45 tokens"):
        permute(x[1:], None, made)
    with pytest.raises(ValueError, match=r"scales torch.float32 \[1, 44\] must be float32 \[_, 45\]"):
        permute(x, torch.zeros(1, 44, device=DEVICE), made)
    with pytest.raises(ValueError, match=f"plan's {len(y)} rows"):
        combine(x, made)
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        combine(y.double(), made)
    with pytest.raises(ValueError, match=r"must be float32 \[45, 3\]"):
        combine(y, made, torch.ones(45, 2, device=DEVICE))
