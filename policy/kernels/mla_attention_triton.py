"""Triton kernels of mla_attention.py: flash attention (arXiv 2205.14135) with the two parts of query and key apart.

A program takes a tile of one sequence's queries (forward, `grad_queries`) or keys (`grad_keys`), so sums run in an
order that the sequence alone decides, without atomics. Tiles lie as if each sequence began a tile of its own: of a
sequence from a to b there are at most b // M - a // M + 1, so tile a // M + s + i is tile i of sequence s, and grids
follow from shapes alone. Probabilities are powers of two of scores times log2(e); `lse` [H, T] is in that unit too.
The shared key's gradient is summed over HEADS heads in the program, over their groups by one kernel in rising order.
One long file: the three kernels are one recurrence, read beside each other.
"""

# Kernels are not Python to a type checker: their arguments are pointers and their numbers tensors.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from policy.kernels.compile_cases import CompileCase

# Rows of queries and of keys in a tile, warps and pipeline stages; by kernel.
FORWARD = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
GRAD_QUERIES = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
GRAD_KEYS = {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
HEADS = 4  # one program of grad_keys takes these one after the other
TILES_BLOCK = 128
LOG2_E = math.log2(math.e)
SUM_BLOCK = 1024


@triton.jit
def tiles_kernel(cu_seqlens, table, num_tiles, num_sequences, STEPS: tl.constexpr, M: tl.constexpr, B: tl.constexpr):
    """table [3, num_tiles]: each tile's first row, its sequence's first and the one behind its last; -1 if it has none."""
    tile = tl.program_id(0) * B + tl.arange(0, B)
    # The last sequence s with cu_seqlens[s] // M + s <= tile, by halving.
    low = tl.zeros((B,), tl.int32)
    high = tl.zeros((B,), tl.int32) + num_sequences
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        begins = tl.load(cu_seqlens + middle).to(tl.int32) // M + middle
        low = tl.where(begins <= tile, middle, low)
        high = tl.where(begins <= tile, high, middle)
    start = tl.load(cu_seqlens + low).to(tl.int32)
    end = tl.load(cu_seqlens + tl.minimum(low + 1, num_sequences)).to(tl.int32)
    row = start + (tile - start // M - low) * M
    live = tile < num_tiles
    tl.store(table + tile, tl.where(row < end, row, -1), mask=live)
    tl.store(table + num_tiles + tile, start, mask=live)
    tl.store(table + 2 * num_tiles + tile, end, mask=live)


@triton.jit
def store_tile(x, value, stride, first, count, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The first `count` of BLOCK rows from `first` on of x, whose rows are `stride` apart."""
    row = tl.arange(0, BLOCK)
    place = x + tl.cast(first, tl.int64) * stride + (row[:, None] * stride + tl.arange(0, WIDTH)[None, :])
    tl.store(place, value.to(x.dtype.element_ty), mask=(row < count)[:, None])


@triton.jit
def own_rows(tile, first, end, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """A tile with zeros for the rows behind the end of the sequence: they are another's, whose NaN must not get here."""
    if MASKED:
        return tl.where((first + tl.arange(0, BLOCK) < end)[:, None], tile, 0.0)
    return tile


@triton.jit
def forward_step(query, rotated, top, total, acc, k_nope, k_rope, v, k_nope_at, v_at, row, key, end, scale,
                 MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The online softmax over one more tile of keys; MASKED where some of them lie ahead of some queries."""
    own = k_nope.load([key, k_nope_at])
    shared = k_rope.load([key, 0])
    scores = tl.dot(query, tl.trans(own), input_precision="ieee")
    scores = tl.dot(rotated, tl.trans(shared), scores, input_precision="ieee") * scale
    if MASKED:
        seen = (row + tl.arange(0, BLOCK_M))[:, None] >= (key + tl.arange(0, BLOCK_N))[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    now = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - now[:, None])
    shrink = tl.exp2(top - now)
    values = own_rows(v.load([key, v_at]), key, end, BLOCK_N, MASKED)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return now, total * shrink + tl.sum(weights, 1), acc


@triton.jit
def forward_kernel(q_nope, q_rope, k_nope, k_rope, v, out, lse, table, num_tiles, num_tokens, heads, scale,
                   q_nope_head, q_rope_head, k_nope_head, v_head,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
                   NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr):  # fmt: skip
    tile = num_tiles - 1 - tl.program_id(0)  # the longest of a sequence first
    h = tl.program_id(1)
    row = tl.load(table + tile)
    if row >= 0:
        start = tl.load(table + num_tiles + tile)
        end = tl.load(table + 2 * num_tiles + tile)
        query = q_nope.load([row, h * q_nope_head])
        rotated = q_rope.load([row, h * q_rope_head])
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, VALUE), tl.float32)
        for key in tl.range(start, row, BLOCK_N, num_stages=STAGES):
            top, total, acc = forward_step(
                query,
                rotated,
                top,
                total,
                acc,
                k_nope,
                k_rope,
                v,
                h * k_nope_head,
                h * v_head,
                row,
                key,
                end,
                scale,
                False,
                BLOCK_M,
                BLOCK_N,
            )
        for key in tl.range(row, tl.minimum(row + BLOCK_M, end), BLOCK_N, num_stages=1):
            top, total, acc = forward_step(
                query,
                rotated,
                top,
                total,
                acc,
                k_nope,
                k_rope,
                v,
                h * k_nope_head,
                h * v_head,
                row,
                key,
                end,
                scale,
                True,
                BLOCK_M,
                BLOCK_N,
            )
        store_tile(out + h * VALUE, acc / total[:, None], heads * VALUE, row, end - row, BLOCK_M, VALUE)
        place = tl.arange(0, BLOCK_M)
        tl.store(lse + tl.cast(h, tl.int64) * num_tokens + row + place, top + tl.log2(total), mask=place < end - row)


@triton.jit
def query_step(query, rotated, do, log_sum, along, grad, turned, k_nope, k_rope, v, k_nope_at, v_at, row, key, end, scale,
               MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Adds what one tile of keys gives to the queries' gradients."""
    own = own_rows(k_nope.load([key, k_nope_at]), key, end, BLOCK_N, MASKED)
    shared = own_rows(k_rope.load([key, 0]), key, end, BLOCK_N, MASKED)
    scores = tl.dot(query, tl.trans(own), input_precision="ieee")
    scores = tl.dot(rotated, tl.trans(shared), scores, input_precision="ieee") * scale
    weights = tl.exp2(scores - log_sum[:, None])
    dweights = tl.dot(do, tl.trans(v.load([key, v_at])), input_precision="ieee")
    dscores = weights * (dweights - along[:, None])
    if MASKED:
        seen = (row + tl.arange(0, BLOCK_M))[:, None] >= (key + tl.arange(0, BLOCK_N))[None, :]
        dscores = tl.where(seen, dscores, 0.0)
    dscores = dscores.to(own.dtype)
    grad = tl.dot(dscores, own, grad, input_precision="ieee")
    return grad, tl.dot(dscores, shared, turned, input_precision="ieee")


@triton.jit
def grad_queries_kernel(q_nope, q_rope, k_nope, k_rope, v, out, dout, lse, delta, dq_nope, dq_rope, table,
                        num_tiles, num_tokens, heads, scale, score_scale,
                        q_nope_head, q_rope_head, k_nope_head, v_head, dout_head,
                        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
                        NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr):  # fmt: skip
    """dq of a tile, and delta [H, T] = sum over V of out * dout, which grad_keys_kernel reads."""
    tile = num_tiles - 1 - tl.program_id(0)
    h = tl.program_id(1)
    row = tl.load(table + tile)
    if row >= 0:
        start = tl.load(table + num_tiles + tile)
        end = tl.load(table + 2 * num_tiles + tile)
        place = tl.arange(0, BLOCK_M)
        by_head = tl.cast(h, tl.int64) * num_tokens + row + place
        do = dout.load([row, h * dout_head])
        result = out.load([row, h * VALUE])
        along = tl.sum(result.to(tl.float32) * do.to(tl.float32), 1)
        tl.store(delta + by_head, along, mask=place < end - row)
        log_sum = tl.load(lse + by_head, mask=place < end - row, other=float("inf"))
        query = q_nope.load([row, h * q_nope_head])
        rotated = q_rope.load([row, h * q_rope_head])
        grad = tl.zeros((BLOCK_M, NOPE), tl.float32)
        turned = tl.zeros((BLOCK_M, ROPE), tl.float32)
        for key in tl.range(start, row, BLOCK_N, num_stages=STAGES):
            grad, turned = query_step(
                query, rotated, do, log_sum, along, grad, turned, k_nope, k_rope, v, h * k_nope_head, h * v_head,
                row, key, end, score_scale, False, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        for key in tl.range(row, tl.minimum(row + BLOCK_M, end), BLOCK_N, num_stages=1):
            grad, turned = query_step(
                query, rotated, do, log_sum, along, grad, turned, k_nope, k_rope, v, h * k_nope_head, h * v_head,
                row, key, end, score_scale, True, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        store_tile(dq_nope + h * NOPE, grad * scale, heads * NOPE, row, end - row, BLOCK_M, NOPE)
        store_tile(dq_rope + h * ROPE, turned * scale, heads * ROPE, row, end - row, BLOCK_M, ROPE)


@triton.jit
def key_step(own, shared, values, grad, grad_shared, grad_values, q_nope, q_rope, dout, lse, delta,
             q_nope_at, q_rope_at, dout_at,
             row, query, end, scale, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Adds what one tile of queries gives to the keys' and values' gradients; tiles of scores are [keys, queries]."""
    q = own_rows(q_nope.load([query, q_nope_at]), query, end, BLOCK_M, MASKED)
    rotated = own_rows(q_rope.load([query, q_rope_at]), query, end, BLOCK_M, MASKED)
    do = own_rows(dout.load([query, dout_at]), query, end, BLOCK_M, MASKED)
    place = query + tl.arange(0, BLOCK_M)
    if MASKED:
        log_sum = tl.load(lse + place, mask=place < end, other=float("inf"))  # weights of 0 behind the end
        along = tl.load(delta + place, mask=place < end, other=0.0)
    else:
        log_sum = tl.load(lse + place)
        along = tl.load(delta + place)
    scores = tl.dot(own, tl.trans(q), input_precision="ieee")
    scores = tl.dot(shared, tl.trans(rotated), scores, input_precision="ieee") * scale
    weights = tl.exp2(scores - log_sum[None, :])
    if MASKED:
        weights = tl.where(place[None, :] >= (row + tl.arange(0, BLOCK_N))[:, None], weights, 0.0)
    grad_values = tl.dot(weights.to(do.dtype), do, grad_values, input_precision="ieee")
    dweights = tl.dot(values, tl.trans(do), input_precision="ieee")
    dscores = (weights * (dweights - along[None, :])).to(q.dtype)
    grad = tl.dot(dscores, q, grad, input_precision="ieee")
    return grad, tl.dot(dscores, rotated, grad_shared, input_precision="ieee"), grad_values


@triton.jit
def grad_keys_kernel(q_nope, q_rope, k_nope, k_rope, v, dout, lse, delta, dk_nope, dk_rope, dv, table,
                     num_tiles, num_tokens, heads, scale, score_scale,
                     q_nope_head, q_rope_head, k_nope_head, v_head, dout_head,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, HEADS: tl.constexpr,
                     NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr):  # fmt: skip
    """dk and dv of a tile of keys for HEADS heads, and their sum of the shared key's gradient, dk_rope [groups, T, R]."""
    tile = tl.program_id(0)
    group = tl.program_id(1)
    row = tl.load(table + tile)
    if row >= 0:
        end = tl.load(table + 2 * num_tiles + tile)
        # Queries that all see all of the keys lie in [whole, last), in tiles of BLOCK_M; before them is the diagonal.
        diagonal = tl.cdiv(tl.minimum(BLOCK_N, end - row), BLOCK_M)
        whole = row + diagonal * BLOCK_M
        last = tl.maximum(row + (end - row) // BLOCK_M * BLOCK_M, whole)
        ragged = tl.where(last < end, 1, 0)
        shared = k_rope.load([row, 0])
        grad_shared = tl.zeros((BLOCK_N, ROPE), tl.float32)
        for h in tl.range(group * HEADS, tl.minimum(group * HEADS + HEADS, heads), num_stages=1, disable_licm=True):
            by_head = tl.cast(h, tl.int64) * num_tokens
            own = k_nope.load([row, h * k_nope_head])
            values = v.load([row, h * v_head])
            grad = tl.zeros((BLOCK_N, NOPE), tl.float32)
            grad_values = tl.zeros((BLOCK_N, VALUE), tl.float32)
            # The whole tiles come first: behind the others, ptxas would wait for every single product (C7515).
            for query in tl.range(whole, last, BLOCK_M, num_stages=STAGES):
                grad, grad_shared, grad_values = key_step(
                    own, shared, values, grad, grad_shared, grad_values, q_nope, q_rope, dout, lse + by_head,
                    delta + by_head, h * q_nope_head, h * q_rope_head, h * dout_head,
                    row, query, end, score_scale, False, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            for i in tl.range(0, diagonal + ragged, num_stages=1, disable_licm=True):
                query = tl.where(i < diagonal, row + i * BLOCK_M, last)
                grad, grad_shared, grad_values = key_step(
                    own, shared, values, grad, grad_shared, grad_values, q_nope, q_rope, dout, lse + by_head,
                    delta + by_head, h * q_nope_head, h * q_rope_head, h * dout_head,
                    row, query, end, score_scale, True, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            store_tile(dk_nope + h * NOPE, grad * scale, heads * NOPE, row, end - row, BLOCK_N, NOPE)
            store_tile(dv + h * VALUE, grad_values, heads * VALUE, row, end - row, BLOCK_N, VALUE)
        part = dk_rope + tl.cast(group, tl.int64) * num_tokens * ROPE
        store_tile(part, grad_shared * scale, ROPE, row, end - row, BLOCK_N, ROPE)


@triton.jit
def sum_groups_kernel(parts, out, groups, size, BLOCK: tl.constexpr):
    """out [size] = the sum of parts [groups, size], group after group."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for group in range(groups):
        total += tl.load(parts + tl.cast(group, tl.int64) * size + place, mask=place < size, other=0.0)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=place < size)


def _tiles(cu_seqlens: Tensor, num_tokens: int, block: int) -> Tensor:
    num_sequences = len(cu_seqlens) - 1
    num_tiles = num_tokens // block + num_sequences
    table = torch.empty(3, num_tiles, dtype=torch.int32, device=cu_seqlens.device)
    if num_tiles:
        tiles_kernel[(triton.cdiv(num_tiles, TILES_BLOCK),)](
            cu_seqlens.contiguous(), table, num_tiles, num_sequences,
            STEPS=num_sequences.bit_length(), M=block, B=TILES_BLOCK,
        )  # fmt: skip
    return table


def _readable(x: Tensor) -> Tensor:
    """x [T, ..., width] as it lies where a descriptor can tell it, or a copy, whose width is a power of two from 16 on."""
    width = x.shape[-1]
    padded = max(16, triton.next_power_of_2(width))
    unit = 16 // x.element_size()
    dense = x.stride(-1) == 1 and all(0 < stride < 2**24 and stride % unit == 0 for stride in x.stride()[:-1])
    if width == padded and dense and x.data_ptr() % 16 == 0:
        return x
    return F.pad(x, (0, padded - width)).contiguous()


def _descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """Tiles of `block` rows and one head of x [T, H, width], as columns h * head stride, or of x [T, R]."""
    columns = x.shape[-1] if x.dim() == 2 else (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    return TensorDescriptor(x, [x.shape[0], columns], [x.stride(0), 1], [block, x.shape[-1]])


def _heads(*tensors: Tensor) -> list[int]:
    return [tensor.stride(1) for tensor in tensors]


def _tuning(config: dict[str, int], q_nope: Tensor, k_rope: Tensor, v: Tensor) -> dict[str, Any]:
    widths = {"NOPE": q_nope.shape[-1], "ROPE": k_rope.shape[-1], "VALUE": v.shape[-1]}
    return {**config, **widths, "STAGES": config["num_stages"]}


def forward(
    q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """out [T, H, V], and log2 of the sum of 2 to the scaled scores, lse [H, T] in fp32."""
    qn, qr, kn, kr, vs = map(_readable, (q_nope, q_rope, k_nope, k_rope, v))
    num_tokens, heads, _ = v.shape
    out = torch.empty(vs.shape, dtype=v.dtype, device=v.device)
    lse = torch.empty(heads, num_tokens, dtype=torch.float32, device=v.device)
    if not num_tokens:
        return torch.empty_like(v), lse
    with torch.cuda.device_of(v):
        table = _tiles(cu_seqlens, num_tokens, FORWARD["BLOCK_M"])
        queries = [_descriptor(x, FORWARD["BLOCK_M"]) for x in (qn, qr)]
        keys = [_descriptor(x, FORWARD["BLOCK_N"]) for x in (kn, kr, vs)]
        forward_kernel[(table.shape[1], heads)](
            *queries, *keys, out, lse, table, table.shape[1], num_tokens, heads, scale * LOG2_E,
            *_heads(qn, qr, kn, vs), **_tuning(FORWARD, qn, kr, vs),
        )  # fmt: skip
    return out[..., : v.shape[2]], lse


def backward(
    dout: Tensor, q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, cu_seqlens: Tensor,
    out: Tensor, lse: Tensor, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q_nope, q_rope, k_nope, k_rope and v."""
    given = (q_nope, q_rope, k_nope, k_rope, v)
    if not len(v):
        return tuple(map(torch.empty_like, given))
    inputs = qn, qr, kn, kr, vs = [_readable(x) for x in given]
    grads = dqn, dqr, dkn, dkr, dv = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
    do, result = _readable(dout), _readable(out)
    num_tokens, heads, _ = v.shape
    groups = triton.cdiv(heads, HEADS)
    delta = torch.empty_like(lse)
    parts = torch.empty(groups, *kr.shape, dtype=torch.float32, device=v.device)
    sizes = (num_tokens, heads, scale, scale * LOG2_E, *_heads(qn, qr, kn, vs, do))
    with torch.cuda.device_of(v):
        table = _tiles(cu_seqlens, num_tokens, GRAD_QUERIES["BLOCK_M"])
        queries = [_descriptor(x, GRAD_QUERIES["BLOCK_M"]) for x in (qn, qr, result, do)]
        keys = [_descriptor(x, GRAD_QUERIES["BLOCK_N"]) for x in (kn, kr, vs)]
        grad_queries_kernel[(table.shape[1], heads)](
            *queries[:2], *keys, *queries[2:], lse, delta, dqn, dqr, table, table.shape[1], *sizes,
            **_tuning(GRAD_QUERIES, qn, kr, vs),
        )  # fmt: skip
        table = _tiles(cu_seqlens, num_tokens, GRAD_KEYS["BLOCK_N"])
        queries = [_descriptor(x, GRAD_KEYS["BLOCK_M"]) for x in (qn, qr, do)]
        keys = [_descriptor(x, GRAD_KEYS["BLOCK_N"]) for x in (kn, kr, vs)]
        grad_keys_kernel[(table.shape[1], groups)](
            *queries[:2], *keys, queries[2], lse, delta, dkn, parts, dv, table, table.shape[1], *sizes,
            **_tuning(GRAD_KEYS, qn, kr, vs), HEADS=HEADS,
        )  # fmt: skip
        sum_groups_kernel[(triton.cdiv(kr.numel(), SUM_BLOCK),)](
            parts, dkr, groups, kr.numel(), BLOCK=SUM_BLOCK, num_warps=4
        )
    return tuple(grad[..., : x.shape[-1]] for grad, x in zip(grads, given, strict=True))


_HEAD_STRIDES = {f"{name}_head": "i32" for name in ("q_nope", "q_rope", "k_nope", "v")}
_SIZES = {"lse": "*fp32", "table": "*i32", "num_tiles": "i32", "num_tokens": "i32", "heads": "i32", "scale": "fp32"}
_BACKWARD = {"delta": "*fp32", "score_scale": "fp32", "dout_head": "i32"}
_WIDTHS = {"NOPE": 128, "ROPE": 64, "VALUE": 128}  # DeepSeek-V2 and V3


def _described(block: int, *names: str) -> dict[str, str]:
    return {name: f"tensordesc<bf16[{block},{64 if 'rope' in name else 128}]>" for name in names}


def _case(name: str, kernel: Any, config: dict[str, int], types: dict[str, str], **constants: int) -> CompileCase:
    blocks = {"BLOCK_M": config["BLOCK_M"], "BLOCK_N": config["BLOCK_N"], "STAGES": config["num_stages"]}
    return CompileCase(
        f"mla_attention/{name}",
        kernel,
        {**_HEAD_STRIDES, **_SIZES, **types},
        {**blocks, **_WIDTHS, **constants},
        config["num_warps"],
        config["num_stages"],
        aligned=(*_HEAD_STRIDES, "dout_head", "heads"),
    )


COMPILE_CASES = [
    CompileCase(
        "mla_attention/tiles",
        tiles_kernel,
        {"cu_seqlens": "*i32", "table": "*i32", "num_tiles": "i32", "num_sequences": "i32"},
        {"STEPS": 6, "M": 128, "B": TILES_BLOCK},
        num_warps=4,
    ),
    _case(
        "forward",
        forward_kernel,
        FORWARD,
        _described(FORWARD["BLOCK_M"], "q_nope", "q_rope")
        | _described(FORWARD["BLOCK_N"], "k_nope", "k_rope", "v")
        | {"out": "*bf16"},
    ),
    _case(
        "grad_queries",
        grad_queries_kernel,
        GRAD_QUERIES,
        _described(GRAD_QUERIES["BLOCK_M"], "q_nope", "q_rope", "out", "dout")
        | _described(GRAD_QUERIES["BLOCK_N"], "k_nope", "k_rope", "v")
        | _BACKWARD
        | {"dq_nope": "*bf16", "dq_rope": "*bf16"},
    ),
    _case(
        "grad_keys",
        grad_keys_kernel,
        GRAD_KEYS,
        _described(GRAD_KEYS["BLOCK_M"], "q_nope", "q_rope", "dout")
        | _described(GRAD_KEYS["BLOCK_N"], "k_nope", "k_rope", "v")
        | _BACKWARD
        | {"dk_nope": "*bf16", "dk_rope": "*fp32", "dv": "*bf16"},
        HEADS=HEADS,
    ),
    CompileCase(
        "mla_attention/sum_groups",
        sum_groups_kernel,
        {"parts": "*fp32", "out": "*bf16", "groups": "i32", "size": "i32"},
        {"BLOCK": SUM_BLOCK},
        num_warps=4,
        aligned=("size",),
    ),
]
