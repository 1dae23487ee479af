"""Token log-probabilities straight from hidden states: the logits [N, V] exist a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from policy.kernels.dispatch import MINIMUM_CAPABILITY, Backend, choose_backend

# What a chunk's buffers may hold: a twelfth of the whole logits in fp32, but never less than MIN_BUFFER_BYTES, because
# products of few rows are slow. At N = 8192, V = 32768 that is 8.3 % of the logits.
BUFFER_SHARE = 1 / 12
MIN_BUFFER_BYTES = 64 * 2**20


class SamplingMask(NamedTuple):
    """For each of N tokens the ids its softmax runs over: `token_ids[offsets[i] : offsets[i + 1]]`, where empty: all.

    `offsets` [N + 1] rise from 0 to n, `token_ids` [n] are different ones within a span; both int64.
    """

    offsets: Tensor
    token_ids: Tensor

    def select(self, rows: Tensor) -> SamplingMask:
        """The spans of the tokens `rows` [m], in that order."""
        starts, counts = self.offsets[rows], self.offsets.diff()[rows]
        offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        places = torch.arange(int(offsets[-1]), device=counts.device)
        return SamplingMask(offsets, self.token_ids[places + (starts - offsets[:-1]).repeat_interleave(counts)])

    def row_of_each_id(self) -> Tensor:
        """The token [n] whose span each id is in."""
        counts = self.offsets.diff()
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)

    def without_target(self, targets: Tensor) -> Tensor:
        """Places of the tokens whose span is not empty and yet lacks their target [N]."""
        rows = self.row_of_each_id()
        found = self.offsets.diff() == 0
        found[rows[self.token_ids == targets[rows]]] = True
        return (~found).nonzero().squeeze(1)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    *,
    chunk_tokens: int | None = None,
    sampling_mask: SamplingMask | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy [N] each (nats) of softmax(hidden @ weight.T / temperature).

    hidden [N, D] and weight [V, D] are of one type, targets [N] whole numbers in 0..V-1. The results are fp32, or fp64
    where the inputs are. The products run in the inputs' type, the softmax in fp32; both outputs have gradients for
    hidden and weight. Backward recomputes the logits, `chunk_tokens` rows at a time (default: by BUFFER_SHARE), and
    sums the weight's gradient in fp32. With `sampling_mask` each row's softmax runs over its span alone, which must hold
    its target. Shapes, types, targets, spans or a temperature out of order are a ValueError.

    On a Hopper GPU, bf16 and fp16 without `sampling_mask` run in kernels: scoring never writes a logit, none is rounded
    to the inputs' type, and nothing waits for the device, so a target outside of the vocabulary gives NaN there. All
    else runs as it does on the CPU; `backend` asks for one of the two ("triton" with a mask is a ValueError).
    """
    chosen = backend_for(hidden, sampling_mask, backend)
    check_inputs(hidden, weight, targets, temperature, chunk_tokens, look=chosen == "torch")
    if chosen == "triton":
        outputs = _FusedLinearLogprob.apply(hidden, weight, targets.long(), temperature, chunk_tokens)
        assert isinstance(outputs, tuple)
        return outputs
    if sampling_mask is not None:
        _check_spans(sampling_mask, targets, len(weight))
    rows = chunk_tokens or _rows_per_chunk(len(hidden), len(weight), hidden.dtype)
    rows = max(1, min(rows, len(hidden)))
    spans = (None, None) if sampling_mask is None else sampling_mask
    outputs = _LinearLogprob.apply(hidden, weight, targets.long(), temperature, rows, *spans)
    assert isinstance(outputs, tuple)
    return outputs


def backend_for(hidden: Tensor, sampling_mask: SamplingMask | None, backend: Backend | None) -> Backend:
    """Which of the two computes: the kernels where they can, unless `backend` says."""
    fits = sampling_mask is None and hidden.dtype in (torch.bfloat16, torch.float16)
    if backend is not None:
        if backend == "triton" and not fits:
            raise ValueError(f"linear_logprob's kernels take bf16 or fp16 and no sampling mask, not {hidden.dtype}")
        return choose_backend("linear_logprob", hidden, backend)
    on_gpu = hidden.device.type == "cuda" and torch.cuda.get_device_capability(hidden.device) >= MINIMUM_CAPABILITY
    return "triton" if fits and on_gpu else "torch"


def check_inputs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_tokens: int | None, *, look: bool
) -> None:
    """ValueError for what is out of order; `look` at the targets too, which waits for their device."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 to define log-probabilities, not {temperature}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [N, D] and [V, D]")
    if hidden.dtype != weight.dtype or not hidden.dtype.is_floating_point:
        raise ValueError(f"hidden ({hidden.dtype}) and weight ({weight.dtype}) must be of one floating-point type")
    if targets.shape != hidden.shape[:1] or targets.dtype.is_floating_point:
        raise ValueError(f"targets are {targets.dtype} {list(targets.shape)}; they must be ids [{len(hidden)}]")
    if look and len(targets):
        lowest, highest = torch.stack(torch.aminmax(targets)).tolist()
        if lowest < 0 or highest >= len(weight):
            raise ValueError(f"targets run from {lowest} to {highest}, the vocabulary from 0 to {len(weight) - 1}")


def _check_spans(spans: SamplingMask, targets: Tensor, vocab: int) -> None:
    offsets, token_ids = spans
    if offsets.dtype != torch.int64 or token_ids.dtype != torch.int64:
        raise ValueError(f"sampling_mask must be int64, not {offsets.dtype} and {token_ids.dtype}")
    if offsets.shape != (len(targets) + 1,) or token_ids.dim() != 1:
        shapes = f"{list(offsets.shape)} and {list(token_ids.shape)}"
        raise ValueError(
            f"sampling_mask is {shapes}; for {len(targets)} targets it must be [{len(targets) + 1}] and [n]"
        )
    if offsets[0] != 0 or offsets[-1] != len(token_ids) or bool((offsets.diff() < 0).any()):
        raise ValueError(f"the offsets of sampling_mask must rise from 0 to its {len(token_ids)} ids")
    if len(token_ids):
        lowest, highest = torch.stack(torch.aminmax(token_ids)).tolist()
        if lowest < 0 or highest >= vocab:
            raise ValueError(
                f"sampling_mask's ids run from {lowest} to {highest}, the vocabulary from 0 to {vocab - 1}"
            )
    if len(lacking := spans.without_target(targets)):
        row = int(lacking[0])
        raise ValueError(
            f"target {int(targets[row])} of row {row} is not among the {int(offsets[row + 1] - offsets[row])} ids of its "
            f"span in sampling_mask ({len(lacking)} such rows)"
        )


def _rows_per_chunk(num_rows: int, vocab: int, dtype: torch.dtype) -> int:
    wide = _wide(dtype).itemsize
    bytes_per_row = vocab * (2 * wide + (dtype.itemsize if dtype.itemsize < wide else 0))
    budget = max(MIN_BUFFER_BYTES, int(4 * num_rows * vocab * BUFFER_SHARE))
    return max(1, budget // bytes_per_row)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Buffers:
    """What one chunk of logits passes through, allocated once: on the CPU, fresh pages cost more than the softmax."""

    def __init__(self, weight: Tensor, rows: int):
        shape = (rows, len(weight))
        self.first = weight.new_empty(shape, dtype=_wide(weight.dtype))
        self.second = torch.empty_like(self.first)
        self.narrow = None if weight.dtype == self.first.dtype else weight.new_empty(shape)

    def log_softmax(
        self, hidden: Tensor, weight: Tensor, temperature: float, spans: SamplingMask | None
    ) -> tuple[Tensor, Tensor]:
        """log p and p [n, V] of a chunk [n, D], both 0 outside of its spans; both are overwritten by the next call."""
        n = len(hidden)
        logits = self.first[:n]
        if self.narrow is None:
            torch.mm(hidden, weight.t(), out=logits)
        else:
            logits.copy_(torch.mm(hidden, weight.t(), out=self.narrow[:n]))
        if temperature != 1:
            logits.div_(temperature)
        if spans is not None:
            _cut_to_spans(logits, spans)
        logp = torch.log_softmax(logits, -1, out=self.second[:n])
        p = torch.exp(logp, out=logits)
        if spans is not None:
            logp.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=0.0)  # so that p log p is 0, its limit
        return logp, p

    def in_type_of_weight(self, grad: Tensor) -> Tensor:
        return grad if self.narrow is None else self.narrow[: len(grad)].copy_(grad)


def _cut_to_spans(logits: Tensor, spans: SamplingMask) -> None:
    """-inf outside of the spans of the rows that have one."""
    where = spans.row_of_each_id(), spans.token_ids
    kept = logits[where]
    logits.masked_fill_((spans.offsets.diff() > 0)[:, None], -math.inf)
    logits[where] = kept


def _spans(offsets: Tensor | None, token_ids: Tensor | None) -> SamplingMask | None:
    return None if offsets is None or token_ids is None else SamplingMask(offsets, token_ids)


def _chunks(num_rows: int, rows: int, spans: SamplingMask | None) -> Iterator[tuple[slice, SamplingMask | None]]:
    """Slices of at most `rows` of the rows, each with its spans."""
    starts = range(0, num_rows, rows)
    # One transfer for all chunks: each would wait for the device otherwise.
    bounds = [] if spans is None else [*spans.offsets[:-1:rows].tolist(), len(spans.token_ids)]
    for number, start in enumerate(starts):
        chunk, own = slice(start, start + rows), None
        if spans is not None:
            first, last = bounds[number : number + 2]
            own = SamplingMask(spans.offsets[start : start + rows + 1] - first, spans.token_ids[first:last])
        yield chunk, own


class _LinearLogprob(torch.autograd.Function):
    """With p the softmax and H its entropy: d log p_t / d logits = onehot_t - p, d H / d logits = -p (log p + H)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        rows: int,
        offsets: Tensor | None,
        token_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        logprobs = hidden.new_empty(len(hidden), dtype=_wide(hidden.dtype))
        entropy = torch.empty_like(logprobs)
        if len(hidden):
            buffers = _Buffers(weight, rows)
            for chunk, spans in _chunks(len(hidden), rows, _spans(offsets, token_ids)):
                logp, p = buffers.log_softmax(hidden[chunk], weight, temperature, spans)
                logprobs[chunk] = logp.gather(1, targets[chunk, None]).squeeze(1)
                # Not log_z - E[logits]: where one token is certain, that difference comes out negative.
                torch.sum(p.mul_(logp), -1, out=entropy[chunk]).neg_()
        ctx.save_for_backward(hidden, weight, targets, entropy, offsets, token_ids)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * 7
        hidden, weight, targets, entropy, *parts_of_spans = ctx.saved_tensors
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight.dtype)) if for_weight else None
        buffers = _Buffers(weight, ctx.rows) if len(hidden) else None
        for chunk, spans in _chunks(len(hidden), ctx.rows, _spans(*parts_of_spans)):
            assert buffers is not None
            logp, p = buffers.log_softmax(hidden[chunk], weight, ctx.temperature, spans)
            parts = [None if grad is None else grad[chunk, None] / ctx.temperature for grad in grads]
            grad_logits = _grad_logits(logp, p, targets[chunk, None], entropy[chunk, None], *parts)
            grad_logits = buffers.in_type_of_weight(grad_logits)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.t(), hidden[chunk])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), *(None,) * 5


def _grad_logits(
    logp: Tensor, p: Tensor, targets: Tensor, entropy: Tensor, for_logprob: Tensor | None, for_entropy: Tensor | None
) -> Tensor:
    """Both outputs' gradients on the logits [n, V], from logp and p, whose memory it takes; columns [n, 1] otherwise."""
    along = torch.zeros_like(entropy) if for_logprob is None else for_logprob
    if for_entropy is None:
        grad = p.mul_(-along)
    else:
        grad = p.mul_(torch.addcmul(along + for_entropy * entropy, for_entropy, logp, out=logp)).neg_()
    return grad.scatter_add_(1, targets, along)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where total may be of a wider type than the product."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


class _FusedLinearLogprob(torch.autograd.Function):
    """The same in kernels: forward scores without logits, backward multiplies a chunk of them again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, rows: int | None
    ) -> tuple[Tensor, Tensor]:
        from policy.kernels import linear_logprob_triton

        logprobs, entropy, *normaliser = linear_logprob_triton.score(hidden, weight, targets, temperature)
        ctx.save_for_backward(hidden, weight, targets, entropy, *normaliser)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides the names)
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        from policy.kernels import linear_logprob_triton as kernels

        if all(grad is None for grad in grads):
            return (None,) * 5
        hidden, weight, targets, *by_row = ctx.saved_tensors
        upstream = [torch.zeros_like(by_row[0]) if grad is None else grad.float().contiguous() for grad in grads]
        step = kernels.Chunks(hidden, weight, ctx.temperature, ctx.rows, ctx.needs_input_grad[:2])
        for chunk in step.slices():
            step.multiply(chunk)
            step.differentiate(chunk, targets[chunk], *(x[chunk] for x in (*by_row, *upstream)))
        return *step.gradients(), None, None, None
