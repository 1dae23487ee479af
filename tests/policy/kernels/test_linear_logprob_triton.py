"""The head's kernels against float64: scoring without logits, backward in chunks, and a loss in one pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from policy.kernels import linear_logprob_triton as kernels
from policy.kernels.linear_logprob import SamplingMask, linear_logprob
from policy.kernels.linear_logprob_loss import linear_logprob_loss
from tests.policy.kernels.interpreter import DEVICE

# Rows, width and vocabulary: none a multiple of a tile, rows of a width that descriptors cannot read, one of everything.
CASES = [((140, 72, 700), 0.7, 64), ((3, 20, 31), 1.0, 2), ((1, 16, 1), 2.0, None)]  # and a temperature, and rows


def inputs(rows: int, width: int, vocab: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator) * 0.3).to(DEVICE, dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, (rows,), generator=generator).to(DEVICE)


def upstream(rows: int) -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 2, rows, device=DEVICE), torch.linspace(0.5, -0.5, rows, device=DEVICE)


def exact(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> list[Tensor]:
    """logprobs, entropy and the gradients of hidden and weight for `upstream`, in float64."""
    wide = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    outputs = linear_logprob(*wide, targets, temperature, backend="torch")
    loss = sum((x * up).sum() for x, up in zip(outputs, upstream(len(hidden)), strict=True))
    assert isinstance(loss, Tensor)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(loss, wide)]


def assert_near(value: Tensor, wanted: Tensor, bar: float) -> None:
    assert (value.double() - wanted).norm() <= bar * wanted.norm() + 1e-12


def weighted(logprobs: Tensor, entropy: Tensor, rows: slice, total: int) -> Tensor:
    first, second = upstream(total)
    return (logprobs * first[rows]).sum() + (entropy * second[rows]).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "temperature", "rows"), CASES)
def test_values_and_gradients(size: tuple, temperature: float, rows: int | None, dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs(*size, dtype)
    wanted = exact(hidden, weight, targets, temperature)
    outputs = linear_logprob(hidden, weight, targets, temperature, chunk_tokens=rows, backend="triton")
    loss = weighted(*outputs, slice(None), len(hidden))
    for value, expected in zip(outputs, wanted[:2], strict=True):
        torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-5)
    for grad, expected, like in zip(
        torch.autograd.grad(loss, (hidden, weight)), wanted[2:], (hidden, weight), strict=True
    ):
        assert grad.dtype == like.dtype
        assert_near(grad, expected, 3e-3)


@pytest.mark.parametrize(("size", "temperature", "rows"), CASES)
def test_a_loss_in_one_pass(size: tuple, temperature: float, rows: int | None) -> None:
    hidden, weight, targets = inputs(*size)
    wanted = exact(hidden, weight, targets, temperature)
    loss, logprobs, entropy = linear_logprob_loss(
        hidden,
        weight,
        targets,
        lambda *figures: weighted(*figures, len(hidden)),
        temperature,
        chunk_tokens=rows,
        backend="triton",
    )
    assert not logprobs.requires_grad
    assert not entropy.requires_grad
    for value, expected in zip((logprobs, entropy), wanted[:2], strict=True):
        torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-5)
    assert loss.item() == pytest.approx(
        weighted(logprobs, entropy, slice(None), len(hidden)).item(), rel=1e-4, abs=1e-5
    )
    (3 * loss).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert_near(hidden.grad / 3, wanted[2], 4e-3)  # scaling rounds once more
    assert_near(weight.grad / 3, wanted[3], 4e-3)


def test_a_loss_in_one_pass_is_the_loss_of_the_definition() -> None:
    hidden, weight, targets = (x.detach().cpu() for x in inputs(7, 16, 33))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()

    def clipped(logprobs: Tensor, entropy: Tensor, rows: slice) -> Tensor:  # a policy gradient's, that ignores entropy
        old = torch.linspace(-4, -3, 7)[rows].to(logprobs)
        return -torch.minimum((logprobs - old).exp(), torch.tensor(1.2, device=logprobs.device)).sum()

    wanted, *_ = linear_logprob_loss(hidden, weight, targets, clipped)
    on_device = hidden.detach().to(DEVICE).requires_grad_(), weight.detach().to(DEVICE).requires_grad_()
    ours, *_ = linear_logprob_loss(*on_device, targets.to(DEVICE), clipped, backend="triton", chunk_tokens=3)
    assert ours.item() == pytest.approx(wanted.item(), rel=2e-2)  # the definition rounds logits to bf16
    for grad, expected in zip(
        torch.autograd.grad(ours, on_device), torch.autograd.grad(wanted, (hidden, weight)), strict=True
    ):
        assert_near(grad.cpu(), expected.double(), 3e-2)


def test_only_one_backward_and_only_the_gradients_asked_for() -> None:
    hidden, weight, targets = inputs(5, 16, 20)
    loss, *_ = linear_logprob_loss(
        hidden, weight.detach(), targets, lambda logprobs, *_: logprobs.sum(), backend="triton"
    )
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    assert (first != 0).any()
    with pytest.raises(RuntimeError, match="backward ran before"):
        torch.autograd.grad(loss, hidden)
    loss, *_ = linear_logprob_loss(
        hidden, weight, targets, lambda logprobs, *_: logprobs.new_ones(()), backend="triton"
    )
    assert [x.abs().sum().item() for x in torch.autograd.grad(loss, (hidden, weight))] == [0, 0]
    with torch.no_grad():
        values = linear_logprob(hidden, weight, targets, backend="triton")
    assert not values[0].requires_grad


def test_a_row_gets_the_same_bits_among_others_and_again() -> None:
    hidden, weight, targets = inputs(140, 72, 300)
    whole = linear_logprob(hidden, weight, targets, backend="triton")
    for again, value in zip(linear_logprob(hidden, weight, targets, backend="triton"), whole, strict=True):
        assert torch.equal(again, value)
    for rows in (slice(0, 1), slice(129, 140), slice(60, 80)):
        alone = linear_logprob(hidden[rows], weight, targets[rows], backend="triton")
        for own, value in zip(alone, whole, strict=True):
            assert torch.equal(own, value[rows])


@pytest.mark.parametrize("size", [1.0, 1e15, 1e30])
def test_a_certain_token_has_entropy_zero_and_nothing_overflows(size: float) -> None:
    hidden = torch.full((2, 8), size, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.zeros(600, 8, dtype=torch.bfloat16, device=DEVICE)
    weight[[0, 1, 599], 0] = torch.tensor([128.0, -128.0, 64.0], dtype=torch.bfloat16, device=DEVICE)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    targets = torch.tensor([0, 1], device=DEVICE)
    rounded = hidden[0, 0].item()
    for rows in (False, True):
        if rows:
            loss, logprobs, entropy = linear_logprob_loss(
                hidden, weight, targets, lambda logprobs, entropy, _: (logprobs + entropy).sum(), backend="triton"
            )
        else:
            logprobs, entropy = linear_logprob(hidden, weight, targets, backend="triton")
            loss = (logprobs + entropy).sum()
        assert logprobs.tolist() == [0, pytest.approx(-256 * rounded, rel=1e-6)]
        assert entropy.tolist() == [pytest.approx(0, abs=1e-20)] * 2
        (grad,) = torch.autograd.grad(loss, hidden)
        assert grad[:, 0].tolist() == [pytest.approx(0, abs=1e-20), -256]


def test_entropy_lies_between_zero_and_that_of_chance() -> None:
    hidden, weight, targets = inputs(60, 16, 300)
    scale = torch.logspace(-4, 3, 60, device=DEVICE)[:, None]
    _, entropy = linear_logprob((hidden.detach() * scale).bfloat16(), weight, targets, backend="triton")
    assert entropy.min() >= 0
    assert entropy.max() <= math.log(300) + 1e-5
    assert entropy[0] > 0.999 * math.log(300)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_row_shows_and_breaks_no_other(bad: float) -> None:
    hidden, weight, targets = inputs(6, 16, 300)
    broken = hidden.detach().clone()
    broken[2, 3] = bad
    wanted = linear_logprob(hidden, weight, targets, backend="triton")
    one_pass = linear_logprob_loss(broken, weight, targets, lambda logprobs, *_: logprobs.sum(), backend="triton")[1:]
    for ours in (linear_logprob(broken, weight, targets, backend="triton"), one_pass):
        for value, expected in zip(ours, wanted, strict=True):
            assert value[2].isnan()
            torch.testing.assert_close(value[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]], atol=1e-5, rtol=1e-5)


def test_a_target_outside_of_the_vocabulary_gives_nan() -> None:
    hidden, weight, _ = inputs(3, 16, 20)
    targets = torch.tensor([20, 4, -1], device=DEVICE)
    for logprobs in (
        linear_logprob(hidden, weight, targets, backend="triton")[0],
        linear_logprob_loss(hidden, weight, targets, lambda *_: torch.zeros(()), backend="triton")[1],
    ):
        assert logprobs.isnan().tolist() == [True, False, True]


def test_a_weights_gradient_is_summed_in_fp32_over_chunks() -> None:
    hidden = torch.ones(512, 8, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.zeros(2, 8, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    targets = torch.zeros(512, dtype=torch.long, device=DEVICE)
    logprobs, _ = linear_logprob(hidden, weight, targets, chunk_tokens=1, backend="triton")
    logprobs.sum().backward()  # in bf16 the sum would stop growing at 128
    assert weight.grad is not None
    assert weight.grad.tolist() == [[256.0] * 8, [-256.0] * 8]


def test_no_rows_and_what_kernels_do_not_take() -> None:
    hidden, weight, targets = inputs(0, 16, 20)
    logprobs, entropy = linear_logprob(hidden, weight, targets, backend="triton")
    (logprobs.sum() + entropy.sum()).backward()
    assert weight.grad is not None
    assert (weight.grad == 0).all()
    assert kernels.score(hidden, weight, targets, 1.0)[0].shape == (0,)
    mask = SamplingMask(torch.zeros(1, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="no sampling mask"):
        linear_logprob(hidden, weight, targets, sampling_mask=mask, backend="triton")
    with pytest.raises(ValueError, match=r"not torch\.float32"):
        linear_logprob(hidden.float(), weight.float(), targets, backend="triton")
