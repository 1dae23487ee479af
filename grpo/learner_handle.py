"""The learner as the loop sees it, in this process or spread over ranks: batches in, metrics, weights and checkpoints out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from grpo.batch import Batch
from grpo.config import TrainConfig
from grpo.learner import Learner
from policy.atomic import CheckpointError
from policy.checkpoint import hf_state_dict, load_policy, save_policy
from policy.config import PolicyConfig
from policy.dense_config import DenseConfig
from policy.interface import Policy
from rollout.weights import PolicySource, WeightSource, policy_of

LEARNER_STATE = "learner.pt"

WriteSnapshot = Callable[[Path], None]  # into an existing folder, its own alone


class LearnerHandle(WeightSource, Protocol):
    """What the loop asks of a learner, wherever it runs; `close` it at the end.

    `num_bytes` is about the size of a checkpoint. `can_write_in_background`: what `snapshot` returns may run in another
    thread while the learner goes on.
    """

    num_bytes: int
    can_write_in_background: bool

    @property
    def policy_config(self) -> PolicyConfig | DenseConfig:
        """The policy's config."""
        ...

    def fill(self, batch: Batch) -> Batch:
        """The batch with what the present policy and the reference say of it."""
        ...

    def step(self, batch: Batch | None, step: int) -> dict[str, float]:
        """Learn from one rollout batch, or from none; the metrics of `Learner.step`."""
        ...

    def snapshot(self, step: int) -> WriteSnapshot:
        """Writes the present state, of the time before `step`: the policy's checkpoint and the learner's own state."""
        ...

    def load_state(self, folder: Path) -> None:
        """Take up the learner's own state from a checkpoint; the weights were read from it at the start."""
        ...

    def close(self) -> None:
        """Free what the learner holds beside memory."""
        ...


def open_learner(config: TrainConfig, weights_dir: Path, *, bad_batch_path: Path, log_dir: Path) -> LearnerHandle:
    """The learner of `config` with the weights in `weights_dir`; ranks write what they print into `log_dir`."""
    if config.learner.placement == "in_process" and config.learner.dtype == "float32":
        return LocalLearner(new_learner(config, load_policy(weights_dir), bad_batch_path))
    from grpo.learner_ranks import LoneRank, RayLearner

    if config.learner.placement == "in_process":
        return LoneRank(config, weights_dir, bad_batch_path)
    return RayLearner(config, weights_dir, bad_batch_path, log_dir)


def new_learner(config: TrainConfig, model: Policy, bad_batch_path: Path) -> Learner:
    """The learner of `config` for a policy in this process, or for this process's share of one."""
    return Learner(
        model,
        config.learner,
        config.algorithm,
        temperature=config.sampling.temperature,
        seed=config.seed,
        bad_batch_path=bad_batch_path,
    )


class LocalLearner(PolicySource):
    """A learner in this process, with whole weights in memory."""

    can_write_in_background = True

    def __init__(self, learner: Learner) -> None:
        super().__init__(learner.model)
        self.learner = learner
        self.num_bytes = checkpoint_bytes(learner)

    @property
    def policy_config(self) -> PolicyConfig | DenseConfig:
        """The policy's config."""
        return self.model.config

    def fill(self, batch: Batch) -> Batch:
        """As `Learner.fill`."""
        return self.learner.fill(batch)

    def step(self, batch: Batch | None, step: int) -> dict[str, float]:
        """As `Learner.step`."""
        return self.learner.step(batch, step)

    def snapshot(self, step: int) -> WriteSnapshot:
        """Copies weights and state into main memory now, and writes the copies: save_policy's files and learner.pt."""
        model = policy_of(self.model.config, hf_state_dict(self.model))
        state = _copied(self.learner.state_dict())

        def write(folder: Path) -> None:
            save_policy(model, folder)
            torch.save({"learner": state}, folder / LEARNER_STATE)

        return write

    def load_state(self, folder: Path) -> None:
        """Take up learner.pt; CheckpointError where there is none."""
        path = folder / LEARNER_STATE
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no {LEARNER_STATE}: it was not written by a learner in one process. "
                "Set learner.placement and learner.dtype as they were."
            )
        self.learner.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["learner"])

    def close(self) -> None:
        """Nothing to free."""


def checkpoint_bytes(learner: Learner) -> int:
    """About the size of a checkpoint: weights, two moments and a reference if there is one, with a tenth to spare."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in learner.model.parameters())
    return int(1.1 * weights * (3 if learner.reference is None else 4))


def _copied(value: Any) -> Any:
    """Dicts, lists and tuples with copies of their tensors in main memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value
