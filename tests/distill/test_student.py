"""A student's run: it learns, stops and goes on to the same bits, survives kills, and is measured."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.student import distill
from distill.student_config import DistillConfig
from distill.student_handle import LocalStudent
from distill.student_loss import StepTotals, StudentBatch, SupervisedLoss
from policy.checkpoint import load_policy
from rollout.errors import UserError
from rollout.interrupt import RunInterrupted
from rollout.run import RunRecord, SilentObserver, read_metrics
from rollout.tokenizer import load_tokenizer
from rollout.toml_config import to_toml
from tests.distill.student_builders import DEEPSEEK, LLAMA, make_config, make_traces, save_student
from tests.rollout.killing import killed_after

HELD_OUT: dict[str, Any] = {
    "eval": {
        "data": {"source": "generator", "generator": "arithmetic", "split": "heldout"},
        "verifier": "numeric",
        "num_workers": 1,
        "num_problems": 2,
        "num_samples": 2,
        "k": 2,
        "max_completion_tokens": 8,
        "every_steps": 2,
    },
    "engine": {"kind": "torch", "placement": "in_process", "max_model_len": 128},
}


class Watcher(SilentObserver):
    """Keeps messages; asks the process to stop after a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.messages: list[str] = []
        self.stop_at = stop_at

    def step(self, step: int, num_steps: int, metrics: Mapping[str, Any]) -> None:
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    def message(self, text: str) -> None:
        self.messages.append(text)


def run(config: DistillConfig, observer: Any = None, **options: Any) -> dict[str, Any]:
    record = RunRecord.open(
        config.run_path, config.model_dump(mode="json"), to_toml(config), resume=False, command="distill"
    )
    with record:
        return distill(config, config.student.init, record, observer or SilentObserver(), **options)


def final(config: DistillConfig) -> dict[str, torch.Tensor]:
    steps = sorted((config.run_path / "checkpoints").glob("step-*"))
    return load_policy(steps[-1]).state_dict()


def losses(config: DistillConfig) -> list[float]:
    return [line["loss"] for line in read_metrics(config.run_path)]


def assert_same(ours: DistillConfig, theirs: DistillConfig) -> None:
    """The same losses and weights, bit for bit."""
    assert losses(ours) == losses(theirs)
    expected = final(theirs)
    assert all(torch.equal(value, expected[name]) for name, value in final(ours).items())


def folder_with(tmp_path: Path, name: str, kind: str = "llama") -> Path:
    (tmp_path / name).mkdir()
    save_student(tmp_path / name / "init", kind)
    return tmp_path / name


def test_it_learns_and_leaves_a_checkpoint_with_its_tokenizer_and_an_account(tmp_path: Path) -> None:
    traces = [*make_traces(10), make_traces(11)[10]]
    bad = make_traces(1)[0].__class__(**{**vars(traces[0]), "completion": ""})
    save_student(tmp_path / "init")
    observer = Watcher()
    config = make_config(tmp_path, [*traces, bad], num_epochs=12, trainer={"lr": 1e-2})
    summary = run(config, observer)
    assert summary["num_steps"] == 33  # 11 traces, 12 times, 4 at once
    said = losses(config)
    assert len(said) == 33
    assert sum(said[-5:]) < 0.6 * sum(said[:5])
    assert json.loads((config.run_path / "data.json").read_text())["dropped"] == {"empty completion": 1}
    assert observer.messages[0] == "11 of 12 traces are learned from; 1 dropped: empty completion"
    folder = Path(summary["checkpoint"])
    assert load_tokenizer(folder).chat_template == load_tokenizer(tmp_path / "init").chat_template
    assert "pass_at_1_after" not in summary
    assert sum(summary["seconds_by_stage"].values()) == pytest.approx(summary["wall_s"])


@pytest.mark.parametrize("kind", ["qwen3", "deepseek"])
def test_stopped_and_taken_up_again_it_is_as_if_it_had_not_been(tmp_path: Path, kind: str) -> None:
    options = {"trainer": {"balance_gamma": 0.01, "mtp_loss_weight": 0.1}} if kind == "deepseek" else {}
    whole = make_config(folder_with(tmp_path, "whole", kind), **options)
    run(whole)
    cut = make_config(folder_with(tmp_path, "cut", kind), **options)
    with pytest.raises(RunInterrupted, match="stopped before step 3"):
        run(cut, Watcher(stop_at=3))
    observer = Watcher()
    run(cut, observer)
    assert observer.messages[0].startswith("going on at step 3")
    assert_same(cut, whole)


def test_killed_at_any_write_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = make_config(folder_with(tmp_path, "whole"))
    run(whole)
    broken = make_config(folder_with(tmp_path, "broken"))
    kills = [killed_after(survives, lambda: run(broken)) for survives in (1, 3, 9, 14, 20, 33, 40, 52)]
    assert sum(kills) >= 6
    if not (broken.run_path / "summary.json").exists():
        run(broken)
    assert_same(broken, whole)


def test_a_snapshot_is_of_the_time_when_it_was_taken(tmp_path: Path) -> None:
    save_student(tmp_path / "init")
    config = make_config(tmp_path)
    student = LocalStudent(
        config, load_policy(tmp_path / "init"), SupervisedLoss(), num_steps=4, bad_batch_path=tmp_path / "bad.pt"
    )
    batch = StudentBatch.of([torch.arange(20)], [3])
    student.step(batch, 0)
    write, then = student.snapshot(), student.step(batch, 1)
    write(tmp_path / "init")  # as if in the background, after another step
    student.model.load_state_dict(load_policy(tmp_path / "init").state_dict())
    student.load_state(tmp_path / "init")
    assert student.step(batch, 1) == then
    moments = student.trainer.adamw.state_dict()["state"][0]
    assert int(moments["step"]) == 2


def test_it_is_measured_before_while_and_after_as_in_rl(tmp_path: Path) -> None:
    save_student(tmp_path / "init")
    config = make_config(tmp_path, **HELD_OUT, checkpoint={"keep_last": 1, "keep_best": True})
    summary = run(config)
    assert summary["pass_at_1_before"] == 0.0
    assert (summary["num_problems_after"], summary["num_samples_after"], summary["k_after"]) == (2, 2, 2)
    assert [line.get("eval_pass_at_1") for line in read_metrics(config.run_path)] == [None, 0.0, None, 0.0, None]
    assert (config.run_path / "samples.parquet").is_file()
    before, after = (json.loads((config.run_path / f"eval_{when}.json").read_text()) for when in ("before", "after"))
    assert before["completion_tokens_mean"] == summary["completion_tokens_mean_before"]
    assert after["completion_tokens_mean"] == summary["completion_tokens_mean_after"]


@pytest.mark.parametrize("shape", [LLAMA, DEEPSEEK])
def test_a_new_student_of_a_shape_takes_the_tokenizer_of_a_folder(tmp_path: Path, shape: dict[str, Any]) -> None:
    tokenizer = save_student(tmp_path / "other")
    source = {"init": None, "model": shape, "tokenizer": tokenizer}
    config = make_config(tmp_path, **HELD_OUT, student=source, max_steps=2)
    run(config)
    assert len(losses(config)) == 2
    first, last = load_policy(config.run_path / "first"), final(config)
    assert any(not torch.equal(value, last[name]) for name, value in first.state_dict().items())
    assert load_policy(config.run_path / "first").config.eos_token_id == load_tokenizer(tokenizer).eos_token_id


def test_a_checkpoints_config_can_be_changed_and_lengths_beyond_its_context_are_refused(tmp_path: Path) -> None:
    save_student(tmp_path / "init")
    long = {"data": {"max_tokens": 400}, "trainer": {"max_tokens_per_microbatch": 512}, "max_steps": 1}
    with pytest.raises(UserError, match=r"data.max_tokens=400 exceeds the student's context of 256"):
        run(make_config(tmp_path, **long, run_dir=str(tmp_path / "refused")))
    config = make_config(tmp_path, **long, student={"config_changes": {"max_position_embeddings": 512}})
    run(config)
    assert load_policy(config.run_path / "checkpoints" / "step-000001").config.max_position_embeddings == 512
    assert load_policy(tmp_path / "init").config.max_position_embeddings == 256
    with pytest.raises(UserError, match="config_changes"):
        changes = {"config_changes": {"hidden_act": "nonsense", "model_type": "bert"}}
        run(make_config(tmp_path, student=changes, run_dir=str(tmp_path / "bad")))


def test_half_precision_learns_and_goes_on_exactly(tmp_path: Path) -> None:
    half = {"trainer": {"dtype": "bfloat16"}}
    single = make_config(folder_with(tmp_path, "single"))
    run(single)
    whole = make_config(folder_with(tmp_path, "whole"), **half, **HELD_OUT)
    run(whole)
    assert losses(whole) != losses(single)
    assert losses(whole) == pytest.approx(losses(single), rel=0.02)
    assert all(value.dtype == torch.float32 for value in final(whole).values())
    cut = make_config(folder_with(tmp_path, "cut"), **half, **HELD_OUT)
    with pytest.raises(RunInterrupted):
        run(cut, Watcher(stop_at=3))
    run(cut)
    assert_same(cut, whole)


@pytest.mark.stack
def test_two_ranks_learn_what_one_does(tmp_path: Path) -> None:
    single = make_config(folder_with(tmp_path, "single", "deepseek"))
    run(single)
    ranks = {"placement": "ray", "num_ranks": 2, "expert_parallel": 2, "step_timeout_s": 300.0}
    spread = make_config(folder_with(tmp_path, "spread", "deepseek"), trainer=ranks)
    with pytest.raises(RunInterrupted):
        run(spread, Watcher(stop_at=2))
    run(spread)
    assert losses(spread) == pytest.approx(losses(single), rel=1e-4)


class OnlyLengths:
    """A method that is not ours: it pulls the student towards long answers, on batches of its own."""

    needs_engine = False

    def loss(self, config: DistillConfig) -> Any:
        return ends_never

    def batches(self, run: Any) -> Any:
        self.end = run.tokenizer.eos_token_id
        self.num_steps = 3
        return self

    def batch(self, step: int) -> StudentBatch:
        row = torch.tensor([self.end] * (4 + step))
        return StudentBatch.of([row, row], [1, 1], values={"weight": [torch.full((len(row),), 2.0)] * 2})


def ends_never(model: Any, batch: StudentBatch, totals: StepTotals) -> Any:
    from policy.logprobs import token_logprobs

    said = token_logprobs(model, batch.input_ids, batch.position_ids, batch.cu_seqlens, mask=batch.targets)
    loss = (said.logprobs * batch.values["weight"]).sum() / totals.num_targets
    return loss, {"loss": loss.detach()}


def test_another_method_can_be_plugged_in(tmp_path: Path) -> None:
    save_student(tmp_path / "init")
    config = make_config(tmp_path, trainer={"lr": 1e-2})
    summary = run(config, method=OnlyLengths())
    assert summary["num_steps"] == 3
    assert losses(config)[-1] < losses(config)[0] < -5
