"""A student over several processes that share it (FSDP2), or in half precision: what runs in each, and the handle on all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from distill.student_config import DistillConfig
from distill.student_handle import WriteSnapshot, checkpoint_bytes
from distill.student_loss import StudentBatch, StudentLoss
from distill.student_trainer import NonFiniteStudentError, StudentTrainer
from policy.atomic import CheckpointError
from policy.config import PolicyConfig
from policy.dense_config import DenseConfig
from policy.interface import Policy
from policy.parallel import ParallelismError
from policy.sharded_checkpoint import load_optimizer, save_optimizer, save_sharded
from policy.sharding import gathered_weights
from rollout.cluster import Rank, RankGroup
from rollout.engine import Completion
from rollout.errors import UserError
from rollout.ranks import join, showing, spread_policy
from rollout.sync_diagnosis import Gap
from rollout.weights import PolicySource, policy_of

OPTIMIZER, COUNTERS = "optimizer", "trainer.json"
# What the run and the user are to see as it is, whichever process raised it.
OWN_ERRORS = (NonFiniteStudentError, CheckpointError, ParallelismError, UserError)


@dataclass(frozen=True)
class StudentPlan:
    """What every rank makes its trainer of; `folder` holds the weights."""

    config: DistillConfig
    folder: Path
    loss: StudentLoss
    num_steps: int
    bad_batch_path: Path


class RankStudent:
    """A student that is one of several, all of which take every call together."""

    def __init__(self, plan: StudentPlan, rank: Rank) -> None:
        trainer = plan.config.trainer
        join(rank, num_threads=trainer.num_threads, timeout_s=trainer.step_timeout_s)
        try:
            self.trainer = StudentTrainer(
                spread_policy(plan.folder, expert_parallel=trainer.expert_parallel, dtype=trainer.dtype),
                plan.config.trainer,
                plan.loss,
                num_steps=plan.num_steps,
                seed=plan.config.seed,
                bad_batch_path=plan.bad_batch_path,
            )
        except BaseException:
            dist.destroy_process_group()
            raise
        self.num_bytes = checkpoint_bytes(self.trainer.model)

    @property
    def policy_config(self) -> PolicyConfig | DenseConfig:
        """The student's config."""
        return self.trainer.model.config

    def facts(self) -> tuple[PolicyConfig | DenseConfig, int]:
        """The student's config, and about how many bytes a checkpoint has."""
        return self.policy_config, self.num_bytes

    def step(self, batch: StudentBatch, step: int) -> dict[str, float]:
        """As `StudentTrainer.step`, of the whole batch."""
        return self.trainer.step(batch, step)

    def weights(self) -> dict[str, Tensor]:
        """The weights, whole and in main memory, on rank 0; none on the others."""
        gathered = gathered_weights(self.trainer.model)
        return {name: weight.cpu() for name, weight in gathered if weight is not None}

    def measure_gap(self, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Gap:
        """As `PolicySource.measure_gap`; every rank computes all of it."""
        return PolicySource(self.trainer.model).measure_gap(prompts, completions)

    def write(self, folder: Path) -> None:
        """Write the student's checkpoint and the trainer's own state into an existing folder."""
        save_sharded(self.trainer.model, folder)
        save_optimizer(self.trainer.model, self.trainer.adamw, folder / OPTIMIZER)
        if dist.get_rank() == 0:
            (folder / COUNTERS).write_text(json.dumps(self.trainer.counters()) + "\n")
        dist.barrier()

    def load_state(self, folder: Path) -> None:
        """Take up the trainer's own state; CheckpointError where ranks wrote none."""
        if not (folder / COUNTERS).is_file():
            raise CheckpointError(
                f"{folder} has no {COUNTERS}: it was written by a student in one process in float32. "
                "Set trainer.placement and trainer.dtype as they were."
            )
        load_optimizer(self.trainer.model, self.trainer.adamw, folder / OPTIMIZER)
        self.trainer.load_counters(json.loads((folder / COUNTERS).read_text()))


class LoneStudent(RankStudent):
    """The only rank, in this process: products in half precision are FSDP2's work, whatever the number of ranks."""

    can_write_in_background = False

    def __init__(self, plan: StudentPlan) -> None:
        super().__init__(plan, Rank(0, 1, ""))

    def snapshot(self) -> WriteSnapshot:
        """Writes the state of when it is called."""
        return self.write

    def scratch(self) -> Policy:
        """A whole copy in main memory, with products in float32."""
        return policy_of(self.policy_config, self.weights())

    def close(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()


class RayStudent:
    """A student whose ranks are Ray actors; a call that fails raises what the rank raised, or RankError for the rank."""

    can_write_in_background = False

    def __init__(self, plan: StudentPlan, log_dir: Path) -> None:
        trainer = plan.config.trainer
        self.timeout_s = trainer.step_timeout_s
        with showing(OWN_ERRORS):
            self.group = RankGroup(
                partial(RankStudent, plan),
                trainer.num_ranks,
                log_dir,
                name="student",
                num_threads=trainer.num_threads,
                start_timeout_s=trainer.step_timeout_s,
            )
        self.policy_config, self.num_bytes = self._call("starting", "facts")

    def step(self, batch: StudentBatch, step: int) -> dict[str, float]:
        """As `StudentTrainer.step`."""
        return self._call(f"learning from step {step}", "step", batch, step)

    def weights(self) -> dict[str, Tensor]:
        """The weights as of now, in this process's memory."""
        return self._call("gathering the weights", "weights")

    def measure_gap(self, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Gap:
        """As `PolicySource.measure_gap`, by the ranks."""
        return self._call("measuring a probe", "measure_gap", prompts, completions)

    def scratch(self) -> Policy:
        """A whole copy in this process."""
        return policy_of(self.policy_config, self.weights())

    def snapshot(self) -> WriteSnapshot:
        """Writes the state of when it is called, all ranks together."""
        return lambda folder: self._call("writing a checkpoint", "write", folder.absolute())

    def load_state(self, folder: Path) -> None:
        """Take up what `snapshot` wrote; CheckpointError where ranks wrote none."""
        self._call(f"reading the state in {folder}", "load_state", folder.absolute())

    def close(self) -> None:
        """End the ranks' processes."""
        self.group.close()

    def _call(self, doing: str, method: str, *arguments: Any) -> Any:
        with showing(OWN_ERRORS):
            return self.group.call(doing, self.timeout_s, method, *arguments)[0]
