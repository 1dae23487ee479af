"""Verifiers that misbehave, named in configs by the end-to-end tests."""

from __future__ import annotations

from rollout.arithmetic import is_heldout
from verifiers.verdict import TaskLike


def fails_now_and_then(completion: str, task: TaskLike) -> float:
    """Raises on about one completion in six, by its text."""
    if sum(completion.encode()) % 6 == 0:
        raise ValueError("this completion is more than I can take")
    return float(sum(completion.encode()) % 2)


def always_the_same(completion: str, task: TaskLike) -> float:
    """Gives everything half a point."""
    return 0.5


def fails_in_training(completion: str, task: TaskLike) -> float:
    """Raises on every training problem and on none that is held out."""
    if not is_heldout(task.prompt):
        raise ValueError("no completion is good enough")
    return 0.0


def always_fails(completion: str, task: TaskLike) -> float:
    """Raises on everything."""
    raise ValueError("no completion is good enough")
