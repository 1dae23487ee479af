"""Which rows of a finite dataset each step takes, from seed and step alone."""

from __future__ import annotations

import numpy as np

from rollout.errors import UserError


class EpochOrder:
    """Epochs that run on without a gap, each a new shuffle of all rows, such that no step takes a row twice."""

    def __init__(self, num_rows: int, shuffle_seed: int) -> None:
        self.num_rows, self.shuffle_seed = num_rows, shuffle_seed

    def rows(self, seed: int, step: int, num_prompts: int) -> list[int]:
        """Row numbers [num_prompts] of a step (from 0); UserError if there are fewer rows than that."""
        if not 1 <= num_prompts <= self.num_rows:
            raise UserError(
                f"num_prompts = {num_prompts} must be between 1 and the number of rows of the data, {self.num_rows}"
            )
        epoch, offset = divmod(step * num_prompts, self.num_rows)
        rows = self._epoch(seed, epoch, num_prompts)[offset : offset + num_prompts]
        if len(rows) < num_prompts:
            rows = np.concatenate([rows, self._epoch(seed, epoch + 1, num_prompts)[: num_prompts - len(rows)]])
        return rows.tolist()

    def _epoch(self, seed: int, epoch: int, num_prompts: int) -> np.ndarray:
        """All rows in this epoch's order; those that its first step has from the epoch before come behind that step."""

        def shared(e: int) -> int:
            return e * self.num_rows % num_prompts  # rows that the step across the start of e has from e - 1

        # The end of an epoch is as shuffled, unless it lies within the epoch's own first num_prompts rows: then that
        # epoch has to be ordered first. Only data of fewer than 2 * num_prompts rows needs it.
        first = epoch
        while shared(first) and self.num_rows - shared(first) < num_prompts:
            first -= 1
        order = self._shuffled(seed, first - 1) if shared(first) else np.empty(0, dtype=np.int64)
        for e in range(first, epoch + 1):
            taken = order[len(order) - shared(e) :]
            order = self._shuffled(seed, e)
            head, rest = order[:num_prompts], order[num_prompts:]
            repeated = np.isin(head, taken)
            order = np.concatenate([head[~repeated], head[repeated], rest])
        return order

    def _shuffled(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, self.shuffle_seed, epoch]).permutation(self.num_rows)
