"""Quantised operands of the expert products, with numbers of experts' rows to choose."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from policy.kernels.plan import Plan, plan
from policy.kernels.quantize import GRADIENT_FLOOR, Fp8Weight, quantize_rows_and_columns, quantize_weight
from tests.policy.kernels.interpreter import DEVICE


class Operands(NamedTuple):
    """x [T, K] and dy [T, N] of T tokens with one expert each, by plan: rows (q, s), columns (qt, st); and the weights."""

    plan: Plan
    q: Tensor
    s: Tensor
    qt: Tensor
    st: Tensor
    dyq: Tensor
    dys: Tensor
    dyqt: Tensor
    dyst: Tensor
    weight: Fp8Weight


def expert_operands(counts: list[int], n: int, k: int, seed: int = 0) -> Operands:
    """Tokens in random order, counts[e] of them of expert e; rows of very different size, as gradients have them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    total = sum(counts)
    choices = torch.repeat_interleave(torch.tensor(counts))[torch.randperm(total, generator=generator)]
    made = plan(choices[:, None].to(DEVICE), len(counts), backend="torch")
    x = normal(total, k) * 2 ** normal(total, 1)
    dy = normal(total, n) * 1e-6 * 2 ** normal(total, 1)
    w = normal(len(counts), n, k) / k**0.5
    x, dy, w = (tensor.bfloat16().to(DEVICE) for tensor in (x, dy, w))
    rows = quantize_rows_and_columns(x, made.source_row, backend="torch")
    gradients = quantize_rows_and_columns(dy, made.source_row, floor=GRADIENT_FLOOR, backend="torch")
    return Operands(made, *rows, *gradients, quantize_weight(w, backend="torch"))


def bits(x: Tensor) -> Tensor:
    """Whole numbers that are equal where x is bit for bit, NaN included."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, Frobenius; nothing may be NaN."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty holds NaN from here on, so that what a kernel does not write is seen."""
    plain = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        made = plain(*args, **kwargs)
        return made.fill_(torch.nan) if made.dtype.is_floating_point else made

    monkeypatch.setattr(torch, "empty", empty)
