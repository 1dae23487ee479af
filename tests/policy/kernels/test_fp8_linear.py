"""The dense layer: its three products against float64 on sizes that 128 does not divide, and against bf16's exact ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from policy.kernels.fp8_linear import Columns, dense_plan, linear_dgrad, linear_forward, linear_wgrad
from policy.kernels.plan import plan
from policy.kernels.quantize import (
    GRADIENT_FLOOR,
    dequantize_columns,
    dequantize_rows,
    dequantize_weight,
    quantize_columns,
    quantize_rows,
    quantize_weight,
)
from tests.policy.kernels.expert_operands import bits, relative_error
from tests.policy.kernels.interpreter import DEVICE

T, N, K = 130, 80, 208


def inputs(num_rows: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, K], dy [T, N] and W [N, K] in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((num_rows, K, 1.0), (num_rows, N, 1e-6), (N, K, K**-0.5))
    x, dy, w = (torch.randn(a, b, generator=generator) * scale for a, b, scale in shapes)
    return x.bfloat16().to(DEVICE), dy.bfloat16().to(DEVICE), w.bfloat16().to(DEVICE)


@pytest.mark.parametrize("num_rows", [1, 128, 130])
def test_dense_plan_is_the_plan_of_one_expert_without_its_spare_tile(num_rows: int) -> None:
    got = dense_plan(num_rows, DEVICE)
    want = plan(torch.zeros(num_rows, 1, dtype=torch.int64, device=DEVICE), 1, backend="torch")
    live = int(want.expert_offsets[-1])
    assert torch.equal(got.expert_offsets, want.expert_offsets)
    assert torch.equal(got.tile_expert, want.tile_expert[: live // 128])
    assert torch.equal(got.source_row, want.source_row[:live])
    assert torch.equal(got.source_slot, want.source_slot[:live])
    assert torch.equal(got.position, want.position)
    assert {tensor.dtype for tensor in got} == {torch.int32}


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_products_are_those_of_the_dequantised_operands(backend: Any, power_of_two: bool) -> None:
    x, dy, w = inputs()
    options: dict[str, Any] = {"power_of_two": power_of_two, "backend": backend}
    weight, rows = quantize_weight(w[None], **options), dense_plan(T, DEVICE)
    y, x_columns = linear_forward(x, weight, N, rows, columns=True, **options)
    dx, dy_columns = linear_dgrad(dy, weight, K, rows, columns=True, **options)
    assert x_columns is not None
    assert dy_columns is not None
    dw = linear_wgrad(dy_columns, x_columns, N, K, rows, backend=backend)
    assert (y.shape, dx.shape, dw.shape) == ((T, N), (T, K), (N, K))

    dense = dequantize_weight(weight.q, weight.s)[0, :N, :K].double()
    x_rows = dequantize_rows(*quantize_rows(x, **options))[:, :K].double()
    dy_rows = dequantize_rows(*quantize_rows(dy, floor=GRADIENT_FLOOR, **options))[:, :N].double()
    assert relative_error(y, x_rows @ dense.T) < 2e-3
    assert relative_error(dx, dy_rows @ dense) < 2e-3
    x_down = dequantize_columns(*quantize_columns(x, **options))[:T, :K].double()
    dy_down = dequantize_columns(*quantize_columns(dy, floor=GRADIENT_FLOOR, **options))[:T, :N].double()
    assert relative_error(dw, dy_down.T @ x_down) < 2e-3
    # What e4m3 costs: 3 bits of mantissa in each operand.
    for got, want in ((y, x.double() @ w.double().T), (dx, dy.double() @ w.double()), (dw, dy.double().T @ x.double())):
        assert 0.03 < relative_error(got, want) < 0.045


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_weight_gradient_is_added_to_whole_and_to_cropped_sums(backend: Any) -> None:
    x, dy, w = inputs()
    rows, weight = dense_plan(T, DEVICE), quantize_weight(w[None], backend="torch")
    _, x_columns = linear_forward(x, weight, N, rows, columns=True, backend="torch")
    _, dy_columns = linear_dgrad(dy, weight, K, rows, columns=True, backend="torch")
    assert x_columns is not None
    assert dy_columns is not None
    gradient = linear_wgrad(dy_columns, x_columns, 128, 256, rows, out_dtype=torch.float32, backend=backend)
    assert not gradient[N:].any()
    assert not gradient[:, K:].any()
    for n, k in ((N, K), (128, 256)):
        out = torch.full((n, k), 1e-5, device=DEVICE)
        assert linear_wgrad(dy_columns, x_columns, n, k, rows, out=out, backend=backend).data_ptr() == out.data_ptr()
        assert torch.equal(out, 1e-5 + gradient[:n, :k])


@pytest.mark.parametrize("num_rows", [1, 128, 130])
def test_without_columns_the_product_is_the_same(num_rows: int) -> None:
    x, dy, w = inputs(num_rows)
    rows, weight = dense_plan(num_rows, DEVICE), quantize_weight(w[None])
    y, kept = linear_forward(x, weight, N, rows, columns=True)
    alone, nothing = linear_forward(x, weight, N, rows, columns=False)
    assert nothing is None
    assert isinstance(kept, Columns)
    assert torch.equal(bits(alone), bits(y))
    assert torch.equal(
        linear_dgrad(dy, weight, K, rows, columns=False)[0], linear_dgrad(dy, weight, K, rows, columns=True)[0]
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_row_does_not_depend_on_the_others(backend: Any) -> None:
    x, _, w = inputs()
    weight = quantize_weight(w[None], backend="torch")
    y, _ = linear_forward(x, weight, N, dense_plan(T, DEVICE), columns=False, backend=backend)
    alone, _ = linear_forward(x[129:], weight, N, dense_plan(1, DEVICE), columns=False, backend=backend)
    assert torch.equal(bits(alone[0]), bits(y[129]))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_rows_have_no_output_and_no_gradient(backend: Any) -> None:
    x, dy, w = inputs(0)
    rows, weight = dense_plan(0, DEVICE), quantize_weight(w[None], backend="torch")
    y, x_columns = linear_forward(x, weight, N, rows, columns=True, backend=backend)
    _, dy_columns = linear_dgrad(dy, weight, K, rows, columns=True, backend=backend)
    assert x_columns is not None
    assert dy_columns is not None
    assert y.shape == (0, N)
    assert torch.equal(
        linear_wgrad(dy_columns, x_columns, N, K, rows, backend=backend).float(), torch.zeros(N, K, device=DEVICE)
    )
