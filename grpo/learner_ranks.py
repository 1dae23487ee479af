"""The learner over several processes that share one policy (FSDP2): what runs in each, and the handle on all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from grpo.batch import Batch
from grpo.config import TrainConfig
from grpo.learner import NonFiniteLossError
from grpo.learner_handle import WriteSnapshot, checkpoint_bytes, new_learner
from policy.atomic import CheckpointError
from policy.config import PolicyConfig
from policy.dense_config import DenseConfig
from policy.interface import Policy
from policy.parallel import ParallelismError
from policy.sharded_checkpoint import save_sharded
from policy.sharding import gathered_weights
from rollout.cluster import Rank, RankGroup
from rollout.engine import Completion
from rollout.errors import UserError
from rollout.ranks import join, showing, spread_policy
from rollout.sync_diagnosis import Gap
from rollout.weights import PolicySource, policy_of

LEARNER_FOLDER = "learner"
# What the loop and the user are to see as it is, whichever process raised it.
OWN_ERRORS = (NonFiniteLossError, CheckpointError, ParallelismError, UserError)


class RankLearner:
    """A learner that is one of several, all of which take every call together."""

    def __init__(self, config: TrainConfig, weights_dir: Path, bad_batch_path: Path, rank: Rank) -> None:
        learner = config.learner
        join(rank, num_threads=learner.num_threads, timeout_s=learner.step_timeout_s)
        try:
            self.learner = new_learner(
                config,
                spread_policy(weights_dir, expert_parallel=learner.expert_parallel, dtype=learner.dtype),
                bad_batch_path,
            )
        except BaseException:
            dist.destroy_process_group()
            raise
        self.num_bytes = checkpoint_bytes(self.learner)

    @property
    def policy_config(self) -> PolicyConfig | DenseConfig:
        """The policy's config."""
        return self.learner.model.config

    def facts(self) -> tuple[PolicyConfig | DenseConfig, int]:
        """The policy's config, and about how many bytes a checkpoint has."""
        return self.policy_config, self.num_bytes

    def fill(self, batch: Batch) -> Batch:
        """As `Learner.fill`, in main memory."""
        return self.learner.fill(batch).to("cpu")

    def filled(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """What `fill` adds: old_logprobs and ref_logprobs."""
        batch = self.fill(batch)
        return batch.old_logprobs, batch.ref_logprobs

    def step(self, batch: Batch | None, step: int) -> dict[str, float]:
        """As `Learner.step`, of the whole batch."""
        return self.learner.step(batch, step)

    def weights(self) -> dict[str, Tensor]:
        """The weights, whole and in main memory, on rank 0; none on the others."""
        gathered = gathered_weights(self.learner.model)
        return {name: weight.cpu() for name, weight in gathered if weight is not None}

    def measure_gap(self, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Gap:
        """As `PolicySource.measure_gap`; every rank computes all of it."""
        return PolicySource(self.learner.model).measure_gap(prompts, completions)

    def write(self, folder: Path) -> None:
        """Write the policy's checkpoint and the learner's own state into an existing folder."""
        save_sharded(self.learner.model, folder)
        own = folder / LEARNER_FOLDER
        own.mkdir(exist_ok=True)
        self.learner.sharded_state(own)

    def load_state(self, folder: Path) -> None:
        """Take up the learner's own state; CheckpointError where ranks wrote none."""
        own = folder / LEARNER_FOLDER
        if not own.is_dir():
            raise CheckpointError(
                f"{folder} has no folder {LEARNER_FOLDER}: it was written by a learner in one process. "
                "Set learner.placement and learner.dtype as they were."
            )
        self.learner.load_sharded_state(own)


class LoneRank(RankLearner):
    """The only rank, in this process: products in half precision are FSDP2's work, whatever the number of ranks."""

    can_write_in_background = False

    def __init__(self, config: TrainConfig, weights_dir: Path, bad_batch_path: Path) -> None:
        super().__init__(config, weights_dir, bad_batch_path, Rank(0, 1, ""))

    def snapshot(self, step: int) -> WriteSnapshot:
        """Writes the state of when it is called."""
        return self.write

    def scratch(self) -> Policy:
        """A whole copy in main memory, with products in float32."""
        return policy_of(self.policy_config, self.weights())

    def close(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()


class RayLearner:
    """A learner whose ranks are Ray actors; a call that fails raises what the rank raised, or RankError for the rank."""

    can_write_in_background = False

    def __init__(self, config: TrainConfig, weights_dir: Path, bad_batch_path: Path, log_dir: Path) -> None:
        learner = config.learner
        self.timeout_s = learner.step_timeout_s
        build = partial(RankLearner, config, weights_dir.absolute(), bad_batch_path.absolute())
        with showing(OWN_ERRORS):
            self.group = RankGroup(
                build,
                learner.num_ranks,
                log_dir,
                name="learner",
                num_threads=learner.num_threads,
                start_timeout_s=learner.step_timeout_s,
            )
        self.policy_config, self.num_bytes = self._call("starting", "facts")

    def fill(self, batch: Batch) -> Batch:
        """As `Learner.fill`."""
        old, ref = self._call("computing log-probabilities", "filled", batch.to("cpu"))
        return dataclasses.replace(batch, old_logprobs=old, ref_logprobs=ref)

    def step(self, batch: Batch | None, step: int) -> dict[str, float]:
        """As `Learner.step`."""
        return self._call(f"learning from step {step}", "step", batch and batch.to("cpu"), step)

    def weights(self) -> dict[str, Tensor]:
        """The weights as of now, in this process's memory."""
        return self._call("gathering the weights", "weights")

    def measure_gap(self, prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Gap:
        """As `PolicySource.measure_gap`, by the ranks."""
        return self._call("measuring a probe", "measure_gap", prompts, completions)

    def scratch(self) -> Policy:
        """A whole copy in this process."""
        return policy_of(self.policy_config, self.weights())

    def snapshot(self, step: int) -> WriteSnapshot:
        """Writes the state of when it is called, all ranks together."""
        return lambda folder: self._call(f"writing the checkpoint of step {step}", "write", folder.absolute())

    def load_state(self, folder: Path) -> None:
        """Take up what `snapshot` wrote; CheckpointError where ranks wrote none."""
        self._call(f"reading the state in {folder}", "load_state", folder.absolute())

    def close(self) -> None:
        """End the ranks' processes."""
        self.group.close()

    def _call(self, doing: str, method: str, *arguments: Any) -> Any:
        with showing(OWN_ERRORS):
            return self.group.call(doing, self.timeout_s, method, *arguments)[0]
