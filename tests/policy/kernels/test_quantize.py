"""FP8 blocks: the definition by hand, the kernels bit for bit the definition, NaN, zeros, odd sizes, far offsets."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policy.kernels import quantize_triton
from policy.kernels.dispatch import choose_backend
from policy.kernels.errors import KernelUnavailableError
from policy.kernels.quantize import (
    FP8,
    dequantize_columns,
    dequantize_rows,
    dequantize_weight,
    quantize_columns,
    quantize_rows,
    quantize_rows_and_columns,
    quantize_weight,
    scale_of,
)
from tests.policy.kernels.interpreter import DEVICE

# 16 and 272 are no multiples of 128; 130 rows end inside a block.
SIZES = [(1, 16), (130, 272), (128, 256)]


def values(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Numbers of many magnitudes, with -0, rows and columns of zeros, and tiles below any floor."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.randn(rows, 1, generator=generator).mul(4).exp() * torch.randn(1, columns, generator=generator).exp()
    x[0, ::3] = -0.0
    x[:, 5] = 0
    x[rows // 2] *= 1e-20
    return x.to(dtype).to(DEVICE)


def assert_same_bits(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Equal bytes, NaN for NaN."""
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        nan = other.float().isnan()
        assert torch.equal(one.float().isnan(), nan)
        raw = torch.uint8 if one.dtype == FP8 else torch.int32
        wrong = (one.contiguous().view(raw) != other.contiguous().view(raw)) & ~nan
        assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}: {one[wrong][:3]} for {other[wrong][:3]}"


def sources(num_rows: int, of: int) -> Tensor:
    """Source rows with repeats, some -1."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-1, of, (num_rows,), generator=generator, dtype=torch.int32).to(DEVICE)


def test_the_definition_by_hand() -> None:
    x = torch.zeros(2, 256)
    x[0, :4] = torch.tensor([896.0, 2.0, -3.0, 0.7])  # scale 2
    x[1, 128] = -0.00448  # scale 0.00001
    q, s = quantize_rows(x)
    assert s.shape == (2, 2)
    assert s[0, 0] == 2
    assert s[0, 1] == s[1, 0] == torch.tensor(1e-4) / torch.tensor(448.0)
    assert s[1, 1] == torch.tensor(0.00448) / torch.tensor(448.0)
    assert q[0, :4].float().tolist() == [448.0, 1.0, -1.5, 0.34375]  # 0.35 lies between 0.34375 and 0.375
    assert q[1, 128].float() == -448
    assert q.float().count_nonzero() == 5


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("floor", [1e-4, 1e-12])
def test_quotients_are_rounded_once_to_the_nearest(power_of_two: bool, floor: float) -> None:
    """Scale and byte against exact fractions: no byte of e4m3 is nearer to the quotient, but for float32's rounding of it."""
    x = values(3, 128, torch.float32)[:, :40].cpu()
    q, s = quantize_rows(x, floor=floor, power_of_two=power_of_two)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(FP8).float()
    codes = sorted(Fraction(v) for v in codes.tolist() if math.isfinite(v))
    for row in range(3):
        scale = Fraction(s[0, row].item())
        amax = max(*map(abs, x[row].tolist()), torch.tensor(floor).item())
        if power_of_two:
            assert math.frexp(float(scale))[0] == 0.5
            assert scale / 2 < Fraction(amax) / 448 <= scale
        else:
            assert abs(scale - Fraction(amax) / 448) <= scale / 2**24
        for value, byte in zip(x[row].tolist(), q[row, :40].float().tolist(), strict=True):
            exact = Fraction(value) / scale
            error = abs(Fraction(byte) - exact)
            assert error <= min(abs(code - exact) for code in codes) + abs(exact) / 2**23


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_kernels_equal_the_definition(size: tuple[int, int], dtype: torch.dtype, power_of_two: bool) -> None:
    x = values(*size, dtype=torch.float32).clamp(-3e4, 3e4).to(dtype)
    kwargs = {"power_of_two": power_of_two}
    source = sources(140, len(x))
    assert_same_bits(quantize_rows(x, backend="triton", **kwargs), quantize_rows(x, backend="torch", **kwargs))
    for rows in (None, source):
        got = quantize_columns(x, rows, backend="triton", floor=1e-12, **kwargs)
        assert_same_bits(got, quantize_columns(x, rows, backend="torch", floor=1e-12, **kwargs))
        got = quantize_rows_and_columns(x, rows, backend="triton", **kwargs)
        assert_same_bits(got, quantize_rows_and_columns(x, rows, backend="torch", **kwargs))
    w = torch.stack((x, x.flip(0)))
    assert_same_bits(quantize_weight(w, backend="triton", **kwargs), quantize_weight(w, backend="torch", **kwargs))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("poison", [math.nan, -math.nan, math.inf, -math.inf])
def test_a_tile_with_nan_or_infinity_is_nan_and_others_are_not(poison: float, backend) -> None:
    x = values(256, 256)
    clean = quantize_rows_and_columns(x, backend=backend)
    x[5, 130] = poison
    q, s, qt, st = quantize_rows_and_columns(x, backend=backend)
    assert s.isnan().nonzero().tolist() == [[1, 5]]
    assert q.float().isnan().nonzero().tolist() == [[5, column] for column in range(128, 256)]
    assert st.isnan().nonzero().tolist() == [[0, 130]]
    assert qt.float().isnan().nonzero().tolist() == [[130, row] for row in range(128)]
    for got, want in zip((q, s, qt, st), clean, strict=True):
        kept = ~got.float().isnan()
        assert torch.equal(got.float()[kept], want.float()[kept])
    w = quantize_weight(x[None], backend=backend)
    assert w.s.isnan().nonzero().tolist() == [[0, 0, 1]]
    assert w.st.isnan().nonzero().tolist() == [[0, 1, 0]]
    assert int(w.q.float().isnan().sum()) == int(w.qt.float().isnan().sum()) == 128 * 128


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_zeros_have_the_floors_scale_and_stay_zero(backend) -> None:
    x = torch.zeros(128, 128, dtype=torch.bfloat16, device=DEVICE)
    floor = torch.tensor([1e-12])
    for q, s in (
        quantize_rows(x, floor=1e-12, backend=backend),
        quantize_columns(x, floor=1e-12, backend=backend),
        quantize_weight(x[None], floor=1e-12, backend=backend)[:2],
    ):
        assert (s == (floor / torch.tensor([448.0])).to(DEVICE)).all()
        assert not q.view(torch.uint8).any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_minus_zero_keeps_its_sign(backend) -> None:
    x = torch.tensor([[-0.0, 0.0, -1e-30, 1.0]], device=DEVICE)
    q, _ = quantize_rows(x, backend=backend)
    assert q.view(torch.uint8)[0, :4].tolist() == [0x80, 0, 0x80, 0x7E]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_columns_are_rows_of_the_gathered_transpose(backend) -> None:
    x = values(40, 272)
    source = sources(130, 40)
    q, s = quantize_columns(x, source, backend=backend)
    gathered = torch.where((source < 0)[:, None], 0, x[source.long().clamp(min=0)])
    want_q, want_s = quantize_rows(torch.nn.functional.pad(gathered, (0, 112)).T.contiguous(), backend="torch")
    assert torch.equal(q.float(), want_q.float())
    assert torch.equal(s, want_s)
    assert q.shape == (384, 256)
    assert not q[:, 130:].float().any()


def test_dequantised_values_are_within_half_a_step() -> None:
    """e4m3 keeps 4 significant bits: off by 1/16 of the value at most, or of the tile's scale times 2^-10 below 2^-6."""
    x = values(130, 272).float().cpu()
    w = quantize_weight(x[None])
    for got in (
        dequantize_rows(*quantize_rows(x))[:, :272],
        dequantize_columns(*quantize_columns(x))[:130, :272],
        dequantize_weight(w.q, w.s)[0, :130, :272],
        dequantize_weight(w.qt, w.st)[0, :272, :130].T,
    ):
        step = torch.maximum(x.abs() / 16, torch.full_like(x, max(w.s.max().item(), 1e-6) * 2**-10))
        assert ((got - x).abs() <= step * (1 + 1e-5)).all()
    assert torch.equal(w.qt.float(), w.q.float().transpose(1, 2))
    assert torch.equal(w.st, w.s.transpose(1, 2))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from([1e-4, 1e-12]),
)
def test_any_finite_tile_is_finite_and_within_range(row: list[float], power_of_two: bool, floor: float) -> None:
    x = torch.tensor([row], device=DEVICE)
    want = quantize_rows(x, floor=floor, power_of_two=power_of_two, backend="torch")
    got = quantize_rows(x, floor=floor, power_of_two=power_of_two, backend="triton")
    assert_same_bits(got, want)
    assert want[0].float().isfinite().all()
    assert (want[1] > 0).all()
    assert want[1].isfinite().all()
    if abs(max(row, key=abs)) >= floor and not power_of_two:
        assert want[0].float().abs().max() == 448


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_row_does_not_depend_on_the_others(backend) -> None:
    x = values(130, 256)
    q, s = quantize_rows(x, backend=backend)
    for row in (0, 64, 129):
        one, scale = quantize_rows(x[row : row + 1], backend=backend)
        assert torch.equal(one[0].float(), q[row].float())
        assert torch.equal(scale[:, 0], s[:, row])


def test_rows_of_a_wider_tensor_and_no_rows() -> None:
    wide = values(20, 512)
    part = wide[:, 128:384]
    assert_same_bits(quantize_rows(part, backend="triton"), quantize_rows(part.contiguous(), backend="torch"))
    empty = wide[:0]
    for backend in ("torch", "triton"):
        q, s = quantize_rows(empty, backend=backend)
        assert (q.shape, s.shape) == ((0, 512), (4, 0))
        q, s, qt, st = quantize_rows_and_columns(empty, backend=backend)
        assert (q.shape, s.shape, qt.shape, st.shape) == ((0, 512), (4, 0), (512, 0), (0, 512))


def far(rows: int, columns: int, stride: int, dtype: torch.dtype, first: int = 0) -> tuple[Tensor, Tensor]:
    """A whole tensor and its [rows, columns] corner from element `first`, rows `stride` apart; untouched pages cost nothing."""
    whole = torch.empty(first + (rows - 1) * stride + columns, dtype=dtype, device=DEVICE)
    return whole, whole.as_strided((rows, columns), (stride, 1), first)


def test_rows_beyond_2_31_elements() -> None:
    """One program of the kernel, its strides those of a tensor of 2^26 columns."""
    stride = 2**26 + 128
    x, x_corner = far(34, 128, stride, torch.bfloat16)
    x_corner.copy_(values(34, 128))
    q, q_corner = far(34, 128, stride, FP8)
    s = torch.empty(1, 34, device=DEVICE)
    quantize_triton.quantize_rows_kernel[(2, 1)](
        x, q, s, 34, 128, stride, stride, 1e-4, POWER_OF_TWO=False, BLOCK_M=32
    )  # fmt: skip
    assert_same_bits((q_corner, s), quantize_rows(x_corner, backend="torch"))


def test_columns_beyond_2_31_elements() -> None:
    stride = 2**25 + 128
    x, x_corner = far(70, 64, stride, torch.bfloat16)
    x_corner.copy_(values(70, 64))
    qt, qt_corner = far(128, 128, stride, FP8)
    st = torch.empty(1, 128, device=DEVICE)
    unused, unused_scale = qt[:0], st[:0]
    quantize_triton.quantize_columns_kernel[(1, 2)](
        x, x, unused, unused_scale, qt, st, 70, stride, 64, 128, stride, 1e-4,
        GATHER=False, ROWS=False, POWER_OF_TWO=False, BLOCK_K=64,
    )  # fmt: skip
    assert_same_bits((qt_corner, st), quantize_columns(x_corner, backend="torch"))


def test_experts_beyond_2_31_elements() -> None:
    """Two experts of 128 rows and 2^24 columns, of which the first 128 are quantised."""
    width = 2**24
    w, first = far(128, 128, width, torch.bfloat16, first=128 * width)
    first.copy_(values(128, 128))
    q, q_corner = far(128, 128, width, FP8, first=128 * width)
    qt, qt_corner = far(128, 128, 128, FP8, first=128 * width)
    across = width // 128
    s, st = torch.zeros(2 * across, device=DEVICE), torch.zeros(2 * across, device=DEVICE)
    w[: 128 * width].as_strided((128, 128), (width, 1)).zero_()
    quantize_triton.quantize_weight_kernel[(1, 1, 2)](
        w, q, s, qt, st, 128, width, 128, width, 1e-4, POWER_OF_TWO=False
    )  # fmt: skip
    want = quantize_weight(first.contiguous()[None], backend="torch")
    assert_same_bits(
        (q_corner, s[across], qt_corner, st[across]), (want.q[0], want.s[0, 0, 0], want.qt[0], want.st[0, 0, 0])
    )


@pytest.mark.parametrize(
    ("x", "kwargs", "says"),
    [
        (torch.zeros(4), {}, "of 2 dimensions"),
        (torch.zeros(4, 4, dtype=torch.float64), {}, "must be bfloat16"),
        (torch.zeros(4, 8).T, {}, "must be contiguous rows"),
        (torch.zeros(4, 4), {"floor": 0.0}, "floor must be between"),
        (torch.zeros(4, 4), {"floor": math.inf}, "floor must be between"),
        (torch.zeros(4, 4), {"backend": "cuda"}, "backend must be 'torch', 'triton' or None"),
    ],
)
def test_unfit_input_is_refused(x: Tensor, kwargs: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        quantize_rows(x, **kwargs)


def test_source_rows_must_be_int32() -> None:
    with pytest.raises(ValueError, match="source_row must be int32"):
        quantize_columns(torch.zeros(4, 4), torch.zeros(4, dtype=torch.int64))


def test_the_device_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice:
        def __init__(self, kind: str) -> None:
            self.device = torch.device(kind)

    assert choose_backend("op", torch.zeros(1)) == "torch"
    assert choose_backend("op", torch.zeros(1), "triton") == "triton"
    with pytest.raises(KernelUnavailableError, match="op runs on the CPU and on NVIDIA GPUs, not on meta"):
        choose_backend("op", torch.zeros(1, device="meta"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(KernelUnavailableError, match=r"op needs .*capability 9.0 .* Old GPU with 8.9"):
        choose_backend("op", OnDevice("cuda:0"))
    assert choose_backend("op", OnDevice("cuda:0"), "torch") == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_backend("op", OnDevice("cuda:0")) == "triton"


def test_scales_of_extreme_magnitudes() -> None:
    amax = torch.tensor([0.0, 1e-30, 448.0, 449.0, 3.4e38, math.inf, math.nan])
    s = scale_of(amax, 1e-4, power_of_two=True)
    assert s[:4].tolist() == [2.0**-22, 2.0**-22, 1.0, 2.0]
    assert 3.4e38 / 448 <= s[4] < 2 * 3.4e38 / 448
    assert s[5:].isnan().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_next_power_of_two_and_the_largest_number(backend) -> None:
    just_above = 448 + 2**-15  # the next float32, whose scale is the one after 1
    x = torch.tensor([[448.0], [just_above], [-224.0], [-just_above / 2], [3.4028235e38]], device=DEVICE)
    q, s = quantize_rows(x, power_of_two=True, backend=backend)
    assert s[0, :4].tolist() == [1.0, 2.0, 0.5, 1.0]
    assert q[:4, 0].float().tolist() == [448.0, 224.0, -448.0, -224.0]
    assert s[0, 4] == 2.0**120
    q, s = quantize_rows(x, backend=backend)
    assert q[:, 0].float().tolist() == [448.0, 448.0, -448.0, -448.0, 448.0]
