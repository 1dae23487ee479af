"""What a run needs before it starts: both data sets and the verifiers, opened and tried before anything expensive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo.config import TrainConfig
from rollout.errors import UserError
from rollout.records import Task
from rollout.tasks import TaskSource, load_tasks
from verifiers.pool import ScorePool, VerifierSpec

MAX_GOLDS_CHECKED = 2000


@dataclass(frozen=True)
class Inputs:
    """The tasks of a run."""

    source: TaskSource
    eval_tasks: list[Task]


def open_inputs(config: TrainConfig) -> Inputs:
    """Load both data sets and try the verifiers; UserError or the verifier's own error for bad input."""
    source, held_out = load_tasks(config.data), load_tasks(config.eval.data)
    if len(source) < config.num_prompts:
        raise UserError(f"num_prompts={config.num_prompts} exceeds the {len(source)} rows of the training data.")
    if len(held_out) < config.eval.num_problems:
        raise UserError(f"eval.num_problems={config.eval.num_problems} exceeds the {len(held_out)} held-out rows.")
    eval_tasks = [held_out.task(i) for i in range(config.eval.num_problems)]
    with score_pool(config, None) as pool:
        checked = [source.task(i) for i in range(min(len(source), MAX_GOLDS_CHECKED))]
        _check_golds(pool, [*checked, *eval_tasks], config.scoring.max_error_share)
    return Inputs(source, eval_tasks)


def score_pool(config: TrainConfig, log_path: Path | None) -> ScorePool:
    """The verifier processes; what plug-ins print goes to `log_path`, or nowhere."""
    specs = [VerifierSpec(r.name, r.verifier, r.weight, r.options, r.timeout_s) for r in config.rewards]
    scoring = config.scoring
    return ScorePool(specs, scoring.num_workers, scoring.timeout_s, scoring.memory_limit_mb, log_path=log_path)


def _check_golds(pool: ScorePool, tasks: Sequence[Task], max_share: float) -> None:
    """UserError if the verifiers can't use more than `max_share` of the gold answers."""
    audits = zip(tasks, pool.prepare(tasks), strict=True)
    bad = [(task, audit) for task, audit in audits if audit is not None and audit.status in ("missing", "unparsable")]
    if len(bad) > max_share * len(tasks):
        task, audit = bad[0]
        raise UserError(
            f"the verifier can't use {len(bad)} of the {len(tasks)} gold answers looked at; the first is that of "
            f"{task.task_id}: {audit.reason}. `groupzero verify-data` lists them."
        )
