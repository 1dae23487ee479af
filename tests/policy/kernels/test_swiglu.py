"""The quantised activation and its gradient: against autograd in float64, the kernels against the definition, special values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from policy.kernels import swiglu_triton
from policy.kernels.quantize import FP8, dequantize_columns, dequantize_rows
from policy.kernels.swiglu import SwigluGradients, swiglu_backward_quantize, swiglu_quantize
from tests.policy.kernels.interpreter import DEVICE

# NumPy announces what the kernels are to compute.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])


def inputs(rows: int = 128, width: int = 256, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """h [rows, 2 width], prob [rows] and da [rows, width] with magnitudes from row to row, some rows of zeros (padding)."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, 2 * width, generator=generator) * torch.randn(rows, 1, generator=generator).exp()
    da = torch.randn(rows, width, generator=generator) * torch.randn(rows, 1, generator=generator).mul(3).exp() * 1e-5
    prob = torch.rand(rows, generator=generator)
    h[rows - 5 :], prob[rows - 5 :], da[rows - 5 :] = 0, 0, 0
    return h.bfloat16().to(DEVICE), prob.to(DEVICE), da.bfloat16().to(DEVICE)


def exact_inputs(rows: int = 128, width: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Gates of which sigmoid is 0, 1/2 or 1 in float32 whatever the exponential's last bit."""
    h, prob, da = inputs(rows, width)
    generator = torch.Generator().manual_seed(5)
    gates = torch.tensor([0.0, 32.0, 33.5, 75.0, 500.0, -200.0])[
        torch.randint(0, 6, (rows, width), generator=generator)
    ]
    h[:, :width] = gates.bfloat16().to(DEVICE)
    return h, prob, da


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Equal bytes, NaN for NaN."""
    nan = want.float().isnan()
    raw = torch.uint8 if want.dtype == FP8 else torch.int32
    same = got.contiguous().view(raw) == want.contiguous().view(raw)
    return bool(torch.equal(got.float().isnan(), nan) and (same | nan).all())


def steps(q: Tensor) -> Tensor:
    """e4m3 as whole numbers in the same order, neighbours 1 apart."""
    bits = q.contiguous().view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


def assert_as_close_as_exponentials(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """(q, s) pairs of values that differ in the last bits of float32: rarely by a step, then by one."""
    for q, s, want_q, want_s in zip(got[::2], got[1::2], want[::2], want[1::2], strict=True):
        assert torch.allclose(s, want_s, rtol=2e-6, atol=0)
        apart = (steps(q) - steps(want_q)).abs()
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < 1e-3


def float64_gradients(h: Tensor, prob: Tensor, da: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The activation, dh and dprob, by autograd."""
    wide, weight = h.double().requires_grad_(), prob.double().requires_grad_()
    gate, up = wide.chunk(2, 1)
    activation = torch.nn.functional.silu(gate) * up * weight[:, None]
    dh, dprob = torch.autograd.grad(activation, (wide, weight), da.double())
    return activation.detach(), dh, dprob


def assert_within_half_a_step(got: Tensor, want: Tensor, scale: Tensor) -> None:
    """As e4m3 rounds, 1/16 of the value or 2^-10 of its tile's scale, and a little for the float32 before it."""
    allowed = torch.maximum(want.abs() / 16, scale.double() * 2**-10) * (1 + 1e-4)
    assert ((got.double() - want).abs() <= allowed).all()


@BACKENDS
def test_values_are_those_of_autograd_in_float64(backend) -> None:
    h, prob, da = inputs()
    activation, dh, dprob = float64_gradients(h, prob, da)
    q, s, qt, st = swiglu_quantize(h, prob, columns=True, backend=backend)
    assert_within_half_a_step(dequantize_rows(q, s), activation, s.T.repeat_interleave(128, 1))
    assert_within_half_a_step(dequantize_columns(qt, st), activation, st)
    got = swiglu_backward_quantize(h, prob, da, backend=backend)
    assert_within_half_a_step(dequantize_rows(got.dh_q, got.dh_s), dh, got.dh_s.T.repeat_interleave(128, 1))
    assert_within_half_a_step(dequantize_columns(got.dh_qt, got.dh_st), dh, got.dh_st)
    assert_within_half_a_step(dequantize_columns(got.a_qt, got.a_st), activation, got.a_st)
    size = (activation / prob.double()[:, None] * da.double()).nan_to_num().abs().sum(1)
    assert ((got.dprob.double() - dprob).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_kernels_are_the_definition_bit_for_bit_where_the_exponential_is_exact(power_of_two: bool) -> None:
    h, prob, da = exact_inputs()
    both = [
        (
            *swiglu_quantize(h, prob, columns=True, power_of_two=power_of_two, backend=backend),
            *swiglu_backward_quantize(h, prob, da, power_of_two=power_of_two, backend=backend)[:-1],
        )
        for backend in ("triton", "torch")
    ]
    for got, want in zip(*both, strict=True):
        assert same_bits(got, want)


@pytest.mark.parametrize("weighted", [True, False])
def test_the_kernels_are_the_definition_up_to_the_exponential(weighted: bool) -> None:
    h, prob, da = inputs(256, 128)
    weight = prob if weighted else None
    for columns in (False, True):
        assert_as_close_as_exponentials(
            swiglu_quantize(h, weight, columns=columns, backend="triton"),
            swiglu_quantize(h, weight, columns=columns, backend="torch"),
        )
    got = swiglu_backward_quantize(h, weight, da, backend="triton")
    want = swiglu_backward_quantize(h, weight, da, backend="torch")
    assert_as_close_as_exponentials(got[:-1], want[:-1])
    assert torch.allclose(got.dprob, want.dprob, rtol=1e-5, atol=1e-9)


@BACKENDS
def test_padding_is_zero_and_its_scales_are_the_floors(backend) -> None:
    h, prob, da = inputs()
    q, s = swiglu_quantize(h, prob, floor=448.0, backend=backend)
    assert not q[-5:].float().any()
    assert (s[:, -5:] == 1).all()
    got = swiglu_backward_quantize(h, prob, da, floor=2**-10 * 448, activation_floor=448.0, backend=backend)
    assert not got.dh_q[-5:].float().any()
    assert (got.dh_s[:, -5:] == 2**-10).all()
    assert (got.a_st >= 1).all()
    assert (got.dprob[-5:] == 0).all()


@BACKENDS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_tile_with_nan_or_infinity_is_nan_and_no_other(backend, bad: float) -> None:
    h, prob, da = inputs()
    h[3, 5] = bad  # a gate
    prob[3] = 1.0
    q, s, qt, st = swiglu_quantize(h, prob, columns=True, backend=backend)
    rows = torch.zeros(128, 256, dtype=torch.bool, device=DEVICE)
    rows[3, :128] = True
    columns = torch.zeros(256, 128, dtype=torch.bool, device=DEVICE)
    columns[5] = True
    assert torch.equal(q.float().isnan(), rows)
    assert torch.equal(s.isnan(), rows[:, ::128].T)
    assert torch.equal(qt.float().isnan(), columns)
    assert torch.equal(st.isnan(), columns[:, :1].T)
    got = swiglu_backward_quantize(h, prob, da, backend=backend)
    assert torch.equal(got.a_qt.float().isnan(), columns)
    assert torch.equal(got.dh_q[:, :256].float().isnan(), rows)
    assert torch.equal(got.dh_qt[:256].float().isnan(), columns)
    others = torch.arange(128, device=DEVICE) != 3
    assert got.dprob[others].isfinite().all()
    assert not got.dprob[3].isfinite()


@BACKENDS
def test_a_row_does_not_depend_on_the_others(backend) -> None:
    h, prob, da = inputs(256, 128)
    rows = swiglu_quantize(h, prob, backend=backend)[0]
    alone = swiglu_quantize(h[128:], prob[128:], backend=backend)[0]
    assert same_bits(alone, rows[128:])
    got = swiglu_backward_quantize(h, prob, da, backend=backend)
    again = swiglu_backward_quantize(h, prob, da, backend=backend)
    assert all(map(same_bits, again, got))
    one = swiglu_backward_quantize(h[128:], prob[128:], da[128:], backend=backend)
    assert same_bits(one.dh_q, got.dh_q[128:])
    assert same_bits(one.dprob, got.dprob[128:])


@BACKENDS
def test_no_rows(backend) -> None:
    h, prob, da = (x[:0] for x in inputs())
    q, s, qt, st = swiglu_quantize(h, prob, columns=True, backend=backend)
    assert [list(x.shape) for x in (q, s, qt, st)] == [[0, 256], [2, 0], [256, 0], [0, 256]]
    got = swiglu_backward_quantize(h, prob, da, backend=backend)
    assert [list(x.shape) for x in got] == [[0, 512], [4, 0], [512, 0], [0, 512], [256, 0], [0, 256], [0]]


def test_rows_and_columns_beyond_2_31_elements() -> None:
    """The first tile of a tensor so wide that its rows' ends, and its columns' when transposed, lie beyond."""
    width, num_rows = 2**23 + 2**17, 256  # rows of the transposed results; 128 of them are computed
    h, prob, da = (x.roll(64, 0).contiguous() for x in inputs(128, 128))  # the last row is no padding

    def corner(stride: int, *parts: Tensor) -> Tensor:
        """Parts [128, 128] beside each other, `width` apart, in a tensor whose untouched pages cost nothing."""
        whole = torch.empty(128, stride, dtype=parts[0].dtype, device=DEVICE)
        for index, part in enumerate(parts):
            whole[:, index * width : index * width + 128] = part
        return whole

    far_h, far_da = corner(2 * width, *h.chunk(2, 1)), corner(width, da)
    made = SwigluGradients(
        dh_q=torch.empty(128, 2 * width, dtype=FP8, device=DEVICE),
        dh_s=torch.empty(2 * width // 128, num_rows, device=DEVICE),
        dh_qt=torch.empty(2 * width, num_rows, dtype=FP8, device=DEVICE),
        dh_st=torch.empty(1, 2 * width, device=DEVICE),
        a_qt=torch.empty(128, num_rows, dtype=FP8, device=DEVICE),
        a_st=torch.empty(1, width, device=DEVICE),
        dprob=torch.empty(1, num_rows, device=DEVICE),
    )
    swiglu_triton.swiglu_backward_kernel[(256 // swiglu_triton.BACKWARD_STRIP, 1)](
        far_h, prob, far_da, *made, num_rows, width, 1e-12, 1e-4,
        WEIGHTED=True, POWER_OF_TWO=False, STRIP=swiglu_triton.BACKWARD_STRIP,
    )  # fmt: skip
    want = swiglu_backward_quantize(h, prob, da, backend="triton")
    parts = [slice(first, first + 128) for first in (0, width)]
    assert same_bits(torch.cat([made.dh_q[:, part] for part in parts], 1), want.dh_q)
    assert same_bits(torch.stack([made.dh_s[part.start // 128, :128] for part in parts]), want.dh_s)
    assert same_bits(torch.cat([made.dh_qt[part, :128] for part in parts]), want.dh_qt)
    assert same_bits(torch.cat([made.dh_st[:, part] for part in parts], 1), want.dh_st)
    assert same_bits(made.a_qt[:, :128], want.a_qt)
    assert same_bits(made.dprob[0, :128], want.dprob)


def test_unfit_input_is_refused() -> None:
    h, prob, da = inputs()
    with pytest.raises(ValueError, match="multiples of 128: pad"):
        swiglu_quantize(h[:100], None)
    with pytest.raises(ValueError, match="multiples of 128: pad"):
        swiglu_quantize(h[:, :384].contiguous(), None)
    with pytest.raises(ValueError, match="must be contiguous bfloat16"):
        swiglu_quantize(h[:, :256], None)
    with pytest.raises(ValueError, match=r"prob must be contiguous float32 \[128\]"):
        swiglu_quantize(h, prob.double())
    with pytest.raises(ValueError, match=r"da torch.float32 \[128, 256\]"):
        swiglu_backward_quantize(h, prob, da.float())
    with pytest.raises(ValueError, match="floors must be between"):
        swiglu_quantize(h, prob, floor=0.0)
