"""The learner over several processes that share one policy (FSDP2): what runs in each, and the handle on all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo.batch import Batch
from grpo.config import LearnerConfig, TrainConfig
from grpo.learner import NonFiniteLossError
from grpo.learner_handle import WriteSnapshot, checkpoint_bytes, new_learner
from policy.atomic import CheckpointError
from policy.checkpoint import read_config
from policy.config import PolicyConfig
from policy.deepseek import DeepseekPolicy
from policy.dense import DensePolicy
from policy.dense_config import DenseConfig
from policy.interface import Policy
from policy.parallel import ParallelismError, materialise, parallelize
from policy.sharded_checkpoint import load_sharded, save_sharded
from policy.sharding import gathered_weights
from rollout.cluster import Rank, RankError, RankGroup
from rollout.engine import Completion
from rollout.errors import UserError
from rollout.sync_diagnosis import Gap
from rollout.weights import PolicySource, policy_of

LEARNER_FOLDER = "learner"
# What the loop and the user are to see as it is, whichever process raised it.
OWN_ERRORS = (NonFiniteLossError, CheckpointError, ParallelismError, UserError)


def join(config: LearnerConfig, rank: Rank) -> None:
    """Make this process one of the learner's ranks: gloo, and NCCL with a GPU each where there are GPUs."""
    torch.set_num_threads(config.num_threads)
    backend = "gloo"
    if torch.cuda.is_available():
        if rank.count > torch.cuda.device_count():
            raise UserError(
                f"learner.num_ranks={rank.count} exceeds this machine's {torch.cuda.device_count()} GPUs: each rank "
                "needs one of its own"
            )
        torch.cuda.set_device(rank.index)
        backend = "cpu:gloo,cuda:nccl"
    place: dict[str, Any] = {"init_method": rank.rendezvous} if rank.count > 1 else {"store": dist.HashStore()}
    limit = timedelta(seconds=config.step_timeout_s)
    dist.init_process_group(backend, rank=rank.index, world_size=rank.count, timeout=limit, **place)


def spread_policy(config: LearnerConfig, weights_dir: Path) -> Policy:
    """The policy of a checkpoint, spread over the process group; each rank reads its own rows from the files."""
    shape = read_config(weights_dir)
    with torch.device("meta"):
        model: Any = DeepseekPolicy(shape) if isinstance(shape, PolicyConfig) else DensePolicy(shape)
    parallelize(model, expert_parallel=config.expert_parallel, precision=getattr(torch, config.dtype))
    materialise(model, "cuda" if torch.cuda.is_available() else "cpu")
    load_sharded(model, weights_dir)
    return model


class RankLearner:
    """A learner that is one of several, all of which take every call together."""

    def __init__(self, config: TrainConfig, weights_dir: Path, bad_batch_path: Path, rank: Rank) -> None:
        join(config.learner, rank)
        try:
            self.learner = new_learner(config, spread_policy(config.learner, weights_dir), bad_batch_path)
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
        with _own_errors():
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
        with _own_errors():
            return self.group.call(doing, self.timeout_s, method, *arguments)[0]


@contextmanager
def _own_errors() -> Iterator[None]:
    try:
        yield
    except RankError as error:
        if isinstance(error.cause, OWN_ERRORS):
            raise error.cause from error
        raise
