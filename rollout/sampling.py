"""From tasks to scored groups: rendering, sampling and scoring, for training and for evaluation alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rollout.engine import Completion, Engine, SamplingParams
from rollout.errors import UserError
from rollout.records import Group, Sample, Task, seed_for
from rollout.tasks import TaskSource
from rollout.templates import render
from verifiers.pool import ScorePool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompter:
    """Turns tasks into prompt text and ids, and refuses a prompt that leaves no room for `max_completion_tokens`."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    max_model_len: int
    max_completion_tokens: int

    def text(self, task: Task) -> str:
        """The prompt's text."""

        def chat(messages: Sequence) -> str:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))

        return render(self.template, task, chat_template=chat if self.tokenizer.chat_template else None)

    def ids(self, task: Task) -> tuple[int, ...]:
        """The prompt's token ids; UserError names the task and the lengths if they don't fit the context."""
        ids = tuple(self.tokenizer(self.text(task), add_special_tokens=False)["input_ids"])
        if len(ids) + self.max_completion_tokens > self.max_model_len:
            raise UserError(
                f"the prompt of task {task.task_id} has {len(ids)} tokens; with sampling.max_completion_tokens="
                f"{self.max_completion_tokens} it does not fit engine.max_model_len={self.max_model_len}. Raise "
                "engine.max_model_len, lower sampling.max_completion_tokens, or drop the row."
            )
        return ids

    def decode(self, completion_ids: Sequence[int]) -> str:
        """A completion's text without end and pad tokens; ids beyond the tokenizer's vocabulary become U+FFFD."""
        skip = (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        known = len(self.tokenizer)
        parts: list[str] = []
        run: list[int] = []
        for token in completion_ids:
            if token < known:
                run += [] if token in skip else [token]
            else:
                parts += [self._plain(run), "\ufffd"]
                run = []
        return "".join([*parts, self._plain(run)])

    def _plain(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False)) if ids else ""


def sample_groups(
    engine: Engine,
    prompter: Prompter,
    tasks: Sequence[Task],
    params: SamplingParams,
    group_size: int,
    seed_of: Callable[[str, int], int],
) -> list[Group]:
    """`group_size` samples for each task, unscored; `seed_of(task_id, sample_index)` seeds each."""
    prompts = [prompter.ids(task) for task in tasks]
    completions = engine.generate(
        [prompt for prompt in prompts for _ in range(group_size)],
        params,
        [seed_of(task.task_id, index) for task in tasks for index in range(group_size)],
    )
    groups = []
    for number, (task, prompt) in enumerate(zip(tasks, prompts, strict=True)):
        own = completions[number * group_size : (number + 1) * group_size]
        samples = tuple(_sample(prompter, task, index, prompt, completion) for index, completion in enumerate(own))
        groups.append(Group(task=task, samples=samples))
    return groups


def _sample(prompter: Prompter, task: Task, index: int, prompt: tuple[int, ...], completion: Completion) -> Sample:
    return Sample(
        task_id=task.task_id,
        sample_index=index,
        prompt_ids=prompt,
        completion_ids=tuple(completion.token_ids),
        rollout_logprobs=np.asarray(completion.logprobs, dtype=np.float32),
        policy_versions=(completion.policy_version, completion.policy_version),
        finish_reason=completion.finish_reason,
        completion_text=prompter.decode(completion.token_ids),
        routed_experts=completion.routed_experts,
        num_draft_tokens=completion.num_draft_tokens,
        num_accepted_tokens=completion.num_accepted_tokens,
    )


def score_groups(pool: ScorePool, groups: Sequence[Group]) -> list[Group]:
    """The groups with a verdict on every sample, scored in the pool's processes."""
    samples = [(group, sample) for group in groups for sample in group.samples]
    tasks = [_with_length(group.task, sample) for group, sample in samples]
    verdicts = iter(pool.score([sample.completion_text for _, sample in samples], tasks))
    return [
        replace(group, samples=tuple(replace(sample, verdict=next(verdicts)) for sample in group.samples))
        for group in groups
    ]


def _with_length(task: Task, sample: Sample) -> Task:
    """The task with the completion's length in tokens for its verifiers, as metadata `num_tokens`."""
    return replace(task, metadata={**task.metadata, "num_tokens": len(sample.completion_ids)})


class GroupStream:
    """Scored groups of a training run, one step at a time; what a step gets depends on `seed`, step and weights only."""

    def __init__(
        self,
        engine: Engine,
        source: TaskSource,
        prompter: Prompter,
        pool: ScorePool,
        params: SamplingParams,
        group_size: int,
        seed: int,
    ) -> None:
        self.engine, self.source, self.prompter, self.pool = engine, source, prompter, pool
        self.params, self.group_size, self.seed = params, group_size, seed
        self.seconds_sampling = 0.0
        self.seconds_scoring = 0.0

    def next_groups(self, step: int, num_prompts: int) -> list[Group]:
        """The step's groups, sampled with the engine's present weights and scored; times are left in `seconds_*`."""
        start = time.monotonic()
        tasks = self.source.for_step(self.seed, step, num_prompts)
        groups = sample_groups(
            self.engine,
            self.prompter,
            tasks,
            self.params,
            self.group_size,
            lambda task_id, index: seed_for(self.seed, step, task_id, index),
        )
        sampled = time.monotonic()
        groups = score_groups(self.pool, groups)
        self.seconds_sampling = sampled - start
        self.seconds_scoring = time.monotonic() - sampled
        return groups
