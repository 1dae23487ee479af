"""The repaired interpreter: its casts against torch's and against nearest-even by search, its products, its refusals."""

from __future__ import annotations

import os
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.policy.kernels.interpreter import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the kernels here, the interpreter is not repaired")

BLOCK = 1 << 16
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
ALL_BF16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
ALL_FP16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@triton.jit
def cast_kernel(x, out, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, mask=place < count, other=0.0)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=place < count)


def interpreted_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    cast_kernel[(-(-x.numel() // BLOCK),)](x, out, x.numel(), BLOCK=BLOCK)
    return out


def torch_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """torch's cast, saturating to fp8 (torch itself saturates or gives NaN, by version)."""
    if dtype in LARGEST and x.dtype != dtype:
        x = x.to(torch.promote_types(x.dtype, torch.float32)) if x.dtype not in FP8 else x.float()
        x = x.clamp(-LARGEST[dtype], LARGEST[dtype])
    return x.to(dtype)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Equal bits, signs of zero included; a NaN for every NaN."""
    assert got.dtype == want.dtype
    nan = want.float().isnan() if want.dtype.is_floating_point else torch.zeros(want.shape, dtype=torch.bool)
    assert torch.equal(nan, got.float().isnan() & torch.ones_like(nan))
    raw = BITS[want.element_size()]
    wrong = (got.view(raw) != want.view(raw)) & ~nan
    assert not wrong.any(), f"{int(wrong.sum())} wrong, first {got[wrong][:3]} for {want[wrong][:3]}"


def float32_around_rounding_points() -> Tensor:
    """For every bf16 and every fp16 value: itself, the middle to the next one, and a float32 step to either side of both."""
    middles = []
    for values in (ALL_BF16, ALL_FP16):
        finite = values[values.float().isfinite()].double().unique()
        middles += [finite.float(), ((finite[1:] + finite[:-1]) / 2).float()]
    points = torch.cat(middles)
    infinity = torch.full_like(points, torch.inf)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan, 0.0, -0.0, 3.4028235e38, 1e-45, -1e-45])
    return torch.cat((points, points.nextafter(infinity), points.nextafter(-infinity), special))


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16, *FP8], ids=str)
@pytest.mark.parametrize("source", ["bf16", "fp16"])
def test_every_half_precision_value_casts_as_torch_does(source: str, target: torch.dtype) -> None:
    values = {"bf16": ALL_BF16, "fp16": ALL_FP16}[source]
    assert len(values.view(torch.int16).unique()) == 65536
    assert_same_bits(interpreted_cast(values, target), torch_cast(values, target))


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16, *FP8], ids=str)
@pytest.mark.parametrize("source", FP8, ids=str)
def test_every_fp8_value_casts_as_torch_does(source: torch.dtype, target: torch.dtype) -> None:
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(source)
    assert_same_bits(interpreted_cast(values, target), torch_cast(values, target))


@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16, *FP8], ids=str)
def test_float32_casts_as_torch_does_at_every_rounding_point(target: torch.dtype) -> None:
    values = float32_around_rounding_points()
    assert_same_bits(interpreted_cast(values, target), torch_cast(values, target))


@pytest.mark.parametrize("target", FP8, ids=str)
def test_fp8_is_the_nearest_value_by_search_ties_to_even(target: torch.dtype) -> None:
    """An answer that owes nothing to torch's casts: search the sorted values of the format."""
    values = float32_around_rounding_points()
    values = values[values.isfinite() & ~values.signbit()].double()
    codes = torch.arange(128, dtype=torch.int32).to(torch.uint8).view(target).float()
    codes = codes[codes.isfinite()].double()  # ascending, and a code's number is its place
    above = torch.searchsorted(codes, values).clamp(max=len(codes) - 1)
    below = (above - 1).clamp(min=0)
    down, up = values - codes[below], codes[above] - values
    code = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    code = torch.where(values >= codes[-1], len(codes) - 1, code)
    got = interpreted_cast(values.float(), target).view(torch.uint8)
    assert torch.equal(got.long(), code)


def test_casts_between_bf16_and_whole_or_double_numbers() -> None:
    whole = torch.tensor([0, 1, -1, 255, 257, 258, 259, -771, 65537, 2**24 + 1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    assert_same_bits(interpreted_cast(whole, torch.bfloat16), whole.double().to(torch.bfloat16))
    parts = torch.tensor([0.0, 1.5, -1.5, 255.0, -3.0e4, 2.0**30]).bfloat16()
    assert interpreted_cast(parts, torch.int32).tolist() == [0, 1, -1, 255, int(parts[4]), 2**30]
    double = torch.tensor([1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-9, 3.0e38, -1e-40], dtype=torch.float64)
    assert_same_bits(interpreted_cast(double, torch.bfloat16), double.to(torch.bfloat16))
    assert_same_bits(interpreted_cast(double, FP8[0]), torch_cast(double, FP8[0]))


@triton.jit
def dot_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + n[:, None] * K + k[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(left, right.T))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, *FP8], ids=str)
def test_dot_is_the_product_of_the_values(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(n, 64, generator=generator).to(dtype) for n in (32, 16))
    out = torch.empty(32, 16)
    dot_kernel[(1,)](a, b, out, M=32, N=16, K=64)
    torch.testing.assert_close(out.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-5)


def test_dot_of_bf16_nan_and_infinity() -> None:
    a, b = torch.ones(16, 16).bfloat16(), torch.ones(16, 16).bfloat16()
    a[0, 0], a[1, 1] = torch.nan, torch.inf
    out = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out, M=16, N=16, K=16)
    assert out[0].isnan().all()
    assert (out[1] == torch.inf).all()
    assert (out[2:] == 16).all()


@triton.jit
def arithmetic_kernel(x, out, WHICH: tl.constexpr):
    place = tl.arange(0, 16)
    a = tl.load(x + place)
    if WHICH == "add":
        result = a + a
    elif WHICH == "multiply":
        result = a * a
    elif WHICH == "compare":
        result = a > a
    elif WHICH == "negate":
        result = -a
    elif WHICH == "abs":
        result = tl.abs(a)
    else:
        result = tl.where(place > 3, a, a)
    tl.store(out + place, result.to(out.dtype.element_ty))


@pytest.mark.parametrize("which", ["add", "multiply", "compare", "negate"])
def test_arithmetic_on_bf16_is_refused(which: str) -> None:
    with pytest.raises(Exception, match="bf16 is wrong in the interpreter: convert to float32"):
        arithmetic_kernel[(1,)](torch.ones(16).bfloat16(), torch.empty(16), WHICH=which)


@pytest.mark.parametrize("which", ["abs", "select"])
def test_moving_bits_of_bf16_is_allowed(which: str) -> None:
    x = torch.linspace(-2, 2, 16).bfloat16()
    out = torch.empty(16)
    arithmetic_kernel[(1,)](x, out, WHICH=which)
    assert torch.equal(out, x.float().abs() if which == "abs" else x.float())


@triton.jit
def fma_kernel(x, y, z, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.fma(tl.load(x + i), tl.load(y + i), tl.load(z + i)))


def nearest_float32(exact: Fraction) -> float:
    """The float32 nearest to a fraction, ties to even, by comparing the neighbours of a first guess."""
    guess = np.float32(float(exact))
    around = (guess, np.nextafter(guess, np.float32(np.inf)), np.nextafter(guess, np.float32(-np.inf)))
    return float(min(around, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.int32)) & 1)))


def test_fma_rounds_once() -> None:
    generator = random.Random(5)
    rows: list[tuple[float, float, float]] = [
        (1 + 2**-12, 1 + 2**-12, 2**-80),  # above the middle by less than a float64 keeps
        (1 + 2**-12, 1 + 2**-12, -(2**-80)),
        (1 + 2**-12, 1 + 2**-12, -(1 + 2**-11)),
    ]
    for _ in range(509):
        x, y = (float(np.float32(generator.uniform(-2, 2))) for _ in range(2))
        size = 2.0 ** generator.randrange(-60, 10)
        rows.append((x, y, -float(np.float32(x * y)) if generator.random() < 0.5 else float(np.float32(x * size))))
    columns = torch.tensor(rows, dtype=torch.float32).T.contiguous()
    out = torch.empty(512)
    fma_kernel[(1,)](*columns, out, BLOCK=512)
    want = [nearest_float32(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in rows]
    assert out.tolist() == want


def test_fma_of_infinity_and_nan() -> None:
    x = torch.tensor([torch.inf, torch.inf, torch.nan, 3e38, 0.0])
    y, z = torch.tensor([1.0, 0.0, 1.0, 3e38, 1.0]), torch.tensor([-1.0, 1.0, 1.0, 0.0, -0.0])
    out = torch.empty(8)
    padded = [torch.nn.functional.pad(v, (0, 3)) for v in (x, y, z)]
    fma_kernel[(1,)](*padded, out, BLOCK=8)
    assert out[0] == torch.inf
    assert out[1:3].isnan().all()
    assert out[3:5].tolist() == [torch.inf, 0.0]


@triton.jit
def helper(x):
    return tl.sum(tl.maximum(x, 0.0), 0)


@triton.jit
def loop_kernel(x, count, out, BLOCK: tl.constexpr):
    total = tl.zeros((), tl.float32)
    for block in range(tl.load(count)):
        total += helper(tl.load(x + block * BLOCK + tl.arange(0, BLOCK)))
    tl.store(out + tl.program_id(0), total)


def test_a_loaded_number_ends_a_loop_and_library_functions_run() -> None:
    x = torch.arange(-8.0, 24.0)
    out = torch.empty(2)
    before = tl.core.load, tl.core.tensor.__dict__.get("__index__")
    loop_kernel[(2,)](x, torch.tensor([3], dtype=torch.int32), out, BLOCK=8)
    assert out.tolist() == [float(sum(range(16)))] * 2
    assert (tl.core.load, tl.core.tensor.__dict__.get("__index__")) == before, "the launch left triton.language patched"


def test_autotuning_takes_the_first_configuration() -> None:
    @triton.autotune(configs=[triton.Config({"BLOCK": 8}), triton.Config({"BLOCK": 16})], key=["count"])
    @triton.jit
    def tuned(x, out, count, BLOCK: tl.constexpr):
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + place, tl.load(x + place) + BLOCK, mask=place < count)

    out = torch.zeros(32)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (32 // meta["BLOCK"],)

    tuned[grid](torch.zeros(32), out, 32)
    assert out.tolist() == [8.0] * 32


def test_child_processes_are_not_interpreted() -> None:
    assert triton.knobs.runtime.interpret
    assert "TRITON_INTERPRET" not in os.environ
