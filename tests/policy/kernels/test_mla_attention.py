"""Attention with a shared rope key: the definition against the policy's, the kernels against the definition."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policy.deepseek import Packing, causal_attention
from policy.kernels import mla_attention_triton as kernels
from policy.kernels.mla_attention import mla_attention
from tests.policy.kernels.interpreter import DEVICE

SCALE = 0.09
# Lengths that are no multiple of a tile, one of one token, none; more heads than one program takes.
RAGGED = [70, 0, 131, 33, 1]
V3 = (2, 128, 64, 128)  # heads, nope, rope and value widths
ODD = (5, 24, 8, 40)


def inputs(
    lengths: list[int], sizes: tuple[int, int, int, int] = V3, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads, nope, rope, value = sizes
    tokens = sum(lengths)
    shapes = [
        (tokens, heads, nope),
        (tokens, heads, rope),
        (tokens, heads, nope),
        (tokens, rope),
        (tokens, heads, value),
    ]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    return [tensor.requires_grad_() for tensor in tensors], cu_seqlens


def output_and_gradients(
    tensors: list[Tensor], cu_seqlens: Tensor, backend: str, bad: float | None = None
) -> list[Tensor]:
    """`bad` stands in rows 40 to 73 of the output's gradient."""
    out = mla_attention(*tensors, cu_seqlens, SCALE, backend=backend)  # pyright: ignore[reportArgumentType]
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out)
    if bad is not None:
        upstream[40:73] = bad
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream)]


def error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


def test_the_definition_is_what_the_policy_computes_over_padded_sequences() -> None:
    tensors, cu_seqlens = inputs([5, 1, 12], (3, 8, 4, 6), torch.float64)
    tensors, cu_seqlens = [x.detach().cpu().requires_grad_() for x in tensors], cu_seqlens.cpu()
    q_nope, q_rope, k_nope, k_rope, v = tensors
    positions = torch.cat([torch.arange(n) for n in (5, 1, 12)])
    packing = Packing.of(positions, cu_seqlens)
    q = torch.cat((q_nope, q_rope), -1)
    k = torch.cat((k_nope, k_rope[:, None].expand(-1, 3, -1)), -1)
    wanted = packing.unpad(
        causal_attention(*(packing.pad(x).transpose(1, 2) for x in (q, k, v)), SCALE).transpose(1, 2)
    )
    ours = mla_attention(*tensors, cu_seqlens, SCALE)
    torch.testing.assert_close(ours, wanted)
    upstream = torch.randn(ours.shape, dtype=torch.float64)
    for grad, expected in zip(
        torch.autograd.grad(ours, tensors, upstream), torch.autograd.grad(wanted, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(grad, expected)


# bf16 products round probabilities and their gradients, as flash attention's do, so gradients meet 4e-3 and the output
# 2e-3; storing alone costs 1.65e-3, and torch's fused attention of one width gets 3.9e-3 and 1.9e-3.
@pytest.mark.parametrize(("dtype", "bars"), [(torch.float32, (1e-6, 1e-6)), (torch.bfloat16, (2e-3, 4e-3))])
@pytest.mark.parametrize(("sizes", "lengths"), [(V3, RAGGED), (ODD, [1, 65])])
def test_kernels_against_float64(
    dtype: torch.dtype, bars: tuple[float, float], sizes: tuple[int, int, int, int], lengths: list[int]
) -> None:
    tensors, cu_seqlens = inputs(lengths, sizes, dtype)
    out, *grads = output_and_gradients(tensors, cu_seqlens, "triton")
    wide = [x.detach().double().requires_grad_() for x in tensors]
    exact, *exact_grads = output_and_gradients(wide, cu_seqlens, "torch")
    assert out.dtype == dtype
    assert error(out, exact) < bars[0]
    for grad, wanted, tensor in zip(grads, exact_grads, tensors, strict=True):
        assert grad.dtype == dtype
        assert grad.shape == tensor.shape
        assert error(grad, wanted) < bars[1]


def test_a_sequence_gets_the_same_bits_whatever_is_packed_with_it_and_whenever() -> None:
    tensors, cu_seqlens = inputs([30, 140, 1], (5, 16, 16, 16), torch.bfloat16)
    packed = output_and_gradients(tensors, cu_seqlens, "triton")
    assert all(map(torch.equal, packed, output_and_gradients(tensors, cu_seqlens, "triton")))
    upstream = torch.randn(packed[0].shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for start, end in pairwise(cu_seqlens.tolist()):
        alone = [x[start:end].detach().requires_grad_() for x in tensors]
        out = mla_attention(*alone, torch.tensor([0, end - start], device=DEVICE), SCALE, backend="triton")
        grads = torch.autograd.grad(out, alone, upstream[start:end].to(out))
        for whole, own in zip(packed, (out, *grads), strict=True):
            assert torch.equal(whole[start:end], own)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_broken_stays_in_its_sequence_and_shows_there(bad: float) -> None:
    lengths = [40, 33, 70]
    clean, cu_seqlens = inputs(lengths, (1, 16, 16, 16), torch.bfloat16)
    broken = [x.detach().clone() for x in clean]
    for x in broken:
        x[40:73] = bad
    ours = output_and_gradients([x.requires_grad_() for x in broken], cu_seqlens, "triton", bad)
    for value, wanted in zip(ours, output_and_gradients(clean, cu_seqlens, "triton"), strict=True):
        assert torch.equal(value[:40], wanted[:40])
        assert torch.equal(value[73:], wanted[73:])
        assert value[40:73].isnan().all()


def test_nothing_ahead_has_a_part() -> None:
    tensors, cu_seqlens = inputs([150], (1, 16, 16, 16))
    changed = [x.detach().clone() for x in tensors]
    for x in changed:
        x[100:] += 1
    before, after = (mla_attention(*x, cu_seqlens, SCALE, backend="triton") for x in (tensors, changed))
    assert torch.equal(before[:100], after[:100])
    assert not torch.equal(before[100:], after[100:])


def test_slices_are_read_where_they_lie() -> None:
    tensors, cu_seqlens = inputs([20, 50], (2, 32, 16, 32), torch.bfloat16)
    q_nope, q_rope, k_nope, k_rope, v = (x.detach() for x in tensors)
    sliced = [
        *torch.cat((q_nope, q_rope), -1).split((32, 16), -1),
        torch.cat((k_nope, v), -1)[..., :32],
        torch.cat((k_rope, k_rope), -1)[:, 16:],
        torch.cat((k_nope, v), -1)[..., 32:],
    ]
    assert all(kernels._readable(x) is x for x in sliced)
    ours = output_and_gradients([x.requires_grad_() for x in sliced], cu_seqlens, "triton")
    for value, wanted in zip(ours, output_and_gradients(tensors, cu_seqlens, "triton"), strict=True):
        assert torch.equal(value, wanted)
    odd = torch.zeros(70, 2, 33, dtype=torch.bfloat16, device=DEVICE)[..., 1:]  # rows that do not begin at 16 bytes
    assert kernels._readable(odd).is_contiguous()


@settings(deadline=None, derandomize=True, max_examples=30)
@given(lengths=st.lists(st.integers(0, 40), max_size=9), block=st.sampled_from([8, 16]))
def test_tiles_cover_every_row_once(lengths: list[int], block: int) -> None:
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    table = kernels._tiles(cu_seqlens, sum(lengths), block).T.tolist()
    bounds = list(pairwise(cu_seqlens.tolist()))
    wanted = [[row, start, end] for start, end in bounds for row in range(start, end, block)]
    assert [tile for tile in table if tile[0] >= 0] == wanted


@triton.jit
def store_kernel(x, stride, first, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    kernels.store_tile(x, tl.full((BLOCK, WIDTH), 3.0, tl.float32), stride, first, BLOCK - 1, BLOCK, WIDTH)


@pytest.mark.skipif(DEVICE != "cpu", reason="memory that is never touched costs nothing on the CPU alone")
def test_rows_beyond_2_31_elements() -> None:
    stride = 2**23
    memory = torch.empty(271 * stride, dtype=torch.bfloat16)  # 4.5 GB of addresses, of which a few pages are used
    tensors, cu_seqlens = inputs([200, 70], (1, 16, 16, 16), torch.bfloat16)
    wanted = mla_attention(*tensors, cu_seqlens, SCALE, backend="triton")
    far = memory.as_strided((270, 1, 16), (stride, 16, 1))
    for place in (0, 2, 4):
        own = [x.detach() for x in tensors]
        own[place] = far.copy_(own[place])
        assert kernels._readable(far) is far
        assert torch.equal(mla_attention(*own, cu_seqlens, SCALE, backend="triton"), wanted)
    store_kernel[(1,)](memory, stride, 260, BLOCK=8, WIDTH=16)
    assert (far[260:267, 0] == 3).all()
    assert torch.equal(far[267:, 0], tensors[4][267:, 0])


def test_no_tokens() -> None:
    tensors, _ = inputs([], (2, 16, 16, 16))
    for backend in ("torch", "triton"):
        out, *grads = output_and_gradients(tensors, torch.tensor([0], device=DEVICE), backend)
        assert [x.shape for x in (out, *grads)] == [tensors[4].shape, *(x.shape for x in tensors)]


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (1, lambda x: x[:, :1], "do not agree"),
        (3, lambda x: x[:, None], "k_rope"),
        (4, lambda x: x[1:], "do not agree"),
        (0, lambda x: x.double(), "of one floating-point type"),
        (5, lambda x: x.float(), "must be int32 or int64"),
        (5, lambda x: x[:-1], "must rise from 0 to 9 tokens"),
        (5, lambda x: x.flip(0), "must rise from 0 to 9 tokens"),
    ],
)
def test_what_is_out_of_order_is_refused(place: int, change, message: str) -> None:
    tensors, cu_seqlens = inputs([4, 5], (2, 16, 16, 16))
    arguments = [x.cpu() for x in (*tensors, cu_seqlens)]
    arguments[place] = change(arguments[place])
    with pytest.raises(ValueError, match=message):
        mla_attention(*arguments, SCALE)


def test_kernels_take_no_float64() -> None:
    tensors, cu_seqlens = inputs([4], (2, 16, 16, 16), torch.float64)
    with pytest.raises(ValueError, match="not fp64"):
        mla_attention(*tensors, cu_seqlens, SCALE, backend="triton")
