"""Log-probabilities without logits: against the plain form, whatever the chunks, and how much memory it takes."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policy.kernels.linear_logprob import SamplingMask, linear_logprob


def plain(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, with all logits at once and autograd's own backward."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -math.inf)
    logprobs = logits.log_softmax(-1)
    finite = logprobs if allowed is None else logprobs.masked_fill(~allowed, 0.0)
    return logprobs.gather(-1, targets[:, None]).squeeze(1), -(logprobs.exp() * finite).sum(-1)


def spans(targets: Tensor, vocab: int = 31, seed: int = 0) -> tuple[SamplingMask, Tensor]:
    """Random spans, each with its target and a fifth of them empty, and what they allow [N, V]."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(len(targets), 1, generator=generator)
    allowed = torch.rand(len(targets), vocab, generator=generator) < share
    allowed[torch.arange(len(targets)), targets] = True
    empty = torch.rand(len(targets), generator=generator) < 0.2
    counts = allowed.sum(1) * ~empty
    offsets = torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0)))
    return SamplingMask(offsets, (allowed & ~empty[:, None]).nonzero()[:, 1]), allowed | empty[:, None]


def inputs(
    rows: int, dim: int = 12, vocab: int = 31, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, dim, generator=generator, dtype=torch.float64) * 0.7).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, (rows,), generator=generator)


def gradients(outputs: tuple[Tensor, Tensor], hidden: Tensor, weight: Tensor, which: str) -> tuple[Tensor, ...]:
    """Gradients for hidden and weight of a sum of the outputs with different weights for each token."""
    logprobs, entropy = outputs
    upstream = torch.linspace(-1, 2, len(hidden), dtype=logprobs.dtype)
    terms = {"logprob": (logprobs * upstream).sum(), "entropy": (entropy * upstream.flip(0)).sum()}
    loss = sum(term for name, term in terms.items() if name in which)
    assert isinstance(loss, Tensor)
    return torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("which", ["logprob", "entropy", "logprob and entropy"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
def test_values_and_gradients_are_those_of_the_plain_form(which: str, temperature: float) -> None:
    hidden, weight, targets = inputs(23, dtype=torch.float64)
    expected = plain(hidden, weight, targets, temperature)
    ours = linear_logprob(hidden, weight, targets, temperature, chunk_tokens=7)
    for value, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    wanted_grads = gradients(expected, hidden, weight, which)
    for grad, wanted in zip(gradients(ours, hidden, weight, which), wanted_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-12)


def test_gradients_agree_with_finite_differences() -> None:
    hidden, weight, targets = inputs(4, dim=3, vocab=5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprob(h, w, targets, 0.7, chunk_tokens=3), (hidden, weight), raise_exception=True
    )


@pytest.mark.parametrize("which", ["logprob", "entropy", "logprob and entropy"])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 40])
def test_within_spans_values_and_gradients_are_those_of_the_plain_form(which: str, chunk_tokens: int) -> None:
    hidden, weight, targets = inputs(40, dtype=torch.float64)
    mask, allowed = spans(targets)
    assert 0 < (mask.offsets.diff() == 0).sum() < 20
    expected = plain(hidden, weight, targets, 0.7, allowed)
    ours = linear_logprob(hidden, weight, targets, 0.7, chunk_tokens=chunk_tokens, sampling_mask=mask)
    for value, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    wanted_grads = gradients(expected, hidden, weight, which)
    for grad, wanted in zip(gradients(ours, hidden, weight, which), wanted_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_spans_narrow_types_are_normalised_in_fp32(dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs(50, dtype=dtype)
    mask, allowed = spans(targets)
    ours = linear_logprob(hidden, weight, targets, chunk_tokens=16, sampling_mask=mask)
    for value, wanted in zip(ours, plain(hidden, weight, targets, allowed=allowed), strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
    wide = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = gradients(plain(*wide, targets, allowed=allowed), *wide, "logprob and entropy")
    bound = 1e-5 if dtype == torch.float32 else 0.01
    for grad, wanted in zip(gradients(ours, hidden, weight, "logprob and entropy"), exact, strict=True):
        assert (grad - wanted).norm() < bound * wanted.norm()


def test_within_spans_gradients_agree_with_finite_differences() -> None:
    hidden, weight, _ = inputs(4, dim=3, vocab=5, dtype=torch.float64)
    targets = torch.tensor([1, 4, 0, 2])
    mask = SamplingMask(torch.tensor([0, 2, 2, 3, 7]), torch.tensor([1, 3, 0, 4, 0, 2, 1]))
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprob(h, w, targets, 0.7, chunk_tokens=3, sampling_mask=mask),
        (hidden, weight),
        raise_exception=True,
    )


@settings(deadline=None, derandomize=True, max_examples=15)
@given(rows=st.integers(1, 12), seed=st.integers(0, 100))
def test_spans_that_are_empty_or_hold_every_id_change_nothing(rows: int, seed: int) -> None:
    hidden, weight, targets = inputs(rows, seed=seed)
    whole = SamplingMask(torch.arange(rows + 1) * 31, torch.arange(31).repeat(rows))
    empty = SamplingMask(torch.zeros(rows + 1, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    results = []
    for mask in (None, whole, empty):
        outputs = linear_logprob(hidden, weight, targets, chunk_tokens=5, sampling_mask=mask)
        results.append((*outputs, *gradients(outputs, hidden, weight, "logprob and entropy")))
    for ours in results[1:]:
        assert all(torch.equal(value, wanted) for value, wanted in zip(ours, results[0], strict=True))


def test_the_only_id_of_a_span_is_certain_whatever_the_others_are() -> None:
    hidden = torch.tensor([[1e30], [2.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    mask = SamplingMask(torch.tensor([0, 1, 2]), torch.tensor([1, 2]))
    logprobs, entropy = linear_logprob(hidden, weight, torch.tensor([1, 2]), sampling_mask=mask)
    assert logprobs.tolist() == entropy.tolist() == [0, 0]
    (logprobs.sum() + 3 * entropy.sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_spans_do_not_hide_a_number_that_is_none() -> None:
    hidden, weight, targets = inputs(3)
    hidden = hidden.detach().clone()
    hidden[1] = math.nan
    logprobs, entropy = linear_logprob(hidden, weight, targets, sampling_mask=spans(targets)[0])
    assert logprobs.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]


@settings(deadline=None, derandomize=True, max_examples=20)
@given(places=st.lists(st.integers(0, 9), max_size=14), seed=st.integers(0, 50))
def test_selected_spans_are_those_of_the_selected_tokens(places: list[int], seed: int) -> None:
    mask, _ = spans(torch.arange(10), seed=seed)
    chosen = mask.select(torch.tensor(places, dtype=torch.long))
    kept = [mask.token_ids[mask.offsets[i] : mask.offsets[i + 1]].tolist() for i in places]
    assert chosen.token_ids.tolist() == [token for span in kept for token in span]
    assert chosen.offsets.diff().tolist() == [len(span) for span in kept]


def test_fp32_gives_fp32_and_agrees_to_1e_5() -> None:
    hidden, weight, targets = inputs(40)
    ours, expected = linear_logprob(hidden, weight, targets, 0.8), plain(hidden, weight, targets, 0.8)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    grads = gradients(ours, hidden, weight, "logprob and entropy")
    for value, wanted in zip(
        (*ours, *grads), (*expected, *gradients(expected, hidden, weight, "logprob and entropy")), strict=True
    ):
        assert (value - wanted).abs().max() < 1e-5 * max(1.0, wanted.abs().max().item())


def test_bf16_multiplies_in_bf16_and_normalises_in_fp32() -> None:
    hidden, weight, targets = inputs(50, dtype=torch.bfloat16)
    ours, expected = linear_logprob(hidden, weight, targets, chunk_tokens=16), plain(hidden, weight, targets)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    for value, wanted in zip(ours, expected, strict=True):  # the same bf16 logits: only the softmax rounds
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)
    # Gradients: as near to those of exact arithmetic on the same numbers as bf16 allows.
    wide = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = gradients(plain(*wide, targets), *wide, "logprob and entropy")
    for grad, wanted in zip(gradients(ours, hidden, weight, "logprob and entropy"), exact, strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad - wanted).norm() < 0.01 * wanted.norm()


def test_many_small_chunks_do_not_wear_out_a_bf16_gradient() -> None:
    # Each of 2,048 rows adds the same to the weight's gradient: a sum kept in bf16 stops growing after 256 of them.
    hidden = torch.ones(2048, 2, dtype=torch.bfloat16)
    weight = torch.zeros(2, 2, dtype=torch.bfloat16, requires_grad=True)
    logprobs, _ = linear_logprob(hidden, weight, torch.zeros(2048, dtype=torch.long), chunk_tokens=1)
    logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1024, 1024], [-1024, -1024]]


@settings(deadline=None, derandomize=True, max_examples=25)
@given(rows=st.integers(1, 20), chunk_tokens=st.integers(1, 25), seed=st.integers(0, 100))
def test_chunks_change_neither_values_nor_gradients(rows: int, chunk_tokens: int, seed: int) -> None:
    hidden, weight, targets = inputs(rows, seed=seed)
    whole, cut = (linear_logprob(hidden, weight, targets, 0.9, chunk_tokens=c) for c in (rows, chunk_tokens))
    for value, wanted in zip(
        (*cut, *gradients(cut, hidden, weight, "logprob and entropy")),
        (*whole, *gradients(whole, hidden, weight, "logprob and entropy")),
        strict=True,
    ):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(row=st.integers(0, 9), chunk_tokens=st.integers(1, 12))
def test_rows_know_nothing_of_each_other(row: int, chunk_tokens: int) -> None:
    hidden, weight, targets = inputs(10)
    alone = linear_logprob(hidden[row : row + 1], weight, targets[row : row + 1])
    among = linear_logprob(hidden, weight, targets, chunk_tokens=chunk_tokens)
    for one, many in zip(alone, among, strict=True):
        assert (one[0] - many[row]).abs().item() < 1e-5
    (grad,) = torch.autograd.grad(among[0][row] + among[1][row], hidden)
    assert (grad[row] != 0).any()
    grad[row] = 0
    assert (grad == 0).all()


def test_what_needs_no_gradient_gets_none() -> None:
    hidden, weight, targets = inputs(9)
    logprobs, _ = linear_logprob(hidden, weight, targets)
    wanted = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    for frozen, (h, w) in enumerate([(hidden.detach(), weight), (hidden, weight.detach())]):
        h.grad = w.grad = None
        linear_logprob(h, w, targets)[0].sum().backward()
        grads = h.grad, w.grad
        assert grads[frozen] is None
        assert torch.equal(grads[1 - frozen], wanted[1 - frozen])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_same_values_without_gradients(mode: type) -> None:
    hidden, weight, targets = inputs(11)
    wanted = linear_logprob(hidden, weight, targets)
    with mode():
        ours = linear_logprob(hidden, weight, targets)
    for value, expected in zip(ours, wanted, strict=True):
        assert not value.requires_grad
        assert torch.equal(value, expected)


def test_no_rows_give_no_values_and_zero_gradients() -> None:
    hidden, weight, targets = inputs(0)
    logprobs, entropy = linear_logprob(hidden, weight, targets)
    assert logprobs.tolist() == entropy.tolist() == []
    (logprobs.sum() + entropy.sum()).backward()
    assert weight.grad is not None
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("size", [1e3, 1e15, 1e30])
def test_a_certain_token_has_entropy_zero_and_nothing_overflows(size: float) -> None:
    hidden = torch.tensor([[size], [size]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    logprobs, entropy = linear_logprob(hidden, weight, torch.tensor([0, 1]))
    assert logprobs.tolist() == [0, pytest.approx(-2 * size, rel=1e-6)]
    assert entropy.tolist() == [0, 0]
    (logprobs.sum() + entropy.sum()).backward()
    # Of the second row only: onehot_1 - onehot_0 of its logits.
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.tolist() == [[0], [-2]]
    assert weight.grad.flatten().tolist() == pytest.approx([-size, size, 0])


def test_entropy_lies_between_zero_and_that_of_chance() -> None:
    hidden, weight, targets = inputs(400, vocab=97)
    scale = torch.logspace(-3, 3, 400)[:, None]
    _, entropy = linear_logprob(hidden.detach() * scale, weight, targets)
    assert entropy.min() >= 0
    assert entropy.max() <= math.log(97) + 1e-5
    assert entropy[0] > 0.999 * math.log(97)
    assert entropy[-10:].max() < 1e-3


def test_default_chunks_bound_the_buffers_and_stay_wide_enough() -> None:
    from policy.kernels.linear_logprob import _rows_per_chunk

    for rows, vocab, dtype in [
        (8192, 32768, torch.float32),
        (8192, 129280, torch.bfloat16),
        (65536, 151936, torch.float32),
    ]:
        per_row = vocab * (8 + (2 if dtype == torch.bfloat16 else 0))
        chunk = _rows_per_chunk(rows, vocab, dtype)
        assert 64 <= chunk < rows
        assert chunk * per_row <= 4 * rows * vocab / 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
        ({"targets": torch.tensor([0, 31, 2])}, "targets run from 0 to 31, the vocabulary from 0 to 30"),
        ({"targets": torch.tensor([0, -100, 2])}, "targets run from -100 to 2"),
        ({"targets": torch.tensor([0, 1])}, r"must be ids \[3\]"),
        ({"targets": torch.zeros(3)}, "must be ids"),
        ({"weight": torch.zeros(31, 5)}, r"must be \[N, D\] and \[V, D\]"),
        ({"weight": torch.zeros(31, 12, dtype=torch.bfloat16)}, "of one floating-point type"),
    ],
)
def test_what_is_out_of_order_is_refused(change: dict[str, object], message: str) -> None:
    hidden, weight, targets = inputs(3)
    with pytest.raises(ValueError, match=message):
        linear_logprob(**({"hidden": hidden, "weight": weight, "targets": targets} | change))


@pytest.mark.parametrize(
    ("offsets", "ids", "message"),
    [
        ([0, 2, 2, 4], [0, 1, 2, 5], "target 9 of row 0 is not among the 2 ids of its span"),
        ([0, 1, 2], [9, 8], r"for 3 targets it must be \[4\] and \[n\]"),
        ([0, 1, 2, 4], [9, 8, 2], "must rise from 0 to its 3 ids"),
        ([0, 2, 1, 3], [9, 8, 2], "must rise from 0 to its 3 ids"),
        ([0, 1, 2, 3], [9, 8, 31], "ids run from 8 to 31, the vocabulary from 0 to 30"),
        ([0.0, 1.0, 2.0, 3.0], [9, 8, 7], "must be int64, not torch.float32"),
    ],
)
def test_spans_out_of_order_are_refused(offsets: list[int], ids: list[int], message: str) -> None:
    hidden, weight, _ = inputs(3)
    mask = SamplingMask(torch.tensor(offsets), torch.tensor(ids))
    with pytest.raises(ValueError, match=message):
        linear_logprob(hidden, weight, torch.tensor([9, 8, 7]), sampling_mask=mask)


MEASURE = """
import resource, sys, torch

def peak_bytes():  # not ru_maxrss, which a process inherits from the one that started it
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024

torch.set_num_threads(1)
from policy.kernels.linear_logprob import SamplingMask, linear_logprob

def within_spans(hidden, weight, targets):
    n = len(targets)
    ids = torch.cat((targets[:, None], (targets[:, None] + torch.arange(1, 50)) % len(weight)), 1)
    return linear_logprob(hidden, weight, targets, sampling_mask=SamplingMask(torch.arange(n + 1) * 50, ids.flatten()))

def plain(hidden, weight, targets):
    logprobs = (hidden @ weight.T).log_softmax(-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)

def run(form, hidden, weight, targets):
    logprobs, entropy = form(hidden, weight, targets)
    (logprobs.sum() + 0.1 * entropy.sum()).backward()

form = {"plain": plain, "ours": linear_logprob, "within spans": within_spans}[sys.argv[1]]
rows, vocab, dim, dtype = int(sys.argv[2]), int(sys.argv[3]), 64, getattr(torch, sys.argv[4])
hidden = torch.randn(rows, dim, dtype=dtype).requires_grad_()
weight = torch.randn(vocab, dim, dtype=dtype).requires_grad_()
targets = torch.randint(vocab, (rows,))
run(form, *(x[:64].detach().requires_grad_() for x in (hidden, weight)), targets[:64] % 64)  # loads what torch loads late
with open("/proc/self/statm") as file:
    before = int(file.read().split()[1]) * resource.getpagesize()
run(form, hidden, weight, targets)
print(peak_bytes() - before - hidden.grad.nbytes - weight.grad.nbytes)
"""


def extra_bytes(form: str, rows: int, vocab: int, dtype: str) -> int:
    """Highest resident memory of forward and backward, above that before them, less the gradients of the inputs."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, form, str(rows), str(vocab), dtype],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
@pytest.mark.parametrize(("form", "dtype"), [("ours", "float32"), ("ours", "bfloat16"), ("within spans", "float32")])
def test_memory_is_under_15_percent_of_the_logits(form: str, dtype: str) -> None:
    """D = 64; counted is all resident memory beyond the inputs and their gradients, against [N, V] in fp32."""
    rows, vocab = 8192, 32768
    assert 0 < extra_bytes(form, rows, vocab, dtype) < 0.15 * 4 * rows * vocab


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_the_measurement_sees_the_logits_of_the_plain_form() -> None:
    rows, vocab = 2048, 32768
    assert extra_bytes("plain", rows, vocab, "float32") > 2 * 4 * rows * vocab
