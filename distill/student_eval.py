"""A student's measurements on held-out tasks, by the functions that measure RL: before, after, and quick ones in between."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distill.student_config import DistillConfig, StudentEvalConfig
from rollout.engine import Engine, SamplingParams
from rollout.errors import UserError
from rollout.evaluation import EvalResult, evaluate
from rollout.records import Task
from rollout.run import Observer, RunRecord
from rollout.sampling import Prompter
from rollout.tasks import load_tasks
from verifiers.pool import ScorePool, VerifierSpec


def eval_tasks(config: StudentEvalConfig) -> list[Task]:
    """The held-out tasks; UserError where there are fewer than asked for."""
    source = load_tasks(config.data)
    if len(source) < config.num_problems:
        raise UserError(f"eval.num_problems={config.num_problems} exceeds the {len(source)} held-out rows.")
    return [source.task(index) for index in range(config.num_problems)]


@contextmanager
def eval_pool(config: StudentEvalConfig | None, log_path: Path | None) -> Iterator[ScorePool | None]:
    """The verifier's processes; none where nothing is measured."""
    if config is None:
        yield None
        return
    specs = [VerifierSpec("accuracy", config.verifier, options=config.options)]
    with ScorePool(specs, config.num_workers, config.timeout_s, log_path=log_path) as pool:
        yield pool


@dataclass(frozen=True, kw_only=True)
class StudentEval:
    """What a measurement needs; every one of a run uses the same tasks and the same seeds."""

    config: DistillConfig
    options: StudentEvalConfig
    tasks: Sequence[Task]
    engine: Engine
    prompter: Prompter
    pool: ScorePool
    record: RunRecord
    observer: Observer
    stop_token_ids: tuple[int, ...]

    def before(self) -> EvalResult:
        """The measurement of the student as it begins; done once in a run's life."""
        path = self.record.run_dir / "eval_before.json"
        return EvalResult(**json.loads(path.read_text())) if path.exists() else self._measure("before", 0)

    def after(self, num_steps: int) -> EvalResult:
        """The measurement of the trained student."""
        return self._measure("after", num_steps)

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

    def _measure(self, when: str, step: int) -> EvalResult:
        options = self.options
        self.observer.stage(
            "evaluate", f"{options.num_problems} held-out problems x {options.num_samples} samples, {when}"
        )
        result, groups = evaluate(
            self.engine,
            self.prompter,
            self.pool,
            self.tasks,
            self._params(),
            num_samples=options.num_samples,
            k=options.k,
            seed=self.config.seed,
        )
        if result.num_failed:
            total = options.num_problems * options.num_samples
            self.observer.message(f"{when}: the verifier failed on {result.num_failed} of {total} samples")
        phase = "eval_before" if when == "before" else "eval_after"
        self.record.write_samples(step, groups, phase, [self.prompter.text(group.task) for group in groups])
        self.record.write_json(phase, result.to_dict())
        self.observer.message(
            f"{when} training: pass@1 {result.pass_at_1:.3f}, pass@{options.k} {result.pass_at_k:.3f}, "
            f"majority@{options.k} {result.majority_at_k:.3f}, greedy {result.greedy:.3f}"
        )
        return result

    def _params(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.options.temperature,
            top_p=self.options.top_p,
            max_completion_tokens=self.options.max_completion_tokens,
            stop_token_ids=self.stop_token_ids,
        )
