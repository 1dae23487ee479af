"""Gradients of expert weights: the definition against float64, every configuration of the kernel against both."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policy.kernels import grouped_wgrad_triton
from policy.kernels.grouped_wgrad import grouped_wgrad
from policy.kernels.quantize import BLOCK, FP8, dequantize_columns
from tests.policy.kernels.expert_operands import Operands, bits, expert_operands, poison_new_memory, relative_error
from tests.policy.kernels.interpreter import DEVICE

RAGGED = [130, 0, 1, 70]
CONFIGS = list(grouped_wgrad_triton.CONFIGS)


def by_kernel(
    operands: Operands, config: str, out: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    o = operands
    return grouped_wgrad_triton.grouped_wgrad(o.dyqt, o.dyst, o.qt, o.st, o.plan.expert_offsets, out, out_dtype, config)


def wgrad(operands: Operands, **options: Any) -> Tensor:
    o = operands
    return grouped_wgrad(o.dyqt, o.dyst, o.qt, o.st, o.plan, **options)


def in_float64(operands: Operands) -> Tensor:
    """The product of the dequantised operands over each expert's rows."""
    dy = dequantize_columns(operands.dyqt, operands.dyst).double()
    x = dequantize_columns(operands.qt, operands.st).double()
    ends = operands.plan.expert_offsets.tolist()
    return torch.stack([dy[i:j].T @ x[i:j] for i, j in pairwise(ends)])


def test_definition_is_the_product_of_the_dequantised_operands() -> None:
    o = expert_operands(RAGGED, 256, 384)
    want = in_float64(o)
    assert relative_error(wgrad(o, out_dtype=torch.float32, backend="torch"), want) < 3e-7
    assert relative_error(wgrad(o, backend="torch"), want) < 2e-3
    start = torch.randn(4, 256, 384, device=DEVICE) * float(want.std())
    out = start.clone()
    assert wgrad(o, out=out, backend="torch") is out
    assert relative_error(out, start.double() + want) < 3e-7


@pytest.mark.parametrize("config", CONFIGS)
def test_kernel_multiplies_ragged_empty_and_single_row_experts(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    o = expert_operands(RAGGED, 256, 384)
    want = in_float64(o)
    poison_new_memory(monkeypatch)
    got = by_kernel(o, config)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, want) < 2e-3
    assert not got[1].any()
    exact = by_kernel(o, config, out_dtype=torch.float32)
    assert relative_error(exact, wgrad(o, out_dtype=torch.float32, backend="torch")) < 1e-6
    assert torch.equal(exact.bfloat16(), got)
    assert torch.equal(bits(by_kernel(o, config)), bits(got))


@pytest.mark.parametrize("config", CONFIGS)
def test_kernel_adds_to_what_is_there_and_leaves_empty_experts_alone(config: str) -> None:
    o = expert_operands([3, 0], 128, 256)
    gradient = by_kernel(o, config, out_dtype=torch.float32)
    # -0 + 0 would be 0.
    out = torch.full((2, 128, 256), -0.0, device=DEVICE)
    start = torch.randn(128, 256, device=DEVICE) * 1e-6
    out[0] = start
    assert by_kernel(o, config, out) is out
    assert torch.equal(bits(out[1]), bits(torch.full((128, 256), -0.0, device=DEVICE)))
    assert torch.equal(out[0], start + gradient[0])
    by_definition = wgrad(o, out=torch.full((2, 128, 256), -0.0, device=DEVICE), backend="torch")
    assert torch.equal(bits(by_definition[1]), bits(out[1]))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_expert_does_not_depend_on_the_others(backend: Any) -> None:
    """The same rows behind another expert's, in a plan of another size: the same bits."""
    alone, behind = expert_operands([129], 128, 128, seed=1), expert_operands([5, 200], 128, 128, seed=2)
    for name in ("dyqt", "qt"):
        getattr(behind, name).view(torch.uint8)[:, 128:384] = getattr(alone, name).view(torch.uint8)[:, :256]
    for name in ("dyst", "st"):
        getattr(behind, name)[1:3] = getattr(alone, name)[:2]
    options: dict[str, Any] = {"out_dtype": torch.float32, "backend": backend}
    assert torch.equal(bits(wgrad(behind, **options)[1]), bits(wgrad(alone, **options)[0]))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nan_stays_in_its_expert_s_row_or_column(backend: Any) -> None:
    o = expert_operands([4, 4], 128, 256)
    o.dyqt.view(torch.uint8)[7, :BLOCK] = 0x7F
    o.dyst[0, 7] = torch.nan
    o.qt.view(torch.uint8)[200, BLOCK : 2 * BLOCK] = 0x7F
    o.st[1, 200] = torch.nan
    want = torch.zeros(2, 128, 256, dtype=torch.bool, device=DEVICE)
    want[0, 7] = True
    want[1, :, 200] = True
    assert torch.equal(wgrad(o, backend=backend).isnan(), want)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_zeros_and_nobody_s_rows_give_zeros(backend: Any) -> None:
    o = expert_operands([5], 128, 128)
    o.dyqt.zero_()
    assert not wgrad(o, backend=backend).any()
    nobody = expert_operands([0, 0], 128, 128)
    # Rows of no expert are not read.
    nobody.qt.view(torch.uint8).fill_(0x7F)
    assert not wgrad(nobody, backend=backend).any()


def test_columns_beyond_2_31_bytes_are_found() -> None:
    rows = 2**24 + BLOCK
    small = expert_operands([3], BLOCK, BLOCK)
    # Never written but at the far end, a page for each column, so most of the memory is not used.
    far = [torch.empty(BLOCK, rows, dtype=FP8, device=DEVICE) for _ in range(2)]
    scales = [torch.empty(rows // BLOCK, BLOCK, device=DEVICE) for _ in range(2)]
    for q, s, near, near_scale in zip(far, scales, (small.dyqt, small.qt), (small.dyst, small.st), strict=True):
        q[:, -BLOCK:] = near[:, :BLOCK]
        s[-1] = near_scale[0]
    offsets = torch.tensor([rows - BLOCK, rows], dtype=torch.int32, device=DEVICE)
    got = grouped_wgrad_triton.grouped_wgrad(far[0], scales[0], far[1], scales[1], offsets, None, torch.bfloat16)
    assert torch.equal(bits(got), bits(by_kernel(small, "plain")))


@given(counts=st.lists(st.integers(0, 140), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(deadline=None, derandomize=True, max_examples=10)
def test_any_numbers_of_rows(counts: list[int], seed: int) -> None:
    o = expert_operands(counts, BLOCK, BLOCK, seed)
    want = in_float64(o)
    for got in (
        wgrad(o, out_dtype=torch.float32, backend="torch"),
        wgrad(o, out_dtype=torch.float32, backend="triton"),
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-9 * float(want.abs().max() + 1))


def test_operands_out_of_order_are_refused() -> None:
    o = expert_operands([3, 2], 128, 256)
    dyq, dys, xq, xs, plan = o.dyqt, o.dyst, o.qt, o.st, o.plan
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((dyq[:, :128], dys[:1], xq, xs, plan), r"columns \[128, 128\] and \[256, 384\]"),
        ((dyq[:64], dys[:, :64], xq, xs, plan), "M 384, N 64 and K 256 must be multiples of 128"),
        ((dyq.bfloat16(), dys, xq, xs, plan), "dyq must be contiguous torch.float8_e4m3fn, not torch.bfloat16"),
        ((dyq, dys, xq, xs.T.contiguous(), plan), r"xq: scales must be contiguous float32 \[3, 256\]"),
        ((dyq, dys, xq, xs, expert_operands([300], 128, 128).plan), "the plan has 4 row tiles, the operands 3"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            grouped_wgrad(*arguments)
    with pytest.raises(ValueError, match=r"out must be contiguous float32 \[2, 128, 256\], not torch\.bfloat16"):
        grouped_wgrad(dyq, dys, xq, xs, plan, out=torch.zeros(2, 128, 256, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"out_dtype must be bfloat16 or float32, not torch\.float16"):
        grouped_wgrad(dyq, dys, xq, xs, plan, out_dtype=torch.float16)
