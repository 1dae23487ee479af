"""Which traces each optimizer step learns from."""

from __future__ import annotations

from typing import Protocol

import torch

from distill.student_data import TokenStore
from distill.student_loss import StudentBatch
from rollout.epoch_order import EpochOrder
from rollout.errors import UserError


class Batches(Protocol):
    """The batches of a run; a step's may depend on the student's present weights, but not on how often it is asked."""

    num_steps: int

    def batch(self, step: int) -> StudentBatch:
        """What step `step` (from 0) learns from, in main memory; all sequences fit one micro-batch each."""
        ...


class TraceBatches:
    """`num_traces` of the stored rows a step, shuffled anew each epoch by the seed; after the last step each row was
    learned exactly `num_epochs` times, for the last step takes what is left."""

    def __init__(
        self,
        store: TokenStore,
        *,
        seed: int,
        num_traces: int,
        num_epochs: int,
        max_steps: int | None = None,
        loss_on_prompt: bool = False,
    ) -> None:
        if num_traces > len(store):
            raise UserError(f"num_traces={num_traces} exceeds the {len(store)} traces that there are to learn from")
        self._store, self._seed, self._num_traces, self._loss_on_prompt = store, seed, num_traces, loss_on_prompt
        self._total = num_epochs * len(store)
        self._order = EpochOrder(len(store), shuffle_seed=0)
        all_steps = -(-self._total // num_traces)
        self.num_steps = min(all_steps, max_steps or all_steps)

    def rows(self, step: int) -> list[int]:
        """The rows of a step."""
        left = self._total - step * self._num_traces
        return self._order.rows(self._seed, step, self._num_traces)[:left]

    def batch(self, step: int) -> StudentBatch:
        """As `Batches.batch`."""
        rows = [self._store.row(index) for index in self.rows(step)]
        return StudentBatch.of(
            [torch.from_numpy(ids) for ids, _ in rows],
            [prompt for _, prompt in rows],
            loss_on_prompt=self._loss_on_prompt,
        )
