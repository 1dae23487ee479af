"""The measurements of a run on held-out tasks: before, after, and quick ones in between."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo.config import TrainConfig
from grpo.measures import failures_in_words
from rollout.engine import Engine, SamplingParams
from rollout.errors import UserError
from rollout.evaluation import EvalResult, evaluate, is_correct, pass_at_k
from rollout.records import Task
from rollout.run import Observer, RunRecord
from rollout.sampling import Prompter
from verifiers.pool import ScorePool


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What a measurement needs; every one of a run uses the same tasks and the same seeds."""

    config: TrainConfig
    tasks: Sequence[Task]
    engine: Engine
    prompter: Prompter
    pool: ScorePool
    record: RunRecord
    observer: Observer
    stop_token_ids: tuple[int, ...]

    def before(self) -> tuple[EvalResult, list[float]]:
        """The measurement at step 0 and pass@k of each problem; done once in a run's life."""
        path = self.record.run_dir / "eval_before.json"
        if path.exists():
            return read_eval(path)
        if self.engine.policy_version > 0:
            self.observer.message(f"{path} is gone: what is measured now as before training has been trained already.")
        return self._measure("before", 0)

    def after(self) -> tuple[EvalResult, list[float]]:
        """The measurement of the trained policy and pass@k of each problem."""
        return self._measure("after", self.config.num_steps)

    def quick(self) -> float:
        """pass@1 of one sample each."""
        result, _ = evaluate(
            self.engine,
            self.prompter,
            self.pool,
            self.tasks,
            self._params(),
            num_samples=1,
            k=1,
            seed=self.config.seed,
            greedy=False,
        )
        return result.pass_at_1

    def _measure(self, when: str, step: int) -> tuple[EvalResult, list[float]]:
        config = self.config.eval
        self.observer.stage(
            "evaluate", f"{config.num_problems} held-out problems x {config.num_samples} samples, {when}"
        )
        result, groups = evaluate(
            self.engine,
            self.prompter,
            self.pool,
            self.tasks,
            self._params(),
            num_samples=config.num_samples,
            k=config.k,
            seed=self.config.seed,
        )
        phase = "eval_before" if when == "before" else "eval_after"
        if failures := failures_in_words(groups, phase, self.config.scoring.max_error_share):
            self.observer.message(failures)
        each = [pass_at_k(config.num_samples, sum(map(is_correct, g.samples)), config.k) for g in groups]
        self.record.write_samples(step, groups, phase, [self.prompter.text(group.task) for group in groups])
        self.record.write_json(phase, {**result.to_dict(), "pass_at_k_by_problem": each})
        self.observer.message(
            f"{when} training: pass@1 {result.pass_at_1:.3f}, pass@{config.k} {result.pass_at_k:.3f}, "
            f"majority@{config.k} {result.majority_at_k:.3f}, greedy {result.greedy:.3f}"
        )
        return result, each

    def _params(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.config.eval.temperature,
            top_p=self.config.eval.top_p,
            max_completion_tokens=self.config.sampling.longest,
            stop_token_ids=self.stop_token_ids,
        )


def read_eval(path: Path) -> tuple[EvalResult, list[float]]:
    """A measurement as it was written into the run folder."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): put back a copy, or remove it to measure again.") from error
    each = values.pop("pass_at_k_by_problem")
    return EvalResult(**values), each
