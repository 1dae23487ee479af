"""One `groupzero train` in a forked process that logs what it samples and can kill itself at a chosen write."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import scripts.train_command as commands
from rollout.journal import Call, RolloutJournal
from rollout.records import Group
from rollout.torch_engine import TorchEngine


def train(config: Path, overrides: Sequence[str], log: Path, die_at_write: int | None) -> None:
    """Run to the end, or to the `die_at_write`-th time that something is put on disk; never returns."""
    output = os.open(log.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    _log_sampling(log)
    if die_at_write is not None:
        _die_at(die_at_write)
    commands.run_train(config, overrides, resume=False)
    os._exit(0)


def _log_sampling(log: Path) -> None:
    """Append `sampled KEY` when a call of the engine begins, `kept KEY` once its groups are in the journal."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    note = os.write  # the real one, whatever is put in its place below
    generate, write = TorchEngine.generate, RolloutJournal.write_samples

    def key(prompts: Sequence[Sequence[int]]) -> str:
        return hashlib.sha256(repr([list(prompt) for prompt in prompts]).encode()).hexdigest()[:16]

    def logged_generate(self: TorchEngine, prompts: Any, params: Any, seeds: Any) -> Any:
        note(descriptor, f"sampled {key(prompts)}\n".encode())
        return generate(self, prompts, params, seeds)

    def logged_write(self: RolloutJournal, call: Call, groups: Sequence[Group]) -> None:
        write(self, call, groups)
        note(descriptor, f"kept {key([s.prompt_ids for group in groups for s in group.samples])}\n".encode())

    TorchEngine.generate = logged_generate
    RolloutJournal.write_samples = logged_write


def _die_at(count: int) -> None:
    """SIGKILL at the `count`-th call of a function that changes the disk: before it, after it, or in the midst of it."""
    calls = 0

    def dying(function: Callable[..., Any], *, torn: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != count:
                return function(*arguments, **options)
            try:
                if torn:
                    descriptor, data = arguments
                    return function(descriptor, bytes(data)[: len(data) // 2])
                return function(*arguments, **options) if count % 2 else None
            finally:
                os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in ("replace", "rename", "fsync", "unlink", "mkdir", "rmdir", "write"):
        setattr(os, name, dying(getattr(os, name), torn=name == "write"))
