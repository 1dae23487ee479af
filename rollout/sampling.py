"""From tasks to scored groups: rendering, sampling and scoring, for training and for evaluation alike."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from rollout.engine import Completion, Engine, SamplingParams
from rollout.errors import UserError
from rollout.journal import Call, RolloutJournal
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
        sampling_mask=completion.sampling_mask,
        num_draft_tokens=completion.num_draft_tokens,
        num_accepted_tokens=completion.num_accepted_tokens,
    )


def score_groups(pool: ScorePool, groups: Sequence[Group]) -> list[Group]:
    """The groups with a verdict on every sample, scored in the pool's processes; a verdict that is there stays."""
    waiting = [(group, sample) for group in groups for sample in group.samples if sample.verdict is None]
    tasks = [_with_length(group.task, sample) for group, sample in waiting]
    verdicts = iter(pool.score([sample.completion_text for _, sample in waiting], tasks))
    return [
        replace(
            group,
            samples=tuple(replace(s, verdict=next(verdicts)) if s.verdict is None else s for s in group.samples),
        )
        for group in groups
    ]


def _with_length(task: Task, sample: Sample) -> Task:
    """The task with the completion's length in tokens for its verifiers, as metadata `num_tokens`."""
    return replace(task, metadata={**task.metadata, "num_tokens": len(sample.completion_ids)})


@dataclass(frozen=True, kw_only=True)
class StepRollout:
    """All scored groups of one training step, in the order of their draws and tasks.

    `groups` are those to learn from; `uninformative` were sampled too, but tell nothing or are beyond num_prompts.
    `num_reused` samples came from the journal. `seconds_scoring` is the wall time spent waiting for verdicts alone:
    scoring while the next call samples costs none.
    """

    groups: list[Group]
    uninformative: list[Group]
    first_draw: int
    num_draws: int
    num_reused: int
    seconds_sampling: float
    seconds_scoring: float


class GroupStream:
    """Scored groups of a training run, one step at a time; what a step gets depends on seed, draw and weights only.

    A draw is one block of `num_prompts` tasks, `source.for_step(seed, draw, num_prompts)`, sampled in calls of
    `num_prompts_per_call` prompts (default: all) with the sampling parameters `params_at(step)`. A call is scored in a
    thread while the next one samples, and with a `journal` it is on disk as soon as it is sampled.

    Without `is_informative` a step is the draw of its own number. With it, calls go on until `num_prompts` scored groups
    are informative or `max_draws` draws are used up: never a call more than that needs, however long scoring takes. A
    budget that ends early leaves fewer groups, possibly none. The next step begins with the next draw.
    """

    def __init__(
        self,
        engine: Engine,
        source: TaskSource,
        prompter: Prompter,
        pool: ScorePool,
        params_at: Callable[[int], SamplingParams],
        *,
        num_prompts: int,
        group_size: int,
        seed: int,
        num_prompts_per_call: int | None = None,
        journal: RolloutJournal | None = None,
        is_informative: Callable[[Group], bool] | None = None,
        max_draws: int = 1,
    ) -> None:
        self.engine, self.source, self.prompter, self.pool = engine, source, prompter, pool
        self.params_at, self.num_prompts, self.group_size, self.seed = params_at, num_prompts, group_size, seed
        self.num_prompts_per_call = num_prompts_per_call or num_prompts
        self.journal = journal
        self.is_informative = is_informative
        self.max_draws = 1 if is_informative is None else max_draws
        self.next_draw = 0
        self._begun: tuple[int, int] | None = None  # the last step and its first draw

    def state_dict(self, step: int) -> dict[str, int]:
        """What a stream needs to begin with `step`: the next one, or the last one once more."""
        return {"next_draw": self._first_draw(step)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a `state_dict`."""
        self.next_draw, self._begun = int(state["next_draw"]), None

    def _first_draw(self, step: int) -> int:
        if self.is_informative is None:
            return step
        return self._begun[1] if self._begun is not None and self._begun[0] == step else self.next_draw

    def next_groups(self, step: int) -> StepRollout:
        """The step's groups, sampled with the engine's present weights and scored.

        The same step again takes the same draws, also after an error.
        """
        start = time.monotonic()
        first_draw = self._first_draw(step)
        num_reused, last_draw = 0, first_draw
        with _scoring_thread() as executor:
            scored = _ScoredGroups(self.is_informative, self.num_prompts)
            for call, tasks in self._calls(first_draw, self.params_at(step)):
                if not scored.needs_more():
                    break
                last_draw = call.draw
                groups = self.journal.read(call, tasks) if self.journal else None
                if groups is None:
                    groups = self._sample(call, tasks)
                else:
                    num_reused += sum(len(group.samples) for group in groups)
                scored.expect(len(groups), executor.submit(self._score, call, groups))
            scored.wait_for_all()
        self.next_draw, self._begun = last_draw + 1, (step, first_draw)
        groups, uninformative = scored.split()
        return StepRollout(
            groups=groups,
            uninformative=uninformative,
            first_draw=first_draw,
            num_draws=self.next_draw - first_draw,
            num_reused=num_reused,
            seconds_sampling=time.monotonic() - start - scored.seconds_waiting,
            seconds_scoring=scored.seconds_waiting,
        )

    def _calls(self, first_draw: int, params: SamplingParams) -> Iterator[tuple[Call, list[Task]]]:
        size, version = self.num_prompts_per_call, self.engine.policy_version
        for draw in range(first_draw, first_draw + self.max_draws):
            tasks = self.source.for_step(self.seed, draw, self.num_prompts)
            for number, begin in enumerate(range(0, self.num_prompts, size)):
                yield (
                    Call(
                        draw, number, seed=self.seed, group_size=self.group_size, params=params, policy_version=version
                    ),
                    tasks[begin : begin + size],
                )

    def _sample(self, call: Call, tasks: Sequence[Task]) -> list[Group]:
        groups = sample_groups(
            self.engine,
            self.prompter,
            tasks,
            call.params,
            self.group_size,
            lambda task_id, index: seed_for(self.seed, call.draw, task_id, index),
        )
        if self.journal:
            self.journal.write_samples(call, groups)
        return groups

    def _score(self, call: Call, groups: list[Group]) -> list[Group]:
        """In the scoring thread: verdicts for what has none, kept in the journal."""
        if all(sample.verdict is not None for group in groups for sample in group.samples):
            return groups
        scored = score_groups(self.pool, groups)
        if self.journal:
            self.journal.write_verdicts(call, scored)
        return scored


@dataclass
class _ScoredGroups:
    """The groups of a step as they come back from scoring, in order, and those still on their way."""

    is_informative: Callable[[Group], bool] | None
    num_wanted: int
    groups: list[Group] = field(default_factory=list)
    informative: list[bool] = field(default_factory=list)
    seconds_waiting: float = 0.0
    _expected: deque[tuple[int, Future[list[Group]]]] = field(default_factory=deque)

    def expect(self, num_groups: int, scoring: Future[list[Group]]) -> None:
        """A call's groups are being scored."""
        self._expected.append((num_groups, scoring))

    def needs_more(self) -> bool:
        """Whether another call is needed; waits only where what is still being scored decides it.

        So the answer is the same as if every call were waited for. Raises what failed in the scoring thread.
        """
        while self._expected:
            on_their_way = sum(num_groups for num_groups, _ in self._expected)
            if sum(self.informative) + on_their_way < self.num_wanted and not self._expected[0][1].done():
                return True
            self._take()
        return sum(self.informative) < self.num_wanted

    def wait_for_all(self) -> None:
        """Take in everything that is expected."""
        while self._expected:
            self._take()

    def split(self) -> tuple[list[Group], list[Group]]:
        """(the first `num_wanted` informative groups, all others)."""
        places = [place for place, informative in enumerate(self.informative) if informative][: self.num_wanted]
        chosen = set(places)
        others = [group for place, group in enumerate(self.groups) if place not in chosen]
        return [self.groups[place] for place in places], others

    def _take(self) -> None:
        start = time.monotonic()
        groups = self._expected.popleft()[1].result()
        self.seconds_waiting += time.monotonic() - start
        self.groups += groups
        self.informative += [self.is_informative is None or self.is_informative(group) for group in groups]


@contextmanager
def _scoring_thread() -> Iterator[ThreadPoolExecutor]:
    """One thread that scores call after call; where the block fails, what has not begun is not scored any more."""
    executor = ThreadPoolExecutor(1, thread_name_prefix="scoring")
    wait = True
    try:
        yield executor
    except KeyboardInterrupt:
        wait = False  # stopping at once: what is being scored ends with its pool
        raise
    finally:
        executor.shutdown(wait=wait, cancel_futures=True)
