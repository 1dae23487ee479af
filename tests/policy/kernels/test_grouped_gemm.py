"""Rows times their expert's weights: the definition against float64, every configuration of the kernel against both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policy.kernels import grouped_gemm_triton
from policy.kernels.grouped_gemm import exact_product, grouped_gemm
from policy.kernels.grouped_gemm_triton import place_of_tile
from policy.kernels.plan import Plan
from policy.kernels.quantize import BLOCK, FP8, dequantize_rows, dequantize_weight
from tests.policy.kernels.expert_operands import Operands, bits, expert_operands, poison_new_memory, relative_error
from tests.policy.kernels.interpreter import DEVICE

RAGGED = [130, 0, 1, 70]
CONFIGS = list(grouped_gemm_triton.CONFIGS)


def by_kernel(operands: Operands, config: str, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    o = operands
    weight, plan = o.weight, o.plan
    return grouped_gemm_triton.grouped_gemm(
        o.q, o.s, weight.q, weight.s, plan.tile_expert, plan.expert_offsets, out_dtype, config
    )


def by_definition(operands: Operands, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    o = operands
    return grouped_gemm(o.q, o.s, o.weight.q, o.weight.s, o.plan, out_dtype=out_dtype, backend="torch")


def in_float64(q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, plan: Plan) -> Tensor:
    """The product of the dequantised operands; zeros in tiles of no expert."""
    experts = plan.tile_expert.long().repeat_interleave(BLOCK)
    w = dequantize_weight(wq, ws).double()
    out = torch.einsum("mk,mnk->mn", dequantize_rows(q, s).double(), w[experts.clamp(min=0)])
    return out * (experts >= 0)[:, None]


def test_definition_is_the_product_of_the_dequantised_operands() -> None:
    o = expert_operands(RAGGED, 256, 384)
    want = in_float64(o.q, o.s, o.weight.q, o.weight.s, o.plan)
    assert relative_error(by_definition(o, torch.float32), want) < 3e-7
    assert relative_error(by_definition(o), want) < 2e-3
    assert torch.equal(by_definition(o), by_definition(o, torch.float32).bfloat16())


def test_definition_sums_a_block_exactly_where_float32_would_not() -> None:
    # 63 times 448^2, as often its negative, and once the least product, which float32 cannot hold beside one of them.
    b = torch.tensor([448.0] * 63 + [-448.0] * 63 + [2.0**-9, 0.0])[
        torch.randperm(BLOCK, generator=torch.manual_seed(0))
    ]
    a = torch.where(b.abs() == 448.0, 448.0, 2.0**-9)
    assert exact_product(a[None].to(FP8), b[None].to(FP8)).item() == 2.0**-18
    assert (a[None] @ b[None].T).item() != 2.0**-18, "float32 is as good: the numbers do not tell"


@pytest.mark.parametrize("config", CONFIGS)
def test_kernel_multiplies_ragged_empty_and_single_row_experts(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    o = expert_operands(RAGGED, 256, 384)
    want = in_float64(o.q, o.s, o.weight.q, o.weight.s, o.plan)
    poison_new_memory(monkeypatch)
    got = by_kernel(o, config)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, want) < 2e-3
    assert relative_error(by_kernel(o, config, torch.float32), by_definition(o, torch.float32)) < 1e-6
    live = int(o.plan.expert_offsets[-1])
    assert live < len(got), "the plan has tiles of no expert"
    assert not got[live:].any()
    assert torch.equal(bits(by_kernel(o, config)), bits(got))


@pytest.mark.parametrize("config", ["plain", "specialized"])
def test_data_gradient_is_the_product_with_the_transposed_copy(config: str) -> None:
    o = expert_operands([1, 129], 128, 384)
    dx = in_float64(o.dyq, o.dys, o.weight.q.transpose(1, 2), o.weight.s.transpose(1, 2), o.plan)
    operands = (o.dyq, o.dys, o.weight.qt, o.weight.st)
    got = grouped_gemm_triton.grouped_gemm(
        *operands, o.plan.tile_expert, o.plan.expert_offsets, torch.bfloat16, config=config
    )
    assert relative_error(got, dx) < 2e-3
    assert relative_error(grouped_gemm(*operands, o.plan, backend="torch"), dx) < 2e-3


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_row_does_not_depend_on_the_others(backend: Any) -> None:
    """Other rows, other numbers of them and another place in the segment: the same bits."""
    many = expert_operands([150, 40], 128, 256, seed=1)
    few = expert_operands([3, 40], 128, 256, seed=2)
    weight = many.weight

    def product(o: Operands) -> Tensor:
        return grouped_gemm(o.q, o.s, weight.q, weight.s, o.plan, out_dtype=torch.float32, backend=backend)

    # Row 140 of the first expert becomes row 2 of the other batch.
    few.q.view(torch.uint8)[2] = many.q.view(torch.uint8)[140]
    few.s[:, 2] = many.s[:, 140]
    assert torch.equal(bits(product(few)[2]), bits(product(many)[140]))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nan_stays_in_its_row_and_in_its_expert_s_block_of_columns(backend: Any) -> None:
    o = expert_operands([2, 1], 256, 128)
    o.q.view(torch.uint8)[1] = 0x7F
    o.s[:, 1] = torch.nan
    o.weight.q.view(torch.uint8)[1, 128:] = 0x7F
    o.weight.s[1, 1] = torch.nan
    y = grouped_gemm(o.q, o.s, o.weight.q, o.weight.s, o.plan, backend=backend)
    want = torch.zeros(y.shape, dtype=torch.bool, device=DEVICE)
    want[1] = True
    want[128:256, 128:] = True
    assert torch.equal(y.isnan(), want)
    assert y[0].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_zeros_give_zeros(backend: Any) -> None:
    o = expert_operands([5], 128, 256)
    o.q.zero_()
    assert not grouped_gemm(o.q, o.s, o.weight.q, o.weight.s, o.plan, backend=backend).any()
    nobody = expert_operands([0, 0], 128, 128)
    y = grouped_gemm(nobody.q, nobody.s, nobody.weight.q, nobody.weight.s, nobody.plan, backend=backend)
    assert len(y) == 256
    assert not y.any()


def test_weights_beyond_2_31_bytes_are_found() -> None:
    experts = 2**31 // BLOCK**2 + 2
    small = expert_operands([3], BLOCK, BLOCK)
    # Never written but in the last expert's 16 KiB, so the memory is not used.
    wq = torch.empty(experts, BLOCK, BLOCK, dtype=FP8, device=DEVICE)
    wq[-1] = small.weight.q[0]
    ws = torch.zeros(experts, 1, 1, device=DEVICE)
    ws[-1] = small.weight.s[0]
    offsets = torch.zeros(experts + 1, dtype=torch.int32, device=DEVICE)
    offsets[-1] = BLOCK
    tiles = torch.tensor([experts - 1], dtype=torch.int32, device=DEVICE)
    far = grouped_gemm_triton.grouped_gemm(small.q[:BLOCK], small.s[:, :BLOCK], wq, ws, tiles, offsets, torch.bfloat16)
    assert torch.equal(bits(far), bits(by_kernel(small, "plain")[:BLOCK]))


@given(counts=st.lists(st.integers(0, 140), min_size=1, max_size=4), columns=st.integers(1, 2), seed=st.integers(0, 99))
@settings(deadline=None, derandomize=True, max_examples=10)
def test_any_numbers_of_rows(counts: list[int], columns: int, seed: int) -> None:
    o = expert_operands(counts, columns * BLOCK, BLOCK, seed)
    want = in_float64(o.q, o.s, o.weight.q, o.weight.s, o.plan)
    for got in (by_definition(o, torch.float32), by_kernel(o, "plain", torch.float32)):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@triton.jit
def places_kernel(out, row_tiles, column_tiles, GROUP: tl.constexpr):
    tile = tl.program_id(0)
    row, column = place_of_tile(tile, row_tiles, column_tiles, GROUP)
    tl.store(out + tile * 2, row)
    tl.store(out + tile * 2 + 1, column)


@pytest.mark.parametrize(("rows", "columns"), [(11, 3), (8, 2), (1, 5), (5, 1)])
def test_tiles_are_taken_once_each_and_down_a_group_first(rows: int, columns: int) -> None:
    out = torch.full((rows * columns, 2), -1, dtype=torch.int32, device=DEVICE)
    places_kernel[(rows * columns,)](out, rows, columns, GROUP=4)
    want = [
        (first + row, column)
        for first in range(0, rows, 4)
        for column in range(columns)
        for row in range(min(4, rows - first))
    ]
    assert [tuple(place) for place in out.tolist()] == want


def test_wide_tiles_need_pairs_of_blocks() -> None:
    with pytest.raises(ValueError, match="multiple of 256, not 384"):
        by_kernel(expert_operands([1], 384, 128), "wide")


def test_operands_out_of_order_are_refused() -> None:
    o = expert_operands([3, 2], 128, 256)
    q, s, (wq, ws, _, _), plan = o.q, o.s, o.weight, o.plan
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((q[:, :128], s[:1], wq, ws, plan), r"rows \[384, 128\] and weights \[2, 128, 256\]"),
        ((q[:100], s[:, :100], wq, ws, plan), "M 100, N 128 and K 256 must be multiples of 128"),
        ((q.float(), s, wq, ws, plan), "q must be contiguous torch.float8_e4m3fn, not torch.float32"),
        ((q, s.T, wq, ws, plan), r"q: scales must be contiguous float32 \[2, 384\]"),
        ((q, s, wq, ws.double(), plan), r"wq: scales must be .* not torch.float64"),
        ((q, s, wq.transpose(1, 2).contiguous().transpose(1, 2), ws, plan), "wq must be contiguous"),
        ((q, s, wq[:1], ws[:1], plan), "the plan is of 2 experts and 3 row tiles, the operands of 1 and 3"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            grouped_gemm(*arguments)
    with pytest.raises(ValueError, match=r"out_dtype must be bfloat16 or float32, not torch\.float16"):
        grouped_gemm(q, s, wq, ws, plan, out_dtype=torch.float16)
