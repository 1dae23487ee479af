"""Triton kernels of linear_logprob.py: scoring without logits, and what lies between the products of a training step.

`score_kernel` multiplies a tile of hidden states by a tile of the head and keeps three numbers of each row of the
product: its maximum m, the sum S of e = exp(z - m), and A = sum of e (z - m), which is never above 0, so that the
entropy log S - A / S is never below (log Z - E[z] would come out negative where one token is certain).
`combine_kernel` joins the tiles in rising order. Logits are the products' fp32 sums, not rounded to the inputs' type.
`row_kernel` takes the same figures from logits that are there, `grad_logits_kernel` turns those into gradients.
"""

# Kernels are not Python to a type checker: their arguments are pointers and their numbers tensors.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from policy.kernels.compile_cases import CompileCase

# Rows, vocabulary and width of a tile of the product; row tiles that share the head's in the cache; warps and stages.
SCORE = {"BLOCK_T": 128, "BLOCK_V": 256, "BLOCK_K": 64, "GROUP": 16, "num_warps": 8, "num_stages": 4}
COMBINE_BLOCK_T = 32
CHUNK_TOKENS = 2048  # fewer, and reading and writing the weight's fp32 gradient shows
ROW = {"BLOCK": 4096, "num_warps": 8}
GRAD = {"BLOCK": 4096, "num_warps": 8}


@triton.jit
def tile_figures(z, axis: tl.constexpr):
    """m, S and A of fp32 logits along an axis, -inf counting as nothing."""
    top = tl.max(z, axis)
    down = z - tl.expand_dims(top, axis)
    e = tl.exp(down)
    return top, tl.sum(e, axis), tl.sum(tl.where(e == 0, 0.0, down) * e, axis)


@triton.jit
def lower(top, total, along, now):
    """exp(m - now), and A for the maximum `now` in place of m; where that weighs nothing, m may be infinitely far below."""
    c = tl.exp(top - now)
    return c, c * (along + tl.where(c == 0, 0.0, top - now) * total)


@triton.jit
def join(top, total, along, top2, total2, along2):
    """m, S and A of two parts' together."""
    now = tl.maximum(top, top2)
    c, moved = lower(top, total, along, now)
    c2, moved2 = lower(top2, total2, along2, now)
    return now, c * total + c2 * total2, moved + moved2


@triton.jit
def score_kernel(hidden, weight, targets, figures, target_logits, num_rows, width, vocab, inverse_temperature,
                 BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
                 STAGES: tl.constexpr):  # fmt: skip
    """One tile of the logits: figures [3, vocabulary tiles, N], and the target's logit where it is in the tile."""
    row_tiles = tl.cdiv(num_rows, BLOCK_T)
    vocab_tiles = tl.cdiv(vocab, BLOCK_V)
    # GROUP tiles of rows take turns at each tile of the head.
    group = tl.program_id(0) // (GROUP * vocab_tiles)
    rows_in_group = tl.minimum(row_tiles - group * GROUP, GROUP)
    place = tl.program_id(0) % (GROUP * vocab_tiles)
    row_tile = group * GROUP + place % rows_in_group
    vocab_tile = place // rows_in_group
    z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for k in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        x = hidden.load([row_tile * BLOCK_T, k])
        w = weight.load([vocab_tile * BLOCK_V, k])
        z = tl.dot(x, tl.trans(w), z)
    row = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    ids = vocab_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    z = tl.where((ids < vocab)[None, :], z * inverse_temperature, float("-inf"))
    live = row < num_rows
    target = tl.load(targets + row, mask=live, other=-1)
    last = tl.minimum(vocab_tile * BLOCK_V + BLOCK_V, vocab)
    inside = live & (target >= vocab_tile * BLOCK_V) & (target < last)
    found = tl.sum(tl.where(ids[None, :] == target[:, None], z, 0.0), 1)
    tl.store(target_logits + row, found, mask=inside)
    top, total, along = tile_figures(z, 1)
    tiles = tl.cast(vocab_tiles, tl.int64) * num_rows
    out = figures + tl.cast(vocab_tile, tl.int64) * num_rows + row
    tl.store(out, top, mask=live)
    tl.store(out + tiles, total, mask=live)
    tl.store(out + 2 * tiles, along, mask=live)


@triton.jit
def combine_kernel(figures, target_logits, logprobs, entropy, maximum, log_sum, num_rows, vocab_tiles,
                   BLOCK_T: tl.constexpr):  # fmt: skip
    """The figures of all tiles of the vocabulary in one, and what follows from them."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = row < num_rows
    tiles = tl.cast(vocab_tiles, tl.int64) * num_rows
    top = tl.load(figures + row, mask=live, other=0.0)
    total = tl.load(figures + tiles + row, mask=live, other=1.0)
    along = tl.load(figures + 2 * tiles + row, mask=live, other=0.0)
    for tile in range(1, vocab_tiles):
        part = figures + tl.cast(tile, tl.int64) * num_rows + row
        top2 = tl.load(part, mask=live, other=0.0)
        total2 = tl.load(part + tiles, mask=live, other=1.0)
        along2 = tl.load(part + 2 * tiles, mask=live, other=0.0)
        top, total, along = join(top, total, along, top2, total2, along2)
    target = tl.load(target_logits + row, mask=live, other=0.0)
    tl.store(logprobs + row, (target - top) - tl.log(total), mask=live)
    tl.store(entropy + row, tl.log(total) - along / total, mask=live)
    tl.store(maximum + row, top, mask=live)
    tl.store(log_sum + row, tl.log(total), mask=live)


@triton.jit
def row_kernel(logits, targets, logprobs, entropy, maximum, log_sum, vocab, inverse_temperature,
               BLOCK: tl.constexpr):  # fmt: skip
    """The same of one row of logits [n, V] in fp32."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    start = logits + tl.cast(row, tl.int64) * vocab
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    along = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocab, BLOCK):
        inside = first + column < vocab
        z = tl.load(start + first + column, mask=inside, other=float("-inf")) * inverse_temperature
        # Each place of the tile keeps figures of its own, of nothing as long as it has seen -inf alone.
        now = tl.maximum(top, z)
        base = tl.where(now == float("-inf"), 0.0, now)
        c, along = lower(top, total, along, base)
        e = tl.exp(z - base)
        along += tl.where(e == 0, 0.0, z - base) * e
        total = c * total + e
        top = now
    best = tl.max(top, 0)
    c, along = lower(top, total, along, best)
    total = tl.sum(c * total, 0)
    log_total = tl.log(total)
    target = tl.load(targets + row)
    known = (target >= 0) & (target < vocab)
    z = tl.load(start + target, mask=known, other=float("nan")) * inverse_temperature
    tl.store(logprobs + row, (z - best) - log_total)
    tl.store(entropy + row, log_total - tl.sum(along, 0) / total)
    tl.store(maximum + row, best)
    tl.store(log_sum + row, log_total)


@triton.jit
def grad_logits_kernel(logits, targets, entropy, maximum, log_sum, for_logprob, for_entropy, out, vocab,
                       inverse_temperature, BLOCK: tl.constexpr):  # fmt: skip
    """(for_logprob (onehot - p) - for_entropy p (log p + H)) / temperature of a tile of one row."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocab
    place = tl.cast(row, tl.int64) * vocab + column
    z = tl.load(logits + place, mask=inside, other=0.0) * inverse_temperature
    logp = (z - tl.load(maximum + row)) - tl.load(log_sum + row)
    p = tl.exp(logp)
    a = tl.load(for_logprob + row)
    b = tl.load(for_entropy + row)
    grad = -p * (a + b * (tl.where(p == 0, 0.0, logp) + tl.load(entropy + row)))
    grad += tl.where(column == tl.load(targets + row), a, 0.0)
    tl.store(out + place, (grad * inverse_temperature).to(out.dtype.element_ty), mask=inside)


def score(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """logprobs, entropy, and the logits' maximum and log of the sum of exponentials above it, fp32 [N] each."""
    (num_rows, width), vocab = hidden.shape, len(weight)
    outputs = tuple(torch.empty(num_rows, dtype=torch.float32, device=hidden.device) for _ in range(4))
    if not num_rows:
        return outputs
    hidden, weight = _readable(hidden), _readable(weight)
    vocab_tiles = triton.cdiv(vocab, SCORE["BLOCK_V"])
    figures = torch.empty(3, vocab_tiles, num_rows, dtype=torch.float32, device=hidden.device)
    # A target outside of the vocabulary is in no tile: its log-probability stays NaN.
    target_logits = torch.full((num_rows,), float("nan"), dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        score_kernel[(triton.cdiv(num_rows, SCORE["BLOCK_T"]) * vocab_tiles,)](
            TensorDescriptor.from_tensor(hidden, [SCORE["BLOCK_T"], SCORE["BLOCK_K"]]),
            TensorDescriptor.from_tensor(weight, [SCORE["BLOCK_V"], SCORE["BLOCK_K"]]),
            targets, figures, target_logits, num_rows, width, vocab, 1 / temperature,
            **SCORE, STAGES=SCORE["num_stages"],
        )  # fmt: skip
        combine_kernel[(triton.cdiv(num_rows, COMBINE_BLOCK_T),)](
            figures, target_logits, *outputs, num_rows, vocab_tiles, BLOCK_T=COMBINE_BLOCK_T, num_warps=1
        )
    return outputs


def _readable(x: Tensor) -> Tensor:
    """x [n, width] as it lies, or a copy whose rows begin at multiples of 16 bytes."""
    unit = 16 // x.element_size()
    if x.stride(1) == 1 and x.stride(0) % unit == 0 and x.stride(0) > 0 and x.data_ptr() % 16 == 0:
        return x
    return torch.nn.functional.pad(x, (0, -x.shape[1] % unit)).contiguous()


class Chunks:
    """Training over some rows at a time: their logits in fp32, gradients of those in the head's type, three products.

    `wanted` says of hidden and weight whether they need a gradient; the weight's is summed in fp32.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, temperature: float, rows: int | None, wanted: tuple[bool, bool]):
        self.hidden, self.weight, self.temperature = hidden, weight, temperature
        self.rows = max(1, min(rows or CHUNK_TOKENS, len(hidden)))
        self.logits = weight.new_empty(self.rows, len(weight), dtype=torch.float32)
        self.grads = weight.new_empty(self.rows, len(weight))
        self.grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        self.grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None

    def slices(self) -> list[slice]:
        return [slice(start, start + self.rows) for start in range(0, len(self.hidden), self.rows)]

    def multiply(self, chunk: slice) -> None:
        """The logits of a chunk, for the other two methods."""
        hidden = self.hidden[chunk]
        product_into(self.logits[: len(hidden)], hidden, self.weight.t())

    def figures(self, targets: Tensor) -> tuple[Tensor, ...]:
        """logprobs, entropy, maximum and log_sum [n], as `score` gives them."""
        outputs = tuple(self.logits.new_empty(len(targets)) for _ in range(4))
        with torch.cuda.device_of(targets):
            row_kernel[(len(targets),)](
                self.logits, targets, *outputs, len(self.weight), 1 / self.temperature, **ROW
            )  # fmt: skip
        return outputs

    def differentiate(self, chunk: slice, targets: Tensor, *by_row: Tensor) -> None:
        """Add a chunk's part of both gradients; by_row: entropy, maximum, log_sum, and the gradients of logprobs and
        entropy."""
        vocab = len(self.weight)
        with torch.cuda.device_of(targets):
            grad_logits_kernel[(len(targets), triton.cdiv(vocab, GRAD["BLOCK"]))](
                self.logits, targets, *by_row, self.grads, vocab, 1 / self.temperature, **GRAD
            )  # fmt: skip
        grads = self.grads[: len(targets)]
        if self.grad_hidden is not None:
            torch.mm(grads, self.weight, out=self.grad_hidden[chunk])
        if self.grad_weight is not None:
            product_into(self.grad_weight, grads.t(), self.hidden[chunk], add=True)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of hidden and weight, in their type."""
        return self.grad_hidden, None if self.grad_weight is None else self.grad_weight.to(self.weight.dtype)


def product_into(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """out (fp32) = or += left @ right of a narrower type, summed in fp32."""
    if left.device.type == "cuda":
        if add:
            torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
        else:
            torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:  # interpreted
        out.copy_(torch.addmm(out, left.float(), right.float()) if add else left.float() @ right.float())


_FIGURES = dict.fromkeys(("logprobs", "entropy", "maximum", "log_sum"), "*fp32")
_COMMON = {"targets": "*i64", "vocab": "i32", "inverse_temperature": "fp32"}

COMPILE_CASES = [
    CompileCase(
        "linear_logprob/score",
        score_kernel,
        {
            "hidden": f"tensordesc<bf16[{SCORE['BLOCK_T']},{SCORE['BLOCK_K']}]>",
            "weight": f"tensordesc<bf16[{SCORE['BLOCK_V']},{SCORE['BLOCK_K']}]>",
            "figures": "*fp32",
            "target_logits": "*fp32",
            "num_rows": "i32",
            "width": "i32",
            **_COMMON,
        },
        {n: SCORE[n] for n in ("BLOCK_T", "BLOCK_V", "BLOCK_K", "GROUP")} | {"STAGES": SCORE["num_stages"]},
        SCORE["num_warps"],
        SCORE["num_stages"],
        aligned=("width",),
    ),
    CompileCase(
        "linear_logprob/combine",
        combine_kernel,
        {"figures": "*fp32", "target_logits": "*fp32", **_FIGURES, "num_rows": "i32", "vocab_tiles": "i32"},
        {"BLOCK_T": COMBINE_BLOCK_T},
        num_warps=1,
    ),
    CompileCase(
        "linear_logprob/row",
        row_kernel,
        {"logits": "*fp32", **_FIGURES, **_COMMON},
        {"BLOCK": ROW["BLOCK"]},
        ROW["num_warps"],
        aligned=("vocab",),
    ),
    CompileCase(
        "linear_logprob/grad_logits",
        grad_logits_kernel,
        {
            **dict.fromkeys(("logits", "entropy", "maximum", "log_sum", "for_logprob", "for_entropy"), "*fp32"),
            "out": "*bf16",
            **_COMMON,
        },
        {"BLOCK": GRAD["BLOCK"]},
        GRAD["num_warps"],
        aligned=("vocab",),
    ),
]
