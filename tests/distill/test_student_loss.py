"""A student's loss against transformers' own, and the laws of its batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.student_loss import StepTotals, StudentBatch, SupervisedLoss
from tests.distill.student_builders import make_student, make_tokenizer, save_student

LENGTHS = ((5, 9), (2, 17), (11, 1), (1, 6))  # prompt, completion


def rows_of(vocab_size: int, lengths: Any = LENGTHS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (prompt + own,), generator=generator) for prompt, own in lengths]


def loss_and_gradients(model: Any, batch: StudentBatch, parts: list[list[int]], **weights: float) -> tuple[float, dict]:
    model.zero_grad()
    totals, total = StepTotals.of(batch, len(model.mtp_layers)), 0.0
    for part in parts:
        loss, _ = SupervisedLoss(**weights)(model, batch.select(part), totals)
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("on_prompt", [False, True])
def test_loss_and_gradients_are_those_of_transformers_labels(tmp_path: Path, kind: str, on_prompt: bool) -> None:
    from transformers import AutoModelForCausalLM

    from policy.checkpoint import load_policy

    folder = save_student(tmp_path / kind, kind)
    ours, theirs = load_policy(folder).train(), AutoModelForCausalLM.from_pretrained(folder).train()
    rows = rows_of(ours.config.vocab_size)
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat((row, row.new_zeros(longest - len(row)))) for row in rows])
    places = torch.arange(longest).expand(len(rows), -1)
    there = places < torch.tensor([len(row) for row in rows])[:, None]
    wanted = there & (places >= torch.tensor([0 if on_prompt else prompt for prompt, _ in LENGTHS])[:, None])
    expected = theirs(ids, attention_mask=there.long(), labels=ids.masked_fill(~wanted, -100)).loss
    expected.backward()
    expected = float(expected.detach())
    batch = StudentBatch.of(rows, [prompt for prompt, _ in LENGTHS], loss_on_prompt=on_prompt)
    for parts in ([[0, 1, 2, 3]], [[1], [3, 0], [2]]):  # packed together, and cut into micro-batches
        loss, gradients = loss_and_gradients(ours, batch, parts)
        assert abs(loss - expected) < 1e-6 * expected
        reference = {name: p.grad for name, p in theirs.named_parameters()}
        assert gradients.keys() == reference.keys()
        for name, gradient in gradients.items():
            assert float((gradient - reference[name]).abs().max()) < 1e-6, name


def test_a_deepseek_student_has_the_loss_of_its_rows_alone_and_its_auxiliary_losses() -> None:
    tokenizer = make_tokenizer()
    model = make_student("deepseek", tokenizer).train()
    rows = rows_of(len(tokenizer))
    batch = StudentBatch.of(rows, [prompt for prompt, _ in LENGTHS])
    weights = {"mtp_loss_weight": 0.3, "balance_alpha": 1e-2}
    whole, gradients = loss_and_gradients(model, batch, [[0, 1, 2, 3]], **weights)
    cut, others = loss_and_gradients(model, batch, [[2, 1], [0], [3]], **weights)
    assert abs(whole - cut) < 1e-5
    assert any(".eh_proj." in name for name in gradients)
    assert all(torch.allclose(gradient, others[name], atol=1e-6) for name, gradient in gradients.items())
    plain, without = loss_and_gradients(model, batch, [[0, 1, 2, 3]])
    assert whole > plain + 0.3
    assert not any(".eh_proj." in name for name in without)


def test_metrics_add_up_over_micro_batches_to_means_over_targets() -> None:
    tokenizer = make_tokenizer()
    model = make_student("llama", tokenizer)
    batch = StudentBatch.of(rows_of(len(tokenizer)), [prompt for prompt, _ in LENGTHS])
    totals = StepTotals.of(batch, 0)
    whole = SupervisedLoss()(model, batch, totals)[1]
    cut = [*(batch.select(part) for part in ([0, 3], [1], [2])), batch.placeholder()]
    parts = [SupervisedLoss()(model, part, totals)[1] for part in cut]
    assert whole.keys() == {"loss", "entropy"}
    for name, value in whole.items():
        assert float(sum(part[name] for part in parts)) == pytest.approx(float(value), rel=1e-5)
    assert float(parts[-1]["loss"]) == 0.0
    assert float(whole["entropy"]) < torch.tensor(float(len(tokenizer))).log() + 1e-4


def test_what_is_learned_begins_at_the_completion_and_never_at_a_first_token() -> None:
    rows = [torch.arange(4), torch.arange(3), torch.arange(2)]
    assert StudentBatch.of(rows, [2, 0, 2]).targets.int().tolist() == [0, 0, 1, 1, 0, 1, 1, 0, 0]
    assert StudentBatch.of(rows, [2, 0, 2], loss_on_prompt=True).targets.int().tolist() == [0, 1, 1, 1, 0, 1, 1, 0, 1]


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 7)), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_a_selection_is_the_batch_of_the_selected_rows(lengths: list[tuple[int, int]], chance: Any) -> None:
    rows = rows_of(100, lengths)
    said = [torch.randn(len(row), 3) for row in rows]
    prompts = [prompt for prompt, _ in lengths]
    chosen = chance.sample(range(len(rows)), chance.randint(1, len(rows)))
    selected = StudentBatch.of(rows, prompts, values={"teacher": said}).select(chosen)
    alone = StudentBatch.of(
        [rows[i] for i in chosen], [prompts[i] for i in chosen], values={"teacher": [said[i] for i in chosen]}
    )
    for name in ("input_ids", "position_ids", "cu_seqlens", "targets"):
        assert torch.equal(getattr(selected, name), getattr(alone, name))
    assert torch.equal(selected.values["teacher"], alone.values["teacher"])
