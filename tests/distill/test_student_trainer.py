"""The trainer's schedule, its steps and their independence of how a batch is cut."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.student_config import TrainerConfig
from distill.student_loss import StepTotals, StudentBatch, SupervisedLoss
from distill.student_trainer import NonFiniteStudentError, StudentTrainer, warmup_then_cosine
from tests.distill.student_builders import make_student, make_tokenizer

TOKENIZER = make_tokenizer()


def make_batch(count: int = 5, seed: int = 0) -> StudentBatch:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(len(TOKENIZER), (8 + 5 * index,), generator=generator) for index in range(count)]
    return StudentBatch.of(rows, [3] * count)


def make_trainer(
    kind: str = "llama", tmp_path: Path = Path("unused"), loss: Any = None, **config: Any
) -> StudentTrainer:
    values = {"lr": 1e-2, "max_tokens_per_microbatch": 200} | config
    return StudentTrainer(
        make_student(kind, TOKENIZER),
        TrainerConfig(**values),
        loss or SupervisedLoss(values.get("mtp_loss_weight", 0.0), values.get("balance_alpha", 0.0)),
        num_steps=20,
        seed=0,
        bad_batch_path=tmp_path / "bad.pt",
    )


def weights(trainer: StudentTrainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_the_cosine_is_that_of_transformers_and_the_warm_up_rises_linearly() -> None:
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 4, 20, min_lr_rate=0.1)
    theirs = []
    for _ in range(21):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    ours = [warmup_then_cosine(4, 20, 0.1)(step) for step in range(21)]
    assert ours[4:] == pytest.approx(theirs[4:])
    assert ours[:4] == [0.25, 0.5, 0.75, 1.0]
    assert ours[4] == 1.0
    assert ours[20] == pytest.approx(0.1)
    assert warmup_then_cosine(0, 1, 0.1)(0) == 1.0


@pytest.mark.parametrize("kind", ["llama", "deepseek"])
def test_a_step_does_not_depend_on_the_micro_batches_nor_on_recomputation(kind: str) -> None:
    options = {"mtp_loss_weight": 0.3, "balance_alpha": 1e-3, "balance_gamma": 0.01} if kind == "deepseek" else {}
    whole = make_trainer(kind, **options)
    cut = make_trainer(kind, **options, max_tokens_per_microbatch=40, activation_checkpointing=True)
    first, second = (trainer.step(make_batch(), 0) for trainer in (whole, cut))
    assert first["num_microbatches"] == 1
    assert second["num_microbatches"] > 2
    for name in ("loss", "entropy", "grad_norm"):
        assert second[name] == pytest.approx(first[name], rel=1e-5), name
    for name, value in weights(cut).items():
        # AdamW's first step has the size of the rate wherever the gradient is not 0, which rounding may decide.
        assert float((value - weights(whole)[name]).abs().median()) < 1e-6, name


def test_the_first_step_moves_every_weight_against_its_gradient_by_the_rate() -> None:
    trainer = make_trainer(max_grad_norm=1e9, weight_decay=0.0)
    before = weights(trainer)
    loss, _ = SupervisedLoss()(trainer.model, make_batch(), StepTotals.of(make_batch(), 0))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    metrics = trainer.step(make_batch(), 0)
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert metrics["lr"] == 1e-2
    after = weights(trainer)
    for name, gradient in gradients.items():
        clear = gradient.abs() > 1e-4
        moved = (after[name] - before[name])[clear]
        assert torch.allclose(moved, -1e-2 * gradient[clear].sign(), rtol=1e-2)


def test_the_loss_falls() -> None:
    trainer = make_trainer(lr=3e-3)
    losses = [trainer.step(make_batch(), step)["loss"] for step in range(20)]
    assert losses[-1] < 0.6 * losses[0]


def test_rates_differ_by_layer_group_and_norms_do_not_decay() -> None:
    trainer = make_trainer(lr_scale={"head": 3.0}, weight_decay=0.1)
    trainer.step(make_batch(), 10)  # half way down the cosine from 1 to a tenth
    groups = {group["name"]: group for group in trainer.adamw.param_groups}
    assert groups["attention"]["lr"] == pytest.approx(1e-2 * 0.55)
    assert groups["head"]["lr"] == pytest.approx(3e-2 * 0.55)
    assert (groups["norms"]["weight_decay"], groups["attention"]["weight_decay"]) == (0.0, 0.1)


def test_prediction_layers_without_a_loss_stay_as_they_are() -> None:
    trainer = make_trainer("deepseek")
    before = weights(trainer)
    trainer.step(make_batch(), 0)
    after = weights(trainer)
    still = {name for name in before if torch.equal(before[name], after[name])}
    ahead = {name for name in before if name.startswith("model.layers.2.")}
    assert ahead
    assert ahead <= still
    assert "model.layers.1.self_attn.o_proj.weight" not in still


class Poisoned:
    """A loss that is NaN at the given calls."""

    def __init__(self, calls: set[int]) -> None:
        self.calls, self.count = calls, 0

    def __call__(self, model: Any, batch: StudentBatch, totals: StepTotals) -> Any:
        loss, metrics = SupervisedLoss()(model, batch, totals)
        self.count += 1
        if self.count - 1 in self.calls:
            return loss * float("nan"), {"loss": metrics["loss"] * float("nan")}
        return loss, metrics


def test_a_step_without_a_finite_loss_is_skipped_and_several_in_a_row_end_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path=tmp_path, loss=Poisoned({1, 3, 4}), max_skipped_steps=2)
    assert trainer.step(make_batch(), 0)["skipped"] == 0
    before = weights(trainer)
    assert trainer.step(make_batch(), 1)["skipped"] == 1
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    trainer.step(make_batch(), 2)
    trainer.step(make_batch(), 3)
    with pytest.raises(NonFiniteStudentError, match="step 4: 2 optimizer steps in a row"):
        trainer.step(make_batch(), 4)
    saved = torch.load(tmp_path / "bad.pt", weights_only=True)
    assert torch.equal(saved["input_ids"], make_batch().input_ids)


def test_the_state_is_all_that_the_next_step_depends_on() -> None:
    first = make_trainer("deepseek", balance_gamma=0.01)
    for step in range(2):
        first.step(make_batch(seed=step), step)
    second = make_trainer("deepseek", balance_gamma=0.01)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    ours, theirs = first.step(make_batch(seed=2), 2), second.step(make_batch(seed=2), 2)
    assert ours == theirs
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())
